"""A training step of configs/tiny.py, beside diffusers' UNet in a plain loop.

    python -m lab.bench step --optimizer=adamw [--batch_size=4 ...]

Any option of a training config goes. The plain loop has torch's AdamW, whatever the config has.
"""

import math
import os
import statistics
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from cli import ROOT
from grid import fold
from lab.bench import peers
from lab.bench.parts import operators_table
from lab.bench.timing import ceilings, in_turn
from sd.device import pick_device, pick_dtype, precision
from sd.presets import TINY, ModelConfig
from train import UNetTask
from training.account import setting
from training.config import Config, read_config
from training.muon import parameter_groups
from training.offload import OffloadAdamW
from training.setup import loss_of


def main(arguments):
    device, cfg = pick_device(), read_config([os.path.join(ROOT, "configs", "tiny.py"), *arguments], __doc__)
    dtype = pick_dtype(cfg.dtype, device)
    cfg = replace(cfg, dtype=str(dtype).removeprefix("torch."))
    parts = {"diffusers": plain_step(cfg, device), "ours": our_step(cfg, device, TINY)}
    spent = in_turn({(name, part): work for name, step in parts.items() for part, work in step.items()}, device,
                    seconds=120)
    whole = {name: np.sum([spent[name, part] for part in parts[name]], axis=0) for name in parts}
    print(f"batches of {cfg.batch_size}, {cfg.dtype}")
    for name, seconds in whole.items():
        middle = {part: statistics.median(spent[name, part]) * 1e3 for part in parts[name]}
        print(f"  {name:10} {statistics.median(seconds) * 1e3:7.1f} ms a step  "
              f"{np.median(whole['diffusers'] / seconds):5.2f}x   "
              + "  ".join(f"{part} {ms:.0f}" for part, ms in middle.items()))
    operators_table(lambda: [work() for work in parts["ours"].values()], device, ceilings(device, dtype))


def our_step(cfg: Config, device, shape: ModelConfig):
    """The parts of a step of train.py, by name."""
    with device:
        module, batch, _ = setting(cfg, UNetTask.example, shape)
    if device.type == "cpu":
        module.to(memory_format=torch.channels_last)
    optimizer, losses = OffloadAdamW(parameter_groups(module, cfg), cfg.ema), []
    optimizer.attach(module)

    def update():
        optimizer.step(cfg.clip)
        module.zero_grad(set_to_none=True)

    return {"forward": lambda: losses.append(loss_of(cfg, module, batch, device).mean()),
            "backward": lambda: losses.pop().backward(), "update": update}


def plain_step(cfg: Config, device):
    """The same with diffusers' UNet and moving average, and torch's clipping and AdamW with their defaults."""
    from diffusers.training_utils import EMAModel

    with device:
        ours, (latents, tokens, _, t, eps), _ = setting(cfg, UNetTask.example, TINY)
        unet, losses = peers.diffusers_unet(TINY.unet), []
    x0, text, schedule = fold(latents, *ours.grid), ours.text, ours.schedule
    params = [*unet.parameters(), *(p for p in text.parameters() if p.requires_grad)]
    optimizer, average = torch.optim.AdamW(params, cfg.lr), EMAModel(params)

    def forward():
        with precision(getattr(torch, cfg.dtype), device):
            output = unet(schedule.add_noise(x0, eps, t), t, text(tokens)).sample
        losses.append(F.mse_loss(output.float(), schedule.target(x0, eps, t)))

    def update():
        torch.nn.utils.clip_grad_norm_(params, cfg.clip or math.inf)
        optimizer.step()
        average.step(params)
        optimizer.zero_grad()

    return {"forward": forward, "backward": lambda: losses.pop().backward(), "update": update}
