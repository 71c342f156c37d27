"""The loss and the loop. Alone or under torchrun.

    python train.py configs/tiny.py [--batch_size=8 ...]
    torchrun --nproc_per_node=8 train.py configs/base.py
    python train.py configs/base.py --dry_run

What a step sees is a function of (seed, position in the stream): samples, timesteps and noise are the same on however
many ranks, and a run that was interrupted goes on exactly where its last checkpoint stands, with nothing to restore but
weights, moments and the loss scale. On a CPU it ends with the same weights, to the bit. A GPU adds in no fixed order:
there only what goes into a step is the same.
"""

import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cli
import sd
from beyond.frames import KINDS, UNKNOWN, draw_given, known_frames
from clips.samples import first_clips
from clips.write import contact_sheet, write_video
from data import Batch, Faults, Stream, batches, generator
from grid import fold, frame_of_pixel, grid_shape
from sample import NoiseSchedule, Request, generate
from sd.device import NotFinite, check_memory, pick_dtype, precision
from training.checkpoints import claimed, load_run, newest_whole, save_run
from training.config import Config, Stage, in_parts, read_config, stages
from training.dry_run import announce, dry_run
from training.log import Log, commit, stamped
from training.low_rank import save_lora
from training.muon import parameter_groups
from training.offload import OffloadAdamW
from training.ranks import Interrupt, Ranks
from training.setup import check_inputs, loss_of, make_model, make_ready, open_clips, weights_dtype
from training.vae import VAETask

# ---------------------------------------------------------------------------------------------------------------------
# The loss: a module whose forward it is, so that DDP sees all of it


class Denoising(nn.Module):
    """Mean squared error of the UNet's prediction: forward gives the loss of each sample (B,).

    text  the tower, or None where the context was encoded ahead
    """

    def __init__(self, model: sd.Model, cfg: Config, text: nn.Module | None):
        super().__init__()
        self.unet, self.text = model.unet, text
        self.unet.checkpointing = cfg.checkpointing
        for part in model.text.unused() if cfg.train_text else [model.text]:
            part.requires_grad_(False)
        self.schedule, self.grid = NoiseSchedule(model.settings), grid_shape(cfg.frames)

    def forward(self, latents, prompt, fps, t, eps, given=None):
        """latents (B, T, 4, h, w) clean, prompt: tokens (B, L) or context (B, L, D), fps (B,), t (B,), eps like the
        folded grid; given (B, T): the timestep of each frame that is known, UNKNOWN for the others, which count."""
        x0 = fold(latents, *self.grid)
        context = self.text(prompt) if self.text else prompt
        if given is None:
            output = self.unet(self.schedule.add_noise(x0, eps, t), t, context, fps, self.grid)
            error = output - self.schedule.target(x0, eps, t)  # in full precision, as the target is
            return error.square().mean(dim=(1, 2, 3))
        t = torch.where(given == UNKNOWN, t[:, None], given)
        cells = frame_of_pixel(*x0.shape[2:], *self.grid, device=x0.device)
        given, level = given[:, None, cells], t[:, None, cells]  # (B, 1, H, W)
        x = torch.where(given == 0, x0, self.schedule.add_noise(x0, eps, level))
        error = self.unet(x, t, context, fps, self.grid) - self.schedule.target(x0, eps, level)
        counted = (given == UNKNOWN).expand_as(error)
        return (error.square() * counted).sum(dim=(1, 2, 3)) / counted.sum(dim=(1, 2, 3))


VALIDATION_TIMESTEPS = (100, 300, 500, 700, 900)  # one would mislead: what is learned moves from noisy to clean


def draw_timesteps(cfg: Config, positions: list[int], world: int) -> torch.Tensor:
    """Timesteps of the samples at some positions of the stream (B,), in the training range cfg.timesteps, half-open.

    Uniform u, then shifted by s and narrowed by w: t / (1 - t) = s (u / (1 - u))^w, odds that are scaled and squeezed.
    The u of a step, on all ranks together, are stratified: its loss is less of a lottery.
    """
    size = cfg.batch_size * cfg.accumulate * world
    strata = torch.randperm(size, generator=generator("strata", cfg.seed, positions[0] // size))
    inside = torch.stack([torch.rand((), generator=generator("timestep", cfg.seed, p)) for p in positions])
    u = (strata[[p % size for p in positions]] + inside) / size
    first, last = cfg.timesteps
    noisy, clean = cfg.timestep_shift * u**cfg.timestep_width, (1 - u) ** cfg.timestep_width
    t = first + (last - first) * noisy / (noisy + clean)
    return t.long().clamp(max=last - 1)  # the largest u below 1 can round up to 1


# ---------------------------------------------------------------------------------------------------------------------
# What is trained. A task has a module (its loss), batches for it, and something to show; `TASKS` at the end has both.


class UNetTask:
    """The denoiser on latents."""

    def __init__(self, cfg: Config, model: sd.Model, lists: dict[str, str], ranks: Ranks):
        self.model, self.ranks, self.faults = model, ranks, Faults(cfg.max_bad)
        if cfg.prompts or cfg.sheet_clips:
            Request(cfg.prompts or ("of a clip",)).resolve(model)  # raises what no sheet could be made of
        self.clips = open_clips(cfg, model, lists, ranks.device)
        self.data = self.clips.data
        self.module = Denoising(model, cfg, model.text if self.clips.empty_context is None else None)
        self.begin(stages(cfg, ranks.world)[-1], cfg.max_steps)  # what is wrong with it is told now

    def begin(self, stage: Stage, step: int):
        """Be ready for the steps of a stage of the run, from one of them on."""
        self.cfg = cfg = stage.cfg
        self.stream = Stream(self.clips, cfg.mix, cfg.batch_size, cfg.seed, self.ranks.rank, self.ranks.world,
                             cfg.drop_caption, cfg.validation, stage.position, cfg.fps_values)
        first, last = ((n - stage.first) * cfg.accumulate for n in (step, stage.last))
        self.loader = batches(self.stream, first, last, cfg.workers)
        self.module.grid = rows, cols = grid_shape(cfg.frames)
        vae = self.model.vae.cfg
        self.shape = vae.latent_channels, rows * cfg.height // vae.downsampling, cols * cfg.width // vae.downsampling
        self.held_out = None

    def batch(self):
        """The next micro-batch: (names of the sources, arguments of the module)."""
        batch = next(self.loader)
        noise = self.noise(generator("noise", self.cfg.seed, position) for position in batch.positions)
        t = draw_timesteps(self.cfg, batch.positions, self.ranks.world)
        arguments = [*self.clean(batch), t, noise]
        if self.cfg.given_share:
            arguments.append(torch.stack([draw_given(self.cfg.frames, self.cfg.given_share, generator(
                "given", self.cfg.seed, position)) for position in batch.positions]))
        return batch.sources, arguments

    def clean(self, batch: Batch):
        """Latents, prompt and FPS."""
        self.faults.add(len(batch.samples), batch.faults)
        prompt = self.model.text.tokenize(batch.captions)[0] if batch.context is None else batch.context
        scale = self.model.settings.latent_scale
        latents = batch.latents(self.model.vae, scale, self.cfg.frames, self.cfg.draw_latents)
        return latents, prompt, batch.fps

    def noise(self, generators) -> torch.Tensor:
        """ε of samples, each from its own generator, so that it does not depend on who else is in the batch."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in generators])

    def validation(self):
        """(name, arguments of the module): what was held out at fixed timesteps, always under the same noise; with
        given frames in training also with each kind of these."""
        with self.ranks.patient("validation"):  # clips that were not encoded ahead are decoded here
            self.held_out = self.held_out or self.clean(self.stream.validation())
        n, kinds = len(self.held_out[0]), ["", *KINDS] if self.cfg.given_share else [""]
        for kind, t in product(kinds, VALIDATION_TIMESTEPS):
            noise = self.noise(generator("validation", t, i) for i in range(n))
            whole = [*self.held_out, torch.full((n,), t), noise]
            if kind:
                known = [known_frames(kind, self.cfg.frames, generator("known", i)) for i in range(n)]
                whole.append(torch.where(torch.stack(known), 0, UNKNOWN))
            for part in zip(*(x.split(self.cfg.batch_size) for x in whole)):
                yield f"val_loss_{kind}{'_' * bool(kind)}{t}", part

    def snapshot(self) -> sd.Model:
        """The model as one would sample it now."""
        return self.model

    def sheet(self, model: sd.Model):
        """A picture uint8 (H, W, 3) of samples of the config's prompts, a row of frames each, then of the pairs of
        `sheet_clips`; None where there are none."""
        clips = first_clips(self.stream.clips, self.cfg.sheet_clips)
        prompts = (*self.cfg.prompts, *(clip.caption for clip in clips))
        if not prompts:
            return None
        try:
            with precision(getattr(torch, self.cfg.dtype), self.ranks.device):
                videos = generate(model, Request(prompts), seeds=range(len(prompts)),
                                  progress=lambda *_: self.ranks.at("samples"))
        except NotFinite as error:  # no reason to end a run
            cli.warn(f"no sheet of samples: {error}")
            return None
        rows, made = list(videos[: len(self.cfg.prompts)]), videos[len(self.cfg.prompts) :]
        for clip, video in zip(clips, made):
            rows += [clip.seen(model.vae), video]
        return contact_sheet(np.concatenate(rows), cols=len(rows[0]))

    @staticmethod
    def example(cfg: Config, model: sd.Model):
        """The module, and a batch of zeros for it: what a dry run counts and times."""
        size, factor, text = cfg.batch_size, model.vae.cfg.downsampling, model.text.cfg
        w, h, channels = cfg.width // factor, cfg.height // factor, model.vae.cfg.latent_channels
        live = cfg.train_text or not cfg.encoded
        prompt = torch.zeros(size, text.length, *([] if live else [text.width]), dtype=torch.long if live else None)
        rows, cols = grid_shape(cfg.frames)
        batch = (torch.zeros(size, cfg.frames, channels, h, w), prompt, torch.zeros(size),
                 torch.zeros(size, dtype=torch.long), torch.zeros(size, channels, rows * h, cols * w))
        return Denoising(model, cfg, model.text if live else None), batch


TASKS = {"unet": UNetTask, "vae": VAETask}

# ---------------------------------------------------------------------------------------------------------------------
# The loop


def learning_rate(cfg: Config, step: int) -> float:
    """A pure function of the step: linear warm-up, flat, linear cool-down to 0 at max_steps."""
    up = (step + 1) / cfg.warmup if step < cfg.warmup else 1.0
    left = cfg.max_steps - step
    down = left / cfg.cooldown if left < cfg.cooldown else 1.0
    return cfg.lr * min(up, down)


class LossScale:
    """Dynamic loss scaling for fp16, so that small gradients do not underflow; 1 for other dtypes."""

    def __init__(self, enabled: bool):
        self.enabled, self.value, self.good, self.bad = enabled, 2.0**16 if enabled else 1.0, 0, 0

    def update(self, finite: bool):
        """Halve after a step that overflowed, double after 2,000 in a row that did not."""
        self.good, self.bad = (self.good + 1, 0) if finite else (0, self.bad + 1)
        if self.enabled and not finite:
            self.value = max(1.0, self.value / 2)
        elif self.enabled and self.good % 2000 == 0:
            self.value *= 2


NOT_FINISHED = 75  # exit status, sysexits.h's "try again": a scheduler that sees it starts the run again
MAX_BAD_STEPS = 10  # in a row


def train(cfg: Config, tasks=TASKS):
    """Train a run from its config, or from its newest checkpoint on, to its end."""
    if not int(os.environ.get("RANK", 0)):
        check_inputs(cfg)
    with Ranks(cfg.timeout) as ranks, claimed(cfg, ranks):
        cfg = in_precision(cfg, ranks)
        torch.manual_seed(cfg.seed)  # of fresh weights; everything later has generators of its own
        with ranks.patient("model and data"):
            model = make_model(cfg)
            check_memory(model, cfg.frames if cfg.train == "unet" else 1, cfg.width, cfg.height, cfg.batch_size,
                         ranks.device)
            lists = make_ready(cfg, model, ranks)
            task = tasks[cfg.train](cfg, model, lists, ranks)
        run(cfg, ranks, task)


def in_precision(cfg: Config, ranks: Ranks) -> Config:
    """Resolve dtype = "auto" for this machine, and say what it is."""
    dtype = str(pick_dtype(cfg.dtype, ranks.device)).removeprefix("torch.")
    if ranks.rank == 0:
        print(f"{dtype} on {ranks.device}", flush=True)
    return replace(cfg, dtype=dtype)


def run(cfg: Config, ranks: Ranks, task):
    """Train all steps that are left."""
    commit()  # noted now: the checkout may move on meanwhile
    module, ddp, optimizer = make_trainable(cfg, ranks, task)
    scale, start, logged = LossScale(cfg.dtype == "float16"), 0, None
    path = ranks.from_rank_0("checkpoint", lambda: newest_whole(cfg))
    if path:
        start, logged = load_run(cfg, ranks, path, module, optimizer, scale, task.data)
        print(f"resume from {path}", flush=True)
    log = Log(cfg, ranks, start, logged)
    parts = stages(cfg, ranks.world)
    with Interrupt() as interrupt:
        for step in range(start, cfg.max_steps):
            stage = next(part for part in parts if step < part.last)
            if step in (start, stage.first):
                task.begin(stage, step)
                log.begin(stage.cfg)
            lr = learning_rate(stage.cfg, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses, sources = backward(stage.cfg, ranks, task, ddp, optimizer, scale)
            ranks.at(f"update of step {step + 1}")
            norm = optimizer.step(stage.cfg.clip, scale.value)
            scale.update(math.isfinite(norm))
            module.zero_grad(set_to_none=ranks.world == 1)  # under DDP they stay, as views of its buckets

            done = step + 1
            last = done == cfg.max_steps
            stopped = interrupt.anywhere(ranks) and not last
            log.step(done, losses, sources, norm, lr, scale.value)
            if scale.bad == MAX_BAD_STEPS:
                raise ValueError(f"step {done}: {MAX_BAD_STEPS} gradients in a row are not finite; look at the data of "
                                 "these steps, at lr, and whether dtype = bfloat16 trains")
            # killed in between, a run does both again; asked to stop, it saves while it may
            began = time.time()
            if (done % cfg.sheet_every == 0 or last) and not stopped:
                show(cfg, ranks, task, optimizer, log, done)
            if done % cfg.save_every == 0 or last or stopped:
                with ranks.patient("checkpoint"):  # a slow disk is no reason to end the job
                    save_run(cfg, ranks, done, module, optimizer, scale, log, task.data)
            log.time += time.time() - began  # no part of the steps' speed
            if stopped or last:
                ranks.together()  # torchrun, or NCCL, ends whoever is still saving
            if stopped:
                by = interrupt.name or "another rank"
                print(f"stopped by {by} after step {done}, saved; the same command goes on")
                sys.exit(NOT_FINISHED)


def make_trainable(cfg: Config, ranks: Ranks, task):
    """The task's module on its device, the same as DDP sees it, and the optimizer."""
    module = task.module.to(ranks.device, weights_dtype(cfg))
    if ranks.device.type == "cpu":  # oneDNN's convolutions are faster so
        module.to(memory_format=torch.channels_last)
    ddp = module
    if ranks.world > 1:  # buckets that are the gradients, not a second copy of them
        ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
    optimizer = OffloadAdamW(parameter_groups(module, cfg), cfg.ema, ranks.rank, ranks.world, ranks.gloo)
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
        wait = ranks.world > 1 and not optimizer.last_micro_batch
        with ddp.no_sync() if wait else nullcontext():
            loss = loss_of(cfg, ddp, batch, ranks.device)
            (loss.mean() * (scale.value / cfg.accumulate)).backward()
        losses.append(loss.detach())
        sources += names
    return torch.cat(losses), sources


# ---------------------------------------------------------------------------------------------------------------------
# Seeing it


def show(cfg: Config, ranks: Ranks, task, optimizer: OffloadAdamW, log: Log, step: int):
    """Let rank 0 judge the model as it is now, by its EMA weights where there are any, write it, and sample."""
    with optimizer.averaged(task.module) as in_host_memory:
        if ranks.rank:
            return
        if cfg.validation:
            log.validation(step, validate(cfg, ranks, task))
        model = stamped(task.snapshot(), cfg, step)
        name, save = ("lora.safetensors", save_lora) if cfg.lora_rank else ("model.safetensors", sd.save)
        with in_host_memory, ranks.patient(name):
            save(model, os.path.join(cfg.out_dir, name))
        sheet = task.sheet(model)
        if sheet is not None:
            write_video(os.path.join(cfg.out_dir, f"sheet-{step:08d}.png"), sheet[None], 1, {"step": step})


@torch.no_grad()
def validate(cfg: Config, ranks: Ranks, task) -> dict[str, float]:
    """Mean loss on what was held out, under its names."""
    losses = {}
    for name, batch in task.validation():
        ranks.at("validation")
        losses.setdefault(name, []).append(loss_of(cfg, task.module, batch, ranks.device))
    return {name: torch.cat(parts).mean().item() for name, parts in losses.items()}


def main():
    parts = [(cfg, TASKS[cfg.train].example) for cfg in in_parts(read_config(sys.argv[1:], __doc__))]
    if len(parts) > 1:
        announce(parts)
    for cfg, example in parts:
        dry_run(cfg, example) if cfg.dry_run else train(cfg)


if __name__ == "__main__":
    cli.run(main)
