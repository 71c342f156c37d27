"""Encoding ahead, as a function and as a command."""

import json
import os
import re
import resource
import shutil
import sys
import time
from dataclasses import replace
from glob import glob
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SPEC
from footage import Drawn, animation
from runs import LIMIT, Processes, few_labels
from safetensors.torch import load_file

import cli
import clips.changes
import clips.encode
import sd
from clips.encode import Job, encode
from clips.encoded import EncodedClips, lines_of
from clips.jobs import LOCK, held, sign
from clips.lists import Items
from clips.samples import SOURCES


def test_encode_refuses_to_overwrite(encoded, lists, micro):
    with pytest.raises(ValueError, match="is there already"):
        encode(sd.load(micro), lists, encoded, SPEC)


def test_an_interrupted_encoding_goes_on(encoded, lists, micro, tmp_path):
    """With a torn shard, a lost one, and half of one the rest is kept, and what comes out is the same."""
    out, left = tmp_path / "clips", tmp_path / "clips.part"
    shutil.copytree(encoded, left)
    (left / "caption-000000.safetensors").unlink()
    (left / "label-000001.safetensors.part").write_bytes(b"torn")
    torn = left / "label-000000.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    kept = (left / "video-000000.safetensors").stat().st_mtime_ns
    encode(sd.load(micro), lists, str(out), SPEC)
    assert (out / "video-000000.safetensors").stat().st_mtime_ns == kept
    assert sorted(os.listdir(out)) == sorted(os.listdir(encoded))
    for name in os.listdir(encoded):
        with open(os.path.join(encoded, name), "rb") as one, open(out / name, "rb") as two:
            assert one.read() == two.read(), name
    shutil.copytree(out, left)
    shutil.rmtree(out)
    with pytest.raises(ValueError, match="other settings"):
        encode(sd.load(micro), lists, str(out), replace(SPEC, frames=6))


def test_two_processes_do_not_write_one_folder(encoded, lists, micro, tmp_path, monkeypatch):
    """Whoever comes while another encodes is told, and changes nothing; so is who comes just as it ends."""
    out, left, model = tmp_path / "clips", tmp_path / "clips.part", sd.load(micro)
    shutil.copytree(encoded, left)
    before = content(left)
    with held(str(left)):
        with pytest.raises(ValueError, match="another job writes to .*clips.part: choose another folder"):
            encode(model, lists, str(out), SPEC)
    (left / LOCK).unlink()
    assert content(left) == before and not out.exists()

    monkeypatch.setattr("clips.encode.fingerprint", lambda _: out.mkdir(exist_ok=True) or "")
    with pytest.raises(ValueError, match="clips is there already"):
        encode(model, lists, str(out), SPEC)
    (left / LOCK).unlink()
    assert content(left) == before


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("size, what", [(700, "caption-000000.safetensors"), (20000, "index.jsonl")])
def test_a_full_disk_is_told_and_the_same_command_goes_on(lists, world, micro, tmp_path, size, what):
    """Rehearsed with the limit of a file's size, which fails in the same places."""
    out, fresh, model, spec = str(tmp_path / "out"), str(tmp_path / "fresh"), sd.load(micro), SPEC
    lines = [json.loads(line) for line in open(lists["caption"], encoding="utf-8")]
    lines = [{**line, "path": os.path.join(world, line["path"])} for line in lines] + [lines[0]] * 200  # missing
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lists = {"caption": str(tmp_path / "list.jsonl")}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        with pytest.raises(OSError, match=f"{out}.part/{what} cannot be written: .*File too large") as told:
            encode(model, lists, out, spec)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(told.value) and not os.path.exists(out) and not glob(f"{out}.part/*.part")
    encode(model, lists, out, spec)
    encode(model, lists, fresh, spec)
    for name in os.listdir(fresh):
        with open(os.path.join(fresh, name), "rb") as one, open(os.path.join(out, name), "rb") as two:
            assert one.read() == two.read(), name


def test_what_is_encoded_can_be_read_by_whom_the_umask_lets(encoded):
    modes = {os.stat(os.path.join(encoded, name)).st_mode & 0o777 for name in os.listdir(encoded)}
    assert modes == {0o666 & ~cli.UMASK}


def test_what_cannot_be_used_is_told(lists, micro, tmp_path, capsys):
    path = Items("video", lists["video"])[0].path
    (tmp_path / "list.csv").write_text(f"path,caption\n{path},a cat\nnowhere.mp4,a dog\nlost.mp4,a dog\n{path},\n")
    encode(sd.load(micro), {"video": str(tmp_path / "list.csv")}, str(tmp_path / "out"), SPEC)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert "3 samples cannot be used (2 x missing; 1 x no caption" in told and "clips.check" in told


def test_what_an_earlier_version_left_is_told(encoded, lists, micro, tmp_path):
    shutil.copytree(encoded, tmp_path / "clips.part")
    (tmp_path / "clips.part" / "index.npy").unlink()
    with pytest.raises(ValueError, match="clips.part was left by an earlier version: remove it"):
        encode(sd.load(micro), lists, str(tmp_path / "clips"), SPEC)


# ---------------------------------------------------------------------------------------------------------------------
# On several ranks


def in_small_shards(*arguments):
    """python -m clips.encode, with shards of two items. Of several ranks the first is slow, and must hold nobody up."""
    clips.encode.SHARD, clips.encode.PATIENCE, hashes = 2, 1, clips.encode.hashes
    if os.environ.get("RANK") == "0":
        clips.encode.hashes = lambda items, i: time.sleep(0.1) or hashes(items, i)
    sys.argv = ["clips/encode.py", *arguments]
    cli.run(clips.encode.main)


@pytest.fixture(scope="module")
def small(world, micro, tmp_path_factory):
    """Options that encode 18 items in nine shards with their contexts, and the folder that one process makes."""
    tmp = tmp_path_factory.mktemp("small")
    options = ["--ckpt", micro, "--video", f"{world}/videos.csv", "--caption", f"{world}/images.jsonl", "--label",
               str(few_labels(world, tmp, 2)), "--frames=4", "--size=32x32", "--fps=4,8", "--draws=2", "--text",
               "--dtype=float32"]
    started = Processes(tmp / "log")
    assert started.run([tmp / "one", *options], target=in_small_shards) == [0], started.log.read_text()
    return options, tmp / "one"


def assert_same(one, two):
    """Two folders have the same index and files, and numbers that agree within 1e-5."""
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))
    assert Path(one, "index.jsonl").read_text() == Path(two, "index.jsonl").read_text()
    for path in Path(one).glob("*.safetensors"):
        ours, theirs = load_file(path), load_file(Path(two, path.name))
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_ranks_that_are_killed_at_any_moment_lose_nothing(processes, small, tmp_path):
    """While a shard is written, before it is in place, when all are there, and between the last two renames: started
    again with another number of ranks, the folder is what one process makes. No shard is made twice."""
    options, one = small
    out, made = tmp_path / "out", {}
    deaths = [(2, (1, "SIGKILL", "sd.checkpoint.save_file", 2)), (3, (0, "SIGKILL", "os.replace", 4)),
              (2, (0, "SIGKILL", "numpy.save", 1))]
    for ranks, die in deaths:
        processes.start([out, *options], ranks, target=in_small_shards, die=die)
        processes.all[die[0]].join(LIMIT)  # and the others as by torchrun
        assert processes.all[die[0]].exitcode == -9, processes.log.read_text()
        processes.kill()
        now = {path.name: path.stat().st_ino for path in Path(f"{out}.part").glob("*0*.safetensors")}
        assert made.items() <= now.items() and not out.exists()
        made = now
    assert len(made) == 9
    assert processes.run([out, *options], ranks=2, target=in_small_shards) == [0, 0], processes.log.read_text()
    assert_same(one, out)
    assert {path.name: path.stat().st_ino for path in out.glob("*0*.safetensors")} == made
    assert sorted(os.listdir(tmp_path)) == ["log", "out"]


@pytest.mark.slow
def test_ranks_that_are_killed_ten_times_lose_nothing(processes, small, tmp_path):
    """After 0 to 4 s, one rank or all, on 1, 2 or 3 of them."""
    options, one = small
    rng, out = np.random.default_rng(0), tmp_path / "out"
    for n in range(10):
        ranks = int(rng.integers(1, 4))
        processes.start([out, *options], ranks, target=in_small_shards)
        time.sleep(rng.uniform(0.5, 4))
        if n % 2:
            processes.all[int(rng.integers(ranks))].kill()
            time.sleep(0.5)  # until torchrun has seen it
        processes.kill()
        if out.exists():
            assert_same(one, out)
            shutil.rmtree(out)
    assert processes.run([out, *options], ranks=3, target=in_small_shards) == [0, 0, 0], processes.log.read_text()
    assert_same(one, out)


def test_a_rank_on_a_machine_that_sees_other_files_is_told(processes, small, tmp_path, monkeypatch):
    """Rehearsed with a rank for which the folder, or a file of the list, lies elsewhere."""
    options, _ = small
    for what, says in (("folder", "does not see .*out.elsewhere.part of rank 0: all machines must share its disk"),
                       ("files", "does not see .*.mp4 as rank 0 does: all machines must share the lists")):
        processes.start([what, tmp_path / "out", *options], 2, target=elsewhere)
        processes.all[1].join(LIMIT)
        assert processes.kill()[1] == 2 and re.search(says, processes.log.read_text()), processes.log.read_text()
        assert not (tmp_path / "out").exists()


def elsewhere(what: str, *arguments):
    if os.environ["RANK"] == "1" and what == "folder":
        clips.encode.Job.part = property(lambda self: f"{self.out}.elsewhere.part", lambda self, _: None)
    if os.environ["RANK"] == "1" and what == "files":
        clips.changes.size_and_time = lambda path: None
    in_small_shards(*arguments)


def test_a_folder_that_another_job_has_taken_is_left_to_it(lists, micro, tmp_path):
    """As where a network drive has no locks: what this job would write is told, and not written."""
    job = Job(sd.load(micro), lists, str(tmp_path / "out"), SPEC, False, torch.float16, False)
    with held(job.part) as lock:
        job.join_in(*job.begin(lock))
        sign(lock)
        with pytest.raises(ValueError, match="out.part on .* is held by another job"):
            job.write(("video-000000.safetensors", [], {}))
    assert not glob(f"{job.part}/video*")


def test_shards_may_lie_on_another_disk(small, tmp_path):
    """Where one gets full: what is finished is moved and linked, and the same command goes on."""
    options, one = small
    part, disk = tmp_path / "out.part", tmp_path / "disk"
    shutil.copytree(one, part)
    (part / "video-000001.safetensors").unlink()
    disk.mkdir()
    for path in part.glob("label-*"):
        shutil.move(path, disk)
        path.symlink_to(disk / path.name)
    started = Processes(tmp_path / "log")
    assert started.run([tmp_path / "out", *options], target=in_small_shards) == [0], started.log.read_text()
    assert_same(one, tmp_path / "out")
    assert (tmp_path / "out" / "label-000000.safetensors").is_symlink()
    assert EncodedClips(str(tmp_path / "out")).sample("label", 0, 0, 0).fps == 0


def test_a_context_is_stored_once_a_caption(small):
    """And each sample has its own, however many share it."""
    _, one = small
    ahead, tower = EncodedClips(str(one)), sd.load(small[0][1]).text
    stored = 0
    for path in one.glob("*0*.safetensors"):
        lines = [json.loads(line) for line in lines_of(str(path)).splitlines()]
        stored += (count := len(load_file(path)["context"]))
        assert count == len({line["caption"] for line in lines}) < len(lines) or path.name.startswith("caption")
    assert stored < sum(1 for _ in open(one / "index.jsonl"))
    for source in SOURCES:
        for i in range(ahead.count(source)):
            sample = ahead.sample(source, i, 0.9, 0.9)
            torch.testing.assert_close(sample.context, tower.encode([sample.caption])[0], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_encode_command(run, lists, micro, tmp_path):
    done = run("clips.encode", tmp_path / "o", "--ckpt", micro, "--caption", lists["caption"], "--size", "32x32",
               "--frames", 4)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "o" / "index.jsonl").read_text().splitlines()) == 8
    done = run("clips.encode", tmp_path / "p", "--ckpt", micro)
    assert done.returncode == 2 and "nothing to encode" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run("clips.encode", "/dev/null/out", "--ckpt", micro, "--caption", lists["caption"], "--size", "32x32")
    assert done.returncode == 2 and done.stderr == "clips.encode: /dev/null/out.part: Not a directory\n"
    assert os.listdir(tmp_path) == ["o"]


@pytest.mark.parametrize("options, says", [
    (["--frames", "7"], "frames must make a grid, got 7"), (["--size", "60x64"], "width must be divisible by 8"),
    (["--fps", "0"], "fps must be in 1..60, got 0"), (["--draws", "0"], "draws must be in 1..1000, got 0"),
    (["--starts", "9999999999"], "starts must be in 1..1000, got 9999999999"),
    (["--device", "cpu:4"], "device cpu:4 is not here"), (["--seed", "-1"], "seed must be >= 0, got -1"),
    (["--ckpt", ""], "ckpt must be given"), (["--video", "nowhere.csv", "--size", "32x32"], "nowhere.csv")])
def test_encode_says_mistakes_in_one_line(world, micro, tmp_path, run, options, says):
    done = run("clips.encode", tmp_path / "out", "--ckpt", micro, "--label", f"{world}/labels", *options)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not os.listdir(tmp_path)


def test_stickers_are_encoded_and_their_changes_noticed(run, micro, tmp_path):
    """Animated pictures are clips; a caption that is a name changes with the name."""
    frames = [Drawn(np.full((32, 32, 4), (30 * n, 0, 0, 200), np.uint8)) for n in range(8)]
    (tmp_path / "set").mkdir()
    for kind in ("gif", "png", "webp"):
        (tmp_path / "set" / f"a_{kind}.{kind}").write_bytes(animation(kind, 32, 32, frames))
    options = ["--frames", 4, "--size", "32x32", "--fps", "8", "--background", "black", "--captions", "from_names"]
    encoded = ["clips.encode", tmp_path / "o", "--ckpt", micro, "--video", tmp_path / "set"]
    done = run(*encoded, *options)
    assert done.returncode == 0, done.stderr
    clips = EncodedClips(str(tmp_path / "o"))
    assert [clips.sample("video", i, 0, 0).caption for i in range(3)] == ["a gif", "a png", "a webp"]
    assert (clips.spec.background, clips.spec.captions) == ("black", "from_names")
    assert "nothing has changed" in run(*encoded, "--update").stdout
    os.rename(tmp_path / "set" / "a_webp.webp", tmp_path / "set" / "a_wave.webp")
    done = run(*encoded, "--update")
    assert "1 of 3 items changed since they were encoded (1 captions, 1 files)" in done.stdout, done
    assert EncodedClips(str(tmp_path / "o")).sample("video", 2, 0, 0).caption == "a wave"
    done = run(*encoded, *options, "--background", "red")
    assert done.returncode == 2 and "was encoded with background = black, not red" in done.stderr
    done = run("clips.encode", tmp_path / "p", *encoded[2:], *options, "--background", "reddish")
    assert done.returncode == 2 and "background must be a color, like white" in done.stderr


def test_a_list_that_is_not_there_is_told_before_a_model_is_loaded(tmp_path, run):
    done = run("clips.encode", tmp_path / "out", "--ckpt", tmp_path / "no-model", "--video", tmp_path / "nope.csv")
    assert done.returncode == 2 and "nope.csv: No such file or directory" in done.stderr
