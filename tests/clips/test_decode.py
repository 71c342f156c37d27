"""media.py: frames by presentation time in every codec, upright and in RGB; and no file that could stop a training."""

import contextlib
import json
import os
import random
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clips.media import (
    Bad,
    View,
    contact_sheet,
    cover,
    crop,
    fit_frame,
    fit_image,
    frames_at,
    opened,
    playback_fps,
    usable_fps,
    write_video,
)

WIDTH, HEIGHT, BITS = 96, 64, 6
CODECS = {  # container, pixel format, options
    "libx264": ("mp4", "yuv420p", {"crf": "10", "bf": "3", "g": "12"}),
    "libx265": ("mp4", "yuv420p", {"crf": "10", "x265-params": "log-level=none:keyint=12:bframes=3"}),
    "libvpx-vp9": ("webm", "yuv420p", {"crf": "10", "b": "0", "deadline": "realtime", "cpu-used": "8", "g": "12"}),
    "libsvtav1": ("mkv", "yuv420p", {"crf": "10", "preset": "10", "svtav1-params": "keyint=12"}),
    "mpeg4": ("avi", "yuv420p", {"q": "2", "bf": "2", "g": "12"}),
    "gif": ("gif", "rgb8", {}),
}


def picture(n, width=WIDTH, height=HEIGHT):
    """The number n as black and white bars, lowest bit on the left."""
    bars = [255 * (n >> bit & 1) for bit in range(BITS)]
    return np.repeat(np.repeat([bars], height, 0), width // BITS, 1)[..., None].repeat(3, 2).astype(np.uint8)


def number(pixels):
    """Of a tensor (3, H, W) that shows picture(n)."""
    bars = pixels.float().mean(0)[:, : pixels.shape[-1] // BITS * BITS].mean(0).reshape(BITS, -1).mean(1)
    return sum((value > 127).item() << bit for bit, value in enumerate(bars))


def write_clip(path, times, codec="libx264", tick=Fraction(1, 600), rotation=0, pixels=picture, aspect=None,
               **container):
    """A clip whose frame n shows picture(n) from times[n] on, in units of `tick`."""
    _, pix_fmt, options = CODECS.get(codec, ("mp4", "yuv420p", {}))
    with av.open(str(path), "w", container_options=container) as file:
        stream = file.add_stream(codec, rate=30, options=options)
        stream.height, stream.width = pixels(0).shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = pix_fmt, tick
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for n, at in enumerate(times):
            frame = av.VideoFrame.from_ndarray(pixels(n)).reformat(format=pix_fmt)
            frame.pts, frame.time_base = at, tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def numbers_at(path, times):
    with opened(str(path)) as video:
        frames = frames_at(video, times)
        return [number(fit_frame(frame, video.aspect, WIDTH, HEIGHT, View())) for frame in frames]


@pytest.fixture(scope="module", params=[(codec, rate) for codec in CODECS for rate in ("constant", "variable")
                                        if (codec, rate) != ("mpeg4", "variable")],  # avi knows constant rates only
                ids="-".join)
def clip(request, tmp_path_factory):
    """(path, when frame n is shown, in seconds from the start)."""
    codec, rate = request.param
    gaps = [20] * 59 if rate == "constant" else [10 + (7 * n) % 31 for n in range(59)]
    tick = Fraction(1, 600)
    if codec in ("gif", "mpeg4"):  # hundredths of a second, whole frames
        tick = Fraction(1, 30 if codec == "mpeg4" else 100)
        gaps = [1] * 59 if codec == "mpeg4" else [2 + gap % 3 for gap in gaps]
    times = np.cumsum([0, *gaps]).tolist()
    path = tmp_path_factory.mktemp("clips") / f"clip.{CODECS[codec][0]}"
    write_clip(path, times, codec, tick)
    first = 1 / 30 if codec == "mpeg4" else 0  # avi starts at 0 and shows its first frame, of those with B-frames, then
    return path, [first + at * float(tick) for at in times]


# ---------------------------------------------------------------------------------------------------------------------
# Which frames


@pytest.mark.parametrize("fps, start", [(30, 0.0), (30, 0.43), (15, 0.21), (8, 0.011), (4, 0.05), (2, 0.4)])
def test_frames_are_those_on_screen(clip, fps, start):
    """Frame k is the one whose presentation interval contains start + k / fps, as a loop over the times says."""
    path, times = clip
    slack = 0.0006 if path.suffix in (".mkv", ".webm") else 1e-9  # Matroska rounds to milliseconds
    wanted = [start + k / fps for k in range(3) if start + k / fps < times[-1]]
    expected = [{max([0] + [n for n, at in enumerate(times) if at <= t + s]) for s in (-slack, slack)} for t in wanted]
    for seen, allowed in zip(numbers_at(path, wanted), expected):
        assert seen in allowed


def test_what_is_not_decoded_changes_nothing(clip):
    """Every frame on its own, after a seek, is to the bit the frame of a decoder that decodes all."""
    path, times = clip
    with av.open(str(path)) as file:
        plain = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    for n in range(0, len(times), 7):
        with opened(str(path)) as video:
            (frame,) = frames_at(video, [times[n] + 0.004])
        assert np.array_equal(frame.to_ndarray(format="rgb24"), plain[n])


def bytes_read():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def test_a_clip_from_the_end_of_a_long_file_is_found_by_seeking(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    write_clip(tmp_path / "long.mp4", range(0, 20 * 600, 20), pixels=lambda n: np.roll(noise, 17 * n, 1))
    with opened(str(tmp_path / "long.mp4")) as video:
        before = bytes_read()
        (frame,) = frames_at(video, [19.0])
        read = bytes_read() - before
    assert frame.time == pytest.approx(19.0)
    assert read < 0.1 * (tmp_path / "long.mp4").stat().st_size


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_negative_start_times(tmp_path, ending):
    path = tmp_path / f"clip.{ending}"
    write_clip(path, range(-200, 1000, 20), avoid_negative_ts="disabled")
    with opened(str(path)) as video:
        first = round((video.start * 600 + 200) / 20)  # a container may cut what lies before 0
    assert numbers_at(path, [0, 0.1, 0.5]) == [first, first + 3, first + 15]


def test_a_late_start_and_a_lone_keyframe(tmp_path, monkeypatch):
    """A transport stream has no index: a seek lands anywhere, here always after the only keyframe."""
    monkeypatch.setitem(CODECS, "libx264", ("ts", "yuv420p", {"crf": "10", "g": "250", "bf": "3"}))
    write_clip(tmp_path / "late.ts", range(3000, 4200, 20))
    assert numbers_at(tmp_path / "late.ts", [0.002, 0.502, 1.502]) == [0, 15, 45]
    assert numbers_at(tmp_path / "late.ts", [1.502]) == [45]


def test_a_video_that_ends_before_it_says_is_bad(tmp_path):
    write_clip(tmp_path / "whole.mp4", range(0, 1200, 20), movflags="+faststart")
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * 0.6)])
    assert numbers_at(tmp_path / "whole.mp4", [1.95]) == [58]
    with pytest.raises(Bad):
        numbers_at(tmp_path / "cut.mp4", [1.95])


def test_usable_fps():
    """f <= 1.01 x the rate, and (T - 1) / f < the duration."""
    assert usable_fps(29.97, 20, 16) == [1, 2, 4, 8, 15, 30]
    assert usable_fps(60, 5, 16) == [4, 8, 15, 30, 60]
    assert usable_fps(29.0, 0.4, 16) == []
    assert usable_fps(30, 15, 16) == [2, 4, 8, 15, 30]  # 15 s are just too short for 1 FPS


# ---------------------------------------------------------------------------------------------------------------------
# What they look like


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


@pytest.mark.parametrize("codec, pix_fmt", [("libx265", "yuv420p10le"), ("libx264", "gray"), ("libx264", "yuv444p")])
def test_pixel_formats(tmp_path, codec, pix_fmt, monkeypatch):
    monkeypatch.setitem(CODECS, codec, ("mp4", pix_fmt, CODECS[codec][2]))
    write_clip(tmp_path / "clip.mp4", range(0, 400, 20), codec)
    assert numbers_at(tmp_path / "clip.mp4", [0.0, 0.2, 0.5]) == [0, 6, 15]


def test_odd_sizes_and_anamorphic_pixels(tmp_path):
    write_clip(tmp_path / "odd.gif", range(0, 40, 4), "gif", Fraction(1, 100),
               pixels=lambda n: picture(n, 66, 37))
    assert numbers_at(tmp_path / "odd.gif", [0.0, 0.2]) == [0, 5]
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
# Damage


def damaged(folder, good, count, seed=0):
    """`count` files made from good ones, as paths: each a kind of damage in turn, at a random place."""
    rng = random.Random(seed)
    for n in range(count):
        data, path = bytearray(good[n % len(good)].read_bytes()), folder / f"{n:04d}{good[n % len(good)].suffix}"
        kind = n // len(good) % 8
        if kind == 0:
            data = data[: rng.randrange(len(data))]  # cut anywhere
        elif kind == 1:
            data = data[: rng.randrange(200)]  # hardly a header
        elif kind == 2:
            for _ in range(rng.choice([1, 10, 100, 1000])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 3:
            at = rng.randrange(len(data))
            data[at : at + 500] = bytes(500)  # a hole
        elif kind == 4:
            for _ in range(8):  # where sizes, rates and durations stand
                data[rng.randrange(min(len(data), 800))] = rng.choice([0, 127, 255])
        elif kind == 5:
            at = data.find(rng.choice([b"mvhd", b"mdhd", b"stts", b"tkhd", b"avcC", b"stsz", b"elst"]))
            data[max(at, 0) + 4 : max(at, 0) + 40] = rng.randbytes(36)
        elif kind == 6:
            data = rng.randbytes(rng.randrange(5000))
        else:
            at = rng.randrange(len(data))
            data = data[at:] + data[:at]  # the halves exchanged
        path.write_bytes(data)
        yield path


def odd_files(folder, good):
    """What else is found under the name of a video; some of it would lead to the good one."""
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("a caption, not a video\n" * 50)
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:2,\n{good}\n#EXT-X-ENDLIST\n")
    (folder / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {good}\n")
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "fifo.mp4")
    os.symlink("nowhere", folder / "link.mp4")
    Image.new("RGB", (64, 64)).save(folder / "image.png")
    os.rename(folder / "image.png", folder / "image.mp4")
    with av.open(str(folder / "audio.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), "fltp", "mono")
        frame.rate = 44100
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    write_clip(folder / "one.mp4", [0])
    return [folder / name for name in ("empty.mp4", "text.mp4", "playlist.mp4", "concat.mp4", "folder.mp4", "fifo.mp4",
                                       "link.mp4", "image.mp4", "audio.mp4", "one.mp4", "missing.mp4")]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    for codec, (ending, _, _) in CODECS.items():
        tick, gap = (Fraction(1, 100), 4) if codec == "gif" else (Fraction(1, 30), 1)
        write_clip(folder / f"{codec}.{ending}", range(0, 60 * gap, gap), codec, tick)
    return sorted(folder.iterdir())


def read_somehow(path):
    """None when the file can be used, else the reason."""
    try:
        with opened(str(path)) as video:
            if not usable_fps(video.rate, video.duration, 4):
                raise Bad("too short")
            frames = frames_at(video, [video.duration / 3 + k / 8 for k in range(4)])
            for frame in frames:
                fit_frame(frame, video.aspect, 64, 64, View())
    except Bad as bad:
        return str(bad)


def test_odd_files_are_bad_for_a_reason(tmp_path, good):
    reasons = {path.name: read_somehow(path) for path in odd_files(tmp_path, good[0])}
    assert all(reasons.values()), reasons
    assert reasons["fifo.mp4"] == reasons["folder.mp4"] == "not a regular file"
    assert reasons["link.mp4"] == reasons["missing.mp4"] == "missing"
    assert reasons["audio.mp4"] == "no video in it" and reasons["one.mp4"] == "too short"
    assert all(read_somehow(path) is None for path in good)


def test_the_ending_of_a_name_decides_nothing(tmp_path, good):
    for n, path in enumerate(good):
        os.symlink(path, tmp_path / f"{n}{good[n - 1].suffix}")
        assert read_somehow(tmp_path / f"{n}{good[n - 1].suffix}") is None


@pytest.mark.parametrize("box, at, harmless", [
    (b"stsd", 44, True),  # width and height of 65,535, but the stream has its own
    (b"stts", 8, False),  # four billion entries
    (b"mdhd", 20, False),  # a duration of three days
    (b"stsz", 12, False),  # four billion samples
])
def test_absurd_declarations(tmp_path, box, at, harmless):
    """An mp4 that says what no video can be."""
    write_clip(tmp_path / "clip.mp4", range(0, 1200, 20))
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    place = data.index(box) + at
    data[place : place + 4] = b"\xff" * 4
    (tmp_path / "clip.mp4").write_bytes(data)
    assert (read_somehow(tmp_path / "clip.mp4") is None) == harmless


def test_an_absurd_size_is_refused_before_memory_is_taken(tmp_path, good):
    data = bytearray(next(path for path in good if path.suffix == ".gif").read_bytes())
    data[6:10] = b"\xff" * 4  # 65,535 x 65,535: 17 GB a frame
    (tmp_path / "huge.gif").write_bytes(data)
    assert read_somehow(tmp_path / "huge.gif")


def test_a_video_without_times_is_bad(tmp_path):
    write_clip(tmp_path / "still.mp4", range(0, 1200, 20))
    data = bytearray((tmp_path / "still.mp4").read_bytes())
    assert read_somehow(tmp_path / "still.mp4") is None
    place = data.index(b"stts") + 8
    data[place : place + 4] = bytes(4)  # a table of no entries
    (tmp_path / "still.mp4").write_bytes(data)
    assert read_somehow(tmp_path / "still.mp4")


def test_damage_is_bad_or_harmless_and_leaks_nothing(tmp_path, good):
    """500 damaged files: only Bad is ever raised, none takes long, and neither memory nor open files grow."""
    slowest, reasons, resident = 0.0, [], []
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        for n, path in enumerate(damaged(tmp_path, good, 500)):
            began = time.monotonic()
            reasons.append(read_somehow(path))
            slowest = max(slowest, time.monotonic() - began)
            if n % 50 == 49:
                resident.append(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert sum(reason is not None for reason in reasons) > 250
    assert slowest < 10
    assert resident[-1] - resident[2] < 64 << 20
    assert len(os.listdir("/proc/self/fd")) < 100


@pytest.mark.slow
def test_memory_is_flat_over_20000_clips(tmp_path, good):
    """Good and damaged files in turn: resident memory after 2,000 and after 20,000 of them."""
    paths = [*damaged(tmp_path, good, 240), *good * 10]
    resident = {}
    for n in range(1, 20001):
        read_somehow(paths[n % len(paths)])
        if n in (2000, 20000):
            resident[n] = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    print(f"resident: {resident[2000]:.0f} MiB after 2,000 clips, {resident[20000]:.0f} MiB after 20,000")
    assert resident[20000] < resident[2000] + 16


# ---------------------------------------------------------------------------------------------------------------------
# Frames -> a file


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
