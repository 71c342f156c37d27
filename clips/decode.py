"""A video file or an animated picture -> the frames that are on screen at given times.

    with opened("clip.mp4") as video:
        frames = frames_at(video, [0.0, 0.5, 1.0])

What the open web calls a video is often none. Whatever is wrong with a file is a Bad with a reason, found in bounded
time and memory.
"""

import bisect
import io
import math
import os
import re
import stat
import time
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import av
import numpy as np
from PIL import Image

VIDEO_FPS = (1, 2, 4, 8, 15, 30, 60)  # Equation 6
PICTURE_ENDINGS = (".gif", ".webp", ".png", ".apng")  # what may be animated, or be a still
VIDEO_ENDINGS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp",
                 ".ogv", ".mts", ".m2ts", *PICTURE_ENDINGS)
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".apng", ".jfif",
                 ".avif")

TIME_LIMIT = 30  # seconds to open a file, and to decode the frames of a clip
BYTE_LIMIT = 1 << 29  # of a clip, compressed
PIXEL_LIMIT = 1 << 26  # of a frame
RATE_LIMIT, DURATION_LIMIT = 250, 1e6  # frames a second and seconds; above, a header tells of its clock, not of frames
# containers that hold their own video: a playlist among downloaded files could name any other file, or a URL
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,m4v,h264,hevc,ivf,mjpeg"
# codecs in which a packet is a frame, so that packets can be left out; one of AV1 may show an earlier packet's frame
SKIPPING = ("h264", "hevc", "mpeg4", "mpeg2video")
SEEING_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # libav's own decoders leave transparency out


class Bad(Exception):
    """A file or an item that cannot be used. Its text is the reason, always the same for the same fault, so that
    reasons can be counted."""


# ---------------------------------------------------------------------------------------------------------------------
# Files, by themselves or in a tar


class Member(str):
    """The path of a file in a tar, "x.tar/000031.mp4": a text for messages, which `open_file` opens where it lies.

    tar       the tar's own path
    at, size  its first byte there, and how many
    time      when the tar was last modified, in nanoseconds, when it was looked through
    beside    ending -> (first byte, size) of files of the same name with another ending
    """

    @classmethod
    def of(cls, tar: str, name: str, at: int, size: int, time: int, beside=()) -> "Member":
        member = cls(f"{tar}/{name}")
        member.tar, member.at, member.size, member.time, member.beside = tar, at, size, time, dict(beside)
        return member


class Part(io.RawIOBase):
    """The bytes of a Member."""

    def __init__(self, member: Member):
        self.name, self.first, self.size, self.place = str(member), member.at, member.size, 0
        self.file = open(member.tar, "rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence=io.SEEK_SET) -> int:
        self.place = max(0, offset + (0, self.place, self.size)[whence])
        return self.place

    def readinto(self, buffer) -> int:
        self.file.seek(self.first + self.place)
        read = self.file.readinto(memoryview(buffer)[: max(0, self.size - self.place)])
        self.place += read
        return read

    def close(self):
        super().close()
        self.file.close()


def open_file(path: str):
    """Open a file, or a Member, to read its bytes."""
    return io.BufferedReader(Part(path)) if isinstance(path, Member) else open(path, "rb")


def require_file(path: str):
    """Raise Bad unless a path leads to a regular file, whole where it is a Member: opening a fifo would wait for ever.
    """
    try:
        found = os.stat(path.tar if isinstance(path, Member) else path)
    except (FileNotFoundError, ValueError) as error:  # ValueError: no file can have such a name
        raise Bad("missing") from error
    except OSError as error:
        raise Bad(error.strerror.lower()) from error
    if not stat.S_ISREG(found.st_mode):
        raise Bad("not a regular file")
    if isinstance(path, Member) and found.st_mtime_ns != path.time:
        raise Bad("its tar has changed meanwhile: start again")
    if isinstance(path, Member) and path.at + path.size > found.st_size:
        raise Bad("cut off by the end of its tar")


# ---------------------------------------------------------------------------------------------------------------------
# Videos


@dataclass
class Video:
    """An open video."""

    stream: av.VideoStream
    decoder: av.VideoCodecContext
    rate: float  # frames a second, on average
    start: float  # timestamp of its beginning, in seconds
    duration: float  # seconds
    aspect: float  # width of a pixel divided by its height


@contextmanager
def opened(path: str):
    """Context manager: open the video in a file, decoded by one thread. Whatever is wrong with it becomes a Bad."""
    require_file(path)
    try:
        if picture_kind(path):
            yield Animation(path)
            return
        with open_container(path) as container:
            stream = video_stream(container)
            context = stream.codec_context
            if not 0 < context.width * context.height <= PIXEL_LIMIT:
                raise Bad("absurd size")
            if stream.metadata.get("alpha_mode") == "1" and context.name in SEEING_ALPHA:
                context = av.CodecContext.create(SEEING_ALPHA[context.name], "r")
            context.thread_count, context.thread_type = 1, "NONE"  # many clips are read at once: one thread each
            aspect = float(stream.sample_aspect_ratio or 1)
            rate, start, duration = told_timing(stream) or measured_timing(path)
            yield Video(stream, context, rate, start, duration, aspect if 0.1 < aspect < 10 else 1.0)
    except (av.FFmpegError, OSError) as error:
        raise Bad((error.strerror or type(error).__name__).lower()) from error


@contextmanager
def open_container(path: str, formats=FORMATS, **options: str):
    """Context manager: open a file that is no playlist."""
    options |= {"format_whitelist": formats, "protocol_whitelist": "file"}
    with (open_file(path) if isinstance(path, Member) else nullcontext(path) as file,
          av.open(file, container_options=options, metadata_errors="replace", timeout=TIME_LIMIT) as container):
        yield container


def video_stream(container) -> av.VideoStream:
    """The first stream of a container that is a video. Raises Bad when none is."""
    pictures = av.stream.Disposition.attached_pic  # the cover of an audio file
    for stream in container.streams.video:
        if stream.codec_context and not stream.disposition & pictures:
            return stream
    raise Bad("no video in it")


def told_timing(stream) -> tuple[float, float, float] | None:
    """(rate, start, duration) by the header of a file; None where it does not tell, or nothing that can be."""
    tagged = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))  # Matroska
    if stream.duration:
        duration = float(stream.duration * stream.time_base)
    elif tagged:
        duration = float(tagged[1]) * 3600 + float(tagged[2]) * 60 + float(tagged[3])
    else:
        duration = (stream.container.duration or 0) / av.time_base
    rate, start = float(stream.average_rate or 0), float((stream.start_time or 0) * stream.time_base)
    told = 0 < rate <= RATE_LIMIT and 0 < duration <= DURATION_LIMIT
    if not stream.duration and start * rate > 1:  # some containers count from there, some from 0
        told = False
    return (rate, start, duration) if told else None


def measured_timing(path: str) -> tuple[float, float, float]:
    """(rate, start, duration) by all packets of a file, as for what a browser recorded. Raises Bad."""
    with open_container(path) as container:
        stream = video_stream(container)
        packets = read_packets(stream, math.inf, time.monotonic() + TIME_LIMIT)
        shown = {p.pts for p in packets if p.pts is not None and not p.is_discard}
    if len(shown) < 2:
        raise Bad("no duration")
    start, span = float(min(shown) * stream.time_base), float((max(shown) - min(shown)) * stream.time_base)
    rate = (len(shown) - 1) / span
    if rate > 1000 or span > DURATION_LIMIT:
        raise Bad("no frame rate")
    return rate, start, span + 1 / rate


def usable_fps(rate: float, duration: float, T: int, values=VIDEO_FPS) -> list[int]:
    """The FPS values that a clip of `rate` frames a second and `duration` seconds offers for T frames (Equation 6)."""
    return [f for f in values if f <= 1.01 * rate and (T - 1) / f < duration]


def frames_at(video, times, back=0.0) -> list[av.VideoFrame]:
    """The frames on screen at the given times: seconds from the start of the video, in rising order.

    All packets are read before any is decoded, so that it is known which of them hold a wanted frame. The others are
    not decoded unless some frame refers to them: half of a usual H.264 file is B-frames that nothing refers to.

    back  how many seconds before the first time to look for a keyframe
    """
    if isinstance(video, Animation):
        return video.frames_at(times)
    stream, context, deadline = video.stream, video.decoder, time.monotonic() + TIME_LIMIT
    context.flush_buffers()
    ticks = [math.floor((video.start + t + 1e-6) / stream.time_base) for t in times]
    if times[0] > back:
        stream.container.seek(math.floor((video.start + times[0] - back) / stream.time_base), stream=stream)
    elif times[0] > 0:
        stream.container.seek(min(0, math.floor(video.start * av.time_base)))  # to the beginning of the file
    packets = list(read_packets(stream, ticks[-1], deadline))
    keys = [n for n, p in enumerate(packets) if p.is_keyframe]
    if times[0] > back and (not keys or (packets[keys[0]].pts or 0) > ticks[0]):
        return frames_at(video, times, back=2 * back + 1)  # that keyframe is shown too late
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
            if frame.pts is None:  # before 0, where this container has no timestamps
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
    on_screen = max(current.duration or 0, math.ceil(1 / video.rate / stream.time_base))
    if ticks[-1] > current.pts + on_screen:
        raise Bad("ends early")
    return frames + [current] * (len(ticks) - len(frames))


def read_packets(stream, last: float, deadline: float):
    """Yield packets in decoding order, up to the first after which none can be shown at or before the tick `last`."""
    size = 0
    for packet in stream.container.demux(stream):
        if packet.size:
            yield packet
        size += packet.size
        if size > BYTE_LIMIT or time.monotonic() > deadline:
            raise Bad("too large")
        if packet.dts is not None and packet.dts > last:  # shown no earlier than decoded
            break


# ---------------------------------------------------------------------------------------------------------------------
# Animated pictures

SHORTEST, INSTEAD = 0.011, 0.1  # seconds: a frame that says it is shorter is shown so long, as by browsers


class Animation:
    """An animated GIF, PNG or WebP, with what `Video` tells of itself. It is not looped. Raises Bad.

    libav draws GIF and PNG: Pillow pastes half transparent parts of a PNG as if they were fainter. Pillow draws WebP,
    whose animations libav cannot read. A frame is what the ones before it left, so each reading begins with the first.
    """

    start, aspect = 0.0, 1.0

    def __init__(self, path: str):
        self.path, self.shown = path, webp_frames if picture_kind(path) == "webp" else libav_frames
        self.ends = list(accumulate(INSTEAD if seconds < SHORTEST else seconds for seconds, _ in self.frames(False)))
        if len(self.ends) < 2:
            raise Bad("a still picture, no video")
        self.duration, self.rate = self.ends[-1], len(self.ends) / self.ends[-1]
        if self.duration > DURATION_LIMIT:
            raise Bad("absurd duration")

    def frames(self, drawn=True):
        """Yield (seconds, frame), of which the frame is missing where it need not be drawn."""
        deadline = time.monotonic() + TIME_LIMIT
        with closing(self.shown(self.path, drawn)) as found:
            for pair in found:
                yield pair
                if time.monotonic() > deadline:
                    raise Bad(f"took more than {TIME_LIMIT} s")

    def frames_at(self, times) -> list[av.VideoFrame]:
        numbers, frames = [bisect.bisect_right(self.ends, t + 1e-6) for t in times], {}
        with closing(self.frames()) as shown:
            for n, (_, frame) in enumerate(shown):
                if n in numbers:
                    frames[n] = frame
                if n >= numbers[-1]:
                    break
        if numbers[-1] not in frames:
            raise Bad("ends early")
        return [frames[n] for n in numbers]


def picture_kind(path: str) -> str:
    """gif, png or webp, by the first bytes of a file; "" for what is none of them."""
    with open_file(path) as file:
        head = file.read(12)
    kinds = {"gif": head[:4] == b"GIF8", "png": head[:8] == b"\x89PNG\r\n\x1a\n",
             "webp": (head[:4], head[8:]) == (b"RIFF", b"WEBP")}
    return next(filter(kinds.get, kinds), "")


def is_still(path: str) -> bool:
    """Whether a file is a picture that does not move. False for one that is damaged, or no picture."""
    try:
        require_file(path)
        with open_file(path) as file, Image.open(file, formats=("GIF", "JPEG", "PNG", "WEBP")) as image:
            return not getattr(image, "is_animated", False)
    except Exception:  # Pillow raises anything on damaged bytes
        return False


def libav_frames(path: str, drawn: bool):
    """Yield (seconds, frame) of a GIF or an animated PNG."""
    with open_container(path, "gif,apng", **({"default_fps": "10"} if picture_kind(path) == "png" else {})) as file:
        stream = video_stream(file)
        context = stream.codec_context
        if not 0 < context.width * context.height <= PIXEL_LIMIT:
            raise Bad("absurd size")
        context.thread_count, context.thread_type = 1, "NONE"
        for packet in file.demux(stream):
            seconds = float((packet.duration or 0) * stream.time_base)
            for frame in context.decode(packet) if drawn else [None] * bool(packet.size):
                if frame and frame.is_corrupt:
                    raise Bad("damaged")
                yield seconds, frame


def webp_frames(path: str, drawn: bool):
    """Yield (seconds, frame) of a WebP."""
    try:
        with open_file(path) as file, Image.open(file, formats=("WEBP",)) as image:
            if not 0 < image.width * image.height <= PIXEL_LIMIT:
                raise Bad("absurd size")
            for n in range(image.n_frames):
                image.seek(n)
                image.load()  # it does not know how long before
                frame = av.VideoFrame.from_ndarray(np.asarray(image.convert("RGBA")), format="rgba") if drawn else None
                yield image.info["duration"] / 1000, frame
    except Bad:
        raise
    except Exception as error:
        raise Bad("damaged") from error
