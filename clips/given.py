"""What a user gives beside a prompt: pictures and clips that become frames, a file of prompts, an earlier video.

Pictures and clips of any size are fitted as in training, and it is told how.
"""

import io
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np

import cli
import sd
from cli import option
from clips.decode import Bad, frames_at, opened, require_file
from clips.pictures import View, cover, fit_frame, fit_loaded, load_image, upright_size
from clips.write import read_metadata
from sd.device import DTYPES, has_room, pick_device, pick_dtype
from sd.lora import read_lora
from sd.settings import LAYOUTS
from sd.sources import is_repository

# ---------------------------------------------------------------------------------------------------------------------
# Options

MOST = 100_000  # videos of a call: their names are all claimed before the first
AT_ONCE = 32  # frames of a clip that are in memory before they are fitted


@dataclass
class Given:
    """Options of sample.py that are no part of a request, but say where things are."""

    prompts: str = option("", "more prompts, one a line", metavar="FILE")
    num: int = option(1, "videos a prompt, with seeds S, S+1, ...", low=1)
    first: str = option("", "the first frame: an image", metavar="FILE")
    last: str = option("", "the last frame: an image", metavar="FILE")
    extend: str = option("", "a clip to go on with; overlap is then 4 by default", metavar="FILE")
    given: str = option("", "a clip of which some frames are kept", metavar="FILE")
    keep: tuple[int, ...] = option((), "the numbers of those frames, from 0", metavar="N,N,...", low=0, high=10**9)
    like: str = option("", "take the settings from a video of sample.py; other options come before them",
                       metavar="FILE")
    ckpt: str = option("", "model: a file, a diffusers folder or a repository (default: the tiny one that ships)")
    prediction: str = option("", "what the UNet predicts, if the file is silent", choices=("", "epsilon", "v"))
    layout: str = option("", "how the tokens of a clip meet (default: as in the file)", choices=("", *LAYOUTS))
    motion: str = option("", "AnimateDiff's motion modules for a Stable Diffusion 1.x: a file, a diffusers folder or a "
                         "repository", metavar="FILE")
    lora: tuple[str, ...] = option((), "a LoRA to add to the weights, and how much of it; may be given several times",
                                   repeat=True, metavar="FILE[:SCALE]")
    out: str = option("out/", "a .mp4, .gif or .png (contact sheet) file, numbered when there are several videos; a "
                      "folder; or a .html page that holds them all", metavar="PATH")
    device: str = option("", "cuda, mps or cpu (default: the first of them that is there)")
    dtype: str = option("auto", "precision; auto is float16 on cuda, bfloat16 on a CPU with units for it, else float32",
                        choices=DTYPES)

    def check_files(self):
        """Raise ValueError where options contradict one another, or a file cannot be opened: before a model is."""
        if len(self.prompt) * self.num > MOST:
            raise ValueError(f"num must make at most {MOST:,} videos of all prompts together, got {self.num:,} of "
                             f"{len(self.prompt):,}")
        if bool(self.given) != bool(self.keep):
            raise ValueError("given and keep go together: a clip, and which frames of it to keep, like "
                             "--given clip.mp4 --keep 0,5,10")
        for n in self.keep:
            if self.keep.count(n) > 1:
                raise ValueError(f"keep must name each frame once, got {n} twice")
        if self.first and self.extend:
            raise ValueError("first and extend cannot both be given: each says what the first frame is")
        for name in ("first", "last"):
            if getattr(self, name):
                open_picture(name, getattr(self, name))
        for name in ("extend", "given"):
            if getattr(self, name):
                with usable(name, getattr(self, name)), opened(getattr(self, name)):
                    pass

    def read_files(self, settings) -> dict:
        """What the options ask of a model with these settings: {known, frames, overlap} of a sample.Request. How each
        file was fitted goes to stderr.

        Raises ValueError on what cannot be read, or gives no frame, or one twice.
        """
        (width, height), fps = self.size or (settings.width, settings.height), self.fps
        fps, overlap = settings.fps if fps is None else fps, self.overlap
        if self.extend and not overlap:
            overlap = min(4, settings.frames - 1) or None
        clip, told = read_clip("extend", self.extend, width, height, fps, most=self.frames) if self.extend else ((), [])
        frames = self.frames or settings.frames + (max(0, len(clip) - (overlap or 0)) if self.extend else 0)
        gives = [("extend", enumerate(clip))]
        for name, n in (("first", 0), ("last", frames - 1)):
            if getattr(self, name):
                frame, how = read_picture(name, getattr(self, name), width, height)
                gives.append((name, [(n, frame)]))
                told += how
        if self.given:
            clip, how = read_clip("given", self.given, width, height, fps, self.keep)
            gives.append(("given", zip(self.keep, clip)))
            told += how
        known, by = {}, {}
        for name, numbered in gives:
            for n, frame in numbered:
                if n >= frames:
                    raise ValueError(f"frames must be > {n}, a frame that {name} gives, got {frames}")
                if n in known:
                    raise ValueError(f"{name} and {by[n]} cannot both be given: each says what frame {n} is")
                known[n], by[n] = frame, name
        for line in told:
            print(line, file=sys.stderr)
        return {"known": known, "frames": frames, "overlap": overlap}


def load_model(o: Given, shipped: str):
    """The model of the options -> (sd.Model, device to work on, dtype): on the device already where it has room.

    shipped  the model when none is named
    """
    device = pick_device(o.device)
    dtype = pick_dtype(o.dtype, device)
    model = sd.load(o.ckpt or shipped, "cpu", dtype, o.prediction or None, layout=o.layout or None,
                    motion=o.motion or None, lora=map(read_lora, o.lora))
    if has_room(device, model.parts().values()):
        model.to(device)
    return model, device, dtype


# ---------------------------------------------------------------------------------------------------------------------
# Frames


def open_picture(name: str, path: str):
    """The image in the file of an option. Raises ValueError."""
    with usable(name, path):
        require_file(path)
        return load_image(path)


def read_picture(name: str, path: str, width: int, height: int) -> tuple[np.ndarray, list[str]]:
    """The image of an option -> (uint8 (height, width, 3), how it was fitted). Raises ValueError."""
    image = open_picture(name, path)
    with usable(name, path):
        frame = fit_loaded(image, width, height, View()).permute(1, 2, 0).numpy()
        return frame, [fitting(path, *image.size, width, height)]


def read_clip(name: str, path: str, width: int, height: int, fps: float, keep=(), most: int | None = None
              ) -> tuple[np.ndarray, list[str]]:
    """The clip of an option at an FPS -> (uint8 (n, height, width, 3), how it was fitted). Raises ValueError.

    keep  numbers of frames; else all, which must be fewer than `most`
    """
    with usable(name, path), opened(path) as video:
        if not 1 <= fps <= 1.01 * video.rate:  # Equation 6: a clip where frames repeat would be gone on with likewise
            raise ValueError(f"fps must be in 1..{video.rate:g}, the rate of {path}, got {fps:g}")
        count = math.ceil(video.duration * fps - 0.01)
        if keep and max(keep) >= count:
            raise ValueError(f"keep must name frames in 0..{count - 1}, as many as {path} has at {fps:g} FPS, got "
                             f"{max(keep)}")
        if most and count >= most:
            raise ValueError(f"frames must be > {count}, which {path} has at {fps:g} FPS, got {most}")
        wanted, fitted = sorted(keep or range(count)), {}
        for at in range(0, len(wanted), AT_ONCE):
            part = wanted[at : at + AT_ONCE]
            frames = frames_at(video, [n / fps for n in part])
            fitted |= {n: fit_frame(frame, video.aspect, width, height, View()) for n, frame in zip(part, frames)}
        how = fitting(path, *map(round, upright_size(frames[0], video.aspect)), width, height)
    return np.stack([fitted[n].permute(1, 2, 0).numpy() for n in keep or wanted]), [how]


@contextmanager
def usable(name: str, path: str):
    """Context manager: a file of an option that cannot be used becomes a ValueError."""
    try:
        yield
    except Bad as bad:
        raise ValueError(f"{name}: {path} cannot be used: {bad}") from bad


def fitting(path: str, w: int, h: int, width: int, height: int) -> str:
    """Say how a picture of w x h pixels is fitted into width x height."""
    W, H = cover(w, h, width, height)
    said = f"{path}: {w}x{h}" + (f", resized to {W}x{H}" if (W, H) != (w, h) else "")
    for side, whole, kept in (("columns", W, width), ("rows", H, height)):
        if whole > kept:
            first = int((whole - kept + 1) * View().left)
            said += f", cropped to {side} {first} to {first + kept - 1} of 0 to {whole - 1}"
    return said


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def read_prompts(path: str) -> tuple[str, ...]:
    """The prompts of a file, one a line. Raises OSError or ValueError when it cannot be read, or holds none."""
    if not os.path.exists(path):
        raise ValueError(f"prompts must be a file with a prompt a line, got {path!r}, which is not there; a prompt "
                         "itself stands without --prompts")
    found = tuple(line.strip() for line in io.StringIO(cli.read_text(path), None) if line.strip())
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Settings of an earlier video

FILES = ("ckpt", "motion", "lora", "first", "last", "extend", "given")  # of these a video has the names, and no paths


def settings_of(request, o, layout: str, shipped: str) -> dict:
    """What a video tells of how it was made: plain values, and of files no more than their names.

    shipped  the model when none is named
    """

    def name(path):
        return path if is_repository(path) else os.path.basename(os.path.normpath(path))

    files = {"ckpt": shipped} | {file: getattr(o, file) for file in FILES if getattr(o, file)}
    named = {file: [*map(name, paths)] if isinstance(paths, tuple) else name(paths) for file, paths in files.items()}
    plain = {f.name: getattr(request, f.name) for f in fields(request) if f.metadata}
    return plain | {"keep": o.keep, "prediction": o.prediction, "layout": layout} | named


def settings_like(o, shipped: str) -> dict:
    """The options that the video in o.like was made with; its prompt only where o has none.

    Raises ValueError where a file was used that o does not name too: where it lies, a video does not know.
    """
    told = read_metadata(o.like)
    found = {f.name: told[f.name] for f in fields(o) if f.metadata and told.get(f.name) is not None}
    for name in FILES:
        value = found.pop(name, None)
        if isinstance(value, str) and is_repository(value):
            found[name] = value
        elif value and value != os.path.basename(shipped) and not getattr(o, name):
            raise ValueError(f"{o.like} was made with {name} {value}, a file that is not in it: give --{name} too")
    if o.texts or o.prompts:
        found |= {"prompt": (), "prompts_at": {}, "blend": False}
    elif isinstance(found.get("prompt"), str):
        found["prompt"] = (found["prompt"],) if found["prompt"] else ()
    if isinstance(found.get("prompts_at"), dict):
        found["prompts_at"] = {int(n) if n.isdecimal() else n: text for n, text in found["prompts_at"].items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
