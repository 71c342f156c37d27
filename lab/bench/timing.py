"""The clock of the benchmarks: works that take turns, and the ceilings of this machine."""

import functools
import math
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from cli import option
from sd.device import DTYPES, pick_device, pick_dtype, size_of
from training.account import count_flop


@dataclass
class Options:
    """Where a benchmark runs, and in which precision."""

    device: str = option("", "cuda, mps or cpu (default: the first of them that is there)")
    dtype: str = option("auto", "precision; auto is float16 on cuda, bfloat16 on a CPU with units for it, else float32",
                        choices=DTYPES)

    def place(self) -> tuple[torch.device, torch.dtype]:
        device = pick_device(self.device)
        return device, pick_dtype(self.dtype, device)


@dataclass
class NoOptions:
    """For a benchmark that has nothing to choose."""


@contextmanager
def default_dtype(dtype):
    """Context manager: make weights in this dtype from the beginning, without a copy of twice the size before it."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Turns


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    getattr(torch, device.type).synchronize()
    return time.perf_counter()


def in_turn(works: dict, device, rounds=20, seconds=math.inf) -> dict[str, list[float]]:
    """Run works in turns -> seconds of each run, by name: a shared machine is now fast, now slow, for all alike.

    A first round warms up and does not count. After `seconds` no further round begins, once two have counted.
    """
    spent, began = {name: [] for name in works}, time.perf_counter()
    for n in range(rounds + 1):
        if n > 2 and time.perf_counter() - began > seconds:
            break
        for name, work in works.items():
            start = clock(device)
            work()
            if n:
                spent[name].append(clock(device) - start)
    return spent


def report(spent: dict[str, list[float]], peer: str, flop: dict[str, float], ceiling: float):
    """Print a line each: median and range, speed as a multiple of the peer's, FLOP/s and their share of the ceiling."""
    for name, seconds in spent.items():
        middle, speed = statistics.median(seconds), flop[name] / statistics.median(seconds)
        print(f"  {name:30} {middle * 1e3:10.1f} ms ({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f})  "
              f"{np.median(np.divide(spent[peer], seconds)):5.2f}x  {speed / 1e9:8.0f} GFLOP/s  {speed / ceiling:4.0%}",
              flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Ceilings


@functools.cache
def ceilings(device, dtype) -> dict[str, float]:
    """Measure what no network can beat: FLOP/s of a large matrix product and convolution, bytes/s of a triad."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(8, 320, 64, 64, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(320, 320, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    p, q, r = (torch.ones(1 << 26, device=device) for _ in range(3))
    works = {"matmul": lambda: a @ b, "convolution": lambda: F.conv2d(x, w, padding=1),
             "triad": lambda: torch.add(p, q, alpha=2, out=r)}
    with torch.no_grad():
        amount = {name: count_flop(work) for name, work in works.items()} | {"triad": size_of([p, q, r])}
        spent = in_turn(works, device, rounds=10)
    speeds = {name: amount[name] / min(seconds) for name, seconds in spent.items()}
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU cores"
    print(f"ceilings of {name}, {str(dtype)[6:]}: " + ", ".join(f"{what} {s / 1e9:.0f}" for what, s in speeds.items())
          + " (GFLOP/s, of the triad GB/s)", flush=True)
    return speeds


def arithmetic(device, dtype) -> float:
    return max(ceilings(device, dtype)[what] for what in ("matmul", "convolution"))
