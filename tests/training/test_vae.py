"""Training the autoencoder."""

import pytest
from footage import write_clip

from training.vae import frame_pool


def test_frames_for_a_vae_come_from_what_can_be_used(bad_lists, tmp_path, capsys):
    write_clip(tmp_path / "short.mp4", range(0, 100, 20))
    (tmp_path / "videos.jsonl").write_text('{"path": "short.mp4", "caption": "too short for four frames"}')
    pool = frame_pool({"caption": bad_lists["caption"]}, 8, (32, 32))
    assert pool.shape == (6, 3, 32, 32)
    assert capsys.readouterr().err.count("skipped caption") == 2
    with pytest.raises(ValueError, match="no frame of .*videos.jsonl can be used"):
        frame_pool({"video": str(tmp_path / "videos.jsonl")}, 8, (32, 32))
