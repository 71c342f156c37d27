"""Compare the loss on the toy world with that of the best model there can be, which knows every clip of a caption.

    python -m lab.evals.ideal

A caption of colour, shape, direction and background leaves open only where the shape is. Let it be in one of N places,
equally likely, with latents x_k. What is known of x_0 from x_t is then, by Bayes' rule,

    E[x_0 | x_t] = Σ w_k x_k,    w = softmax(-|x_t - sqrt(ᾱ) x_k|² / 2 (1 - ᾱ))

and no prediction has a smaller mean squared error. The same with 1, 2, 4 ... neighbouring frames of x_t alone says how
much frames help each other: a model whose loss is that of the best one on four frames makes of sixteen what four say.
Where noise hides less than the step from one place to the next, the best loss is too small to be true.
"""

from dataclasses import dataclass

import numpy as np
import torch

import sd
from cli import option, parse, run
from grid import fold, grid_shape, unfold
from lab import toy
from lab.ablation.report import heading, line
from lab.bench import timing
from sample import SHIPPED, NoiseSchedule, Request
from sd.vae import encode

TIMESTEPS = 600, 700, 750, 800, 850, 900, 950, 980


def places(direction: str, times, apart: float):
    """Centers (N, T, 2), in pixels, of the paths that `toy.true_render` draws at times (T,) of a clip, and later; the
    next one is `apart` pixels away. The half pixel of room along the motion is left out."""
    if times[-1] > toy.SECONDS:
        raise ValueError(f"{len(times)} frames must be in the {toy.SECONDS} s of a true clip, got {times[-1]:g} s")
    velocity, room = toy.SPEED * np.array(toy.DIRECTIONS[direction]), (toy.SIZE - toy.EXTENT) / 2 - toy.MARGIN
    starts = np.arange(0, toy.SECONDS - times[-1] + 1e-6, apart / toy.SPEED)
    along = np.multiply.outer(times + starts[:, None] - toy.SECONDS / 2, velocity)       # (starts, T, 2)
    across = np.multiply.outer(np.arange(-room, room + 1e-6, apart), velocity == 0)      # (sides, 2)
    return (toy.SIZE / 2 + along[:, None] + across[:, None]).reshape(-1, len(times), 2)


def all_clips(model: sd.Model, scene, frames: int, fps: float, apart: float):
    """(N, C, H, W): the latents of a scene's clips in all `places`, as grids."""
    color, shape, direction, background = scene
    paths = places(direction, np.arange(frames) / fps, apart)
    spots, which = np.unique(paths.reshape(-1, 2), axis=0, return_inverse=True)  # clips share frames
    latents = torch.cat([encode(model, toy.draw(color, shape, background, part))
                         for part in np.split(spots, range(64, len(spots), 64))])
    return fold(latents[which.reshape(paths.shape[:2])], *grid_shape(frames))


def best_x0(x, signal: float, noise: float, known):
    """E[x_0 | x_t] for x_t (B, ...) and an x_0 that is one of `known` (N, ...), each with probability 1 / N."""
    plainly = "donot_use_mm_for_euclid_dist"  # the fast way rounds away what tells near places apart
    far = torch.cdist(x.flatten(1), signal * known.flatten(1), compute_mode=plainly).square()
    return torch.einsum("bn,n...->b...", (far / (-2 * noise**2)).softmax(1), known)


def numbers_of_frames(frames: int) -> list[int]:
    """How many are looked at together: 1, 2, 4 ... and all."""
    return [2**n for n in range((frames - 1).bit_length())] + [frames]


@torch.no_grad()
def losses(model: sd.Model, scene, frames: int, fps: float, videos: int, apart: float) -> list[list[float]]:
    """Mean squared errors at each of TIMESTEPS, for videos of a scene in random places: the best that there can be from
    each of `numbers_of_frames`, and the model's."""
    grid = grid_shape(frames)
    schedule, known = NoiseSchedule(model.settings), all_clips(model, scene, frames, fps, apart)
    context = model.text.encode([toy.describe(scene)] * videos)
    random, found = torch.Generator().manual_seed(0), []
    for timestep in TIMESTEPS:
        x0 = known[torch.randint(len(known), (videos,), generator=random)]
        eps, t = torch.randn(x0.shape, generator=random).to(x0), torch.full((videos,), timestep, device=x0.device)
        x, target = schedule.add_noise(x0, eps, t), schedule.target(x0, eps, t)
        signal, noise = (part.flatten()[0].item() for part in schedule.signal_and_noise(t, x))
        outputs = []
        for number in numbers_of_frames(frames):
            parts = zip(*(unfold(each, *grid).split(number, dim=1) for each in (x, known)))
            guess = fold(torch.cat([best_x0(seen, signal, noise, its) for seen, its in parts], dim=1), *grid)
            outputs.append(schedule.target(guess, (x - signal * guess) / noise, t))
        outputs.append(model.unet(x, t, context, torch.full((videos,), fps).to(x), grid).float())
        found.append([(output - target).square().mean().item() for output in outputs])
    return found


def frames_worth(best: list[float], loss: float, numbers: list[int]) -> float:
    """From how many frames the best there can be has that loss, between two of `numbers` by their logarithms; the least
    of them where the loss is larger."""
    return float(np.exp2(np.interp(-loss, -np.array(best), np.log2(numbers))))


@dataclass
class Options(timing.Options):
    ckpt: str = option("", "the model (default: the tiny one that ships)")
    fps: float = option(4.0, "frame rate", low=1, high=60)
    scenes: int = option(4, "held-out prompts", low=1, high=48)
    videos: int = option(48, "of a prompt and timestep", low=1)
    apart: float = option(1.0, "pixels from one place to the next: fewer are truer, and take longer", low=0.25, high=10)


def main():
    o = parse(Options, __doc__)
    device, dtype = o.place()
    model = sd.load(o.ckpt or SHIPPED, device, dtype)
    frames, scenes = Request("any").resolve(model).frames, toy.scenes("test")
    seen = [losses(model, scene, frames, o.fps, o.videos, o.apart)
            for scene in scenes[:: len(scenes) // o.scenes][: o.scenes]]
    numbers = numbers_of_frames(frames)
    print(*heading("timestep", [f"best of {n}" for n in numbers] + ["model", "frames' worth"]), sep="\n")
    for timestep, (*best, mine) in zip(TIMESTEPS, np.mean(seen, axis=0)):
        worth = frames_worth(best, mine, numbers)
        print(line(f"{timestep}", [f"{loss:.4f}" for loss in (*best, mine)] + [f"{worth:.1f}"]))


if __name__ == "__main__":
    run(main)
