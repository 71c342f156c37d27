"""Pictures of one size: upright, square pixels, antialiased, and the part of them that was asked for."""

import os
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from footage import HEIGHT, WIDTH, write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clips.decode import Bad, frames_at, opened
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


# ---------------------------------------------------------------------------------------------------------------------
# What a viewer shows


def shown(path, width, height):
    """uint8 (height, width, 3) of an image file."""
    return fit_image(str(path), width, height, View()).permute(1, 2, 0).numpy()


def over_white(colors, alpha):
    """Colors (H, W, 3 or 1) in 0..255 with alpha (H, W) in 0..255, on white: what a viewer shows, in floats."""
    return 255 - (255 - colors.astype(float)) * alpha[..., None] / 255 * np.ones(3)


def deep(a):
    return a[..., 0].astype(np.uint16) * 256 + a[..., 1]


def indexed(a, transparency=None):
    """An image in the palette that the bytes of `a` make, and its palette in RGB (256, 3)."""
    palette = np.random.default_rng(a.sum()).integers(0, 256, (256, 3), np.uint8)
    image = Image.fromarray(a[..., 0].copy(), "P")
    image.putpalette(palette.tobytes())
    if transparency is not None:
        image.info["transparency"] = transparency
    return image, palette[a[..., 0]]


ALPHAS, OPAQUE = np.arange(256, dtype=np.uint8)[::-1].copy(), np.full(256, 255, np.uint8)
MODES = {  # random bytes (H, W, 4) -> an image, and what a viewer shows of it: by formula, without Pillow
    "1": lambda a: (Image.fromarray(a[..., 0] > 127), over_white((a[..., :1] > 127) * 255, a[..., 3] * 0 + 255)),
    "L": lambda a: (Image.fromarray(a[..., 0].copy()), over_white(a[..., :1], a[..., 3] * 0 + 255)),
    "I;16": lambda a: (Image.fromarray(deep(a)), over_white(deep(a)[..., None] / 257, a[..., 3] * 0 + 255)),
    "LA": lambda a: (Image.fromarray(a[..., [0, 3]].copy()), over_white(a[..., :1], a[..., 3])),
    "RGB": lambda a: (Image.fromarray(a[..., :3].copy()), over_white(a[..., :3], a[..., 3] * 0 + 255)),
    "RGBA": lambda a: (Image.fromarray(a.copy()), over_white(a[..., :3], a[..., 3])),
    "CMYK": lambda a: (Image.fromarray(a.copy(), "CMYK"), (255.0 - a[..., :3]) * (255 - a[..., 3:]) / 255),
    "P": lambda a: (indexed(a)[0], over_white(indexed(a)[1], a[..., 3] * 0 + 255)),
    "P, one clear": lambda a: (indexed(a, 7)[0], over_white(indexed(a)[1], (a[..., 0] != 7) * 255)),
    "P, alphas": lambda a: (indexed(a, ALPHAS.tobytes())[0], over_white(indexed(a)[1], ALPHAS[a[..., 0]])),
}
ENDINGS = {
    "png": ("1", "L", "I;16", "LA", "RGB", "RGBA", "P", "P, one clear", "P, alphas"),
    "tif": ("1", "L", "I;16", "LA", "RGB", "RGBA", "CMYK", "P"),
    "gif": ("L", "P", "P, one clear"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("1", "L", "RGB", "P"),
    "jp2": ("L", "LA", "RGB", "RGBA"),
}
KINDS = [(ending, mode) for ending, modes in ENDINGS.items() for mode in modes]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(KINDS), st.integers(4, 24), st.integers(4, 24), st.integers(0, 2**32 - 1))
def test_every_mode_is_shown_as_on_a_white_page(tmp_path_factory, kind, width, height, seed):
    """To the level at its own size; when it shrinks, like what is laid on white first and resized then."""
    (ending, mode), a = kind, np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    path = tmp_path_factory.mktemp("modes") / f"image.{ending}"
    image, expected = MODES[mode](a)
    image.save(path, **{"webp": {"lossless": True, "exact": True}}.get(ending, {}))
    assert np.abs(shown(path, width, height) - expected).max() <= 1
    w, h = cover(width, height, 3, 3)
    small = Image.fromarray(expected.round().astype(np.uint8)).resize((w, h), Image.BICUBIC)
    assert np.abs(shown(path, w, h) - np.asarray(small, float)).max() <= 24  # both round and clip, in another order


def png(path, width, bits, color, rows, *chunks):
    """Write a PNG by hand: rows of packed pixels; color 0 is gray, 2 RGB."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + data + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits, color", [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_the_one_color_that_a_png_calls_transparent_is_white(tmp_path, bits, color):
    """In every depth: 16 pixels, of which those like the fifth are transparent."""
    channels = 3 if color else 1
    values = np.random.default_rng(bits).integers(0, 2**bits, (16, channels))
    values[9] = values[4]
    data = "".join(f"{v:0{bits}b}" for v in values.flatten())
    row = int(data, 2).to_bytes(len(data) // 8, "big")
    png(tmp_path / "key.png", 16, bits, color, [row], (b"tRNS", struct.pack(f">{channels}H", *values[4])))
    expected = over_white(values * 255 / (2**bits - 1), (values != values[4]).any(1) * 255)
    assert np.abs(shown(tmp_path / "key.png", 16, 1)[0] - expected).max() <= 1


def test_a_gray_ramp_of_16_bits_stays_a_ramp(tmp_path):
    ramp = np.linspace(0, 65535, 4096).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    Image.fromarray(ramp).save(tmp_path / "ramp.tif", compression="tiff_lzw")
    Image.frombytes("I;16B", (64, 64), ramp.astype(">u2").tobytes()).save(tmp_path / "big endian.tif")
    Image.fromarray(65535 - ramp).save(tmp_path / "0 is white.tif", tiffinfo={262: 0})
    for path in tmp_path.iterdir():
        assert np.abs(shown(path, 64, 64) - ramp[..., None] / 257).max() <= 0.5, path


def test_gray_of_an_unknown_range_is_bad(tmp_path):
    Image.fromarray(np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64)).save(tmp_path / "float.tif")
    Image.fromarray(np.arange(4096, dtype=np.int32).reshape(64, 64)).save(tmp_path / "int.tif")
    for path in tmp_path.iterdir():
        with pytest.raises(Bad, match="unknown range"):
            shown(path, 64, 64)


def test_what_is_transparent_is_white_and_bleeds_into_nothing(tmp_path):
    """Noise under a transparent background, around a red square, in pictures and frames."""
    a = np.random.default_rng(0).integers(0, 255, (64, 64, 4), np.uint8)
    a[..., 3], a[16:48, 16:48] = 0, (200, 30, 30, 255)
    Image.fromarray(a).save(tmp_path / "a.png")
    frame = av.VideoFrame.from_ndarray(a, format="rgba")
    for pixels in (fit_image(str(tmp_path / "a.png"), 32, 32, View()), fit_frame(frame, 1, 32, 32, View())):
        assert (pixels[:, :6] == 255).all()
        assert (pixels[:, 10:22, 10:22].int() - torch.tensor([200, 30, 30])[:, None, None]).abs().max() <= 1
        assert (pixels[0].int() - pixels[1] > -2).all()  # no green, and no blue, from under the alpha


@pytest.mark.parametrize("pix_fmt", ["yuva420p", "yuva444p10le", "rgba", "bgra", "gbrap", "ya8", "rgba64le", "pal8"])
def test_frames_with_alpha_lie_on_white(pix_fmt):
    a = np.full((32, 32, 4), (90, 90, 90, 255), np.uint8)
    a[:16, :, 3], a[16:, 16:, 3] = 0, 128
    if pix_fmt == "pal8":
        palette = np.zeros((256, 4), np.uint8)  # ARGB
        palette[:2] = (0, 90, 90, 90), (255, 90, 90, 90)
        frame = av.VideoFrame.from_ndarray(((a[..., 3] > 0).astype(np.uint8), palette), format="pal8")
    else:
        frame = av.VideoFrame.from_ndarray(a, format="rgba").reformat(format=pix_fmt)
    pixels = fit_frame(frame, 1, 32, 32, View())
    expected = [255, 90, 90 if pix_fmt == "pal8" else 172]
    for part, value in zip((pixels[:, :12], pixels[:, 20:, :12], pixels[:, 20:, 20:]), expected):
        assert (part.int() - value).abs().max() <= 2


@pytest.mark.parametrize("pix_fmt", ["gray16le", "gray16be", "gray10le", "rgb48le", "gbrp12le", "yuv444p16le"])
def test_frames_of_many_bits_are_scaled(pix_fmt):
    ramp = np.linspace(0, 255, 64).astype(np.uint8).repeat(32).reshape(64, 32)[..., None].repeat(3, 2)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(ramp)).reformat(format=pix_fmt)
    assert (fit_frame(frame, 1, 32, 64, View()).permute(1, 2, 0).int() - torch.tensor(ramp)).abs().max() <= 2


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p10le", "yuva420p", "gbrp", "rgb24", "gray"])
@pytest.mark.parametrize("height, told, coded", [(718, 2, 5), (720, 2, 1), (720, 5, 5), (64, 1, 1)])
def test_colors_that_a_video_does_not_tell_are_those_that_browsers_take(pix_fmt, height, told, coded):
    """BT.601 (5) below 720 lines, and BT.709 (1) from there on."""
    color = [90, 90, 90] if pix_fmt == "gray" else [200, 30, 30]
    frame = av.VideoFrame.from_ndarray(np.full((height, 64, 3), color, np.uint8))
    frame = frame.reformat(format=pix_fmt, dst_colorspace=coded)
    frame.colorspace = told
    assert (fit_frame(frame, 1, 32, 32, View()).int() - torch.tensor(color)[:, None, None]).abs().max() <= 3


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "green", "blue")]
    for ending, more in (("gif", {}), ("png", {}), ("webp", {"lossless": True})):
        frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], duration=100, **more)
        assert (shown(tmp_path / f"a.{ending}", 32, 32) == (255, 0, 0)).all()


@pytest.mark.parametrize("clear", [False, True])
def test_a_first_frame_smaller_than_its_gif_has_white_around_it(tmp_path, clear):
    colors = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    control = b"\x21\xf9\x04\x01\0\0\x03\0" if clear else b""  # index 3 is transparent
    codes = sum(code << 3 * n for n, code in enumerate([4, 2] * 4 + [5])).to_bytes(4, "little")  # 2 x 2 pixels of 2
    (tmp_path / "a.gif").write_bytes(b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x91, 1, 0) + colors + control
                                     + b"," + struct.pack("<HHHHB", 1, 1, 2, 2, 0) + b"\x02\x04" + codes + b"\0;")
    expected = np.full((4, 4, 3), 255)
    expected[1:3, 1:3] = 0, 0, 255
    assert (shown(tmp_path / "a.gif", 4, 4) == expected).all()


# ---------------------------------------------------------------------------------------------------------------------
# Color profiles

P3 = np.array([[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]])  # XYZ, D50
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])


def icc(space, connection=b"XYZ ", **tags):
    """A profile of ICC version 2: XYZ triples by tag, a number for a curve's gamma, bytes for what else."""
    table, body = b"", b""
    for name, value in {"wtpt": (0.9642, 1, 0.8249), **tags}.items():
        if isinstance(value, bytes):
            data = value
        elif isinstance(value, (int, float)):
            data = b"curv" + struct.pack(">IIH", 0, 1, round(value * 256)) + b"\0\0"
        else:
            data = b"XYZ " + struct.pack(">I3i", 0, *(round(v * 65536) for v in value))
        table += name.encode() + struct.pack(">II", 132 + 12 * (len(tags) + 1) + len(body), len(data))
        body += data
    data = struct.pack(">I", len(tags) + 1) + table + body
    head = struct.pack(">I4sI4s4s4s", 128 + len(data), b"lcms", 0x02400000, b"prtr" if space == b"CMYK" else b"mntr",
                       space, connection) + bytes(12)
    return head + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48) + data


def rgb_profile(primaries, gamma):
    return icc(b"RGB ", **dict(zip(("rXYZ", "gXYZ", "bXYZ"), primaries)), rTRC=gamma, gTRC=gamma, bTRC=gamma)


def srgb_of(linear):
    linear = linear.clip(0, 1)
    return 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_color_profiles_are_followed(tmp_path, mode):
    """Display P3, as phones write, and a gray curve, against their formulas."""
    a = np.random.default_rng(0).integers(40, 216, (16, 16, 4), np.uint8)
    image = Image.fromarray(a, "RGBA")
    image = image if mode == "RGBA" else image.convert("RGB").quantize(64) if mode == "P" else image.convert(mode)
    seen = np.asarray(image.convert("RGBA")).astype(float)
    image.save(tmp_path / "p3.png", icc_profile=rgb_profile(P3, 2.2))
    expected = srgb_of((seen[..., :3] / 255) ** 2.2 @ P3 @ np.linalg.inv(SRGB))
    assert np.abs(shown(tmp_path / "p3.png", 16, 16) - over_white(expected, seen[..., 3])).max() <= 2
    if mode == "L":
        image.save(tmp_path / "gray.png", icc_profile=icc(b"GRAY", kTRC=1.5))
        assert np.abs(shown(tmp_path / "gray.png", 16, 16) - srgb_of((seen[..., :3] / 255) ** 1.5)).max() <= 2


@pytest.mark.parametrize("profile", [b"garbage" * 50, rgb_profile(P3, 2.2)[:200], icc(b"GRAY", kTRC=1.5),
                                     icc(b"RGB ", rTRC=2.2), icc(b"CMYK", kTRC=2.2), icc(b"R\xff  ")])
def test_a_profile_that_is_broken_or_of_another_kind_changes_nothing(tmp_path, profile):
    a = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(a).save(tmp_path / "a.png", icc_profile=profile)
    assert (shown(tmp_path / "a.png", 16, 16) == a).all()


def test_the_profile_of_cmyk_says_what_ink_looks_like(tmp_path):
    """A profile of a printer whose K alone is seen: Lab (100 (1 - K), 0, 0)."""
    ramps, matrix = bytes(range(256)), struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    colors = bytes([255, 128, 128, 0, 128, 128]) * 8
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramps * 4 + colors + ramps * 3
    a = np.random.default_rng(0).integers(0, 255, (16, 16, 4), np.uint8)
    Image.fromarray(a, "CMYK").save(tmp_path / "gray.tif", icc_profile=icc(b"CMYK", b"Lab ", A2B0=table))
    root = (100 * (1 - a[..., 3:] / 255) + 16) / 116
    expected = srgb_of(np.where(root > 6 / 29, root**3, (root - 4 / 29) * 108 / 841))
    assert np.abs(shown(tmp_path / "gray.tif", 16, 16) - expected).max() <= 3


def test_cmyk_of_photoshop_is_not_inverted(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 217, 217, 55))  # red
    image.save(tmp_path / "cmyk.jpg", quality=100)  # with Adobe's marker, and inverted, as theirs
    assert b"Adobe" in (tmp_path / "cmyk.jpg").read_bytes()
    assert np.abs(shown(tmp_path / "cmyk.jpg", 16, 16) - np.array([200, 30, 30.0])).max() <= 3


# ---------------------------------------------------------------------------------------------------------------------
# No images


@pytest.mark.parametrize("data", [b"garbage" * 9, b"MM\0*\0\0\0\x08\xff\xff\x01\x12", b"MM"])
def test_damaged_exif_data_leave_the_picture_as_it_lies(tmp_path, data):
    Image.fromarray(corners(0)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + data, quality=95)
    assert colors(fit_image(str(tmp_path / "a.jpg"), 48, 32, View())) == ["red", "green", "blue", "white"]


def test_a_damaged_tag_beside_it_does_not_hide_a_turn(tmp_path):
    tags = [(0x0107, 2, 5, 50), (0x0112, 3, 1, 6 << 16), (0x8769, 4, 1, 56)]  # text where a number belongs; a quarter
    data = b"MM\0*\0\0\0\x08\0\x03" + b"".join(struct.pack(">HHII", *tag) for tag in tags) + bytes(4) + b"make\0\0"
    data += b"\0\x01\x90\x03\0\x02\0\0\0\x05\0\0\0J" + bytes(4) + b"2020\0\0"
    Image.fromarray(corners(0)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + data, quality=95)
    assert colors(fit_image(str(tmp_path / "a.jpg"), 32, 48, View())) == ["blue", "red", "white", "green"]


def test_what_is_no_image_is_bad(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    size = data.index(b"\xff\xc0") + 5
    (tmp_path / "huge.jpg").write_bytes(data[:size] + b"\xff" * 4 + data[size + 4 :])  # 65,535 x 65,535
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    png(tmp_path / "bomb.png", 14000, 1, 0, [bytes(1750)] * 14000)
    Image.new("L", (1, 20000)).save(tmp_path / "thread.png")  # 64 wide, it is 1,280,000 high
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "noise.png").write_bytes(rng.bytes(5000))
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    Image.new("L", (16, 16)).save(tmp_path / "kind.png", "PCX")  # Pillow could, but it is nothing of that name
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    os.symlink("/dev/zero", tmp_path / "device.png")
    (tmp_path / "whole.jpg").unlink()
    for path in [*tmp_path.iterdir(), tmp_path / "missing.png"]:
        with pytest.raises(Bad):
            shown(path, 64, 64)
