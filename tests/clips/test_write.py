"""Videos, animations and contact sheets that are written."""

import json

import av
import numpy as np
import pytest
from PIL import Image

from clips.write import contact_sheet, playback_fps, write_video


@pytest.mark.parametrize("fps", [4, 8, 29.97, 60])
def test_mp4_decodes_with_its_rate_and_metadata(tmp_path, fps):
    video = np.zeros((6, 33, 47, 3), np.uint8)  # odd sides
    video[:, :, :, 0] = np.arange(6)[:, None, None] * 40
    path = tmp_path / "v.mp4"
    write_video(str(path), video, fps, {"prompt": "ein roter Kreis – ⚪", "seed": 3})
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert abs(float(stream.average_rate) - fps) < 0.01
        assert json.loads(file.metadata["comment"]) == {"prompt": "ein roter Kreis – ⚪", "seed": 3}
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
    assert decoded.shape == (6, 34, 48, 3)
    assert np.abs(decoded[:, :33, :47].astype(int) - video).mean() < 4


def test_gif_and_png(tmp_path):
    video = np.random.default_rng(0).integers(0, 255, (6, 16, 24, 3), dtype=np.uint8)
    video[:] = video[:, :1, :1]
    write_video(str(tmp_path / "v.gif"), video, 10, {"seed": 1})
    with Image.open(tmp_path / "v.gif") as gif:
        assert gif.n_frames == 6 and gif.info["duration"] == 100 and json.loads(gif.info["comment"]) == {"seed": 1}
        for t in range(6):
            gif.seek(t)
            assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - video[t]).max() <= 3
    for fps, hundredths in ((30, [3, 4, 3, 3, 4, 3]), (60, [2] * 6), (8, [12, 13, 13, 12, 12, 13])):
        write_video(str(tmp_path / "t.gif"), video, fps, {})
        with Image.open(tmp_path / "t.gif") as gif:
            assert [gif.info["duration"] for t in range(6) if gif.seek(t) is None] == [10 * n for n in hundredths]
    write_video(str(tmp_path / "v.png"), video, 10, {"seed": 1})
    with Image.open(tmp_path / "v.png") as png:
        assert json.loads(png.text["comment"]) == {"seed": 1}
        assert (np.asarray(png) == contact_sheet(video)).all()


def test_contact_sheet_reads_left_to_right():
    sheet = contact_sheet(np.arange(6)[:, None, None, None] * np.ones((6, 5, 7, 3), np.uint8), gap=0)
    assert sheet[::5, ::7, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_playback():
    assert [playback_fps(f) for f in (0, 1, 8, 29.97, 60, 120)] == [8, 1, 8, 29.97, 60, 8]
