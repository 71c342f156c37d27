"""What a forward of one half of guidance by SD 2.1's UNet costs: with each layout, and against frames and their size.

    python -m lab.bench scale

First the layouts at 256x256, on the same weights: FLOP of 16, 64 and 256 frames, counted without contents (which takes
a few minutes), and their exponent, fitted as T^x; then seconds of 16 frames, in turns.

Then the grid, also at other sizes. Seconds are fitted as a n + b n², n being the latent pixels of the grid:
convolutions and linear layers, and attention. What would take longer than a minute, or more memory than is free, is not
measured but read off the fit.
"""

import math
from inspect import signature

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sd
from cli import parse
from grid import grid_shape
from lab.bench.timing import Options, arithmetic, default_dtype, in_turn, report
from lab.bench.unet import forward_of, unet_input
from model import UNet
from sd.device import free_memory, size_of
from sd.presets import SD21
from sd.settings import LAYOUTS, make_layout
from training.account import Account, count_flop

FRAMES, SIDE = (16, 64, 256), 256  # in which layouts are compared: numbers of frames, and their side in pixels
CASES = [(T, width, height) for width, height in ((128, 128), (256, 160), (256, 256), (512, 512))
         for T in (4, 16, 32, 64, 256)]
LONGEST = 60  # seconds of a forward up to which it is measured


def main(arguments):
    device, dtype = parse(Options, __doc__, arguments).place()
    with device, default_dtype(dtype):
        unet = UNet(SD21.unet)
    compare_layouts(unet, device, dtype)
    points = []
    for T, width, height in sorted(CASES, key=math.prod):
        grid = grid_shape(T)
        h, w = grid[0] * height // 8, grid[1] * width // 8
        (peak, least), seconds, how = peak_memory(h, w, grid), fitted(points, h * w), "fitted"
        fits = peak * dtype.itemsize / 2 < free_memory(device)  # all networks in fp16: more than this forward takes
        if fits and (len(points) < 3 or seconds < LONGEST):
            work = forward_of(unet, clip_input(T, width, height, device, dtype))
            seconds, how = min(in_turn({"": work}, device, 5, seconds=10)[""]), "measured"
            points.append((h * w, seconds))
        print(f"  {T:4} frames of {width}x{height}  {h * w:8} latent pixels  {seconds:9.2f} s {how:9} "
              f"{peak / 1e9:6.1f} GB, {least / 1e9:.1f} one network at a time", flush=True)
    a, b = coefficients(points)
    off = [fitted(points, n) / seconds - 1 for n, seconds in points]
    print(f"seconds = {a * 1e3:.3f} n / 1000 + {b * 1e6:.5f} (n / 1000)^2: half of them quadratic at n = {a / b:.0f}, "
          f"where they grow as n^1.5; the fit is off by {np.sqrt(np.mean(np.square(off))):.0%} (root mean square)")


def compare_layouts(unet: UNet, device, dtype):
    """Print FLOP and their growth, then seconds of the fewest frames beside the grid's."""
    print(f"TFLOP of {', '.join(map(str, FRAMES))} frames of {SIDE}x{SIDE}, the last over the first, their exponent")
    flop = {}
    for name in LAYOUTS:
        counted = [flop_of(name, T) for T in FRAMES]
        flop[name], exponent = counted[0], np.polyfit(np.log(FRAMES), np.log(counted), 1)[0]
        print(f"  {name:9}" + "".join(f"{n / 1e12:9.2f}" for n in counted)
              + f"  {counted[-1] / counted[0]:6.1f}x  T^{exponent:.2f}", flush=True)
    inputs = clip_input(FRAMES[0], SIDE, SIDE, device, dtype)
    works = {name: forward_of(each, inputs) for name, each in with_layouts(unet, device, dtype).items()}
    ceiling = arithmetic(device, dtype)
    print(f"{FRAMES[0]} frames, {str(dtype)[6:]}")
    report(in_turn(works, device, rounds=5, seconds=120), "grid", flop, ceiling)


def clip_input(T: int, width: int, height: int, device, dtype):
    """Arguments of UNet.forward for T frames, whose sides are in pixels."""
    rows, cols = grid = grid_shape(T)
    return (*unet_input(device, dtype, rows * height // 8, cols * width // 8), torch.full((1,), 8.0, device=device),
            grid)


def flop_of(name: str, T: int) -> int:
    """FLOP of a forward over T frames with a layout, counted without contents."""
    with FakeTensorMode(), torch.no_grad():
        unet, inputs = UNet(SD21.unet, fresh_layout(name)), clip_input(T, SIDE, SIDE, "cpu", torch.float32)
        return count_flop(lambda: unet(*inputs))


def fresh_layout(name: str):
    """A layout for SD 2.1 that takes all frames there are here."""
    options = {"positions": max(FRAMES)} if "positions" in signature(LAYOUTS[name]).parameters else {}
    return make_layout(SD21.unet, sd.Settings(layout=name, layout_options=options))


def with_layouts(unet: UNet, device, dtype) -> dict[str, UNet]:
    """The UNet with each layout, by name, on the very same tensors."""
    with torch.device("meta"):
        unets = {name: UNet(SD21.unet) for name in LAYOUTS}
    for name, each in unets.items():
        each.load_state_dict(unet.state_dict(), assign=True)
        with device, default_dtype(dtype):
            each.layout = fresh_layout(name)
    return unets


def peak_memory(h: int, w: int, grid) -> tuple[int, int]:
    """Count bytes at the peak of sampling with guidance in fp16: with all networks in memory, and with each only while
    it works (sd.device.at_work). The UNet takes both halves of guidance, the VAE 16 frames."""
    with FakeTensorMode(), torch.no_grad(), Account() as account:
        with default_dtype(torch.float16):
            model = sd.build(SD21, sd.Settings())
            inputs = torch.zeros(2, 4, h, w), torch.zeros(2), torch.zeros(2, 77, SD21.unet.context_dim), torch.zeros(2)
            frames = torch.zeros(min(16, math.prod(grid)), 4, h // grid[0], w // grid[1])
        weights = {name: size_of(part.parameters()) for name, part in model.parts().items()}
        work = {"unet": account.during(lambda: model.unet(*inputs, grid)),
                "vae": account.during(lambda: model.vae.decode(frames))}
    return sum(weights.values()) + max(work.values()), max(weights[name] + work[name] for name in work)


def coefficients(points):
    """a and b of seconds = a n + b n², by least squares of the relative error."""
    n, seconds = np.array(points, dtype=float).T
    return np.linalg.lstsq(np.stack([n / seconds, n**2 / seconds], 1), np.ones(len(n)), rcond=None)[0]


def fitted(points, n: int) -> float:
    a, b = coefficients(points) if len(points) > 1 else (0, 0)
    return a * n + b * n**2
