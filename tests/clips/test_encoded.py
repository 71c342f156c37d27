"""Samples encoded ahead are those read live."""

import dataclasses
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ONE_THREAD, ROOT, SPEC
from safetensors.torch import load_file, save_file

import sd
from cli import is_ours
from clips.encode import encode
from clips.encoded import EncodedClips, index_of
from clips.samples import SOURCES, LiveClips, Spec


def test_encoded_samples_are_the_vae_of_the_live_ones(encoded, lists, micro):
    """Caption, FPS and moments agree, for every source and every choice."""
    ahead, live, vae = EncodedClips(encoded), LiveClips(lists, SPEC), sd.load(micro).vae
    for source in SOURCES:
        assert ahead.count(source) == live.count(source)
        for u, v, among in ((0.0, 0.0, ()), (0.3, 0.9, (4, 8)), (0.99, 0.5, ()), (0.6, 0.9, (8,)), (0.9, 0.1, (4,))):
            one, two = (clips.sample(source, live.count(source) - 1, u, v, among) for clips in (ahead, live))
            assert (one.caption, one.fps, one.k) == (two.caption, two.fps, two.k)
            assert source != "video" or not among or one.fps in among
            mean, logvar = vae.encode(two.data / 127.5 - 1)
            assert one.data.shape == (1 if source == "caption" else 4, 8, 4, 4)
            torch.testing.assert_close(one.data, torch.cat([mean, logvar], dim=1).half(), atol=2e-3, rtol=2e-3)
    chosen = {(s.fps, s.k) for u in (0.1, 0.6) for v in (0.1, 0.6) for s in [live.sample("video", 0, u, v)]}
    assert chosen == {(4, 0), (4, 1), (8, 0), (8, 1)}


# ---------------------------------------------------------------------------------------------------------------------
# Damage: each is one line that names the file


@pytest.fixture
def copy(encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "clips")
    return tmp_path / "clips"


def read_all(folder):
    clips = EncodedClips(str(folder))
    for source in SOURCES:
        for i in range(clips.count(source)):
            for line in clips.lines(source, i):
                clips.sample_of(line)


@pytest.mark.parametrize("old, new", [
    ('"source": "label"', '"source": "lable"'), ('"item": 3,', '"item": 2000,'), ('"item": 3,', '"item": "3",'),
    ('"row": 1,', '"row": -1,'), ('"row": 1,', '"row": 1000,'), ('"row": 1,', '"row": 1.5,'),
    ('"row": 1,', '"row": "1",'), ('"row": 1,', ""), ('"fps": 4,', '"fps": null,'),
    ('"caption": "', '"caption": ["'), ('"caption": "', '"caption": "\\ud800'),
    ('"skipped": []', '"skipped": [1]'), ('"skipped": []', '"skipped": [["a", 1]]'), ('"skipped": []', '"skipped": ['),
    ('"shard": "video-000000.safetensors"', '"shard": "../clips/video-000000.safetensors"'),
    ('"k": 0,', '"k": 0, "shard": "../clips/video-000000.safetensors",'),
    ('"k": 0,', '"k": 0, "shard": "nowhere.safetensors",'), ('"k": 0,', '"k": 0, "shard": "empty.safetensors",'),
    ('"k": 0,', '"k": ' + "[" * 100_000)], ids=itertools.count())
def test_a_damaged_index_is_refused(copy, old, new):
    index = copy / "index.jsonl"
    text = index.read_text()
    assert old in text
    index.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"^{copy}/[\w-]*.(jsonl|safetensors) is damaged: .*; remove the f") as told:
        read_all(copy)
    assert "\n" not in str(told.value) and is_ours(told.value)


def test_a_torn_index_is_refused(copy):
    index = copy / "index.jsonl"
    index.write_text(index.read_text()[:-30])
    with pytest.raises(ValueError, match="index.jsonl is damaged"):
        read_all(copy)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-100]), lambda path: path.write_bytes(b""), os.remove,
    lambda path: path.write_bytes(path.read_bytes().replace(b"moments", b"mements")),
    lambda path: path.write_bytes(path.read_bytes().replace(b'"F16"', b'"I16"')),
    lambda path: save_file({"moments": torch.zeros(40, 4, 8, 4, dtype=torch.float16)}, path),
    lambda path: save_file({"moments": torch.zeros(40, 3, 8, 4, 4)}, path),
    lambda path: save_file({"moments": torch.zeros(40, 4, 7, 4, 4)}, path),
    lambda path: save_file({"moments": torch.zeros(40, 4, 8, 4, 2)}, path),
    lambda path: (path.unlink(), os.mkfifo(path))], ids=itertools.count())
def test_a_damaged_shard_is_refused(copy, damage):
    damage(copy / "video-000000.safetensors")
    with pytest.raises(ValueError, match=f"^{copy}/video-000000.safetensors is damaged: .*; remove the") as told:
        read_all(copy)
    assert "\n" not in str(told.value) and is_ours(told.value)


@pytest.mark.parametrize("edit", [
    lambda s: [], lambda s: {}, lambda s: s | {"spec": []}, lambda s: s | {"spec": s["spec"] | {"frames": "4"}},
    lambda s: s | {"spec": s["spec"] | {"frames": 0}}, lambda s: s | {"spec": s["spec"] | {"fps_values": 8}},
    lambda s: s | {"spec": s["spec"] | {"fps_values": ["8"]}}, lambda s: s | {"spec": s["spec"] | {"starts": 0}},
    lambda s: s | {"spec": s["spec"] | {"more": 1}}, lambda s: s | {"text": 1}, lambda s: s | {"vae": None},
    lambda s: s | {"lists": {"sound": "x"}}, lambda s: s | {"lists": {"video": 1}}, lambda s: s | {"dtype": "float64"}],
    ids=itertools.count())
def test_damaged_settings_are_refused(copy, edit):
    settings = copy / "spec.json"
    settings.write_text(json.dumps(edit(json.loads(settings.read_text()))))
    with pytest.raises(ValueError, match=f"^{copy} is not a folder of encoded clips: ") as told:
        EncodedClips(str(copy))
    settings.write_text("{")
    with pytest.raises(ValueError, match="is not a folder of encoded clips: .*spec.json, line 1: not JSON"):
        EncodedClips(str(copy))
    assert is_ours(told.value)


# ---------------------------------------------------------------------------------------------------------------------
# Size, and folders of earlier versions


MEASURE = """
import resource, sys, time
from clips.encoded import EncodedClips
from data import Stream

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before, began = peak(), time.perf_counter()
clips = EncodedClips(sys.argv[1])
clips.data  # the hash that a run keeps
opened = time.perf_counter() - began
stream = Stream(clips, {"video": 1}, 6)
stream.batch(0)  # draws the order of an epoch
seconds = []
for n in range(1, 1001):
    began = time.perf_counter()
    assert stream.batch(n).context.shape[0] == 6
    seconds.append(time.perf_counter() - began)
print(clips.count("video"), opened, peak() - before, peak(), sorted(seconds)[500], sorted(seconds)[990])
"""


def many_clips(folder, count: int):
    """Write an encoded folder of `count` clips, all of whose shards are one file."""
    moments = torch.randn(32, 16, 8, 4, 4).half()
    save_file({"moments": moments, "context": torch.randn(32, 16, 32).half()}, folder / "one")
    save_file({"context": torch.randn(1, 16, 32).half()}, folder / "empty.safetensors")
    spec = dataclasses.asdict(Spec(16, 32, 32, fps_values=(8,)))
    (folder / "spec.json").write_text(json.dumps({"spec": spec, "lists": {"video": "clips.csv"}, "text": True,
                                                  "dtype": "torch.float16", "vae": "1"}))
    at, parts = 0, []
    with open(folder / "index.jsonl", "wb") as file:
        for n in range(0, count, 32):
            name = f"video-{n // 32:06d}.safetensors"
            os.link(folder / "one", folder / name)
            lines = b"".join(
                b'{"shard": "%s", "source": "video", "item": %d, "made": "%016x%016x", "path": "videos/%08d.mp4", '
                b'"fps": 8, "k": 0, "caption": "a clip of something that moves, number %d", "row": %d, "skipped": [], '
                b'"context": %d}\n' % (name.encode(), i, i + 1, i + 2, i, i, i % 32, i % 32)
                for i in range(n, min(n + 32, count)))
            parts.append(index_of(lines))
            parts[-1]["start"] += at
            at += file.write(lines)
    np.save(folder / "index.npy", np.concatenate([*(part[:-1] for part in parts), parts[-1][-1:]]))


@pytest.mark.slow
def test_a_million_clips_open_at_once_and_are_read_at_random(tmp_path):
    many_clips(tmp_path, 1_000_000)
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], cwd=ROOT, capture_output=True, text=True,
                          env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    count, opened, more, peak, usual, slow = map(float, done.stdout.split())
    print(f"{count:,.0f} clips: opened in {opened:.2f} s; {more:.0f} MiB more, {peak:.0f} in all; a batch of 6 takes "
          f"{1000 * usual:.1f} ms, one of a hundred {1000 * slow:.1f}")
    assert count == 1e6 and opened < 5 and more < 300 and slow < 0.02


def test_a_folder_of_an_earlier_version_is_read_and_an_update_makes_the_new_form_of_it(lists, micro, tmp_path):
    """It had a context with each sample, no index beside the lines and no lines in the shards. The VAE is not asked."""
    out, old, model = str(tmp_path / "new"), tmp_path / "old", sd.load(micro)
    spec = dataclasses.replace(SPEC, draws=1)
    encode(model, lists, out, spec, text=True)
    shutil.copytree(out, old)
    (old / "index.npy").unlink()
    lines = [json.loads(line) for line in (old / "index.jsonl").read_text().splitlines()]
    for path in old.glob("*0*.safetensors"):
        rows = [line["context"] for line in lines if line["shard"] == path.name]
        tensors = load_file(path)
        save_file({"moments": tensors["moments"], "context": tensors["context"][rows]}, path)
    for line in lines:
        del line["context"]
    (old / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert_same_samples(out, old)
    model.vae.encoder.register_forward_pre_hook(lambda *_: pytest.fail("the VAE was asked"))
    encode(model, lists, str(old), spec, text=True, update=True)
    assert_same_samples(out, old)
    shards = {path.name: set(load_file(path)) for path in old.glob("*0*.safetensors")}
    assert all(tensors == {"moments", "context", "lines"} for tensors in shards.values()) and len(shards) == 5
    assert load_file(old / "+video-000000.safetensors")["context"].shape[0] == 8


def assert_same_samples(one, two):
    one, two = (pickle.loads(pickle.dumps(EncodedClips(str(folder)))) for folder in (one, two))  # as workers get them
    for source in SOURCES:
        assert one.count(source) == two.count(source) > 0 and np.array_equal(one.made(source), two.made(source))
        for i in range(one.count(source)):
            a, b = (clips.sample(source, i, 0.7, 0.7) for clips in (one, two))
            assert (a.caption, a.fps, a.k) == (b.caption, b.fps, b.k)
            assert torch.equal(a.data, b.data) and torch.equal(a.context, b.context)
