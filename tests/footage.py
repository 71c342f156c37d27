"""Clips for tests, whose frames show their own number; and files that are damaged, or no clips at all."""

import io
import os
import random
import struct
import zlib
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from PIL import Image

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
    """The n of a tensor (3, H, W) that shows picture(n)."""
    bars = pixels.float().mean(0)[:, : pixels.shape[-1] // BITS * BITS].mean(0).reshape(BITS, -1).mean(1)
    return sum((value > 127).item() << bit for bit, value in enumerate(bars))


def write_clip(path, times, codec="libx264", tick=Fraction(1, 600), rotation=0, pixels=picture, aspect=None,
               **container):
    """Write a clip whose frame n shows picture(n) from times[n] on, in units of `tick`."""
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


# containers as browsers, phones and streams write them: codec, format, options, and whether the header has a duration
RECORDERS = {
    "MediaRecorder.webm": ("libvpx", "webm", {"live": "1"}, False),
    "live.mkv": ("libx264", "matroska", {"live": "1"}, False),
    "phone.mp4": ("libx264", "mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}, True),
    "stream.flv": ("libx264", "flv", {"flvflags": "no_duration_filesize"}, True),  # its end is read
    "stream.ts": ("libx264", "mpegts", {}, True),
}


def record(path, times, tick, start=0):
    """Write a clip like `write_clip`, into the container that the name of the path says, starting at `start`."""
    codec, kind, container, _ = RECORDERS[path.name]
    options = {"g": "12", "deadline": "realtime"} if codec == "libvpx" else {"g": "12", "bf": "2"}
    with av.open(str(path), "w", format=kind, container_options=container) as file:
        stream = file.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.time_base = WIDTH, HEIGHT, "yuv420p", tick
        for n, at in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(n)).reformat(format="yuv420p")
            frame.pts, frame.time_base = start + at, tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    data = bytearray(path.read_bytes())
    place = data.find(b"\x23\xe3\x83\x84") if path.name == "MediaRecorder.webm" else -1
    if place >= 0:
        data[place : place + 8] = b"\xec\x86" + bytes(6)  # browsers give no default duration of frames
        path.write_bytes(data)


# ---------------------------------------------------------------------------------------------------------------------
# Animated pictures, byte by byte: what their formats can say goes beyond what a library would write


@dataclass
class Drawn:
    """A frame of an animation: RGBA (h, w, 4) drawn at a place of the canvas."""

    rgba: np.ndarray
    left: int = 0
    top: int = 0
    ms: int = 100
    over: bool = True  # what was there, rather than instead of it
    after: str = "keep"  # what becomes of it: keep, clear or restore


def animation(kind, width, height, frames):
    """The bytes of a gif, png or webp. In a gif all pixels are opaque or clear, and their colors are of PALETTE."""
    return {"gif": gif_of, "png": png_of, "webp": webp_of}[kind](width, height, frames)


PALETTE = np.random.default_rng(0).integers(0, 256, (127, 3), np.uint8)  # number 127 is clear


def gif_of(width, height, frames):
    out = b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF6, 0, 0) + PALETTE.tobytes() + bytes(3)
    for f in frames:
        near = np.abs(f.rgba[..., None, :3].astype(int) - PALETTE).sum(-1).argmin(-1)
        codes = np.where(f.rgba[..., 3] < 128, 127, near).astype(np.uint8).tobytes()
        # a code is a byte while the decoder's table is emptied (128) before it has grown
        data = b"".join(b"\x80" + codes[at : at + 100] for at in range(0, len(codes), 100)) + b"\x81"
        how = ("", "keep", "clear", "restore").index(f.after)
        out += struct.pack("<BBBBHBB", 0x21, 0xF9, 4, how << 2 | 1, f.ms // 10, 127, 0)
        out += struct.pack("<BHHHHBB", 0x2C, f.left, f.top, *f.rgba.shape[1::-1], 0, 7)
        out += b"".join(bytes([len(data[at : at + 255])]) + data[at : at + 255] for at in range(0, len(data), 255))
        out += b"\0"
    return out + b";"


def png_of(width, height, frames):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    out += chunk(b"acTL", struct.pack(">II", len(frames), 0))
    for n, f in enumerate(frames):
        how = ("keep", "clear", "restore").index(f.after)
        out += chunk(b"fcTL", struct.pack(">IIIIIHHBB", max(0, 2 * n - 1), *f.rgba.shape[1::-1], f.left, f.top, f.ms,
                                          1000, how, f.over))
        data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in f.rgba))
        out += chunk(b"fdAT", struct.pack(">I", 2 * n) + data) if n else chunk(b"IDAT", data)
    return out + chunk(b"IEND", b"")


def webp_of(width, height, frames):
    def three(*values):
        return b"".join(struct.pack("<I", value)[:3] for value in values)

    out = b"VP8X" + struct.pack("<I", 10) + b"\x12\0\0\0" + three(width - 1, height - 1)
    out += b"ANIM" + struct.pack("<IIH", 6, 0xFF0000FF, 0)
    for f in frames:
        file = io.BytesIO()
        Image.fromarray(f.rgba).save(file, "WEBP", lossless=True, exact=True)
        still = file.getvalue()
        data = three(f.left // 2, f.top // 2, f.rgba.shape[1] - 1, f.rgba.shape[0] - 1, f.ms)
        data += bytes([2 * (not f.over) + (f.after == "clear")]) + still[still.index(b"VP8L") :]
        out += b"ANMF" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(out)) + b"WEBP" + out


def composed(width, height, frames):
    """What a browser shows of an animation: RGBA (height, width, 4) a frame, in floats."""
    canvas, shown = np.zeros((height, width, 4)), []
    for f in frames:
        before, (h, w) = canvas.copy(), f.rgba.shape[:2]
        part = canvas[f.top : f.top + h, f.left : f.left + w]
        alpha, below = (f.rgba[..., 3:] / 255, part[..., 3:] / 255) if f.over else (1, 0)
        whole = alpha + below * (1 - alpha) if f.over else f.rgba[..., 3:] / 255
        mixed = f.rgba[..., :3] * alpha + part[..., :3] * below * (1 - alpha)
        part[..., :3] = np.divide(mixed, whole, where=whole > 0, out=np.zeros_like(mixed)) if f.over else mixed
        part[..., 3:] = whole * 255
        shown.append(canvas.copy())
        if f.after == "clear":
            part[:] = 0
        elif f.after == "restore":
            canvas = before
    return shown


def damaged(folder, good, count, seed=0):
    """Yield the paths of `count` files made from good ones: each kind of damage in turn, at a random place."""
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
    """Make what else is found under the name of a video, some of which would lead to the good one -> paths."""
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
