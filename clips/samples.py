"""Samples: what training sees of an item (Equation 6)."""

import os
import re
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from clips.decode import VIDEO_FPS, Bad, Video, frames_at, opened, usable_fps
from clips.lists import Item, Items, image_names
from clips.pictures import View, fit_frame, fit_image

LABEL_FPS, CAPTION_FPS = 0, 120


SOURCES = ("video", "label", "caption")


# ---------------------------------------------------------------------------------------------------------------------
# Samples


@dataclass(frozen=True)
class Spec:
    """What a sample is made of, beside its item. With (source, item, fps, k) it says every pixel of it."""

    frames: int
    width: int
    height: int
    fps_values: tuple = VIDEO_FPS
    starts: int = 1  # different starts a clip and FPS
    draws: int = 1  # different sets of images a label
    random_crop: bool = False  # else from the middle
    flip: bool = False  # left and right, half of the time, where the caption cannot mention a side
    seed: int = 0

    def repeats(self, source: str) -> int:
        return {"video": self.starts, "label": self.draws, "caption": 1}[source]


SIDES = re.compile(r"\b(left|right|east|west|(counter-?|anti-?)?clockwise|text|letter|word|sign)", re.IGNORECASE)


def draw_view(caption: str, spec: Spec, rng) -> View:
    left, top, mirror = rng.random(3)
    mirror = spec.flip and mirror < 0.5 and not SIDES.search(caption)
    return View(left, top, mirror) if spec.random_crop else View(mirror=mirror)


@dataclass
class Sample:
    data: torch.Tensor  # frames uint8 (T, 3, H, W), or their moments (T, 2C, h, w); T = 1 for a captioned image
    caption: str
    fps: int
    k: int
    skipped: tuple = ()  # (path, reason) of images of a label that could not be read
    context: torch.Tensor | None = None  # (L, D), encoded ahead


def read_sample(source: str, i: int, item: Item, spec: Spec, choose) -> Sample:
    """One sample of an item; choose(FPS values that the item offers) -> (fps, k). Raises Bad.

    Caption, view and start are a function of (seed, source, item, fps, k): the same live and encoded ahead.
    """
    with opened(item.path) if source == "video" else nullcontext() as video:
        fps, k = choose(offered_fps(source, video, spec))
        rng = np.random.default_rng([spec.seed, SOURCES.index(source), i, fps, k])
        caption, skipped = item.captions[rng.integers(len(item.captions))], ()
        if source == "label":
            frames, skipped = label_images(item.path, caption, spec, rng)
        elif source == "caption":
            frames = fit_image(item.path, spec.width, spec.height, draw_view(caption, spec, rng))[None]
        else:
            frames = clip_frames(video, fps, caption, spec, rng)
    return Sample(frames, caption, fps, k, skipped)


def offered_fps(source: str, video: Video | None, spec: Spec) -> list[int]:
    if source != "video":
        return [LABEL_FPS if source == "label" else CAPTION_FPS]
    offered = usable_fps(video.rate, video.duration, spec.frames, spec.fps_values)
    if not offered:
        raise Bad("too short")
    return offered


def clip_frames(video: Video, fps: int, caption: str, spec: Spec, rng) -> torch.Tensor:
    """T frames from a random start (T, 3, H, W), all of one view."""
    view = draw_view(caption, spec, rng)
    start = rng.uniform(0, video.duration - (spec.frames - 1) / fps)
    frames = frames_at(video, [start + t / fps for t in range(spec.frames)])
    fitted = {id(f): fit_frame(f, video.aspect, spec.width, spec.height, view) for f in frames}  # some stay longer
    return torch.stack([fitted[id(f)] for f in frames])


def label_images(folder: str, caption: str, spec: Spec, rng):
    """T different images of a folder (T, 3, H, W), with repeats only where there are too few; and those passed over."""
    names, images, skipped = image_names(folder), [], []
    for j in rng.permutation(len(names)):
        path = os.path.join(folder, names[j])
        try:
            images.append(fit_image(path, spec.width, spec.height, draw_view(caption, spec, rng)))
        except Bad as bad:
            skipped.append((path, str(bad)))
        if len(images) == spec.frames:
            break
    if not images:
        raise Bad("no image in it that can be read")
    return torch.stack([images[t % len(images)] for t in range(spec.frames)]), tuple(skipped)


class LiveClips:
    """Samples decoded when they are asked for; the VAE makes latents of them in the training process."""

    def __init__(self, lists: dict[str, str], spec: Spec):
        self.items = {source: Items(source, path) for source, path in lists.items()}
        self.spec, self.empty_context = spec, None

    def count(self, source: str) -> int:
        return len(self.items.get(source, ()))

    def name(self, source: str, i: int) -> str:
        return self.items[source].name(i)

    def sample(self, source: str, i: int, u: float, v: float) -> Sample:
        """The sample of item i that the numbers u and v in 0..1 choose: its FPS and its k."""

        def choose(offered):
            return offered[int(u * len(offered))], int(v * self.spec.repeats(source))

        return read_sample(source, i, self.items[source][i], self.spec, choose)
