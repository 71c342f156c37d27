"""Frames by presentation time in every codec, and no file that could stop a training."""

import contextlib
import os
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from footage import (
    CODECS,
    HEIGHT,
    PALETTE,
    RECORDERS,
    WIDTH,
    Drawn,
    animation,
    composed,
    damaged,
    number,
    odd_files,
    picture,
    record,
    write_clip,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from clips.decode import TIME_LIMIT, Bad, frames_at, opened, usable_fps
from clips.pictures import View, fit_frame


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


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(RECORDERS)), st.lists(st.integers(12, 60), min_size=3, max_size=40) | st.just([20] * 30),
       st.sampled_from([0, 0, 300, 6000]), st.data())
def test_what_browsers_phones_and_streams_write(tmp_path_factory, name, gaps, start, data):
    """No duration, no rate, any start: the frames of a plain decoder that decodes all, and the rate of the packets."""
    path = tmp_path_factory.mktemp("recorded") / name
    record(path, np.cumsum([0, *gaps]).tolist(), Fraction(1, 600), start)
    with av.open(str(path)) as file:
        plain = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    first, span = plain[0][0], plain[-1][0] - plain[0][0]
    times = sorted(data.draw(st.lists(st.floats(0, span), min_size=1, max_size=4)))
    with opened(str(path)) as video:
        assert video.start == pytest.approx(first, abs=1e-6)
        if not RECORDERS[name][-1]:
            assert video.rate == pytest.approx(len(gaps) / span)
        assert video.rate < 60 and abs(video.duration - span - 1 / video.rate) < 0.13
        frames = frames_at(video, times)
    for t, frame in zip(times, frames):
        expected = [pixels for at, pixels in plain if at <= first + t + 1e-6][-1]
        assert np.array_equal(frame.to_ndarray(format="rgb24"), expected)


def test_the_clock_of_a_stream_is_not_its_rate(tmp_path, monkeypatch):
    """A transport stream whose H.264 says 600 for the clock of its times, as a header in hundredths could."""
    monkeypatch.setitem(CODECS, "libx264", ("ts", "yuv420p", {"bf": "0"}))
    write_clip(tmp_path / "clip.ts", range(0, 600, 20))
    with av.open(str(tmp_path / "clip.ts")) as file:
        assert file.streams.video[0].average_rate > 250
    with opened(str(tmp_path / "clip.ts")) as video:
        assert video.rate == pytest.approx(30) and video.duration == pytest.approx(1)


def test_a_stream_without_timestamps_is_bad(tmp_path):
    with av.open(str(tmp_path / "raw.h264"), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for n in range(30):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture(n)).reformat(format="yuv420p")))
        file.mux(stream.encode())
    assert read_somehow(tmp_path / "raw.h264") == "no duration"


def test_measuring_is_bounded(tmp_path, monkeypatch):
    record(tmp_path / "live.mkv", range(0, 600, 20), Fraction(1, 600))
    assert read_somehow(tmp_path / "live.mkv") is None
    monkeypatch.setattr("clips.decode.BYTE_LIMIT", 1000)
    assert read_somehow(tmp_path / "live.mkv") == "too large"


@pytest.mark.parametrize("codec, ending, pix_fmt", [
    ("libvpx", "webm", "yuva420p"), ("libvpx-vp9", "webm", "yuva420p"), ("gif", "gif", "pal8"),
    ("prores_ks", "mov", "yuva444p10le"), ("png", "mov", "rgba"), ("qtrle", "mov", "argb"),
])
def test_clips_with_alpha_lie_on_white(tmp_path, codec, ending, pix_fmt):
    """A gray square that is transparent on its left, at the beginning and after a seek."""
    with av.open(str(tmp_path / f"clip.{ending}"), "w") as file:
        stream = file.add_stream(codec, rate=10, options={"auto-alt-ref": "0", "g": "5"} if ending == "webm" else {})
        stream.width, stream.height, stream.pix_fmt = 64, 64, pix_fmt
        for _ in range(20):
            if pix_fmt == "pal8":
                palette = np.zeros((256, 4), np.uint8)
                palette[:2] = (0, 90, 90, 90), (255, 90, 90, 90)
                frame = av.VideoFrame.from_ndarray((np.repeat([[0, 1]], 32, 1).repeat(64, 0).astype(np.uint8), palette),
                                                   format="pal8")
            else:
                a = np.full((64, 64, 4), (90, 90, 90, 255), np.uint8)
                a[:, :32, 3] = 0
                frame = av.VideoFrame.from_ndarray(a, format="rgba").reformat(format=pix_fmt)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with opened(str(tmp_path / f"clip.{ending}")) as video:
        for times in ([0.0, 0.5], [1.95], [0.7]):
            for frame in frames_at(video, times):
                pixels = fit_frame(frame, video.aspect, 64, 64, View())
                assert (pixels[:, 4:-4, 4:28] > 250).all() and (pixels[:, 4:-4, 36:-4].int() - 90).abs().max() < 6


def test_usable_fps():
    """f <= 1.01 x the rate, and (T - 1) / f < the duration."""
    assert usable_fps(29.97, 20, 16) == [1, 2, 4, 8, 15, 30]
    assert usable_fps(60, 5, 16) == [4, 8, 15, 30, 60]
    assert usable_fps(29.0, 0.4, 16) == []
    assert usable_fps(30, 15, 16) == [2, 4, 8, 15, 30]  # 15 s are just too short for 1 FPS


@pytest.mark.parametrize("codec, pix_fmt", [("libx265", "yuv420p10le"), ("libx264", "gray"), ("libx264", "yuv444p")])
def test_pixel_formats(tmp_path, codec, pix_fmt, monkeypatch):
    monkeypatch.setitem(CODECS, codec, ("mp4", pix_fmt, CODECS[codec][2]))
    write_clip(tmp_path / "clip.mp4", range(0, 400, 20), codec)
    assert numbers_at(tmp_path / "clip.mp4", [0.0, 0.2, 0.5]) == [0, 6, 15]


def test_odd_sizes(tmp_path):
    write_clip(tmp_path / "odd.gif", range(0, 40, 4), "gif", Fraction(1, 100), pixels=lambda n: picture(n, 66, 37))
    assert numbers_at(tmp_path / "odd.gif", [0.0, 0.2]) == [0, 5]


# ---------------------------------------------------------------------------------------------------------------------
# Animated pictures


@st.composite
def animations(draw):
    """(kind, width, height, frames): all that the formats can say of where and how frames are drawn."""
    kind, width, height = draw(st.sampled_from(["gif", "png", "webp"])), draw(st.integers(2, 20)), 13
    rng, frames = np.random.default_rng(draw(st.integers(0, 999))), []
    for n in range(draw(st.integers(2, 5))):
        left, top = (2 * draw(st.integers(0, (side - 1) // 2)) * (n > 0) for side in (width, height))
        w, h = ((draw(st.integers(1, side - at)) if n else side) for side, at in ((width, left), (height, top)))
        rgba = rng.integers(0, 256, (h, w, 4), np.uint8)
        rgba[..., 3] = rng.choice([0, 255] if kind == "gif" else [0, 77, 255], (h, w))
        if kind == "gif":
            rgba[..., :3] = PALETTE[rgba[..., 0] % len(PALETTE)]
        frames.append(Drawn(rgba, left, top, draw(st.sampled_from([0, 10, 20, 70, 500])),
                            kind == "gif" or draw(st.booleans()),
                            draw(st.sampled_from(["keep", "clear"] + ["restore"] * (kind != "webp")))))
    return kind, width, height, frames


@settings(max_examples=60, deadline=None)
@given(animations(), st.sampled_from(["white", "black", "#1080f0"]), st.data())
def test_animated_pictures_are_what_a_browser_shows(tmp_path_factory, animated, background, data):
    """At its own times, drawn as the formats say, on the background; frames of 10 ms or less take 100 ms."""
    kind, width, height, frames = animated
    path = tmp_path_factory.getbasetemp() / "animated"
    path.write_bytes(animation(*animated))
    ends = np.cumsum([f.ms / 1000 if f.ms > 10 else 0.1 for f in frames])
    times = sorted(data.draw(st.floats(0, ends[-1] - 0.001)) for _ in range(3))
    color = np.array(ImageColor.getrgb(background))
    with opened(str(path)) as video:
        assert video.duration == pytest.approx(ends[-1]) and video.rate == pytest.approx(len(frames) / ends[-1])
        for at, frame in zip(times, frames_at(video, times)):
            seen = fit_frame(frame, video.aspect, width, height, View(background=background)).permute(1, 2, 0).numpy()
            near = {int(np.searchsorted(ends, at + slack, "right")) for slack in (-2e-6, 2e-6)}  # APNG's clock in libav
            for rgba in (composed(width, height, frames)[n] for n in near):
                expected = color + (rgba[..., :3] - color) * rgba[..., 3:] / 255
                if np.abs(seen - expected).max() <= 3:
                    break
            else:
                raise AssertionError((at, near))


def test_animations_that_cannot_be_used_are_bad(tmp_path, monkeypatch):
    frames = [Drawn(np.full((8, 8, 4), 30 * n, np.uint8)) for n in range(8)]
    for kind in ("gif", "png", "webp"):
        good, path = animation(kind, 8, 8, frames), tmp_path / kind
        path.write_bytes(good)
        assert read_somehow(path) is None
        with opened(str(path)) as video, pytest.raises(Bad, match="ends early"):
            frames_at(video, [0, 0.81])
        path.write_bytes(animation(kind, 8, 8, frames[:1]))
        assert read_somehow(path) == "a still picture, no video"
        Image.new("RGB", (8, 8)).save(path, kind)
        assert read_somehow(path)
        for n in range(12, len(good), 29):  # cut off anywhere, it is bad or whole
            path.write_bytes(good[:n])
            read_somehow(path)
        path.write_bytes(good)
        monkeypatch.setattr("clips.decode.PIXEL_LIMIT", 63)
        assert read_somehow(path) == "absurd size"
        monkeypatch.undo()


# ---------------------------------------------------------------------------------------------------------------------
# Damage


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
    (b"mdhd", 20, True),  # a duration of three days, and so no rate: the packets tell
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
    assert slowest < TIME_LIMIT
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
