"""x"""

import itertools
import sys

import numpy as np
import torch

from clips.decode import Bad
from grid import fold, grid_shape, unfold
from lab import toy
from lab.evals.fvd import VideoSet
from lab.metrics import psnr, ssim_map
from sample import check_frames
from sd.checkpoint import load, parse_size
from sd.vae import encode_frames

# ---------------------------------------------------------------------------------------------------------------------
# The VAE (appendix H): frames encoded one by one, or stitched first


BORDER = 8  # pixels from a frame's edge: one latent pixel of Stable Diffusion


def reconstructions(model, frames: torch.Tensor):
    """frames uint8 (T, 3, H, W) -> what comes back in 0..1, encoded one by one and as one stitched image."""
    rows, cols = grid_shape(len(frames))
    for images in (frames, fold(frames[None], rows, cols)):
        mean = encode_frames(model.vae, images).chunk(2, dim=1)[0]
        with torch.no_grad():
            back = torch.cat([model.vae.decode(part) for part in mean.split(16)]).float().clamp(-1, 1) / 2 + 0.5
        yield back if len(back) == len(frames) else unfold(back, rows, cols)[0]


def vae_scores(model, clips) -> dict[str, dict[str, float]]:
    """How -> PSNR and SSIM inside the frames and along their borders, the mean over clips."""
    scores = {"one by one": [], "stitched": []}
    for frames in clips:
        true = frames.float() / 255
        height, width = true.shape[-2:]
        border = torch.ones(height, width)
        border[BORDER:-BORDER, BORDER:-BORDER] = 0
        for how, back in zip(scores, reconstructions(model, frames)):
            similar, edge = ssim_map(true, back.cpu()), border[3:-3, 3:-3]
            mean = similar.mean(dim=(0, 1))
            scores[how].append([psnr(true, back.cpu(), 1 - border), psnr(true, back.cpu(), border),
                                (mean * (1 - edge)).sum() / (1 - edge).sum(), (mean * edge).sum() / edge.sum()])
    names = "PSNR inside", "PSNR border", "SSIM inside", "SSIM border"
    return {how: dict(zip(names, np.mean(rows, axis=0).tolist())) for how, rows in scores.items()}


def toy_clips(frames: int):
    """True renders without end, uint8 (T, 3, 64, 64) each."""
    rng = np.random.default_rng(0)
    for scene in itertools.cycle(toy.scenes("test")):
        clip = toy.true_render(scene, rng, frames, 4 if frames <= 16 else frames / toy.SECONDS)
        yield torch.from_numpy(clip).permute(0, 3, 1, 2)


def listed_clips(path: str, frames: int, size: tuple[int, int]):
    """The usable clips of a list."""
    videos = VideoSet(path, frames, size, None, None)
    for i in range(len(videos)):
        try:
            yield torch.from_numpy(videos.clip(i, 0)).permute(0, 3, 1, 2)
        except Bad as error:
            print(f"skipped {videos.name(i)}: {error}", file=sys.stderr)


def command_vae(args):
    model = load(args.ckpt, args.device)
    size = parse_size(args.size) if args.size else (model.settings.width, model.settings.height)
    frames = args.frames or model.settings.frames
    check_frames(frames)
    clips = listed_clips(args.video, frames, size) if args.video else toy_clips(frames)
    clips = list(itertools.islice(clips, args.clips))
    if not clips:
        raise ValueError("there is no clip to encode")
    scores = vae_scores(model, clips)
    print(f"{args.ckpt}, {len(clips)} clips of {frames} frames; border: {BORDER} pixels")
    print(f"{'':<12}" + "".join(f"{name:>13}" for name in scores["stitched"]))
    for how, row in scores.items():
        print(f"{how:<12}" + "".join(f"{value:>13.{2 if name[0] == 'P' else 4}f}" for name, value in row.items()))
