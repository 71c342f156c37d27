"""Stable Diffusion's autoencoder: images <-> latents."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from cli import warn
from layers.basic import Upsample, initialize, per_pixel
from sd.device import NotFinite, require_finite


@dataclass(frozen=True)
class VAEConfig:
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2  # a level (the decoder has one more)
    latent_channels: int = 4
    norm_groups: int = 32

    @property
    def downsampling(self) -> int:
        """Pixels a latent pixel, along each side."""
        return 2 ** (len(self.channel_mult) - 1)


class VAEResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    @property
    def branch_end(self):
        return self.conv2

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class VAEAttention(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    @property
    def branch_end(self):
        return self.proj_out

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H*W, C)
        q, k, v = (per_pixel(layer, h)[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, H*W, C)
        h = per_pixel(self.proj_out, F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + h.reshape(B, H, W, C).permute(0, 3, 1, 2)


class VAEDownsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as the original


def vae_middle(channels: int, groups: int) -> nn.ModuleDict:
    """Its modules in the order in which they run."""
    return nn.ModuleDict({"block_1": VAEResBlock(channels, channels, groups), "attn_1": VAEAttention(channels, groups),
                          "block_2": VAEResBlock(channels, channels, groups)})


def vae_level(widths: list[int], groups: int, resample: dict[str, nn.Module]) -> nn.ModuleDict:
    """Residual blocks from each width to the next, then the resampling under the name that the original gives it."""
    blocks = nn.Sequential(*(VAEResBlock(a, b, groups) for a, b in zip(widths, widths[1:])))
    return nn.ModuleDict({"block": blocks} | resample)


def in_order(modules: nn.ModuleDict, x):
    for module in modules.values():
        x = module(x)
    return x


class Encoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths, groups = [cfg.channels * m for m in cfg.channel_mult], cfg.norm_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0]] + widths, widths)):
            resample = {"downsample": VAEDownsample(width)} if i < len(widths) - 1 else {}
            self.down.append(vae_level([before] + [width] * cfg.num_res_blocks, groups, resample))
        self.mid = vae_middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = in_order(level, x)
        return self.conv_out(F.silu(self.norm_out(in_order(self.mid, x))))


class Decoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths, groups = [cfg.channels * m for m in cfg.channel_mult], cfg.norm_groups
        self.conv_in = nn.Conv2d(cfg.latent_channels, widths[-1], 3, padding=1)
        self.mid = vae_middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for i, (before, width) in enumerate(zip(widths[1:] + widths[-1:], widths)):  # level 0 is the finest
            resample = {"upsample": Upsample(width)} if i > 0 else {}
            self.up.append(vae_level([before] + [width] * (cfg.num_res_blocks + 1), groups, resample))
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        z = in_order(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            z = in_order(level, z)
        return self.conv_out(F.silu(self.norm_out(z)))


class AutoencoderKL(nn.Module):
    """Images <-> latents, before the latent scale (that one belongs to the diffusion, and stands in the settings)."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        c = cfg.latent_channels
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * c, 2 * c, 1), nn.Conv2d(c, c, 1)
        initialize(self)
        # almost no noise in the latent at first, so that the decoder has something to listen to
        nn.init.zeros_(self.quant_conv.weight[c:])
        nn.init.constant_(self.quant_conv.bias[c:], -6)

    def encode(self, images):
        """images (N, 3, H, W) in -1..1 -> mean and log-variance, each (N, 4, H/8, W/8)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents):
        """latents (N, 4, h, w) -> images (N, 3, 8h, 8w), about -1..1."""
        return self.decoder(self.post_quant_conv(latents))


def encode(model, frames):
    """uint8 (N, H, W, 3) -> the means of their latents, scaled (N, 4, h, w)."""
    moments = encode_frames(model.vae, torch.from_numpy(frames).permute(0, 3, 1, 2))
    return moments.float().chunk(2, dim=1)[0] * model.settings.latent_scale


def decode(model, latents):
    """Scaled latents (B, T, 4, h, w) -> uint8 (B, T, H, W, 3).

    Where half precision cannot hold what is between the layers of a VAE, as in some fine-tunes, the VAE becomes float32
    and decodes again, with a warning. Raises NotFinite where that does not help.
    """
    flat, weight = latents.flatten(0, 1) / model.settings.latent_scale, model.vae.post_quant_conv.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    try:
        images = decode_frames(model, flat)
    except NotFinite:
        if dtype not in (torch.float16, torch.bfloat16) or model.bad_tensors():
            raise
        warn(f"the VAE's numbers do not fit into {str(dtype).removeprefix('torch.')}: it decodes again in float32")
        model.vae.float()
        with torch.autocast(kind, enabled=False):
            images = decode_frames(model, flat)
    return images.unflatten(0, latents.shape[:2]).cpu().numpy()


def decode_frames(model, latents):
    """Latents before the latent scale (N, 4, h, w) -> uint8 (N, H, W, 3), a few at a time to be light on memory."""
    weight, pixels = model.vae.post_quant_conv.weight, latents[0, 0].numel() * model.vae.cfg.downsampling**2
    chunk, images = max(1, min(16, 2**23 // pixels)), []  # above, an activation has more numbers than int32 counts
    with torch.no_grad():
        for part in latents.to(weight.device, weight.dtype).split(chunk):
            images.append(model.vae.decode(part))
            require_finite(images[-1], "the VAE's output", model)
            images[-1] = to_uint8(images[-1])
    return torch.cat(images)


def to_uint8(images):
    """(N, 3, H, W) in -1..1 -> uint8 (N, H, W, 3)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def encode_frames(vae, frames, chunk=16):
    """uint8 (T, 3, H, W) -> moments (T, 2C, h, w): mean and log-variance, before the latent scale."""
    weight = vae.post_quant_conv.weight
    with torch.no_grad():
        return torch.cat([
            torch.cat(vae.encode(part.to(weight.device, weight.dtype) / 127.5 - 1), dim=1)
            for part in frames.split(chunk)
        ])
