"""Samples: what training sees of an item, T frames of one size with a caption and an FPS (Equation 6).

    video     frames of a clip, chosen by presentation time      FPS 1..60
    label     T different images of one label                    FPS 0
    caption   one image, which training repeats T times          FPS 120

An item has as many samples as it offers FPS values, times `Spec.starts` or `Spec.draws`; (fps, k) says which. Every
random choice of a sample is a function of (seed, source, item, fps, k), so that it is the same live and encoded ahead.
"""

import re
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace

import numpy as np
import torch

from clips.decode import VIDEO_FPS, Bad, Video, frames_at, opened, usable_fps
from clips.lists import Item, Items, images_of
from clips.pictures import View, fit_frame, fit_image, read_color
from sd.vae import to_uint8

SOURCES = ("video", "label", "caption")
LABEL_FPS, CAPTION_FPS = 0, 120


@dataclass(frozen=True)
class Spec:
    """What a sample is made of, beside its item. With (source, item, fps, k) it determines every pixel of it."""

    frames: int
    width: int
    height: int
    fps_values: tuple = VIDEO_FPS
    starts: int = 1  # samples of a clip at each FPS, from different places in it
    draws: int = 1  # samples of a label, of different images
    random_crop: bool = False  # instead of the middle
    flip: bool = False  # mirror half of the samples, but never one whose caption may mention a side
    background: str = "white"  # the color that shows through where a picture is transparent
    captions: str = ""  # "from_names": of what has no other; else the field that says them
    seed: int = 0

    def __post_init__(self):
        read_color(self.background)

    def repeats(self, source: str) -> int:
        """How many samples an item has at each FPS."""
        return {"video": self.starts, "label": self.draws, "caption": 1}[source]


@dataclass
class Sample:
    data: torch.Tensor  # frames uint8 (T, 3, H, W), or their moments (T, 2C, h, w); T = 1 for a captioned image
    caption: str
    fps: int
    k: int
    skipped: tuple = ()  # (path, reason) of images of a label that could not be read
    context: torch.Tensor | None = None  # (L, D), when encoded ahead

    @torch.no_grad()
    def seen(self, vae) -> np.ndarray:
        """The frames as pictures, uint8 (T, H, W, 3): what the VAE makes of their moments where they are encoded."""
        if not self.data.is_floating_point():
            return self.data.permute(0, 2, 3, 1).numpy()
        mean = self.data.chunk(2, dim=1)[0].to(vae.quant_conv.weight)
        return to_uint8(vae.decode(mean)).cpu().numpy()


class LiveClips:
    """Samples that are decoded when they are asked for; the training process makes latents of them.

    lists  source -> list
    """

    data = None  # no hash: at each step clips are read as they are then

    def __init__(self, lists: dict[str, str], spec: Spec):
        self.items = {source: Items(source, path, spec.captions) for source, path in lists.items()}
        self.spec, self.empty_context = spec, None

    def count(self, source: str) -> int:
        return len(self.items.get(source, ()))

    def name(self, source: str, i: int) -> str:
        return self.items[source].name(i)

    def sample(self, source: str, i: int, u: float, v: float, fps_values=()) -> Sample:
        """The sample of item i that two numbers in [0, 1) choose: u its FPS, v its k. Raises Bad.

        fps_values  those of the spec to choose among for a clip; () for all
        """
        item = self.items[source][i]
        with video_of(source, item) as video:
            offered = offered_fps(source, video, replace(self.spec, fps_values=fps_values or self.spec.fps_values))
            fps, k = offered[int(u * len(offered))], int(v * self.spec.repeats(source))
            return read_sample(source, i, item, video, self.spec, fps, k)


def first_clips(clips, count: int) -> list[Sample]:
    """The first samples of videos, one a clip, that can be used; from LiveClips or EncodedClips."""
    found = []
    for i in range(clips.count("video")):
        if len(found) == count:
            break
        with suppress(Bad):
            found.append(clips.sample("video", i, 0, 0))
    return found


def video_of(source: str, item: Item):
    """Context manager: open the video of an item; None where it has images."""
    return opened(item.path) if source == "video" else nullcontext()


def offered_fps(source: str, video: Video | None, spec: Spec) -> list[int]:
    """The FPS values of an item's samples. Raises Bad when there is none."""
    if source != "video":
        return [LABEL_FPS if source == "label" else CAPTION_FPS]
    offered = usable_fps(video.rate, video.duration, spec.frames, spec.fps_values)
    if not offered:
        raise Bad("too short")
    return offered


def read_sample(source: str, i: int, item: Item, video: Video | None, spec: Spec, fps: int, k: int) -> Sample:
    """The k-th sample of item i at an FPS, from its open video or its images. Raises Bad."""
    rng = np.random.default_rng([spec.seed, SOURCES.index(source), i, fps, k])
    caption, skipped = item.captions[rng.integers(len(item.captions))], ()
    if source == "video":
        frames = clip_frames(video, fps, caption, spec, rng)
    elif source == "label":
        frames, skipped = label_images(item.path, caption, spec, rng)
    else:
        frames = fit_image(item.path, spec.width, spec.height, draw_view(caption, spec, rng))[None]
    return Sample(frames, caption, fps, k, skipped)


def clip_frames(video: Video, fps: int, caption: str, spec: Spec, rng) -> torch.Tensor:
    """T frames from a random start (T, 3, H, W), all of them in the same view."""
    view = draw_view(caption, spec, rng)
    start = rng.uniform(0, video.duration - (spec.frames - 1) / fps)
    frames = frames_at(video, [start + t / fps for t in range(spec.frames)])
    fitted = {id(f): fit_frame(f, video.aspect, spec.width, spec.height, view) for f in frames}  # some appear twice
    return torch.stack([fitted[id(f)] for f in frames])


def label_images(folder: str, caption: str, spec: Spec, rng) -> tuple[torch.Tensor, tuple]:
    """T different images of a folder (T, 3, H, W), repeated only when there are too few; and what had to be skipped."""
    paths, images, skipped = images_of(folder), [], []
    for j in rng.permutation(len(paths)):
        try:
            images.append(fit_image(paths[j], spec.width, spec.height, draw_view(caption, spec, rng)))
        except Bad as bad:
            skipped.append((str(paths[j]), str(bad)))
        if len(images) == spec.frames:
            break
    if not images:
        raise Bad("no image in it that can be read")
    return torch.stack([images[t % len(images)] for t in range(spec.frames)]), tuple(skipped)


SIDES = re.compile(r"\b(left|right|east|west|(counter-?|anti-?)?clockwise|text|letter|word|sign)", re.IGNORECASE)


def draw_view(caption: str, spec: Spec, rng) -> View:
    """A view at random, as far as the spec allows."""
    left, top, mirror = rng.random(3)
    mirror = spec.flip and mirror < 0.5 and not SIDES.search(caption)
    view = View(left, top, mirror, spec.background)
    return view if spec.random_crop else replace(view, left=View.left, top=View.top)
