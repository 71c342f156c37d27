"""What a run tells: lines on the terminal, metrics.jsonl, and where a model comes from in the file that holds it."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import cache

import torch

try:
    import resource
except ImportError:  # on Windows the memory of the host is not told
    resource = None

from cli import ROOT, write_text
from clips.samples import SOURCES
from sd import Model
from training.checkpoints import samples_a_step
from training.config import Config, portable
from training.ranks import Ranks

# ---------------------------------------------------------------------------------------------------------------------
# The origin of a model


@cache
def commit() -> str:
    """The commit of this code when it was first asked for, "" outside a git checkout."""
    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()


def stamped(model: Model, cfg: Config, step: int) -> Model:
    """The model with its origin in the settings, without a path of this machine."""
    before = model.settings.origin.get(cfg.train)  # where it started from a model that was trained in the same way
    config = {name: portable(value) for name, value in asdict(cfg).items()}
    origin = model.settings.origin | {
        cfg.train: {"config": config, "steps": step, "commit": commit(), "licence": cfg.licence, "from": before}}
    return replace(model, settings=replace(model.settings, origin=origin, ema=bool(cfg.ema)))


# ---------------------------------------------------------------------------------------------------------------------
# The log


class Log:
    """A line to read every `log_every` steps, and the same numbers as a line of metrics.jsonl: means over all ranks.

    start  the step that the run goes on from
    state  what `state` gave there
    """

    NAMES = (*SOURCES, "frame")

    def __init__(self, cfg: Config, ranks: Ranks, start: int, state: dict | None = None):
        self.cfg, self.ranks, self.at, self.time, self.skipped = cfg, ranks, start, time.time(), 0
        self.sums = torch.zeros(2, len(self.NAMES), dtype=torch.float64)  # losses, samples
        if state:  # its sums are those of all ranks
            self.skipped, self.sums = state["skipped"], self.sums if ranks.rank else state["sums"].clone()
        if ranks.rank == 0:
            self.path = os.path.join(cfg.out_dir, "metrics.jsonl")
            forget_after(self.path, start)
            self.wandb = start_wandb(cfg) if cfg.wandb_log else None

    def begin(self, cfg: Config):
        """Count the frames of a stage of the run."""
        self.frames = samples_a_step(cfg, self.ranks) * (cfg.frames if cfg.train == "unet" else 1)

    def state(self) -> dict:
        """What the next line needs of the steps before it. Every rank must call it."""
        return {"sums": self.ranks.sum(self.sums.clone()), "skipped": self.skipped}

    def step(self, step: int, losses: torch.Tensor, sources: list[str], norm: float, lr: float, scale: float):
        """Add the losses of a step's samples; write a line when it is time. Every rank must call it."""
        if not math.isfinite(norm):
            self.skipped += 1
            if self.ranks.rank == 0:
                print(f"step {step} skipped: the gradient is not finite (loss scale {scale:g})", flush=True)
        for loss, source in zip(losses.tolist(), sources):
            self.sums[:, self.NAMES.index(source)] += torch.tensor([loss, 1.0])
        if step % self.cfg.log_every and step != self.cfg.max_steps:
            return
        totals, counts = self.ranks.sum(self.sums)
        means = {"loss": (totals.sum() / counts.sum()).item()}
        means |= {f"loss_{n}": (t / c).item() for n, t, c in zip(self.NAMES, totals, counts) if c}
        speed, peaks = (step - self.at) / (time.time() - self.time), memory(self.ranks.device)
        line = {**means, "grad_norm": norm, "skipped": self.skipped, "lr": lr, "steps_per_s": speed,
                "frames_per_s": speed * self.frames} | {f"{name}_gb": gb for name, gb in peaks.items()}
        self.at, self.time, self.sums = step, time.time(), torch.zeros_like(self.sums)
        if self.ranks.rank == 0:
            left = int((self.cfg.max_steps - step) / speed)
            self.tell(step, *(f"{name} {value:.4f}" for name, value in means.items()), f"|grad| {norm:.3f}",
                      f"lr {lr:.2e}", f"{speed:.2f} steps/s", f"{line['frames_per_s']:.0f} frames/s",
                      *(f"{name} {gb:.1f} GB" for name, gb in peaks.items()),
                      f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
            self.write(step, line)

    def validation(self, step: int, losses: dict[str, float]):
        """Write the losses of what is held out; rank 0 has them."""
        self.tell(step, *(f"{name} {value:.4f}" for name, value in losses.items()))
        self.write(step, losses)

    def tell(self, step: int, *texts: str):
        print(f"step {step}/{self.cfg.max_steps}", *texts, sep="  ", flush=True)

    def write(self, step: int, line: dict):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **line, "time": time.time()}) + "\n")
        if self.wandb:
            self.wandb.log({"step": step, **line})


def memory(device) -> dict[str, float]:
    """GB at the peak so far: of this process on its host, of tensors on its device where that is another."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9} if resource else {}
    return host | ({"device": torch.cuda.max_memory_allocated() / 1e9} if device.type == "cuda" else {})


def forget_after(path: str, step: int):
    """Drop the lines of steps that will be done again, so that an interrupted run leaves no line twice."""
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_text(path, "".join(lines))


def start_wandb(cfg: Config):
    import wandb  # no dependency

    return wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name or None, config=asdict(cfg), dir=cfg.out_dir)
