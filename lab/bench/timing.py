"""Clocks and counters for bench.py: works that take turns, this machine's ceilings, a UNet's time by kind of work."""

import functools
import math
import statistics
import time
from collections import Counter
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from model import Attention, UNet
from training.account import size_of

# ---------------------------------------------------------------------------------------------------------------------
# Turns


def clock(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(works: dict, device, rounds=20, seconds=math.inf) -> dict[str, list[float]]:
    """Seconds of each work, by name. They take turns, since a shared machine is now fast, now slow; a first round does
    not count. After so many seconds no further round begins, once two have counted."""
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
    """A line each: median and range, speed as a multiple of the peer's, FLOP/s and their share of the ceiling."""
    for name, seconds in spent.items():
        middle, speed = statistics.median(seconds), flop[name] / statistics.median(seconds)
        print(f"  {name:30} {middle * 1e3:10.1f} ms ({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f})  "
              f"{np.median(np.divide(spent[peer], seconds)):5.2f}x  {speed / 1e9:8.0f} GFLOP/s  {speed / ceiling:4.0%}",
              flush=True)


def flop_of(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------------
# Ceilings


@functools.cache
def ceilings(device, dtype) -> dict[str, float]:
    """What no network can beat: FLOP/s of a large matrix product and a large convolution, bytes/s of a triad."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(8, 320, 64, 64, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(320, 320, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    p, q, r = (torch.ones(1 << 26, device=device) for _ in range(3))
    works = {"matmul": lambda: a @ b, "convolution": lambda: F.conv2d(x, w, padding=1),
             "triad": lambda: torch.add(p, q, alpha=2, out=r)}
    with torch.no_grad():
        amount = {name: flop_of(work) for name, work in works.items()} | {"triad": size_of([p, q, r])}
        spent = in_turn(works, device, rounds=10)
    speeds = {name: amount[name] / min(seconds) for name, seconds in spent.items()}
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU cores"
    print(f"ceilings of {name}, {str(dtype)[6:]}: " + ", ".join(f"{what} {s / 1e9:.0f}" for what, s in speeds.items())
          + " (GFLOP/s, of the triad GB/s)", flush=True)
    return speeds


def arithmetic(device, dtype) -> float:
    return max(ceilings(device, dtype)[what] for what in ("matmul", "convolution"))


# ---------------------------------------------------------------------------------------------------------------------
# A forward, taken to pieces

KINDS = {"conv2d": "convolutions", "linear": "linear layers", "group_norm": "normalisation",
         "layer_norm": "normalisation", "silu": "activations", "gelu": "activations"}


class Parts(TorchFunctionMode):
    """Seconds, FLOP and bytes (read and written) of what a UNet does inside, by kind of work."""

    def __init__(self, unet, device, count=False):
        super().__init__()
        self.device, self.count, self.attending, self.handles = device, count, None, []
        self.seconds, self.flop, self.bytes = Counter(), Counter(), Counter()
        for module in unet.modules():
            if isinstance(module, Attention):
                self.handles += [module.register_forward_pre_hook(self.enter), module.register_forward_hook(self.leave)]

    def enter(self, module, inputs):
        x, (k, _) = inputs
        self.attending = f"attention, {x.shape[1]} x {k.shape[2]}"

    def leave(self, *_):
        self.attending = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kind = KINDS.get(getattr(func, "__name__", "")) or self.attending or "the rest"
        if self.count:
            with FlopCounterMode(display=False) as counter:
                result = func(*args, **(kwargs or {}))
            self.flop[kind] += counter.get_total_flops()
            self.bytes[kind] += size_of(x for x in (*args, result) if isinstance(x, torch.Tensor))
        else:
            began = clock(self.device)
            result = func(*args, **(kwargs or {}))
            self.seconds[kind] += clock(self.device) - began
        return result

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*error)


def parts_table(unet, inputs, ceiling):
    """Where the time of a forward goes, each kind of work beside the ceiling that is its own."""
    with torch.no_grad(), Parts(unet, inputs[0].device) as timed:
        unet(*inputs)
    with unfilled(unet, inputs) as (shape, fakes), torch.no_grad():
        with Parts(shape, inputs[0].device, count=True) as counted:
            shape(*fakes)
    whole = sum(timed.seconds.values())
    for kind, seconds in timed.seconds.most_common():
        limit = "convolution" if kind == "convolutions" else "matmul" if counted.flop[kind] else "triad"
        speed, unit = (counted.flop[kind] or counted.bytes[kind]) / seconds, "GB/s" if limit == "triad" else "GFLOP/s"
        print(f"    {kind:28} {seconds * 1e3:9.1f} ms {seconds / whole:5.0%}  {speed / 1e9:8.1f} {unit:7} "
              f"{speed / ceiling[limit]:4.0%} of the {limit}")


def operators_table(work, device, ceiling):
    """Where the time of work(), backward passes included, goes by PyTorch's own operators: one call, profiled."""
    with FlopCounterMode(display=False) as counter:
        work()
    flop, seconds = Counter(), Counter()
    for operator, n in counter.get_flop_counts()["Global"].items():
        flop[limit_of(str(operator))] += n
    with torch.profiler.profile() as profiler:
        work()
    for event in profiler.key_averages():
        on_gpu = device.type == "cuda"
        seconds[limit_of(event.key)] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    whole = sum(seconds.values())
    for limit, s in seconds.most_common():
        share = f"{flop[limit] / s / ceiling[limit]:4.0%} of its ceiling" if limit in ceiling else ""
        print(f"    {limit:20} {s * 1e3:8.1f} ms {s / whole:5.0%}  {flop[limit] / s / 1e9:7.0f} GFLOP/s  {share}")


def limit_of(operator: str) -> str:
    """The ceiling that an operator knocks against, by the operator's name."""
    return "convolution" if "conv" in operator else "matmul" if operator.endswith("mm") else "the rest"


@contextmanager
def default_dtype(dtype):
    """Weights made inside are of this dtype from the beginning: no copy of twice the size comes first."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def unfilled(unet, inputs):
    """A UNet of the same shape and its inputs, of tensors that have no contents: to count with."""
    with FakeTensorMode() as fake:
        with default_dtype(inputs[0].dtype):
            shape = UNet(unet.cfg)
        yield shape, [fake.from_tensor(x.cpu()) for x in inputs]
