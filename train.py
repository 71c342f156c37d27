"""The training loop: checkpoints of a run, its steps, its log. Alone or under torchrun.

    python train.py configs/tiny.py [--batch_size=8 ...]
    torchrun --nproc_per_node=8 train.py configs/base.py
    python train.py configs/base.py --dry_run

What a step sees is a function of (seed, position in the stream): samples, timesteps and noise are the same on however
many ranks, and a run that was interrupted goes on exactly where its last checkpoint stands, with nothing to restore but
weights, moments and the loss scale.
"""

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import cache

import torch
from torch.nn.parallel import DistributedDataParallel

from clips.media import write_video
from data import SOURCES
from sample import generate, to_uint8
from sd.checkpoint import Model, UserError, command_line, save
from training.account import dry_run
from training.config import Config, read_config
from training.offload import OffloadAdamW
from training.ranks import Interrupt, Ranks
from training.task import UNetTask, VAETask, loss_of, make_model, make_ready, open_clips, precision

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of a run: step-00000500.pt holds all that a resume needs


def save_run(cfg: Config, ranks: Ranks, step: int, module, optimizer: OffloadAdamW, scale: "LossScale", log: "Log"):
    """Write beside, rename into place, then drop all but the newest `keep`. Every rank must call it.

    Raises UserError when it cannot be written; the checkpoints before it stay whole.
    """
    state = {"step": step, "config": asdict(cfg), "module": module.state_dict(), "optimizer": optimizer.state_dict(),
             "scale": vars(scale), "log": log.state(), "samples": samples_a_step(cfg, ranks)}
    if ranks.rank:
        return
    path = os.path.join(cfg.out_dir, f"step-{step:08d}.pt")
    try:
        torch.save(state, path + ".part")
    except (OSError, RuntimeError) as error:  # of a full disk torch says RuntimeError
        with suppress(FileNotFoundError):
            os.remove(path + ".part")
        raise UserError(f"{path} cannot be written, is the disk full? Those before it are whole ({error})") from error
    os.replace(path + ".part", path)
    for old in run_checkpoints(cfg.out_dir)[: -cfg.keep]:
        os.remove(old)


def samples_a_step(cfg: Config, ranks: Ranks) -> int:
    return cfg.batch_size * cfg.accumulate * ranks.world


def run_checkpoints(out_dir: str) -> list[str]:
    """Oldest first."""
    return sorted(os.path.join(out_dir, name) for name in os.listdir(out_dir) if re.fullmatch(r"step-\d+\.pt", name))


def is_whole(path: str) -> bool:
    """Whether what a checkpoint holds is what was written: torch.save leaves checksums."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def newest_whole(cfg: Config) -> str:
    """The checkpoint to go on from, "" for none; damaged ones are named, and renamed out of the way of new ones."""
    found = run_checkpoints(cfg.out_dir)
    if found and not cfg.resume:
        raise UserError(f"{found[-1]} is in the way of a run with resume = False: choose another out_dir, or remove it")
    for path in reversed(found):
        if is_whole(path):
            return path
        os.replace(path, path + ".damaged")
        print(f"{path} is damaged, it is {path}.damaged now: trying the one before", file=sys.stderr, flush=True)
    return ""


def load_run(cfg: Config, ranks: Ranks, path: str, module, optimizer: OffloadAdamW, scale: "LossScale"):
    """Take up what save_run wrote -> (the step to go on with, the log's state). The file is mapped: no second copy in
    memory.

    Raises UserError when it is of another model.
    """
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    try:
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        before, logged = state["samples"], state["log"]  # of an earlier version there are none
    except (KeyError, IndexError, RuntimeError) as error:
        raise UserError(f"{path} is of another model or optimizer than the config's: choose another out_dir "
                        f"({str(error).splitlines()[0]})") from error
    if state["config"]["dtype"] == cfg.dtype:
        vars(scale).update(state["scale"])
    now = samples_a_step(cfg, ranks)
    if before != now and not ranks.rank:
        print(f"a step saw {before} samples before, now {now}: it goes on with others than it would have. batch_size "
              "times accumulate times processes keeps them", file=sys.stderr, flush=True)
    return state["step"], logged


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def learning_rate(cfg: Config, step: int) -> float:
    """A pure function of the step: linear warm-up, flat, linear cool-down to 0 at max_steps."""
    up = (step + 1) / cfg.warmup if step < cfg.warmup else 1.0
    left = cfg.max_steps - step
    down = left / cfg.cooldown if left < cfg.cooldown else 1.0
    return cfg.lr * min(up, down)


class LossScale:
    """Of fp16: what the loss is multiplied with, so that small gradients are not lost. 1 of other dtypes."""

    def __init__(self, enabled: bool):
        self.enabled, self.value, self.good, self.bad = enabled, 2.0**16 if enabled else 1.0, 0, 0

    def update(self, finite: bool):
        """Half as large after a step that overflowed, twice as large after 2,000 that did not."""
        self.good, self.bad = (self.good + 1, 0) if finite else (0, self.bad + 1)
        if self.enabled and not finite:
            self.value = max(1.0, self.value / 2)
        elif self.enabled and self.good % 2000 == 0:
            self.value *= 2


NOT_FINISHED = 75  # exit status, sysexits.h's "try again": a scheduler that sees it starts the run again
MAX_BAD_STEPS = 10  # in a row


def train(cfg: Config):
    with Ranks(cfg.timeout) as ranks:
        torch.manual_seed(cfg.seed)  # of fresh weights; everything later has generators of its own
        with ranks.patient():
            model = make_model(cfg)
            lists = ranks.from_rank_0("lists", lambda: make_ready(cfg, model, ranks.device))
            if cfg.train == "vae":
                task = VAETask(model, cfg, lists, ranks.rank, ranks.world)
            else:
                task = UNetTask(model, cfg, open_clips(cfg, model, lists, ranks.device), ranks.rank, ranks.world)
        run(cfg, ranks, model, task)


def run(cfg: Config, ranks: Ranks, model: Model, task):
    """All steps that are left."""
    commit()  # noted now: the checkout may move on meanwhile
    module, ddp, optimizer = make_trainable(cfg, ranks, task)
    scale, start, logged = LossScale(cfg.dtype == "float16"), 0, None
    path = ranks.from_rank_0("checkpoint", lambda: newest_whole(cfg))
    if path:
        start, logged = load_run(cfg, ranks, path, module, optimizer, scale)
        print(f"resume from {path}", flush=True)
    log = Log(cfg, ranks, start, logged)
    task.begin(start * cfg.accumulate, cfg.max_steps * cfg.accumulate)
    with Interrupt() as interrupt:
        for step in range(start, cfg.max_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(cfg, step)
            losses, sources = backward(cfg, ranks, task, ddp, optimizer, scale)
            ranks.at(f"update of step {step + 1}")
            norm = optimizer.step(cfg.clip or math.inf, scale.value)
            scale.update(math.isfinite(norm))
            module.zero_grad(set_to_none=ranks.world == 1)  # under DDP they stay, as views of its buckets

            done = step + 1
            stopped = interrupt.anywhere(ranks) and done < cfg.max_steps
            log.step(done, losses, sources, norm, learning_rate(cfg, step), scale)
            if scale.bad == MAX_BAD_STEPS:
                raise UserError(f"step {done}: {MAX_BAD_STEPS} gradients in a row are not finite; look at the data of "
                                "these steps, at lr, and whether dtype = bfloat16 trains")
            # killed in between, a run does both again; asked to stop, it saves while it may
            if (done % cfg.sheet_every == 0 or done == cfg.max_steps) and not stopped:
                began = time.time()
                show(cfg, ranks, model, task, optimizer, log, done)
                log.time += time.time() - began  # no part of the steps' speed
            if done % cfg.save_every == 0 or done == cfg.max_steps or stopped:
                ranks.at(f"checkpoint of step {done}")
                save_run(cfg, ranks, done, module, optimizer, scale, log)
            if stopped:
                ranks.sum(torch.zeros(1))  # torchrun kills the others soon after the first has left: wait for the save
                by = interrupt.name or "another rank"
                print(f"stopped by {by} after step {done}, saved; the same command goes on")
                sys.exit(NOT_FINISHED)


def make_trainable(cfg: Config, ranks: Ranks, task):
    """The task's module on its device, the same as DDP sees it, and the optimizer."""
    module = task.module.to(ranks.device, torch.float64 if cfg.dtype == "float64" else torch.float32)
    if ranks.device.type == "cpu":  # oneDNN's convolutions are faster so
        module.to(memory_format=torch.channels_last)
    ddp = module
    if ranks.world > 1:  # buckets that are the gradients, not a second copy of them
        ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
    group = {"params": list(module.parameters()), "lr": cfg.lr, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
    optimizer = OffloadAdamW([group], cfg.ema, ranks.rank, ranks.world, ranks.gloo)
    optimizer.attach(ddp)
    return module, ddp, optimizer


def backward(cfg: Config, ranks: Ranks, task, ddp, optimizer: OffloadAdamW, scale: LossScale):
    """Gradients of all micro-batches of a step -> (loss of each sample, names of their sources)."""
    losses, sources = [], []
    for micro in range(cfg.accumulate):
        ranks.at("data")
        names, batch = task.batch()
        ranks.at("forward and backward")
        optimizer.last_micro_batch = micro == cfg.accumulate - 1
        if ranks.world > 1:
            ddp.require_backward_grad_sync = optimizer.last_micro_batch
        loss = loss_of(cfg, ddp, batch, ranks.device)
        (loss.mean() * (scale.value / cfg.accumulate)).backward()
        losses.append(loss.detach())
        sources += names
    return torch.cat(losses), sources


# ---------------------------------------------------------------------------------------------------------------------
# Seeing it


def show(cfg: Config, ranks: Ranks, model: Model, task, optimizer: OffloadAdamW, log: "Log", step: int):
    """Rank 0 judges the model as it is now, with averaged weights where they are kept, writes it, and samples."""
    with optimizer.averaged():
        if ranks.rank == 0:
            if cfg.validation:
                log.validation(step, validate(cfg, ranks, task))
            current = snapshot(cfg, model, task)
            save(stamped(current, cfg, step), os.path.join(cfg.out_dir, "model.safetensors"))
            sheet(cfg, ranks, current, task, step)


@torch.no_grad()
def validate(cfg: Config, ranks: Ranks, task) -> dict[str, float]:
    """Mean loss on what was held out, under its names."""
    losses = {}
    for name, batch in task.validation():
        ranks.at("validation")
        losses.setdefault(name, []).append(loss_of(cfg, task.module, batch, ranks.device))
    return {name: torch.cat(parts).mean().item() for name, parts in losses.items()}


def snapshot(cfg: Config, model: Model, task) -> Model:
    """The model as one would sample it now."""
    settings = replace(model.settings, ema=bool(cfg.ema))
    if isinstance(task, VAETask):
        with torch.no_grad():
            settings = replace(settings, latent_scale=task.latent_scale())
    return Model(model.unet, model.vae, model.text, settings)


@cache
def commit() -> str:
    """Of this code as it was first asked for, "" outside a git checkout."""
    folder = os.path.dirname(os.path.abspath(__file__))
    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=folder).stdout.strip()


def stamped(model: Model, cfg: Config, step: int) -> Model:
    """With its origin written into the settings."""
    before = model.settings.origin.get(cfg.train)  # when it started from a model that was trained in the same way
    origin = model.settings.origin | {
        cfg.train: {"config": asdict(cfg), "steps": step, "commit": commit(), "licence": cfg.licence, "from": before}}
    return Model(model.unet, model.vae, model.text, replace(model.settings, origin=origin))


def sheet(cfg: Config, ranks: Ranks, model: Model, task, step: int):
    """What the model makes now, as a picture in the run's folder: a row of frames a prompt, or reconstructions."""
    if isinstance(task, VAETask):
        images = task.pool[:32].to(model.vae.quant_conv.weight) / 127.5 - 1
        with torch.no_grad():
            decoded = model.vae.decode(model.vae.encode(images)[0])
        video = to_uint8(torch.cat([images, decoded])).cpu().numpy()
    elif cfg.prompts:
        with precision(cfg, ranks.device):
            video = generate(model, list(cfg.prompts), seeds=list(range(len(cfg.prompts))),
                             progress=lambda *_: ranks.at(f"samples of step {step}"))
        video = video.reshape(-1, *video.shape[2:])
    else:
        return
    write_video(os.path.join(cfg.out_dir, f"sheet-{step:08d}.png"), video, 1, {"step": step})


class Log:
    """A line to read every `log_every` steps, a JSON line in metrics.jsonl for each of them; numbers of all ranks."""

    NAMES = (*SOURCES, "frame")

    def __init__(self, cfg: Config, ranks: Ranks, start: int, state: dict | None = None):
        self.cfg, self.ranks, self.at, self.time, self.skipped = cfg, ranks, start, time.time(), 0
        self.sums = torch.zeros(2, len(self.NAMES), dtype=torch.float64)  # losses, samples
        self.frames = samples_a_step(cfg, ranks) * (cfg.frames if cfg.train == "unet" else 1)
        if state:  # its sums are of all ranks
            self.skipped, self.sums = state["skipped"], self.sums if ranks.rank else state["sums"].clone()
        if ranks.rank == 0:
            self.path = os.path.join(cfg.out_dir, "metrics.jsonl")
            forget_after(self.path, start)
            self.wandb = start_wandb(cfg) if cfg.wandb_log else None

    def state(self) -> dict:
        """What the next line needs of the steps before it. Every rank must call it."""
        return {"sums": self.ranks.sum(self.sums.clone()), "skipped": self.skipped}

    def step(self, step, losses, sources, norm, lr, scale: LossScale):
        if not math.isfinite(norm):
            self.skipped += 1
            if self.ranks.rank == 0:
                print(f"step {step} skipped: the gradient is not finite (loss scale {scale.value:g})", flush=True)
        for loss, source in zip(losses.tolist(), sources):
            self.sums[:, self.NAMES.index(source)] += torch.tensor([loss, 1.0])
        if step % self.cfg.log_every and step != self.cfg.max_steps:
            return
        totals, counts = self.ranks.sum(self.sums)
        means = {"loss": (totals.sum() / counts.sum()).item()}
        means |= {f"loss_{n}": (t / c).item() for n, t, c in zip(self.NAMES, totals, counts) if c}
        speed = (step - self.at) / (time.time() - self.time)
        peaks = memory(self.ranks.device)
        line = {**means, "grad_norm": norm, "skipped": self.skipped, "lr": lr, "steps_per_s": speed,
                "frames_per_s": speed * self.frames} | {f"{name}_gb": gb for name, gb in peaks.items()}
        self.at, self.time, self.sums = step, time.time(), torch.zeros_like(self.sums)
        if self.ranks.rank == 0:
            left = int((self.cfg.max_steps - step) / speed)
            print(f"step {step}/{self.cfg.max_steps}  "
                  + "  ".join(f"{name} {value:.4f}" for name, value in means.items())
                  + f"  |grad| {norm:.3f}  lr {lr:.2e}  {speed:.2f} steps/s  {line['frames_per_s']:.0f} frames/s  "
                  + "  ".join(f"{name} {gb:.1f} GB" for name, gb in peaks.items())
                  + f"  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left", flush=True)
            self.write(step, line)

    def validation(self, step: int, losses: dict[str, float]):
        print(f"step {step}/{self.cfg.max_steps}  " + "  ".join(f"{n} {v:.4f}" for n, v in losses.items()), flush=True)
        self.write(step, losses)

    def write(self, step: int, line: dict):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **line, "time": time.time()}) + "\n")
        if self.wandb:
            self.wandb.log({"step": step, **line})


def memory(device) -> dict[str, float]:
    """GB at the peak so far: of this process on its host, of tensors on its device where that is another."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    return {"host": host} | ({"device": torch.cuda.max_memory_allocated() / 1e9} if device.type == "cuda" else {})


def forget_after(path: str, step: int):
    """Drop the lines of steps that will be done again, so that an interrupted run leaves no line twice."""
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step]
    with open(path + ".part", "w", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(path + ".part", path)


def start_wandb(cfg: Config):
    try:
        import wandb
    except ImportError as error:
        raise UserError("wandb_log = True needs the package: pip install wandb") from error
    return wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name or None, config=asdict(cfg), dir=cfg.out_dir)


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__ + "\nOptions, with their defaults (see the comments of class Config):\n")
        for f in fields(Config):
            print(f"  --{f.name}={getattr(Config(), f.name)!r}")
        return
    cfg = read_config(sys.argv[1], sys.argv[2:])
    dry_run(cfg) if cfg.dry_run else train(cfg)


if __name__ == "__main__":
    command_line(main)
