"""A file -> frames, and back: libav for videos, Pillow for images.

What the open web calls a video is often none. Whatever is wrong with a file is a Bad with a reason, found in bounded
time and memory; frames come out upright, in RGB, with square pixels, those on screen at the times asked for.
"""

import bisect
import json
import math
import os
import re
import stat
import time
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

from sd.checkpoint import UserError

VIDEO_FPS = (1, 2, 4, 8, 15, 30, 60)  # Equation 6
VIDEO_ENDINGS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


class Bad(Exception):
    """What cannot be used. The text is the reason, the same for the same fault, so that reasons can be counted."""


# ---------------------------------------------------------------------------------------------------------------------
# Videos


@dataclass
class Video:
    """An open video: frames a second on average, where it starts and how long it lasts, in seconds."""

    stream: av.VideoStream
    rate: float
    start: float
    duration: float
    aspect: float  # width of a pixel through its height


TIME_LIMIT = 30  # seconds a file may take
BYTE_LIMIT = 1 << 29  # of one clip, compressed
PIXEL_LIMIT = 1 << 26  # of one frame
# what holds video and nothing else: a playlist among downloaded files could name any other file, or a URL
SKIPPING = ("h264", "hevc", "mpeg4", "mpeg2video")  # a packet is a frame; AV1 may show that of an earlier packet
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,mpegvideo,flv,asf,ogg,m4v,h264,hevc,ivf,mjpeg"


def require_file(path: str):
    """Raise Bad unless a path is that of a regular file: opening a fifo would wait for ever."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, ValueError) as error:  # ValueError: no file can have such a name
        raise Bad("missing") from error
    except OSError as error:
        raise Bad(error.strerror.lower()) from error
    if not regular:
        raise Bad("not a regular file")


@contextmanager
def opened(path: str):
    """The video in a file, decoded by one thread. Whatever is wrong with the file becomes a Bad."""
    require_file(path)
    try:
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        with av.open(path, container_options=options, metadata_errors="replace", timeout=TIME_LIMIT) as container:
            pictures = av.stream.Disposition.attached_pic  # the cover of an audio file
            streams = [s for s in container.streams.video if s.codec_context and not s.disposition & pictures]
            if not streams:
                raise Bad("no video in it")
            stream = streams[0]
            context = stream.codec_context
            context.thread_count, context.thread_type = 1, "NONE"  # many clips are read at once: one thread each
            if not 0 < context.width * context.height <= PIXEL_LIMIT:
                raise Bad("absurd size")
            yield Video(stream, *timing(stream))
    except (av.FFmpegError, OSError) as error:
        raise Bad((error.strerror or type(error).__name__).lower()) from error


def timing(stream) -> tuple[float, float, float, float]:
    """(rate, start, duration, aspect)."""
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    tagged = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))  # Matroska
    if stream.duration:
        duration = float(stream.duration * stream.time_base)
    elif tagged:
        duration = float(tagged[1]) * 3600 + float(tagged[2]) * 60 + float(tagged[3])
    else:
        duration = (stream.container.duration or 0) / av.time_base
    if not 0 < rate < 1000:
        raise Bad("no frame rate")
    if not 0 < duration < 1e6:
        raise Bad("no duration")
    aspect = float(stream.sample_aspect_ratio or 1)
    return rate, float((stream.start_time or 0) * stream.time_base), duration, aspect if 0.1 < aspect < 10 else 1.0


def usable_fps(rate: float, duration: float, T: int, values=VIDEO_FPS) -> list[int]:
    """The FPS values that a clip of `rate` frames a second and `duration` seconds offers for T frames (Equation 6)."""
    return [f for f in values if f <= 1.01 * rate and (T - 1) / f < duration]


def frames_at(video: Video, times, back=0.0) -> list[av.VideoFrame]:
    """The frames on screen at some times (rising seconds, 0 is the start of the video).

    Packets are read before any is decoded, so that it is known which hold a wanted frame; of the others those are not
    decoded to which no frame refers: half of a usual H.264 file is such B-frames.

    back  seconds before the first time from which on a keyframe is looked for
    """
    stream, context, deadline = video.stream, video.stream.codec_context, time.monotonic() + TIME_LIMIT
    ticks = [math.floor((video.start + t + 1e-6) / stream.time_base) for t in times]
    if times[0] > back:
        stream.container.seek(math.floor((video.start + times[0] - back) / stream.time_base), stream=stream)
    elif times[0] > 0:
        stream.container.seek(min(0, math.floor(video.start * av.time_base)))  # to the beginning of the file
    packets = read_packets(stream, ticks[-1], deadline)
    keys = [n for n, p in enumerate(packets) if p.is_keyframe]
    if times[0] > back and (not keys or (packets[keys[0]].pts or 0) > ticks[0]):
        return frames_at(video, times, back=2 * back + 1)  # decoded before it, shown after it
    if not keys:
        raise Bad("no keyframe in it")
    packets = packets[keys[0] :]
    shown = sorted(p.pts for p in packets if p.pts is not None and not p.is_discard)
    wanted = {shown[max(0, bisect.bisect_right(shown, tick) - 1)] for tick in ticks} if shown else set()
    skipping = context.name in SKIPPING and len(shown) == len(packets)

    frames, current = [], None
    for packet in [*packets, None]:  # None: what the decoder still holds back
        context.skip_frame = "NONREF" if skipping and packet and packet.pts not in wanted else "DEFAULT"
        for frame in context.decode(packet):
            if frame.is_corrupt:
                raise Bad("damaged")
            if frame.pts is None:  # before 0, where the container has no numbers
                continue
            while len(frames) < len(ticks) and current is not None and frame.pts > ticks[len(frames)]:
                frames.append(current)
            current = frame
        if time.monotonic() > deadline:
            raise Bad(f"took more than {TIME_LIMIT} s")
        if len(frames) == len(ticks):
            return frames
    if current is None:
        raise Bad("no frame in it")
    stays = max(current.duration or 0, math.ceil(1 / video.rate / stream.time_base))  # the last is on screen so long
    if ticks[-1] > current.pts + stays:
        raise Bad("ends early")
    return frames + [current] * (len(ticks) - len(frames))


def read_packets(stream, last: int, deadline: float) -> list[av.Packet]:
    """In the order of decoding, until no later one can be shown at or before the tick `last`."""
    packets, size = [], 0
    for packet in stream.container.demux(stream):
        if packet.size:
            packets.append(packet)
        size += packet.size
        if size > BYTE_LIMIT or time.monotonic() > deadline:
            raise Bad("too large")
        if packet.dts is not None and packet.dts > last:  # shown no earlier than decoded
            break
    return packets


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of one size


@dataclass(frozen=True)
class View:
    """Which part of a picture is taken: left and top of what is cut off, as a share of it; mirrored or not."""

    left: float = 0.5  # in 0..1, without 1
    top: float = 0.5
    mirror: bool = False


def cover(w: float, h: float, width: int, height: int) -> tuple[int, int]:
    """The size at which a picture of shape w x h just covers width x height."""
    scale = max(width / w, height / h)
    return max(width, round(w * scale)), max(height, round(h * scale))


def crop(pixels: np.ndarray, width: int, height: int, view: View) -> torch.Tensor:
    """uint8 (H, W, 3) -> uint8 (3, height, width)."""
    H, W = pixels.shape[:2]
    top, left = int((H - height + 1) * view.top), int((W - width + 1) * view.left)
    part = pixels[top : top + height, left : left + width]
    return torch.tensor(np.ascontiguousarray(part[:, ::-1] if view.mirror else part)).permute(2, 0, 1)


def quarters(frame: av.VideoFrame) -> int:
    """Quarter turns, counterclockwise, that put a frame upright."""
    return round(frame.rotation / 90) % 4


def upright_size(frame: av.VideoFrame, aspect: float) -> tuple[float, float]:
    """Width and height of a frame upright, in square pixels."""
    size = frame.width * aspect, frame.height
    return size[::-1] if quarters(frame) % 2 else size


def fit_frame(frame: av.VideoFrame, aspect: float, width: int, height: int, view: View) -> torch.Tensor:
    """Upright, in RGB, with square pixels, resized (bicubic, antialiased) and cropped: uint8 (3, height, width)."""
    size = cover(*upright_size(frame, aspect), width, height)
    w, h = size[::-1] if quarters(frame) % 2 else size  # resized before it is turned
    pixels = frame.reformat(w, h, "rgb24", interpolation="BICUBIC").to_ndarray()
    return crop(np.rot90(pixels, quarters(frame)), width, height, view)


def fit_image(path: str, width: int, height: int, view: View) -> torch.Tensor:
    """Likewise of an image file."""
    require_file(path)
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            return crop(np.asarray(image.resize(cover(*image.size, width, height), Image.BICUBIC)), width, height, view)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them Pillow's verdict
        raise Bad("not an image that can be read") from error


# ---------------------------------------------------------------------------------------------------------------------
# Frames -> a file


def playback_fps(fps: float) -> float:
    """The condition 1..60 is also the speed to play at; 0 (unrelated frames) and 120 (a still) play at 8."""
    return fps if 1 <= fps <= 60 else 8


def contact_sheet(video, gap=2):
    """All frames of a video (T, H, W, 3) beside each other in reading order -> uint8 (H', W', 3)."""
    T, H, W, _ = video.shape
    rows = max(f for f in range(1, int(T**0.5) + 1) if T % f == 0)
    cols = T // rows
    sheet = np.full((rows * (H + gap) - gap, cols * (W + gap) - gap, 3), 255, np.uint8)
    for t, frame in enumerate(video):
        y, x = t // cols * (H + gap), t % cols * (W + gap)
        sheet[y : y + H, x : x + W] = frame
    return sheet


def write_video(path: str, video, fps: float, metadata: dict):
    """Write a video, uint8 (T, H, W, 3), as .mp4, .gif or .png (contact sheet), with the metadata as its comment.

    Written beside and renamed into place. Raises UserError when the path cannot be written or has another ending.
    """
    kind = os.path.splitext(path)[1].lower()
    if kind not in WRITERS:
        raise UserError(f"{path}: the file must end in {', '.join(WRITERS)}")
    beside = f"{path}.part{kind}"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        WRITERS[kind](beside, video, fps, json.dumps(metadata, ensure_ascii=False))
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def write_mp4(path, video, fps, comment):
    with av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as file:
        file.metadata["comment"] = comment
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        height, width = video.shape[1:3]
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        for frame in video:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # yuv420p has even sides
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def write_gif(path, video, fps, comment):
    images = [Image.fromarray(frame) for frame in video]
    # in hundredths of a second, of which browsers want two: rounded so that no error adds up, and 50 FPS at most
    ends = np.round(np.arange(len(video) + 1) * 100 / min(fps, 50)).astype(int)
    images[0].save(path, save_all=True, append_images=images[1:], duration=(10 * np.diff(ends)).tolist(), loop=0,
                   comment=comment)


def write_png(path, video, fps, comment):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("comment", comment)
    Image.fromarray(contact_sheet(video)).save(path, pnginfo=info)


WRITERS = {".mp4": write_mp4, ".gif": write_gif, ".png": write_png}
