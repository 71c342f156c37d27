"""Samples encoded ahead are those read live."""

import shutil

import pytest
import torch
from conftest import SPEC

import sd
from clips.encoded import EncodedClips
from clips.samples import SOURCES, LiveClips


def test_encoded_samples_are_the_vae_of_the_live_ones(encoded, lists, micro):
    """Caption, FPS and moments agree, for every source and every choice."""
    ahead, live, vae = EncodedClips(encoded), LiveClips(lists, SPEC), sd.load(micro).vae
    for source in SOURCES:
        assert ahead.count(source) == live.count(source)
        for u, v in ((0.0, 0.0), (0.3, 0.9), (0.99, 0.5)):
            one, two = (clips.sample(source, live.count(source) - 1, u, v) for clips in (ahead, live))
            assert (one.caption, one.fps, one.k) == (two.caption, two.fps, two.k)
            mean, logvar = vae.encode(two.data / 127.5 - 1)
            assert one.data.shape == (1 if source == "caption" else 4, 8, 4, 4)
            torch.testing.assert_close(one.data, torch.cat([mean, logvar], dim=1).half(), atol=2e-3, rtol=2e-3)
    chosen = {(s.fps, s.k) for u in (0.1, 0.6) for v in (0.1, 0.6) for s in [live.sample("video", 0, u, v)]}
    assert chosen == {(4, 0), (4, 1), (8, 0), (8, 1)}


def test_a_damaged_index_is_refused(encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "clips")
    index = tmp_path / "clips" / "index.jsonl"
    index.write_text(index.read_text().replace('"source": "label"', '"source": "lable"', 1))
    with pytest.raises(ValueError, match="index.jsonl is damaged"):
        EncodedClips(str(tmp_path / "clips"))
