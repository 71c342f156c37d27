"""Encoding ahead, as a function and as a command."""

import json
import os
import resource
import shutil
from dataclasses import replace
from glob import glob

import numpy as np
import pytest
from conftest import SPEC
from footage import Drawn, animation

import cli
import sd
from clips.encode import encode
from clips.encoded import EncodedClips
from clips.jobs import appending
from clips.lists import Items


def test_encode_refuses_to_overwrite(encoded, lists, micro):
    with pytest.raises(ValueError, match="is there already"):
        encode(sd.load(micro), lists, encoded, SPEC)


def test_an_interrupted_encoding_goes_on(encoded, lists, micro, tmp_path):
    """With a torn index and a lost shard the rest is kept, and what comes out is the same."""
    out, left = tmp_path / "clips", tmp_path / "clips.part"
    shutil.copytree(encoded, left)
    lines = (left / "index.jsonl").read_text().splitlines(keepends=True)
    (left / "index.jsonl").write_text("".join(lines[:150]) + lines[150][:40])
    (left / "caption-000000.safetensors").unlink()
    kept = (left / "video-000000.safetensors").stat().st_mtime_ns
    encode(sd.load(micro), lists, str(out), SPEC)
    assert (out / "index.jsonl").read_text().splitlines(keepends=True) == lines
    assert (out / "video-000000.safetensors").stat().st_mtime_ns == kept
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
    before = (left / "index.jsonl").read_text()
    with appending(str(left / "index.jsonl")):
        with pytest.raises(ValueError, match="index.jsonl is being written by another process"):
            encode(model, lists, str(out), SPEC)
    assert (left / "index.jsonl").read_text() == before and not out.exists()

    monkeypatch.setattr("clips.encode.os.makedirs", lambda path, exist_ok: out.mkdir())
    with pytest.raises(ValueError, match="clips is there already"):
        encode(model, lists, str(out), SPEC)
    assert (left / "index.jsonl").read_text() == before


@pytest.mark.parametrize("size, what", [(700, "caption-000000.safetensors"), (4000, "index.jsonl")])
def test_a_full_disk_is_told_and_the_same_command_goes_on(lists, world, micro, tmp_path, size, what):
    """Rehearsed with the limit of a file's size, which fails in the same places."""
    out, fresh, model, spec = str(tmp_path / "out"), str(tmp_path / "fresh"), sd.load(micro), SPEC
    lines = [json.loads(line) for line in open(lists["caption"], encoding="utf-8")]
    lines = [{**line, "path": os.path.join(world, line["path"])} for line in lines] + [lines[0]] * 40  # missing
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


def test_a_damaged_interrupted_encoding_is_told(encoded, lists, micro, tmp_path):
    shutil.copytree(encoded, tmp_path / "clips.part")
    (tmp_path / "clips.part" / "index.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="clips.part/index.jsonl is damaged: remove"):
        encode(sd.load(micro), lists, str(tmp_path / "clips"), SPEC)


def test_encode_refuses_torchrun(run, lists, micro, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("clips.encode", tmp_path / "o", "--ckpt", micro, "--caption", lists["caption"])
    assert done.returncode == 2 and "not with torchrun" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not os.listdir(tmp_path)


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
