"""What sixteen frames of 256x256 take: ours beside ModelScope and AnimateDiff, and what makes ours faster.

    python -m lab.bench video

Steps of every kind take turns: with both halves of guidance or one, with the whole UNet or, where deep features are
reused, its outermost blocks. A row is the sum of its steps, by their medians; frames a second count the VAE, too. The
arithmetic of a sampler is part of a step, and next to nothing of it.
"""

import math
import statistics
from collections import Counter
from dataclasses import replace

import torch

from beyond.fast import FAST, Reuse
from cli import parse
from lab.bench import peers
from lab.bench.scale import with_layouts
from lab.bench.timing import Options, default_dtype, in_turn
from lab.bench.unet import forward_of, unet_input
from model import UNet
from sample import NoiseSchedule, Request, denoise
from sd.presets import SD21
from sd.settings import LAYOUTS, Settings
from sd.vae import AutoencoderKL

# (UNet, shape of the context of both halves of guidance): AnimateDiff wants it once a frame
PEERS = {"ModelScope": (peers.modelscope_unet, (2, 77, 1024)), "AnimateDiff": (peers.animatediff_unet, (32, 77, 768))}
PUBLISHED, FEWER = 50, FAST["steps"]  # steps: what the peers' papers take, and what a better solver needs
SCHEDULE = NoiseSchedule(Settings())


def main(arguments):
    device, dtype = parse(Options, __doc__, arguments).place()
    at_once = 10 if device.type == "cuda" else 1
    with device, default_dtype(dtype):
        plain, vae = UNet(SD21.unet), AutoencoderKL(SD21.vae)
        works = {name: their_step(make(), text, device, dtype) for name, (make, text) in PEERS.items()}
    unets = with_layouts(plain, device, dtype)
    for name, *kind in sorted({(name, *kind) for name, request in rows().values() for kind in steps_of(request)}):
        works[(name, *kind)] = our_step(unets[name], *kind, device, dtype)
    spent = in_turn({key: repeated(step, at_once) for key, step in works.items()}, device, seconds=120, rounds=7)
    seconds = {key: statistics.median(each) / at_once for key, each in spent.items()}
    latents = torch.randn(16, 4, 32, 32).to(device, dtype)
    decoding = statistics.median(in_turn({"": forward_of(vae.decode, (latents,))}, device, 2)[""])
    show(seconds, decoding, f"{device.type}, {str(dtype)[6:]}")


def rows() -> dict[str, tuple[str, Request]]:
    """Ours: what a row says, its layout, and how it samples."""
    whole = Request("any", steps=PUBLISHED, guidance=7.0, guidance_interval=(0, 999), reuse=1)
    fewer, (low, high) = replace(whole, steps=FEWER), FAST["guidance_interval"]
    seldom, said = replace(fewer, guidance_interval=(low, high)), f"{FEWER} steps, guided at {low}..{high}"
    return {**{f"{name}, {PUBLISHED} steps": (name, whole) for name in LAYOUTS},
            f"grid, {FEWER} steps": ("grid", fewer), f"grid, {said}": ("grid", seldom),
            f"grid, {said}, reuse 2": ("grid", replace(seldom, reuse=2)),
            f"pooled, {FEWER} steps": ("pooled", fewer), f"pooled, {said}": ("pooled", seldom)}


def steps_of(request: Request, timesteps=None) -> Counter:
    """How many steps of each kind a resolved request has: (halves of guidance, whether the whole UNet runs)."""
    timesteps = timesteps or SCHEDULE.sampling_timesteps(request.steps)
    counts, before, full = Counter(), 0, Reuse(None, timesteps, request.reuse).full
    for t in timesteps:
        halves = 1 if request.guidance_at(t) == 1 else 2
        counts[halves, t in full or halves > before] += 1  # a step in which guidance begins is full, too
        before = halves
    return counts


def our_step(unet, halves: int, whole: bool, device, dtype):
    """() -> a step of that kind is taken, each time the next one of a long run."""
    noise, _, context = unet_input(device, dtype, 128, 128, 2)
    steps, guidance, condition = SCHEDULE.timesteps, 7.0 if halves == 2 else 1.0, torch.full((1,), 8.0, device=device)
    called = unet if whole else Reuse(unet, SCHEDULE.sampling_timesteps(steps), steps)  # after a first step, all reuse
    run = denoise(called, SCHEDULE, noise[:1].float(), *context.split(1), condition, (4, 4), steps=steps,
                  guidance=guidance)
    return lambda: next(run)


def their_step(unet, text, device, dtype):
    """The same, as diffusers' pipelines take it; text: shape of the context."""
    from diffusers import DPMSolverMultistepScheduler

    noise, context = torch.randn(1, 4, 16, 32, 32).to(device), torch.randn(text).to(device, dtype)

    def steps():
        while True:
            scheduler, x = DPMSolverMultistepScheduler(beta_schedule="scaled_linear"), noise
            scheduler.set_timesteps(PUBLISHED)
            for t in scheduler.timesteps:
                with torch.no_grad():
                    output = unet(torch.cat([x, x]).to(dtype), t, encoder_hidden_states=context).sample.float()
                without, with_prompt = output.chunk(2)
                x = scheduler.step(without + 7.0 * (with_prompt - without), t, x).prev_sample
                yield
    run = steps()
    return lambda: next(run)


def repeated(step, times: int):
    def work():
        for _ in range(times):
            step()
    return work


def show(seconds: dict, decoding: float, where: str):
    """Print what a step of each kind takes, and then the rows."""
    print(f"a step of 16 frames of 256x256, {where}; the VAE takes {decoding:.2f} s for all frames")
    for key, each in seconds.items():
        name, halves, whole = key if isinstance(key, tuple) else (key, 2, True)
        said = f"{name}, {'both halves' if halves == 2 else 'one half'}" + ", reused features" * (not whole)
        print(f"  {said:45} {each * 1e3:10.1f} ms  {seconds['ModelScope'] / each:6.2f}x")
    total = {f"{name}, {steps} steps": steps * seconds[name] for name in PEERS for steps in (PUBLISHED, FEWER)}
    for said, (name, request) in rows().items():
        total[said] = math.fsum(n * seconds[(name, *kind)] for kind, n in steps_of(request).items())
    print("a video: steps, speed beside ModelScope's published steps, frames a second with the VAE")
    for said, each in total.items():
        print(f"  {said:45} {each:10.2f} s   {total[f'ModelScope, {PUBLISHED} steps'] / each:6.2f}x  "
              f"{16 / (each + decoding):8.3f} frames/s")
