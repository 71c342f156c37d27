"""Every way to see time on one set of weights, SD 2.1's: what a forward of one half of guidance costs at 256x256.

    python -m lab.bench layouts

FLOP are counted for 16, 64 and 256 frames, and their growth is fitted as T^x between the first and the last. Seconds
are of 16 frames, the layouts in turns.
"""

import math
import statistics
from inspect import signature

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cli import parse
from grid import grid_shape
from lab.bench.timing import Options, default_dtype, in_turn
from lab.bench.unet import forward_of, unet_input
from model import UNet
from sd.presets import SD21
from sd.settings import LAYOUTS, Settings, make_layout
from training.account import count_flop

FRAMES = 16, 64, 256
SIDE = 32  # of a frame in latent pixels


def main(arguments):
    device, dtype = parse(Options, __doc__, arguments).place()
    flop = {name: [flop_of(name, T) for T in FRAMES] for name in LAYOUTS}
    with device, default_dtype(dtype):
        unet = UNet(SD21.unet)
    works = {name: forward_in(unet, name, device, dtype) for name in LAYOUTS}
    spent = in_turn(works, device, rounds=5, seconds=120)
    print(f"TFLOP of {', '.join(map(str, FRAMES))} frames; how they grow; seconds of {FRAMES[0]} frames in "
          f"{str(dtype)[6:]}, and grid's over them")
    for name, counted in flop.items():
        growth, seconds = counted[-1] / counted[0], statistics.median(spent[name])
        ratio = statistics.median(a / b for a, b in zip(spent["grid"], spent[name]))
        print(f"  {name:9}" + "".join(f"{n / 1e12:9.2f}" for n in counted) + f"  {growth:6.1f}x, T^"
              f"{math.log(growth, FRAMES[-1] / FRAMES[0]):.2f}  {seconds:8.2f} s  {ratio:5.2f}x", flush=True)


def layout_of(name: str):
    """A fresh layout for SD 2.1 that takes as many frames as there are here."""
    options = {"positions": FRAMES[-1]} if "positions" in signature(LAYOUTS[name]).parameters else {}
    return make_layout(SD21.unet, Settings(layout=name, layout_options=options))


def flop_of(name: str, T: int) -> int:
    """FLOP of a forward over T frames, counted without contents."""
    rows, cols = grid = grid_shape(T)
    with FakeTensorMode(), torch.no_grad():
        unet, context = UNet(SD21.unet, layout_of(name)), torch.zeros(1, 77, SD21.unet.context_dim)
        x, t, fps = torch.zeros(1, 4, rows * SIDE, cols * SIDE), torch.zeros(1, dtype=torch.long), torch.zeros(1)
        return count_flop(lambda: unet(x, t, context, fps, grid))


def forward_in(unet: UNet, name: str, device, dtype):
    """A forward over 16 frames with a layout, on weights that all layouts share."""
    rows, cols = grid = grid_shape(FRAMES[0])
    with device, default_dtype(dtype):
        layout = layout_of(name).to(device, dtype)
    inputs = *unet_input(device, dtype, rows * SIDE, cols * SIDE), torch.full((1,), 8.0, device=device), grid
    forward = forward_of(unet, inputs)

    def work():
        unet.layout = layout
        forward()
    return work
