"""Fifty guided steps of 16 frames of 256x256 with each layout, beside ModelScope and AnimateDiff.

    python -m lab.bench video

A step is one forward of both halves of guidance and DDIM's update. On a CPU two steps are timed, the rest is
extrapolated.
"""

import statistics

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cli import parse
from lab.bench import peers
from lab.bench.scale import flop_of, with_layouts
from lab.bench.timing import Options, arithmetic, default_dtype, in_turn, report
from lab.bench.unet import forward_of, unet_input
from model import UNet
from sample import NoiseSchedule, denoise
from sd.presets import SD21
from sd.settings import Settings
from sd.vae import AutoencoderKL
from training.account import count_flop

# (UNet, shape of the context of both halves of guidance): AnimateDiff wants it once a frame
PEERS = {"ModelScope (3-D UNet)": (peers.modelscope_unet, (2, 77, 1024)),
         "AnimateDiff (motion modules)": (peers.animatediff_unet, (32, 77, 768))}


def main(arguments):
    device, dtype = parse(Options, __doc__, arguments).place()
    steps = 50 if device.type == "cuda" else 2
    with device, default_dtype(dtype):
        plain, vae = UNet(SD21.unet), AutoencoderKL(SD21.vae)
        works = {name: their_video(make(), text, steps, device, dtype) for name, (make, text) in PEERS.items()}
    flop = {name: steps * flop_of_step(make, text) for name, (make, text) in PEERS.items()}
    for name, unet in with_layouts(plain, device, dtype).items():
        works[f"ours ({name})"] = our_video(unet, steps, device, dtype)
        flop[f"ours ({name})"] = 2 * steps * flop_of(name, 16)  # both halves of guidance
    ceiling = arithmetic(device, dtype)
    spent = in_turn(works, device, seconds=60, rounds=5)
    latents = torch.randn(16, 4, 32, 32).to(device, dtype)
    decoding = statistics.median(in_turn({"": forward_of(vae.decode, (latents,))}, device, 2)[""])
    print(f"{steps} guided steps of 16 frames of 256x256, {str(dtype)[6:]}; the VAE takes {decoding:.1f} s for all")
    report(spent, "ModelScope (3-D UNet)", flop, ceiling)
    how = "measured" if steps == 50 else f"extrapolated from {steps} steps"
    for name, seconds in spent.items():
        print(f"  {name:30} {16 / (statistics.median(seconds) * 50 / steps + decoding):7.4f} frames/s, 50 steps, {how}")


def our_video(unet, steps: int, device, dtype):
    noise, _, context = unet_input(device, dtype, 128, 128, 2)
    condition, schedule = torch.full((1,), 8.0, device=device), NoiseSchedule(Settings())

    def work():
        run = denoise(unet, schedule, noise[:1].float(), *context.split(1), condition, (4, 4))
        for _ in range(steps):
            next(run)
    return work


def their_video(unet, text, steps: int, device, dtype):
    """The same steps as diffusers' pipelines take them; text: shape of the context."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(50)
    noise, context = torch.randn(1, 4, 16, 32, 32).to(device), torch.randn(text).to(device, dtype)

    def work():
        x = noise
        with torch.no_grad():
            for t in scheduler.timesteps[:steps]:
                output = unet(torch.cat([x, x]).to(dtype), t, encoder_hidden_states=context).sample.float()
                without, with_prompt = output.chunk(2)
                x = scheduler.step(without + 7.0 * (with_prompt - without), t, x).prev_sample
    return work


def flop_of_step(make, text) -> int:
    with FakeTensorMode(), torch.no_grad():
        unet, inputs = make(), (torch.zeros(2, 4, 16, 32, 32), torch.zeros(2), torch.zeros(text))
        return count_flop(lambda: unet(*inputs))
