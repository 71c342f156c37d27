"""Measure what the VAE loses: PSNR and SSIM of frames encoded one by one, as here, and stitched first, as in the paper
(appendix H).

    python -m lab.evals.vae --ckpt weights/tiny.safetensors
"""

import itertools
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch

import sd
from cli import option, parse, read_size, run
from clips.decode import Bad
from grid import fold, grid_shape, unfold
from lab import toy
from lab.evals.fvd import ListedVideos
from lab.metrics import psnr, ssim_map
from sample import SHIPPED
from sd.device import pick_device
from sd.vae import encode_frames

BORDER = 8  # pixels from a frame's edge: one latent pixel of Stable Diffusion


def reconstructions(model: sd.Model, frames: torch.Tensor):
    """Yield what comes back of frames uint8 (T, 3, H, W), in 0..1: encoded one by one, then as one stitched image."""
    rows, cols = grid_shape(len(frames))
    for images in (frames, fold(frames[None], rows, cols)):
        mean = encode_frames(model.vae, images).chunk(2, dim=1)[0]
        with torch.no_grad():
            back = torch.cat([model.vae.decode(part) for part in mean.split(16)]).float().clamp(-1, 1) / 2 + 0.5
        yield back if len(back) == len(frames) else unfold(back, rows, cols)[0]


def vae_scores(model: sd.Model, clips) -> dict[str, dict[str, float]]:
    """Mean PSNR and SSIM over clips, inside the frames and along their borders, for both ways to encode."""
    scores = {"one by one": [], "stitched": []}
    for frames in clips:
        true = frames.float() / 255
        border = torch.ones(true.shape[-2:])
        border[BORDER:-BORDER, BORDER:-BORDER] = 0
        for how, back in zip(scores, reconstructions(model, frames)):
            back = back.cpu()
            similar, edge = ssim_map(true, back).mean(dim=(0, 1)), border[3:-3, 3:-3]
            scores[how].append([psnr(true, back, 1 - border), psnr(true, back, border),
                                (similar * (1 - edge)).sum() / (1 - edge).sum(), (similar * edge).sum() / edge.sum()])
    names = "PSNR inside", "PSNR border", "SSIM inside", "SSIM border"
    return {how: dict(zip(names, np.mean(rows, axis=0).tolist())) for how, rows in scores.items()}


def toy_clips(frames: int):
    """Yield true renders without end, uint8 (T, 3, 64, 64) each."""
    rng = np.random.default_rng(0)
    for scene in itertools.cycle(toy.scenes("test")):
        clip = toy.true_render(scene, rng, frames, 4 if frames <= 16 else frames / toy.SECONDS)
        yield torch.from_numpy(clip).permute(0, 3, 1, 2)


def listed_clips(path: str, frames: int, size: tuple[int, int]):
    """Yield the usable clips of a list, uint8 (T, 3, H, W) each."""
    videos = ListedVideos(path, frames, size, fps=None)
    for i in range(len(videos)):
        try:
            yield torch.from_numpy(videos.clip(i, seed=0)).permute(0, 3, 1, 2)
        except Bad as error:
            print(f"skipped {videos.name(i)}: {error}", file=sys.stderr)


@dataclass
class Options:
    ckpt: str = option("", "the model (default: the tiny one that ships)")
    video: str = option("", "clips to encode (default: true renders of the toy world)", metavar="LIST")
    clips: int = option(48, "at most", low=1)
    frames: int | None = option(None, "of a clip (default: the model's)", low=1)
    size: tuple[int, int] | None = option(None, "of frames of a list (default: the model's)", metavar="WxH",
                                          read=read_size)
    device: str = option("", "cuda, mps or cpu (default: the first of them that is there)")


def main():
    o = parse(Options, __doc__)
    if o.video:
        os.stat(o.video)  # now, not after a model is loaded
    model = sd.load(o.ckpt or SHIPPED, pick_device(o.device))
    frames = o.frames or model.settings.frames
    size = o.size or (model.settings.width, model.settings.height)
    model.check_size(*size, frames)
    clips = list(itertools.islice(listed_clips(o.video, frames, size) if o.video else toy_clips(frames), o.clips))
    if not clips:
        raise ValueError(f"no video of {o.video} can be used")
    scores = vae_scores(model, clips)
    print(f"{os.path.basename(o.ckpt or SHIPPED)}, {len(clips)} clips of {frames} frames; border: {BORDER} pixels")
    print(f"{'':<12}" + "".join(f"{name:>13}" for name in scores["stitched"]))
    for how, row in scores.items():
        print(f"{how:<12}" + "".join(f"{value:>13.{2 if name[0] == 'P' else 4}f}" for name, value in row.items()))


if __name__ == "__main__":
    run(main)
