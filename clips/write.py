"""Frames -> a file: .mp4 (H.264), .gif or .png (contact sheet); and free names for files to come."""

import itertools
import json
import os
import re
import signal
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, PngImagePlugin

from cli import beside, warn
from clips.decode import Bad, open_container, require_file
from grid import largest_factor

BT709, LIMITED = 1, 1  # color space, and range of its numbers, as libav and files number them


def write_video(path: str, frames, fps: float, metadata: dict):
    """Write uint8 frames (H, W, 3) as .mp4, .gif or .png, with the metadata as a JSON comment.

    frames  an array (T, H, W, 3), or whatever yields frames: those of an .mp4 go to the file one by one

    Raises ValueError on another ending, OSError when the file cannot be written; it is never half there.
    """
    kind = os.path.splitext(path)[1].lower()
    if kind not in WRITERS:
        raise ValueError(f"the name of a video must end in {', '.join(WRITERS)}, got {path}")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with beside(path) as part:
        comment = json.dumps(metadata, ensure_ascii=False)
        WRITERS[kind](part, iter(frames), fps, comment.encode(errors="backslashreplace").decode())  # no surrogates


def write_mp4(path, frames, fps, comment):
    with av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as file:
        file.metadata["comment"] = comment
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        first = next(frames)
        height, width = first.shape[:2]
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        # players take a large video that does not tell its colors for BT.709, a small one for BT.601
        color = stream.codec_context
        color.color_range = LIMITED
        color.colorspace = color.color_primaries = color.color_trc = BT709
        for frame in itertools.chain([first], frames):
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # yuv420p has even sides
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def write_gif(path, frames, fps, comment):
    images = [Image.fromarray(frame) for frame in frames]
    # GIF counts in hundredths of a second, and browsers want two at least: 50 FPS at most, rounded without drift
    ends = np.round(np.arange(len(images) + 1) * 100 / min(fps, 50)).astype(int)
    images[0].save(path, "GIF", save_all=True, append_images=images[1:], duration=(10 * np.diff(ends)).tolist(), loop=0,
                   comment=comment)


def write_png(path, frames, fps, comment):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("comment", comment)
    Image.fromarray(contact_sheet(np.stack(list(frames)))).save(path, "PNG", pnginfo=info)


WRITERS = {".mp4": write_mp4, ".gif": write_gif, ".png": write_png}


class Kept:
    """The frames of a video that comes in parts (1, n, H, W, 3), until Ctrl-C: what is finished is worth a file."""

    def __init__(self, parts):
        self.parts, self.count, self.stopped, self.writing = parts, 0, False, False

    def __iter__(self):
        before = signal.signal(signal.SIGINT, self.interrupt)
        try:
            for part in self.parts:
                for frame in part[0]:
                    self.writing = True
                    yield frame
                    self.writing = False
                    self.count += 1
                    if self.stopped:
                        return
        except KeyboardInterrupt:
            if not self.count:
                raise
            self.stopped = True
        finally:
            signal.signal(signal.SIGINT, before)

    def interrupt(self, *_):
        """Ctrl-C: end what makes the frames at once, but let whoever writes one come to its end."""
        if not self.writing:
            raise KeyboardInterrupt
        self.stopped = True

    def tell(self, path: str):
        """Raise the KeyboardInterrupt that there was, now that the file is written."""
        if self.stopped:
            warn(f"stopped early: {path} has the first {self.count} frames")
            raise KeyboardInterrupt


def read_metadata(path: str) -> dict:
    """The metadata of a file that `write_video` made, or of a .json file of them. Raises ValueError where there are
    none."""
    try:
        require_file(path)
        kind = os.path.splitext(path)[1].lower()
        if kind == ".json":
            comment = Path(path).read_text(encoding="utf-8")
        elif kind == ".mp4":
            with open_container(path) as file:
                comment = file.metadata.get("comment")
        else:
            with Image.open(path, formats=("GIF", "PNG")) as image:
                comment = image.info.get("comment")
        found = json.loads(comment)
    except Bad as bad:
        raise ValueError(f"{path} cannot be used: {bad}") from bad
    except Exception:  # libav and Pillow raise anything on damaged bytes
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} carries no settings: it must be a .mp4, .gif or .png that sample.py made")
    return found


def playback_fps(fps: float) -> float:
    """Frames a second to play a video at: the FPS it was made for, but 8 for unrelated frames (0) and a still (120)."""
    return fps if 1 <= fps <= 60 else 8


def contact_sheet(video: np.ndarray, cols: int | None = None, gap=2) -> np.ndarray:
    """All frames of a video (T, H, W, 3) in reading order, `cols` of them beside each other -> uint8 (H', W', 3).

    By default the sheet is as square as T allows.
    """
    T, H, W, _ = video.shape
    cols = cols or T // largest_factor(T)
    rows = T // cols
    sheet = np.full((rows * (H + gap) - gap, cols * (W + gap) - gap, 3), 255, np.uint8)
    for t, frame in enumerate(video):
        y, x = t // cols * (H + gap), t % cols * (W + gap)
        sheet[y : y + H, x : x + W] = frame
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# Names of files to come


@contextmanager
def claim_paths(out: str, videos: list[tuple[str, int]], still: bool):
    """Context manager: a free path for each video, a (prompt, seed), which other processes are kept off meanwhile.

    out  a folder; or the name of a file, which gets numbers where there are several videos, or of a gallery (.html)

    Raises ValueError or OSError when a file is there already or cannot be written. No new folder is left empty.
    """
    stem, kind = (out, "") if os.path.isdir(out) else os.path.splitext(out)
    if kind and kind.lower() not in (*WRITERS, ".html"):
        raise ValueError(f"out must be a folder, or end in {', '.join(WRITERS)}, .html, got {out!r}; "
                         "a new folder with a dot in its name must end in /")
    digits = max(3, len(str(len(videos) - 1)))  # sorted by name, files are in the order of the prompts
    new = [folder for folder in Path(out, "" if kind else "video").parents if not os.path.exists(folder)]
    claimed = []
    try:
        for folder in reversed(new):
            os.makedirs(folder, exist_ok=True)
        for n, (prompt, seed) in enumerate(videos):
            if kind:
                names = [out if len(videos) == 1 else f"{stem}-{n:0{digits}d}{kind}"]
            else:
                slug = re.sub(r"\W+", "-", prompt.lower())[:60].encode()[:100].decode(errors="ignore")
                slug = slug.strip("-") or "video"  # with all that follows under 143 bytes, the least of limits
                names = numbered(os.path.join(out, f"{slug}-seed{seed}"), ".png" if still else ".mp4")
            path = next(filter(claim, names), None)
            if not path:
                there = names[0] + ".part" * (not os.path.lexists(names[0]))  # of another process, also a killed one
                raise ValueError(f"{there} is there already: choose another out, or remove it")
            claimed.append(path)
        yield claimed
    finally:
        for path in claimed:
            release(path)
        for folder in new:
            with suppress(OSError):
                os.rmdir(folder)


def numbered(stem: str, kind: str):
    """Yield a.mp4, a-2.mp4, a-3.mp4, ..."""
    yield stem + kind
    for n in itertools.count(2):
        yield f"{stem}-{n}{kind}"


def claim(path: str) -> bool:
    """Take a path, unless it is taken: by a file, or by the `.part` beside it, which is what cli.beside writes to."""
    try:
        os.close(os.open(f"{path}.part", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    if os.path.lexists(path):
        release(path)
        return False
    return True


def release(path: str):
    """Give a claimed path back; a file that was written there stays."""
    with suppress(FileNotFoundError):
        os.remove(f"{path}.part")
