"""Samples encoded ahead are those read live."""

import itertools
import json
import os
import shutil

import pytest
import torch
from conftest import SPEC
from safetensors.torch import save_file

import sd
from cli import is_ours
from clips.encoded import EncodedClips
from clips.samples import SOURCES, LiveClips


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
