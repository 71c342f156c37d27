"""The training loop: config, DDP, optimizer steps, checkpoints of a run. One process, or torchrun.

    python train.py configs/tiny.py [--batch_size=8 ...]
    torchrun --nproc_per_node=8 train.py configs/base.py

Batches, timesteps and noise are functions of (seed, step, rank), so a run that was interrupted goes on exactly where
its last checkpoint stands, with nothing to restore but weights, moments and the loss scale.
"""

import ast
import difflib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import typing
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import model as models
import toy
from checkpoint import Model, Settings, UserError, build, command_line, load, save
from data import SOURCES, EncodedClips, Faults, LiveClips, Spec, Stream, batches, generator
from grid import fold, grid_shape
from offload import OffloadAdamW
from prepare import encode, frame_pool
from sample import NoiseSchedule, generate, to_uint8, write_png

# ---------------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config:
    """Every knob of a run. A config file assigns some of them; `--name=value` on the command line goes last."""

    # what is trained
    train: str = "unet"  # "unet": the denoiser on latents; "vae": the autoencoder on frames
    model: str = "tiny"  # architecture of a model that starts from nothing: micro, tiny, sd15 or sd21
    init: str = ""  # the checkpoint to start from; "" starts from random weights
    vae: str = ""  # the checkpoint to take the VAE and its latent scale from, when not `init`
    train_text: bool = False  # the text tower too; Stable Diffusion keeps it frozen
    mixed_embedding: bool = True  # off for ablations
    fps_embedding: bool = True  # likewise
    checkpointing: bool = False  # recompute activations in backward: a third more time, a fraction of the memory

    # data
    toy: str = ""  # folder of the toy world, rendered when missing; its lists are used where none are given
    toy_clips: int = 864  # videos
    toy_images: int = 16  # images a label
    toy_captioned: int = 720  # captioned images
    video: str = ""  # list of clips; what lists may be is said in data.py
    label: str = ""  # folder of folders of images, or a file of their names
    caption: str = ""  # list of captioned images
    encoded: str = ""  # folder of their latents, encoded when missing; "" decodes and encodes live
    workers: int = 0  # processes that read ahead; decoding live wants them
    max_bad: float = 0.1  # share of the samples that may be unusable
    mix: dict = field(default_factory=lambda: {"video": 2, "label": 1, "caption": 1})  # shares of a batch
    frames: int = 16  # of a clip; they must make a grid, see grid.py
    width: int = 256  # of a frame, in pixels
    height: int = 256  # likewise
    fps_values: tuple = (1, 2, 4, 8, 15, 30, 60)  # Equation 6
    starts: int = 1  # different starts a clip and FPS
    draws: int = 16  # different sets of images a label
    random_crop: bool = False  # else the middle
    flip: bool = False  # mirror half of the samples whose caption cannot mention a side
    frame_pool: int = 8000  # frames in memory for training a VAE
    drop_caption: float = 0.1  # captions dropped, for classifier-free guidance

    # diffusion
    prediction: str = ""  # "epsilon" or "v"; "" is what the checkpoint says, ε for a model that starts from nothing
    zero_snr: bool = False  # these two for a model that starts from nothing; a checkpoint brings its own
    spacing: str = "leading"  # of the sampler's timesteps; "trailing" goes with zero_snr
    timesteps: tuple = (0, 1000)  # trained are those from the first up to, not with, the last
    timestep_shift: float = 1.0  # s > 1 trains noisy timesteps more often: t = s u / (1 + (s - 1) u), u uniform
    default_fps: float = 30  # what sampling asks for when the user does not
    guidance: float = 7.0  # likewise

    # VAE
    kl_weight: float = 1e-6  # of the KL a latent number, beside the squared error a pixel

    # optimizer
    max_steps: int = 15_000  # in total, resumed or not
    batch_size: int = 6  # a process; times `accumulate` times processes is what one step sees
    accumulate: int = 1  # micro-batches a step
    lr: float = 1e-4  # 5.1
    warmup: int = 0  # steps of linear warm-up
    cooldown: int = 0  # last steps, linearly down to 0
    betas: tuple = (0.9, 0.9)  # E.2
    weight_decay: float = 0.03  # E.2
    clip: float = 1.0  # global gradient norm
    ema: float = 0.0  # decay of the weights' moving average, 0 for none; it warms up as (1 + n) / (10 + n)
    dtype: str = "float16"  # of autocast: float32, bfloat16 or float16; weights are always fp32

    # the run
    out_dir: str = "runs/base"  # checkpoints, metrics.jsonl, sheets, model.safetensors
    seed: int = 0  # of weights, order, timesteps and noise
    log_every: int = 10  # steps
    sheet_every: int = 500  # sample sheet, with `prompts`
    save_every: int = 500  # a checkpoint to resume from
    keep: int = 2  # checkpoints
    prompts: tuple = ()  # of the sheet
    licence: str = ""  # of the data and the base weights, for the file's header


def read_config(path: str, overrides: list[str]) -> Config:
    """The config in a file of plain assignments, with `--name=value` overrides. Nothing in it is executed.

    Raises UserError on an unknown name (with the nearest one), a wrong type, or anything that is no assignment.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read(), path)
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from error
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path}, line {node.lineno}"
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{where}: a config holds assignments of plain values, nothing else")
        try:
            check_value(values, node.targets[0].id, ast.literal_eval(node.value), where)
        except ValueError as error:
            raise UserError(f"{where}: {node.targets[0].id} is not a plain value") from error
    for override in overrides:
        match = re.fullmatch(r"--(\w+)=(.*)", override, re.DOTALL)
        if not match:
            raise UserError(f"{override!r} is no override: write --name=value")
        name, text = match.groups()
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text  # a bare word is a string
        check_value(values, name, value, override)
    cfg = Config(**values)
    check_config(cfg)
    return cfg


def check_config(cfg: Config):
    """Raise UserError on values of the right type that mean nothing."""
    choices = {"train": ("unet", "vae"), "dtype": ("float32", "bfloat16", "float16"), "model": tuple(PRESETS)}
    for name, known in choices.items():
        if getattr(cfg, name) not in known:
            raise UserError(f"{name} is one of {', '.join(known)}, not {getattr(cfg, name)!r}")
    whole = len(cfg.timesteps) == 2 and all(type(t) is int for t in cfg.timesteps)
    if not whole or not 0 <= cfg.timesteps[0] < cfg.timesteps[1] <= NoiseSchedule.timesteps:
        raise UserError(f"timesteps are two rising whole numbers in 0..{NoiseSchedule.timesteps}, not {cfg.timesteps}")
    try:
        grid_shape(cfg.frames)
    except ValueError as error:
        raise UserError(f"frames: {error}") from error


def check_value(values: dict, name: str, value, where: str):
    """Put a value under its name if both are right for a Config."""
    types = typing.get_type_hints(Config)
    if name not in types:
        near = difflib.get_close_matches(name, types, n=1)
        raise UserError(f"{where}: there is no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    kind = types[name]
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and type(value) is list:
        value = tuple(value)
    if type(value) is not kind:
        raise UserError(f"{where}: {name} is of type {kind.__name__}, not {type(value).__name__} ({value!r})")
    values[name] = value


def learning_rate(cfg: Config, step: int) -> float:
    """A pure function of the step: linear warm-up, flat, linear cool-down to 0 at max_steps."""
    up = (step + 1) / cfg.warmup if step < cfg.warmup else 1.0
    left = cfg.max_steps - step
    down = left / cfg.cooldown if left < cfg.cooldown else 1.0
    return cfg.lr * min(up, down)


# ---------------------------------------------------------------------------------------------------------------------
# Model and data of a run

PRESETS = {"micro": models.MICRO, "tiny": models.TINY, "sd15": models.SD15, "sd21": models.SD21}


def make_model(cfg: Config) -> Model:
    """The model that training starts from, on the CPU in fp32."""
    if cfg.init:
        model = load(cfg.init, prediction=cfg.prediction or None)
        settings = model.settings
    else:
        preset = PRESETS[cfg.model]
        unet = replace(preset.unet, mixed_embedding=cfg.mixed_embedding, fps_embedding=cfg.fps_embedding)
        settings = Settings(prediction=cfg.prediction or "epsilon", zero_snr=cfg.zero_snr, spacing=cfg.spacing)
        model = build(replace(preset, unet=unet), settings)
    if cfg.vae:
        donor = load(cfg.vae)
        origin = {"vae": donor.settings.origin.get("vae", {"file": cfg.vae})}
        model.vae = donor.vae
        settings = replace(settings, latent_scale=donor.settings.latent_scale, origin=origin)
    fps = tuple(sorted({float(f) for f in cfg.fps_values if cfg.mix.get("video")}
                       | ({0.0} if cfg.mix.get("label") else set()) | ({120.0} if cfg.mix.get("caption") else set())))
    model.settings = replace(
        settings, frames=cfg.frames, width=cfg.width, height=cfg.height, fps=cfg.default_fps, fps_trained=fps,
        guidance=cfg.guidance, grid_trained=cfg.train == "unet" or settings.grid_trained)
    return model


def data_lists(cfg: Config) -> dict[str, str]:
    """source -> list. A missing toy world is rendered."""
    lists = {source: getattr(cfg, source) for source in SOURCES}
    if cfg.toy:
        if not os.path.exists(cfg.toy):
            try:
                toy.render(cfg.toy, clips=cfg.toy_clips, images=cfg.toy_images, captioned=cfg.toy_captioned,
                           size=cfg.width, progress=Progress("render the toy world"))
            except toy.ToyError as error:
                raise UserError(f"the toy world: {error}") from error
        files = {"video": "videos.csv", "label": "labels", "caption": "images.jsonl"}
        lists = {source: path or os.path.join(cfg.toy, files[source]) for source, path in lists.items()}
    return {source: path for source, path in lists.items() if path and cfg.mix.get(source)}


class Progress:
    """A line on stderr, at most one every 5 seconds."""

    def __init__(self, what: str):
        self.what, self.last = what, 0.0

    def __call__(self, done: int, total: int):
        if time.time() - self.last > 5 or done == total:
            self.last = time.time()
            print(f"{self.what}: {done}/{total}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# What is trained: a module whose forward is the loss, so that DDP sees all of it


class Denoising(nn.Module):
    """Mean squared error of the UNet's prediction: forward gives the loss of each sample (B,).

    text  the tower, or None where the context was encoded ahead
    """

    def __init__(self, model: Model, cfg: Config, text: nn.Module | None):
        super().__init__()
        self.unet, self.text = model.unet, text
        self.unet.checkpointing = cfg.checkpointing
        if not cfg.train_text:
            model.text.requires_grad_(False)
        self.schedule = NoiseSchedule(model.settings)
        self.grid, self.timesteps, self.shift = grid_shape(cfg.frames), cfg.timesteps, cfg.timestep_shift

    def forward(self, latents, prompt, fps, u, eps):
        """latents (B, T, 4, h, w) clean, prompt: tokens (B, L) or context (B, L, D), fps (B,), u (B,) uniform in 0..1,
        eps like the folded grid."""
        x0 = fold(latents, *self.grid)
        first, last = self.timesteps
        t = first + self.shift * u / (1 + (self.shift - 1) * u) * (last - first)
        t = t.long().clamp(max=last - 1)  # the largest u below 1 can round up to 1
        context = self.text(prompt) if self.text else prompt
        output = self.unet(self.schedule.add_noise(x0, eps, t), t, context, fps, self.grid)
        error = output.float() - self.schedule.target(x0, eps, t)
        return error.square().mean(dim=(1, 2, 3))


class Autoencoding(nn.Module):
    """Reconstruction plus KL (appendix H, Equations 27-28): forward gives the loss of each image (B,).

    L2, not L1: a small shape is 3% of a frame, and where every pixel pulls alike the background drowns it.
    """

    def __init__(self, model: Model, cfg: Config):
        super().__init__()
        self.vae, self.kl_weight = model.vae, cfg.kl_weight

    def forward(self, images, eps):
        """images (B, 3, H, W) in -1..1, eps like the latents."""
        mean, logvar = (m.float() for m in self.vae.encode(images))
        decoded = self.vae.decode(mean + (logvar / 2).exp() * eps).float()
        reconstruction = (decoded - images).square().mean(dim=(1, 2, 3))
        kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean(dim=(1, 2, 3))  # Equation 28, a latent number
        return reconstruction + self.kl_weight * kl


class UNetTask:
    """Batches and loss of training the denoiser."""

    def __init__(self, model: Model, cfg: Config, clips: LiveClips | EncodedClips, rank: int, world: int):
        self.cfg, self.vae, self.scale = cfg, model.vae, model.settings.latent_scale
        self.stream = Stream(clips, cfg.mix, cfg.batch_size, cfg.seed, rank, world, cfg.drop_caption)
        self.tokenize = model.text.tokenize
        self.module = Denoising(model, cfg, model.text if clips.empty_context is None else None)
        self.faults = Faults(cfg.max_bad)

    def begin(self, first: int, last: int):
        """Be ready for the micro-batches first..last-1 of this rank, in this order."""
        self.loader = batches(self.stream, first, last, self.cfg.workers)

    def batch(self, noise: torch.Generator):
        """The next micro-batch: (names of the sources, arguments of the module)."""
        batch = next(self.loader)
        self.faults.add(batch)
        latents = batch.latents(self.vae, self.scale, self.cfg.frames)
        B, T, C, h, w = latents.shape
        rows, cols = self.module.grid
        # one timestep a stratum: the loss of a batch is less of a lottery
        u = (torch.arange(B) + torch.rand(B, generator=noise))[torch.randperm(B, generator=noise)] / B
        eps = torch.randn(B, C, rows * h, cols * w, generator=noise)
        prompt = self.tokenize(batch.captions)[0] if batch.context is None else batch.context
        return batch.sources, (latents, prompt, batch.fps, u, eps)


class VAETask:
    """Batches and loss of training the autoencoder."""

    def __init__(self, model: Model, cfg: Config, lists: dict[str, str]):
        self.module = Autoencoding(model, cfg)
        self.pool = frame_pool(lists, cfg.frame_pool, (cfg.width, cfg.height), cfg.seed)
        self.batch_size, self.factor = cfg.batch_size, model.vae.cfg.downsampling
        self.channels = model.vae.cfg.latent_channels

    def begin(self, first: int, last: int):
        """Batches are drawn from memory: there is nothing to make ready."""

    def batch(self, noise: torch.Generator):
        chosen = torch.randint(len(self.pool), (self.batch_size,), generator=noise)
        images = self.pool[chosen].float() / 127.5 - 1
        h, w = (side // self.factor for side in images.shape[-2:])
        return ["frame"] * len(images), (images, torch.randn(len(images), self.channels, h, w, generator=noise))

    def latent_scale(self) -> float:
        """1 / the standard deviation of the latents, so that diffusion sees them at a deviation of 1."""
        means = [self.module.vae.encode(part.float() / 127.5 - 1)[0] for part in self.pool[:1024].split(64)]
        return 1 / torch.cat(means).std().item()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of a run: step-00000500.pt holds all that a resume needs


def save_run(cfg: Config, step: int, module, optimizer: OffloadAdamW, scale: "LossScale"):
    """Write beside, rename into place, then drop all but the newest `keep`. Every rank must call it.

    Raises UserError when it cannot be written; the checkpoints before it stay whole.
    """
    state = {"step": step, "config": asdict(cfg), "module": module.state_dict(), "optimizer": optimizer.state_dict(),
             "scale": vars(scale)}
    if optimizer.rank:
        return
    path = os.path.join(cfg.out_dir, f"step-{step:08d}.pt")
    try:
        torch.save(state, path + ".part")
    except (OSError, RuntimeError) as error:  # of a full disk torch says RuntimeError
        os.remove(path + ".part")
        raise UserError(f"{path} cannot be written, is the disk full? Those before it are whole ({error})") from error
    os.replace(path + ".part", path)
    for old in run_checkpoints(cfg.out_dir)[: -cfg.keep]:
        os.remove(old)


def run_checkpoints(out_dir: str) -> list[str]:
    """Oldest first."""
    return sorted(os.path.join(out_dir, name) for name in os.listdir(out_dir) if re.fullmatch(r"step-\d+\.pt", name))


def is_whole(path: str) -> bool:
    """Whether every byte of a checkpoint is the one that was written: torch.save leaves checksums."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def resume_run(cfg: Config, module, optimizer: OffloadAdamW, scale: "LossScale") -> int:
    """Load the newest whole checkpoint of the run, if there is one; returns the step to go on with."""
    for path in reversed(run_checkpoints(cfg.out_dir)):
        if not is_whole(path):
            print(f"{path} is damaged: trying the one before", file=sys.stderr, flush=True)
            continue
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        if state["config"]["dtype"] == cfg.dtype:
            vars(scale).update(state["scale"])
        print(f"resume from {path}", flush=True)
        return state["step"]
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def setup():
    """(rank, world, device), under torchrun or alone."""
    gpu = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return 0, 1, torch.device("cuda" if gpu else "cpu")
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def prepare(cfg: Config, model: Model, rank: int, world: int, device):
    """Everything the loop reads, made by rank 0 when it is not there yet -> the task."""
    if rank == 0:
        os.makedirs(cfg.out_dir, exist_ok=True)
        lists = data_lists(cfg)
        if cfg.train == "unet" and cfg.encoded and not os.path.exists(cfg.encoded):
            model.vae.to(device)
            model.text.to(device)
            encode(model, lists, cfg.encoded, sample_spec(cfg), text=not cfg.train_text)
    if world > 1:
        dist.barrier()
    if cfg.train == "vae":
        return VAETask(model, cfg, data_lists(cfg))
    return UNetTask(model, cfg, open_clips(cfg, model, device), rank, world)


def sample_spec(cfg: Config) -> Spec:
    return Spec(**{f.name: getattr(cfg, f.name) for f in fields(Spec)})


def open_clips(cfg: Config, model: Model, device) -> LiveClips | EncodedClips:
    """The samples of a run. Raises UserError when those encoded ahead are of other options than the config's."""
    if not cfg.encoded:
        model.vae.to(device, memory_format=torch.channels_last)
        return LiveClips(data_lists(cfg), sample_spec(cfg))
    clips = EncodedClips(cfg.encoded, text=not cfg.train_text)
    for name, ours in asdict(sample_spec(cfg)).items():
        theirs = getattr(clips.spec, name)
        if theirs != ours and name != "seed":  # runs may share a folder
            raise UserError(f"{cfg.encoded} was encoded with {name} = {theirs}, the config says {ours}: choose another "
                            "folder for `encoded`, or remove it")
    return clips


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


class Interrupt:
    """Notes SIGTERM and SIGINT, on whichever rank they arrive; the loop asks after every step."""

    def __init__(self):
        self.name = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: setattr(self, "name", signal.Signals(number).name))

    def anywhere(self, optimizer: OffloadAdamW) -> bool:
        """Whether any rank was asked to stop: all leave after the same step."""
        asked = torch.tensor(float(self.name is not None))
        if optimizer.world > 1:
            dist.all_reduce(asked, group=optimizer.gloo)
        return asked.item() > 0


def train(cfg: Config):
    rank, world, device = setup()
    torch.manual_seed(cfg.seed)  # of fresh weights; everything later has generators of its own
    model = make_model(cfg)
    task = prepare(cfg, model, rank, world, device)
    module = task.module.to(device)
    if device.type == "cpu":  # oneDNN's convolutions are faster so
        module.to(memory_format=torch.channels_last)
    group = {"params": list(module.parameters()), "lr": cfg.lr, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
    optimizer, scale = OffloadAdamW([group], cfg.ema, rank, world), LossScale(cfg.dtype == "float16")
    start = resume_run(cfg, module, optimizer, scale)
    ddp = DistributedDataParallel(module) if world > 1 else module
    optimizer.attach(ddp)
    log = Log(cfg, start) if rank == 0 else None
    interrupt = Interrupt()
    task.begin(start * cfg.accumulate, cfg.max_steps * cfg.accumulate)

    for step in range(start, cfg.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        losses, sources = backward(cfg, step, task, ddp, optimizer, scale, device)
        norm = optimizer.step(cfg.clip, scale.value)
        scale.update(math.isfinite(norm))
        module.zero_grad(set_to_none=True)

        done = step + 1
        stopped = interrupt.anywhere(optimizer) and done < cfg.max_steps
        if rank == 0:
            log.step(done, losses, sources, norm, learning_rate(cfg, step), scale)
        if scale.bad == MAX_BAD_STEPS:
            raise UserError(f"step {done}: {MAX_BAD_STEPS} gradients in a row are not finite; look at the data of "
                            "these steps, at lr, and whether dtype = bfloat16 trains")
        if done % cfg.save_every == 0 or done == cfg.max_steps or stopped:
            save_run(cfg, done, module, optimizer, scale)
        if done % cfg.sheet_every == 0 or done == cfg.max_steps:
            show(cfg, model, task, optimizer, done)
        if stopped:
            print(f"stopped by {interrupt.name or 'another rank'} after step {done}, saved; the same command goes on")
            sys.exit(NOT_FINISHED)
    if world > 1:
        dist.destroy_process_group()


def backward(cfg: Config, step: int, task, ddp, optimizer: OffloadAdamW, scale: LossScale, device):
    """Gradients of all micro-batches of a step -> (loss of each sample, names of their sources)."""
    losses, sources = [], []
    for micro in range(cfg.accumulate):
        names, batch = task.batch(generator(cfg.seed, step, micro, optimizer.rank))
        optimizer.last_micro_batch = micro == cfg.accumulate - 1
        if optimizer.world > 1:
            ddp.require_backward_grad_sync = optimizer.last_micro_batch
        with torch.autocast(device.type, getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32"):
            loss = ddp(*(x.to(device, non_blocking=True) for x in batch))
        (loss.mean() * (scale.value / cfg.accumulate)).backward()
        losses.append(loss.detach())
        sources += names
    return torch.cat(losses), sources


def show(cfg: Config, model: Model, task, optimizer: OffloadAdamW, step: int):
    """Rank 0 writes the model as it is now, with averaged weights where they are kept, and a sheet of samples."""
    with optimizer.averaged():
        if optimizer.rank == 0:
            current = snapshot(cfg, model, task)
            save(stamped(current, cfg, step), os.path.join(cfg.out_dir, "model.safetensors"))
            sheet(cfg, current, task, step)


def snapshot(cfg: Config, model: Model, task) -> Model:
    """The model as one would sample it now."""
    settings = replace(model.settings, ema=bool(cfg.ema))
    if isinstance(task, VAETask):
        with torch.no_grad():
            settings = replace(settings, latent_scale=task.latent_scale())
    return Model(model.unet, model.vae, model.text, settings)


def commit() -> str:
    """Of this code, "" outside a git checkout."""
    folder = os.path.dirname(os.path.abspath(__file__))
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=folder).stdout.strip()


COMMIT = commit()  # asked once: the checkout may move on while the run goes on


def stamped(model: Model, cfg: Config, step: int) -> Model:
    """With its origin written into the settings."""
    before = model.settings.origin.get(cfg.train)  # when it started from a model that was trained in the same way
    origin = model.settings.origin | {
        cfg.train: {"config": asdict(cfg), "steps": step, "commit": COMMIT, "licence": cfg.licence, "from": before}}
    return Model(model.unet, model.vae, model.text, replace(model.settings, origin=origin))


def sheet(cfg: Config, model: Model, task, step: int):
    """What the model makes now, as a picture in the run's folder: a row of frames a prompt, or reconstructions."""
    if isinstance(task, VAETask):
        images = task.pool[:32].float() / 127.5 - 1
        with torch.no_grad():
            decoded = model.vae.decode(model.vae.encode(images)[0])
        video = to_uint8(torch.cat([images, decoded.clamp(-1, 1)])).numpy()
    elif cfg.prompts:
        video = generate(model, list(cfg.prompts), seeds=list(range(len(cfg.prompts))))
        video = video.reshape(-1, *video.shape[2:])
    else:
        return
    write_png(os.path.join(cfg.out_dir, f"sheet-{step:08d}.png"), video, 1, f"step {step}")


class Log:
    """A line to read every `log_every` steps, a JSON line in metrics.jsonl for each of them."""

    def __init__(self, cfg: Config, start: int):
        self.cfg, self.at, self.time, self.sums, self.skipped = cfg, start, time.time(), {}, 0
        self.file = open(os.path.join(cfg.out_dir, "metrics.jsonl"), "a", encoding="utf-8")

    def step(self, step, losses, sources, norm, lr, scale: LossScale):
        if not math.isfinite(norm):
            self.skipped += 1
            print(f"step {step} skipped: the gradient is not finite (loss scale {scale.value:g})", flush=True)
        for loss, source in zip(losses.tolist(), sources):
            for name in ("loss", f"loss_{source}"):
                total, n = self.sums.get(name, (0.0, 0))
                self.sums[name] = total + loss, n + 1
        if step % self.cfg.log_every and step != self.cfg.max_steps:
            return
        speed = (step - self.at) / (time.time() - self.time)
        means = {name: total / n for name, (total, n) in sorted(self.sums.items())}
        left = int((self.cfg.max_steps - step) / speed)
        print(f"step {step}/{self.cfg.max_steps}  "
              + "  ".join(f"{name} {value:.4f}" for name, value in means.items())
              + f"  |grad| {norm:.3f}  lr {lr:.2e}  {speed:.2f} steps/s"
              + f"  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left", flush=True)
        line = {"step": step, **means, "grad_norm": norm, "skipped": self.skipped, "lr": lr, "steps_per_s": speed,
                "time": time.time()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.at, self.time, self.sums = step, time.time(), {}


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__ + "\nOptions, with their defaults (see the comments of class Config):\n")
        for f in fields(Config):
            print(f"  --{f.name}={getattr(Config(), f.name)!r}")
        return
    train(read_config(sys.argv[1], sys.argv[2:]))


if __name__ == "__main__":
    command_line(main)
