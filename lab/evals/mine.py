"""Measure how well a model learned a folder of clips: does each caption give its own clip, and what does the VAE lose?

    python -m lab.evals.mine FOLDER --ckpt runs/mine/model.safetensors

A made clip counts as right where it is nearer to the clip of its caption than to any other: mean squared error of
frames in 8x8 gray squares, the least over all times at which the clip could begin. The VAE is graded on frames of these
clips that it was not trained on, to the bit.
"""

import math
import sys
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import sd
from cli import check_writable, option, parse, run
from clips.decode import Bad, frames_at, opened
from clips.lists import Items
from clips.pictures import View, fit_frame
from clips.samples import Spec, offered_fps
from clips.write import write_video
from lab.bench import timing
from lab.metrics import psnr, wilson
from sample import NoiseSchedule, Request, generate
from sd.vae import encode_frames
from training.vae import frame_pool

GRAY = torch.tensor([0.299, 0.587, 0.114])


@dataclass
class Clip:
    caption: str
    fps: int  # the lowest at which the model's frames fit into it
    frames: torch.Tensor  # uint8 (n, 3, H, W), all of it at that FPS
    between: torch.Tensor  # others, in the middle between those


def spec_of(model: sd.Model, captions: str) -> Spec:
    """What the model's samples were made of. Raises ValueError where it does not tell."""
    told = model.settings.origin.get("unet", {}).get("config")
    if not told or not {f.name for f in fields(Spec)} <= told.keys():
        raise ValueError("ckpt must be a model that train.py trained with the code of today, and say how")
    known = {f.name: told[f.name] for f in fields(Spec)}
    return Spec(**known | {"fps_values": tuple(told["fps_values"]), "captions": captions or told["captions"]})


def read_clips(items: Items, spec: Spec, count: int) -> list[Clip]:
    """The first `count` clips that can be used; the others are told."""
    found, view = [], View(background=spec.background)
    for i in tqdm(range(len(items)), "read", file=sys.stderr):
        if len(found) == count:
            break
        try:
            item = items[i]
            with opened(item.path) as video:
                offered = offered_fps("video", video, spec)
                times = np.arange(math.ceil(2 * video.duration * offered[0] - 1e-6)) / 2 / offered[0]
                frames = [fit_frame(frame, video.aspect, spec.width, spec.height, view)
                          for frame in frames_at(video, times)]
            found.append(Clip(item.captions[0], offered[0], torch.stack(frames[::2]), torch.stack(frames[1::2])))
        except Bad as bad:
            print(f"skipped {items.name(i)}: {bad}", file=sys.stderr)
    if len(found) < 2:
        raise ValueError(f"at least two clips of {items.path} must be usable, got {len(found)}")
    return found


def small(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (n, 3, H, W) -> gray in 0..255 on 8x8 squares (n, 64)."""
    return F.adaptive_avg_pool2d((frames.float() * GRAY[:, None, None]).sum(1, keepdim=True), 8).flatten(1)


def distances(made: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
    """Mean squared error between made clips (N, T, 64) and a clip (n, 64), n >= T, at its best start (N,)."""
    windows = clip.unfold(0, made.shape[1], 1).transpose(1, 2)  # (n - T + 1, T, 64)
    return (made[:, None] - windows).square().mean(dim=(2, 3)).min(dim=1).values


def make(model: sd.Model, clips: list[Clip], request: Request, batch_size=10) -> torch.Tensor:
    """A video of each caption at the FPS of its clip: uint8 (N, T, 3, H, W)."""
    made = [None] * len(clips)
    with tqdm(total=len(clips), desc="sample", unit="video", file=sys.stderr) as bar:
        for fps in sorted({clip.fps for clip in clips}):
            same = [n for n, clip in enumerate(clips) if clip.fps == fps]
            for at in range(0, len(same), batch_size):
                part = same[at : at + batch_size]
                asked = replace(request, prompt=tuple(clips[n].caption for n in part), fps=fps)
                for n, video in zip(part, generate(model, asked, seeds=part)):
                    made[n] = torch.from_numpy(video).permute(0, 3, 1, 2)
                bar.update(len(part))
    return torch.stack(made)


@torch.no_grad()
def vae_psnr(model: sd.Model, frames: torch.Tensor) -> float:
    """Decibels between frames uint8 (n, 3, H, W) and what comes back of them."""
    mean = encode_frames(model.vae, frames).chunk(2, dim=1)[0]
    back = torch.cat([model.vae.decode(part) for part in mean.split(16)]).float().clamp(-1, 1) / 2 + 0.5
    return psnr(frames.float() / 255, back.cpu())


def unseen(clips: list[Clip], pool: torch.Tensor) -> list[torch.Tensor]:
    """The frames of each clip that are not in the pool; clips that have none are left out."""
    known = {frame.numpy().tobytes() for frame in pool}
    rest = [[frame for frame in clip.between if frame.numpy().tobytes() not in known] for clip in clips]
    return [torch.stack(frames) for frames in rest if frames]


@dataclass
class Options(timing.Options):
    video: str = option(None, "the clips that it was trained on", positional=True, metavar="LIST")
    ckpt: str = option("runs/mine/model.safetensors", "the model")
    clips: int = option(100, "at most", low=2)
    captions: str = option("", "from_names: without any, the name of the file; else the field that says them (default: "
                           "as in training)")
    sampler: str | None = option(None, "how to step (default: the model's)")
    steps: int | None = option(None, "sampling steps (default: the model's)", low=1, high=NoiseSchedule.timesteps)
    guidance: float | None = option(None, "guidance scale (default: the model's)")
    eta: float | None = option(None, "noise that DDIM adds (default: the model's)", low=0, high=1)
    sheet: str = option("", "a picture: each clip, and below it what is made of its caption", metavar="FILE.png")


def main():
    o = parse(Options, __doc__)
    if o.sheet and not o.sheet.lower().endswith(".png"):
        raise ValueError(f"sheet must end in .png, got {o.sheet}")
    if o.sheet:
        check_writable(o.sheet)  # now, not after minutes
    model = sd.load(o.ckpt, *o.place())
    spec = spec_of(model, o.captions)
    request = Request("any", sampler=o.sampler, steps=o.steps, guidance=o.guidance, eta=o.eta).resolve(model)
    clips = read_clips(Items("video", o.video, spec.captions), spec, o.clips)
    trained = model.settings.origin.get("vae", {}).get("config", {})
    spec = replace(spec, seed=trained.get("seed", 0))
    pool = frame_pool({"video": o.video}, trained["frame_pool"], spec) if trained.get("video") else []
    parts = unseen(clips, pool)
    print(f"VAE: {np.mean([vae_psnr(model, frames) for frames in parts]):.2f} dB on {sum(map(len, parts))} frames of "
          f"{len(parts)} clips that it was not trained on")
    made = make(model, clips, request)
    near = small(made.flatten(0, 1)).unflatten(0, made.shape[:2])
    table = torch.stack([distances(near, small(clip.frames)) for clip in clips], 1)  # (made, clips)
    right = int((table.argmin(1) == torch.arange(len(clips))).sum())
    low, high = wilson(right, len(clips))
    print(f"made clips nearest to their own: {right} of {len(clips)}, {right / len(clips):.1%} [{low:.1%}, {high:.1%}]"
          f"; {request.sampler}, {request.steps} steps, guidance {request.guidance:g}, eta {request.eta:g}")
    if o.sheet:
        rows = [row for clip, video in zip(clips, made) for row in (clip.frames[: made.shape[1]], video)]
        write_video(o.sheet, torch.cat(rows).permute(0, 2, 3, 1).numpy(), 1, {"ckpt": o.ckpt.rpartition("/")[2]})


if __name__ == "__main__":
    run(main)
