"""What a run trains: its model, its data, and a module whose forward is the loss."""

import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, fields, replace

import torch
from torch import nn

from clips.prepare import encode, frame_pool
from data import (
    SOURCES,
    Batch,
    EncodedClips,
    Faults,
    LiveClips,
    Spec,
    Stream,
    batches,
    fingerprint,
    generator,
    read_settings,
)
from grid import fold, grid_shape
from lab import toy
from model import ModelConfig
from sample import NoiseSchedule, check_size
from sd.checkpoint import Model, Settings, UserError, build, load
from training.config import PRESETS, Config

# ---------------------------------------------------------------------------------------------------------------------
# Model and data of a run


def make_model(cfg: Config) -> Model:
    """The model that training starts from, on the CPU in fp32. Raises UserError on what cannot be trained."""
    if cfg.init:
        if not (cfg.mixed_embedding and cfg.fps_embedding):
            raise UserError("mixed_embedding and fps_embedding are switched off for models that start from nothing: "
                            f"{cfg.init} brings its own")
        model = load(cfg.init, prediction=cfg.prediction or None)
        settings = model.settings
    else:
        settings = Settings(prediction=cfg.prediction or "epsilon", zero_snr=cfg.zero_snr, spacing=cfg.spacing)
        model = build(architecture(cfg), settings)
    if cfg.vae:
        donor = load(cfg.vae)
        origin = settings.origin | {"vae": donor.settings.origin.get("vae", {"file": cfg.vae})}
        model.vae = donor.vae
        settings = replace(settings, latent_scale=donor.settings.latent_scale, origin=origin)
    fps = tuple(sorted({float(f) for f in cfg.fps_values if cfg.mix.get("video")}
                       | ({0.0} if cfg.mix.get("label") else set()) | ({120.0} if cfg.mix.get("caption") else set())))
    model.settings = replace(
        settings, frames=cfg.frames, width=cfg.width, height=cfg.height, fps=cfg.default_fps, fps_trained=fps,
        guidance=cfg.guidance, eta=cfg.eta,
        grid_trained=settings.grid_trained or cfg.train == "unet" and cfg.frames > 1)
    NoiseSchedule(model.settings)
    check_sides(cfg, model)
    return model


def architecture(cfg: Config) -> ModelConfig:
    """Of a model that starts from nothing."""
    preset = PRESETS[cfg.model]
    unet = replace(preset.unet, mixed_embedding=cfg.mixed_embedding, fps_embedding=cfg.fps_embedding)
    return replace(preset, unet=unet)


def check_sides(cfg: Config, model: Model):
    """Raise UserError on sides that are no whole latent pixels, or that the UNet cannot halve."""
    try:
        check_size((cfg.width, cfg.height), cfg.frames if cfg.train == "unet" else 1, model)
    except UserError as error:
        raise UserError(str(error).replace("--size", "width and height")) from error


def data_lists(cfg: Config, render=True) -> dict[str, str]:
    """source -> list. A missing toy world is rendered."""
    lists = {source: getattr(cfg, source) for source in SOURCES}
    if cfg.toy:
        if render:
            render_world(cfg)
        files = {"video": "videos.csv", "label": "labels", "caption": "images.jsonl"}
        lists = {source: path or os.path.join(cfg.toy, files[source]) for source, path in lists.items()}
    return {source: path for source, path in lists.items() if path and cfg.mix.get(source)}


def render_world(cfg: Config):
    """Unless it is there. Raises UserError when that is of other options."""
    world = {"clips": cfg.toy_clips, "images": cfg.toy_images, "captioned": cfg.toy_captioned,
             "moving": cfg.toy_moving, "size": cfg.width}
    try:
        if not os.path.exists(cfg.toy):
            toy.render(cfg.toy, **world, progress=Progress("render the toy world"))
        with open(os.path.join(cfg.toy, "world.json"), encoding="utf-8") as file:
            found = json.load(file)
    except (toy.ToyError, OSError, ValueError) as error:
        raise UserError(f"the toy world {cfg.toy}: {error}") from error
    for name, ours in world.items():
        if found.get(name) != ours:
            raise UserError(f"the toy world {cfg.toy} was rendered with {name} {found.get(name)}, the config says "
                            f"{ours}: choose another folder for `toy`, or remove it")


class Progress:
    """A line on stderr, at most one every 5 seconds."""

    def __init__(self, what: str):
        self.what, self.last = what, 0.0

    def __call__(self, done: int, total: int):
        if time.time() - self.last > 5 or done == total:
            self.last = time.time()
            print(f"{self.what}: {done}/{total}", file=sys.stderr, flush=True)


def make_ready(cfg: Config, model: Model, device) -> dict[str, str]:
    """Render and encode what is missing -> the lists; none where everything is encoded already."""
    try:
        os.makedirs(cfg.out_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"out_dir {cfg.out_dir} cannot be made: {error.strerror}") from error
    ahead = cfg.encoded if cfg.train == "unet" else ""
    if ahead and os.path.exists(ahead):
        compare_lists(cfg)
        return {}
    lists = data_lists(cfg)
    if ahead:
        for source in cfg.mix:
            if cfg.mix[source] and source not in lists:
                raise UserError(f"mix asks for {source} samples, of which there is no list: give `{source}` one, or "
                                "leave it out of the mix")
        model.vae.to(device)
        model.text.to(device)
        encode(model, lists, ahead, sample_spec(cfg), text=not cfg.train_text)
        model.vae.to("cpu")
        model.text.to("cpu")
    return lists


def compare_lists(cfg: Config):
    """Say where what was encoded ahead is not of the config's lists; they may be the same in another place."""
    encoded = read_settings(cfg.encoded)["lists"]
    for source, path in data_lists(cfg, render=False).items():
        if encoded.get(source, path) != path:
            print(f"{cfg.encoded}, encoded from {encoded[source]}, is used, and {path} is not read: for other data "
                  "choose another folder for `encoded`", file=sys.stderr, flush=True)


def sample_spec(cfg: Config) -> Spec:
    return Spec(**{f.name: getattr(cfg, f.name) for f in fields(Spec)})


def open_clips(cfg: Config, model: Model, lists: dict[str, str], device) -> LiveClips | EncodedClips:
    """The samples of a run. Raises UserError when those encoded ahead are of other options than the config's, or of
    another VAE or text tower than the model's."""
    if not cfg.encoded:
        model.vae.to(device, memory_format=torch.channels_last)
        return LiveClips(lists, sample_spec(cfg))
    clips = EncodedClips(cfg.encoded, text=not cfg.train_text)
    for name, ours in asdict(sample_spec(cfg)).items():
        theirs = getattr(clips.spec, name)
        if theirs != ours and name != "seed":  # runs may share a folder
            raise UserError(f"{cfg.encoded} was encoded with {name} = {theirs}, the config says {ours}: choose another "
                            "folder for `encoded`, or remove it")
    for what, theirs, network in (("VAE", clips.vae, model.vae), ("text tower", clips.tower, model.text)):
        if theirs and theirs != fingerprint(network):
            raise UserError(f"{cfg.encoded} was encoded by another {what} than the model's: choose another folder for "
                            "`encoded`, or remove it")
    return clips


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
        for part in [model.text] if not cfg.train_text else model.text.unused():
            part.requires_grad_(False)
        self.schedule, self.grid = NoiseSchedule(model.settings), grid_shape(cfg.frames)

    def forward(self, latents, prompt, fps, t, eps):
        """latents (B, T, 4, h, w) clean, prompt: tokens (B, L) or context (B, L, D), fps (B,), t (B,), eps like the
        folded grid."""
        x0 = fold(latents, *self.grid)
        context = self.text(prompt) if self.text else prompt
        output = self.unet(self.schedule.add_noise(x0, eps, t), t, context, fps, self.grid)
        error = output - self.schedule.target(x0, eps, t)  # of full precision, as the target is
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
        mean, logvar = (m.to(images.dtype) for m in self.vae.encode(images))
        decoded = self.vae.decode(mean + (logvar / 2).exp() * eps)
        reconstruction = (decoded - images).square().mean(dim=(1, 2, 3))
        kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean(dim=(1, 2, 3))  # Equation 28, a latent number
        return reconstruction + self.kl_weight * kl


VALIDATION_TIMESTEPS = (100, 300, 500, 700, 900)  # one would mislead: what is learned moves from noisy to clean


def draw_timesteps(cfg: Config, positions: list[int], world: int) -> torch.Tensor:
    """t of the samples at some positions (B,): uniform, then shifted and narrowed, then into the trained range.

    With s the shift and w the width, t / (1 - t) = s (u / (1 - u))^w: odds that are scaled and squeezed.

    Of all samples of a step, on all ranks, each has a stratum of its own: its loss is less of a lottery.
    """
    size = cfg.batch_size * cfg.accumulate * world
    strata = torch.randperm(size, generator=generator("strata", cfg.seed, positions[0] // size))
    inside = torch.stack([torch.rand((), generator=generator("timestep", cfg.seed, p)) for p in positions])
    u = (strata[[p % size for p in positions]] + inside) / size
    first, last = cfg.timesteps
    noisy, clean = cfg.timestep_shift * u**cfg.timestep_width, (1 - u) ** cfg.timestep_width
    t = first + (last - first) * noisy / (noisy + clean)
    return t.long().clamp(max=last - 1)  # the largest u below 1 can round up to 1


class UNetTask:
    """Batches and loss of training the denoiser."""

    def __init__(self, model: Model, cfg: Config, clips: LiveClips | EncodedClips, rank: int, world: int):
        self.cfg, self.world, self.vae, self.scale = cfg, world, model.vae, model.settings.latent_scale
        self.stream = Stream(clips, cfg.mix, cfg.batch_size, cfg.seed, rank, world, cfg.drop_caption, cfg.validation)
        self.tokenize = model.text.tokenize
        self.module = Denoising(model, cfg, model.text if clips.empty_context is None else None)
        self.faults, self.held_out = Faults(cfg.max_bad), None
        rows, cols = self.module.grid
        factor = model.vae.cfg.downsampling
        self.shape = model.vae.cfg.latent_channels, rows * cfg.height // factor, cols * cfg.width // factor

    def begin(self, first: int, last: int):
        """Be ready for the micro-batches first..last-1 of this rank, in this order."""
        self.loader = batches(self.stream, first, last, self.cfg.workers)

    def batch(self):
        """The next micro-batch: (names of the sources, arguments of the module)."""
        batch = next(self.loader)
        noise = self.noise(generator("noise", self.cfg.seed, position) for position in batch.positions)
        t = draw_timesteps(self.cfg, batch.positions, self.world)
        return batch.sources, (*self.clean(batch), t, noise)

    def clean(self, batch: Batch):
        """Latents, prompt and FPS."""
        self.faults.add(batch)
        prompt = self.tokenize(batch.captions)[0] if batch.context is None else batch.context
        return batch.latents(self.vae, self.scale, self.cfg.frames), prompt, batch.fps

    def noise(self, generators) -> torch.Tensor:
        """ε of samples, each from its own generator, so that it does not depend on who else is in the batch."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in generators])

    def validation(self):
        """(name, arguments of the module): what was held out at fixed timesteps, always under the same noise."""
        self.held_out = self.held_out or self.clean(self.stream.validation())
        n = len(self.held_out[0])
        for t in VALIDATION_TIMESTEPS:
            noise = self.noise(generator("validation", t, i) for i in range(n))
            whole = *self.held_out, torch.full((n,), t), noise
            for part in zip(*(x.split(self.cfg.batch_size) for x in whole)):
                yield f"val_loss_{t}", part


class VAETask:
    """Batches and loss of training the autoencoder."""

    def __init__(self, model: Model, cfg: Config, lists: dict[str, str], rank: int, world: int):
        self.module, self.cfg, self.rank, self.world = Autoencoding(model, cfg), cfg, rank, world
        size = cfg.width, cfg.height
        self.pool = frame_pool(lists, cfg.frame_pool, size, cfg.seed, slice(0, -cfg.validation or None))
        if cfg.validation:
            held_out = slice(-cfg.validation, None)
            self.held_out = frame_pool(lists, cfg.validation * len(lists), size, cfg.seed, held_out)
        factor = model.vae.cfg.downsampling
        self.latent = model.vae.cfg.latent_channels, cfg.height // factor, cfg.width // factor

    def begin(self, first: int, last: int):
        """Batches are drawn from memory: there is nothing to make ready but their number."""
        self.n = first

    def batch(self):
        first = (self.n * self.world + self.rank) * self.cfg.batch_size
        self.n += 1
        noise = [generator("frame", self.cfg.seed, first + i) for i in range(self.cfg.batch_size)]
        chosen = [torch.randint(len(self.pool), (), generator=g) for g in noise]
        eps = torch.stack([torch.randn(self.latent, generator=g) for g in noise])
        return ["frame"] * len(chosen), (self.pool[torch.stack(chosen)].float() / 127.5 - 1, eps)

    def validation(self):
        for part in self.held_out.split(self.cfg.batch_size):
            yield "val_loss", (part.float() / 127.5 - 1, torch.zeros(len(part), *self.latent))

    def latent_scale(self) -> float:
        """1 / the standard deviation of the latents, so that diffusion sees them at a deviation of 1."""
        vae = self.module.vae
        some = self.pool[:: len(self.pool) // 1024 + 1]
        means = [vae.encode(part.to(vae.quant_conv.weight) / 127.5 - 1)[0] for part in some.split(64)]
        return 1 / torch.cat(means).std().item()


def loss_of(cfg: Config, module, batch, device) -> torch.Tensor:
    """Loss of each sample (B,), in the precision of the run."""
    whole = torch.float64 if cfg.dtype == "float64" else torch.float32
    batch = [x.to(device, whole if x.is_floating_point() else x.dtype, non_blocking=True) for x in batch]
    with precision(cfg, device):
        return module(*batch)


def precision(cfg: Config, device):
    """Autocast, where the run has it (E.2)."""
    mixed = cfg.dtype in ("float16", "bfloat16")
    return torch.autocast(device.type, getattr(torch, cfg.dtype)) if mixed else nullcontext()
