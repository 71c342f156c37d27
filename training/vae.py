"""Training the autoencoder (appendix H): the task beside train.py's, with the same methods."""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from clips.changes import hash_of
from clips.decode import Bad
from clips.lists import Items
from clips.samples import Spec, offered_fps, read_sample, video_of
from clips.write import contact_sheet
from data import Faults, generator
from sd import Model
from sd.vae import to_uint8
from training.config import Config, Stage
from training.ranks import Ranks
from training.setup import sample_spec


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


class VAETask:
    """The autoencoder on single frames."""

    def __init__(self, cfg: Config, model: Model, lists: dict[str, str], ranks: Ranks):
        self.module, self.cfg, self.model, self.ranks = Autoencoding(model, cfg), cfg, model, ranks
        spec = sample_spec(cfg)
        self.pool = frame_pool(lists, cfg.frame_pool, spec, slice(0, -cfg.validation or None), cfg.max_bad)
        if cfg.validation:
            held_out = slice(-cfg.validation, None)
            self.held_out = frame_pool(lists, cfg.validation * len(lists), spec, held_out, cfg.max_bad)
        self.data = hash_of(self.pool.numpy())
        factor = model.vae.cfg.downsampling
        self.latent = model.vae.cfg.latent_channels, cfg.height // factor, cfg.width // factor

    def begin(self, stage: Stage, step: int):
        """Start at a step of a stage; batches are drawn from memory, with no end to be ready for."""
        self.cfg, self.start, self.n = stage.cfg, stage.position, (step - stage.first) * stage.cfg.accumulate

    def batch(self):
        first = self.start + (self.n * self.ranks.world + self.ranks.rank) * self.cfg.batch_size
        self.n += 1
        noise = [generator("frame", self.cfg.seed, first + i) for i in range(self.cfg.batch_size)]
        chosen = [torch.randint(len(self.pool), (), generator=g) for g in noise]
        eps = torch.stack([torch.randn(self.latent, generator=g) for g in noise])
        return ["frame"] * len(chosen), (self.pool[torch.stack(chosen)].float() / 127.5 - 1, eps)

    def validation(self):
        for part in self.held_out.split(self.cfg.batch_size):
            yield "val_loss", (part.float() / 127.5 - 1, torch.zeros(len(part), *self.latent))

    def snapshot(self) -> Model:
        """The model as it is now, with the latent scale of its VAE."""
        return replace(self.model, settings=replace(self.model.settings, latent_scale=self.latent_scale()))

    def sheet(self, model: Model):
        """Some frames, and below them what comes back: uint8 (H, W, 3)."""
        images = self.pool[:32].to(model.vae.quant_conv.weight) / 127.5 - 1
        with torch.no_grad():
            decoded = model.vae.decode(model.vae.encode(images)[0])
        return np.concatenate([contact_sheet(to_uint8(part).cpu().numpy()) for part in (images, decoded)])

    @staticmethod
    def example(cfg: Config, model: Model):
        """The module, and a batch of zeros for it: what a dry run counts and times."""
        size, vae = cfg.batch_size, model.vae.cfg
        latent = size, vae.latent_channels, cfg.height // vae.downsampling, cfg.width // vae.downsampling
        return Autoencoding(model, cfg), (torch.zeros(size, 3, cfg.height, cfg.width), torch.zeros(latent))

    @torch.no_grad()
    def latent_scale(self) -> float:
        """1 / the standard deviation of the latents: scaled, they have a deviation of 1."""
        vae = self.module.vae
        some = self.pool[:: len(self.pool) // 1024 + 1]
        means = [vae.encode(part.to(vae.quant_conv.weight) / 127.5 - 1)[0] for part in some.split(64)]
        return 1 / torch.cat(means).std().item()


def frame_pool(lists: dict[str, str], count: int, spec: Spec, which=slice(None), max_bad=1.0) -> torch.Tensor:
    """`count` frames drawn evenly from the sources, for training a VAE: uint8 (count, 3, H, W), in memory.

    spec     of a video there are at most spec.frames, at the lowest FPS at which they fit into it
    which    of each list's items
    max_bad  share of them that may be unusable, else ValueError
    """
    rng, pool, faults = np.random.default_rng(spec.seed), [], Faults(max_bad)
    for source, path in lists.items():
        items = Items(source, path, spec.captions)
        chosen = np.arange(len(items))[which]
        if not len(chosen):
            raise ValueError(f"validation must leave something to train on, and {source} has {len(items)} samples")
        each = math.ceil(count / len(lists) / len(chosen))
        few = replace(spec, frames=min(each, spec.frames) if source == "video" else each)
        for i in tqdm(rng.permutation(chosen)[: math.ceil(count / len(lists))], desc=f"frames of {source}"):
            try:
                item = items[i]
                with video_of(source, item) as video:
                    fps = offered_fps(source, video, few)[0]
                    sample = read_sample(source, i, item, video, few, fps, 0)
                pool.append(sample.data)
                faults.add(1, [(source, *skipped) for skipped in sample.skipped])
            except Bad as bad:
                faults.add(0, [(source, items.name(i), str(bad))])
    if not pool:
        raise ValueError(f"no frame of {', '.join(lists.values())} can be used: the reasons are above")
    return torch.cat(pool)
