"""Stable Diffusion 2.1's UNet beside diffusers' on the same weights, and where its time goes.

    python -m lab.bench unet --dtype bfloat16 --side 64
"""

from dataclasses import dataclass

import torch

from cli import option, parse
from lab.bench import peers, timing
from lab.bench.parts import operators_table, parts_table, unfilled
from lab.bench.timing import arithmetic, ceilings, default_dtype, in_turn, report
from sd.presets import SD21
from training.account import count_flop


def unet_input(device, dtype, h: int, w: int, batch=1):
    """x, t and context of a UNet."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, h, w, generator=g)
    context = torch.randn(batch, 77, SD21.unet.context_dim, generator=g)
    return x.to(device, dtype), torch.full((batch,), 500, device=device), context.to(device, dtype)


def forward_of(network, inputs):
    def work():
        with torch.no_grad():
            network(*inputs)
    return work


def backward_of(unet, inputs):
    def work():
        output = unet(*inputs)
        getattr(output, "sample", output).square().mean().backward()
        unet.zero_grad()
    return work


@dataclass
class Options(timing.Options):
    side: int = option(0, "of the latent grid; without, both", choices=(0, 64, 128))
    batch: int = option(1, "grids", low=1)
    compile: bool = option(False, "both also through torch.compile")


def main(arguments):
    o = parse(Options, __doc__, arguments)
    device, dtype = o.place()
    with device, default_dtype(dtype):
        theirs = peers.diffusers_unet(SD21.unet)
    unets = {"diffusers": theirs, "ours": peers.ours_with_weights_of(theirs, SD21.unet)}
    if o.compile:
        unets |= {f"{name}, compiled": torch.compile(unet) for name, unet in unets.items()}
    for side in [o.side] if o.side else (64, 128):
        inputs = unet_input(device, dtype, side, side, o.batch)
        for what, kind in (("forward", forward_of), ("forward and backward", backward_of)):
            with unfilled(unets["ours"], inputs) as fakes:
                flop = count_flop(kind(*fakes))
            ceiling = arithmetic(device, dtype)
            print(f"{what}, {str(dtype)[6:]}, {o.batch} x {side}x{side}: {flop / 1e12:.2f} TFLOP", flush=True)
            report(in_turn({name: kind(unet, inputs) for name, unet in unets.items()}, device, seconds=60),
                   "diffusers", dict.fromkeys(unets, flop), ceiling)
        parts_table(unets["ours"], inputs, ceilings(device, dtype))
        print("  with its backward pass, by operator")
        operators_table(backward_of(unets["ours"], inputs), device, ceilings(device, dtype))
