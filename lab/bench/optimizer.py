"""AdamW on the CPU: seconds a step of 100 M parameters, beside DeepSpeed's and torch's foreach.

    python -m lab.bench optimizer

The lines take turns, and a ratio is the median over the rounds: the memory of a shared machine is now fast, now slow.
"""

import time

import numpy as np
import torch

from cli import parse
from lab.bench.timing import NoOptions
from training.offload import OffloadAdamW

LAYERS, WIDTH, REPEATS = 25, 2000, 40
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.03}


def fresh_parameters() -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=g)) for _ in range(LAYERS)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=g)
    return params


def four_in_three_out(p, m, v, g):
    """The traffic of AdamW and none of its arithmetic."""
    p.add_(g)
    m.add_(g)
    v.add_(g)


def whole_step(params, update, clip=1.0, scale=1024.0):
    """What a plain loop does: unscale, global norm, clip, update."""
    torch._foreach_mul_([p.grad for p in params], 1 / scale)
    torch.nn.utils.clip_grad_norm_(params, clip, foreach=True)
    update()


def main(arguments):
    parse(NoOptions, __doc__, arguments)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    sets = {name: fresh_parameters() for name in ("ours", "deepspeed", "foreach")}
    ours = OffloadAdamW([{"params": sets["ours"], **SETTINGS}])
    deepspeed = DeepSpeedCPUAdam(sets["deepspeed"], adamw_mode=True, **SETTINGS)
    foreach = torch.optim.AdamW(sets["foreach"], foreach=True, **SETTINGS)
    ceiling, arrays = torch.compile(four_in_three_out), [torch.ones(LAYERS * WIDTH * WIDTH) for _ in range(4)]
    grads = [p.grad.clone() for p in sets["ours"]]
    ours.step()  # makes the state
    steps = {
        "four arrays in, three out": lambda: ceiling(*arrays),
        "update: ours (torch's fused)": ours.inner.step,
        "update: DeepSpeedCPUAdam": deepspeed.step,
        "update: torch's foreach": foreach.step,
        "whole: ours": lambda: ours.step(clip=1.0, scale=1024.0),
        "whole: DeepSpeedCPUAdam": lambda: whole_step(sets["deepspeed"], deepspeed.step),
        "whole: torch's foreach": lambda: whole_step(sets["foreach"], foreach.step),
    }
    spent = {name: [] for name in steps}
    for n in range(REPEATS + 2):
        for name, step in steps.items():
            for p, grad in zip([p for params in sets.values() for p in params], grads * len(sets)):
                p.grad.copy_(grad)  # a step leaves it scaled
            ours.inner.grad_scale = ours.inner.found_inf = None  # of the whole step before
            began = time.perf_counter()
            step()
            if n >= 2:
                spent[name].append(time.perf_counter() - began)
    for name, seconds in spent.items():
        peer = spent.get(name.split(":")[0] + ": DeepSpeedCPUAdam")
        ratio = f"{np.median(np.divide(peer, seconds)):5.2f}x DeepSpeed" if peer else " " * 15
        low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)) * 1e3
        share = np.median(np.divide(spent["four arrays in, three out"], seconds))
        print(f"{name:30} {middle:6.1f} ms (quartiles {low:.1f} to {high:.1f})   {ratio}   {share:4.0%} of the ceiling")
