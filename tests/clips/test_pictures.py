"""Pictures of one size: upright, square pixels, antialiased, and the part of them that was asked for."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from footage import HEIGHT, WIDTH, write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clips.decode import frames_at, opened
from clips.pictures import View, cover, crop, fit_frame, fit_image


def corners(n):
    """Red top left, green top right, blue bottom left, white bottom right."""
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    image[:32, :48], image[:32, 48:], image[32:, :48] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return image


def colors(pixels):
    """The names of the four corners of a tensor (3, H, W)."""
    named = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}
    return [named.get(tuple((pixels[:, y, x] > 127).int().tolist())) for y in (4, -5) for x in (4, -5)]


@pytest.mark.parametrize("rotation, expected", [
    (0, ["red", "green", "blue", "white"]),
    (90, ["green", "white", "red", "blue"]),  # counterclockwise
    (180, ["white", "blue", "green", "red"]),
    (-90, ["blue", "red", "white", "green"]),
])
def test_rotation_is_undone(tmp_path, rotation, expected):
    write_clip(tmp_path / "clip.mp4", range(0, 100, 20), rotation=rotation, pixels=corners)
    with opened(str(tmp_path / "clip.mp4")) as video:
        (frame,) = frames_at(video, [0.05])
        size = (48, 32) if rotation % 180 == 0 else (32, 48)
        assert colors(fit_frame(frame, video.aspect, *size, View())) == expected


def test_anamorphic_pixels(tmp_path):
    write_clip(tmp_path / "wide.mp4", range(0, 100, 20), aspect=Fraction(2, 1), pixels=corners)
    with opened(str(tmp_path / "wide.mp4")) as video:
        assert video.aspect == 2  # 96 x 64 pixels show 192 x 64: a square of it is the middle third
        (frame,) = frames_at(video, [0])
        pixels = fit_frame(frame, video.aspect, 64, 64, View())
        assert colors(pixels) == ["red", "green", "blue", "white"]
        assert (pixels[0, 2:30, :28] > 127).all() and (pixels[0, 2:30, 36:] < 127).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(9, 80), st.integers(9, 80), st.integers(1, 5), st.integers(1, 5), st.floats(0, 0.999),
       st.floats(0, 0.999), st.booleans())
def test_crop_gives_the_size_asked_for(height, width, w, h, left, top, mirror):
    size = cover(width, height, 8 * w, 8 * h)
    assert size[0] >= 8 * w and size[1] >= 8 * h and (size[0] == 8 * w or size[1] == 8 * h)
    out = crop(np.zeros((size[1], size[0], 3), np.uint8), 8 * w, 8 * h, View(left, top, mirror))
    assert out.shape == (3, 8 * h, 8 * w) and out.dtype == torch.uint8


def test_crop_takes_the_part_asked_for():
    pixels = np.arange(12)[None, :, None].repeat(3, 2).repeat(4, 0).astype(np.uint8)
    assert crop(pixels, 4, 4, View())[0, 0].tolist() == [4, 5, 6, 7]
    assert crop(pixels, 4, 4, View(left=0))[0, 0].tolist() == [0, 1, 2, 3]
    assert crop(pixels, 4, 4, View(left=0.999, mirror=True))[0, 0].tolist() == [11, 10, 9, 8]


def test_resizing_is_antialiased(tmp_path):
    """A fine checkerboard becomes gray, in a video as in an image: sampling it would leave black and white."""
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    frame = av.VideoFrame.from_ndarray(board)
    Image.fromarray(board).save(tmp_path / "board.png")
    for pixels in (fit_frame(frame, 1, 32, 32, View()), fit_image(str(tmp_path / "board.png"), 32, 32, View())):
        assert (pixels[:, 4:-4, 4:-4].float() - 127.5).abs().max() < 12


def test_resizing_agrees_with_pillow():
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 255, (12, 20, 3), dtype=np.uint8)).resize((240, 144)))
    ours = fit_frame(av.VideoFrame.from_ndarray(smooth), 1, 80, 48, View()).permute(1, 2, 0).numpy()
    theirs = np.asarray(Image.fromarray(smooth).resize((80, 48), Image.BICUBIC))
    assert np.abs(ours.astype(int) - theirs).mean() < 1


def test_photographs_are_turned_as_their_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    Image.fromarray(corners(0)).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    assert colors(fit_image(str(tmp_path / "photo.jpg"), 32, 48, View())) == ["blue", "red", "white", "green"]
