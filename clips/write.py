"""Frames -> a file: .mp4 (H.264), .gif, or .png (contact sheet)."""

import itertools
import json
import os
import re
from contextlib import suppress
from fractions import Fraction

import av
import numpy as np
from PIL import Image, PngImagePlugin

from cli import beside
from grid import largest_factor


def playback_fps(fps: float) -> float:
    """The condition 1..60 is also the speed to play at; 0 (unrelated frames) and 120 (a still) play at 8."""
    return fps if 1 <= fps <= 60 else 8


def contact_sheet(video, gap=2):
    """All frames of a video (T, H, W, 3) beside each other in reading order -> uint8 (H', W', 3)."""
    T, H, W, _ = video.shape
    rows = largest_factor(T)
    cols = T // rows
    sheet = np.full((rows * (H + gap) - gap, cols * (W + gap) - gap, 3), 255, np.uint8)
    for t, frame in enumerate(video):
        y, x = t // cols * (H + gap), t % cols * (W + gap)
        sheet[y : y + H, x : x + W] = frame
    return sheet


def write_video(path: str, video, fps: float, metadata: dict):
    """Write a video, uint8 (T, H, W, 3), as .mp4, .gif or .png (contact sheet), with the metadata as its comment.

    Written beside and renamed into place. Raises ValueError on another ending, OSError when it cannot be written.
    """
    kind = os.path.splitext(path)[1].lower()
    if kind not in WRITERS:
        raise ValueError(f"{path} must end in {', '.join(WRITERS)}")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with beside(path) as part:
        WRITERS[kind](part, video, fps, json.dumps(metadata, ensure_ascii=False))


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
    images[0].save(path, "GIF", save_all=True, append_images=images[1:], duration=(10 * np.diff(ends)).tolist(), loop=0,
                   comment=comment)


def write_png(path, video, fps, comment):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("comment", comment)
    Image.fromarray(contact_sheet(video)).save(path, "PNG", pnginfo=info)


WRITERS = {".mp4": write_mp4, ".gif": write_gif, ".png": write_png}

# ---------------------------------------------------------------------------------------------------------------------
# Names of files to come


def claim_paths(out: str, videos, still: bool) -> list[str]:
    """A path for each video, (prompt, seed). None of them exists, and the `.part` beside each keeps others away.

    Raises ValueError or OSError when one is there already, or cannot be written.
    """
    stem, kind = os.path.splitext(out)
    if kind and kind.lower() not in WRITERS:
        raise ValueError(f"out must end in {', '.join(WRITERS)}, or be a folder, got {out!r}")
    claimed, digits = [], max(3, len(str(len(videos) - 1)))  # sorted by name they are in the order of the prompts
    try:
        for n, (prompt, seed) in enumerate(videos):
            name = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "video"
            path = os.path.join(out, f"{name}-seed{seed}{'.png' if still else '.mp4'}")
            if kind:
                path = out if len(videos) == 1 else f"{stem}-{n:0{digits}d}{kind}"
            numbered = itertools.chain([path], (f"-{n}".join(os.path.splitext(path)) for n in itertools.count(2)))
            free = next((p for p in ([path] if kind else numbered) if claim(p)), None)
            if not free:
                raise ValueError(f"{path} is there already, or is being written: choose another out, or remove it")
            claimed.append(free)
    except BaseException:
        release(claimed)
        raise
    return claimed


def claim(path: str) -> bool:
    """Whether a path was free, and is ours now: `.part` beside it is what cli.beside writes to and renames."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        os.close(os.open(f"{path}.part", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    if os.path.lexists(path):
        release([path])
        return False
    return True


def release(paths):
    for path in paths:
        with suppress(FileNotFoundError):
            os.remove(f"{path}.part")
