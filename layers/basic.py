"""Layers that every network here is made of, as in the original code, and the weights that they start from."""

import torch
import torch.nn.functional as F
from torch import nn


def norm_act_conv(groups: int, in_channels: int, out_channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(groups, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)]


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class GEGLU(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()  # Identity where the original has dropout
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x):
        return self.net(x)


def per_pixel(layer, x):
    """A linear layer, or the 1x1 convolution with the same weights, on x (B, L, C)."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


# ---------------------------------------------------------------------------------------------------------------------
# Fresh weights


def initialize(net: nn.Module, kinds=(nn.Conv2d, nn.Linear), generator: torch.Generator | None = None):
    """Let layers of these kinds keep the variance of what passes, and every residual branch start at zero.

    PyTorch's default shrinks a signal by sqrt(3) a layer; through the twenty layers between the latent and the pixels
    of a VAE nothing is left of it, and a flat colour takes thousands of steps to learn instead of a hundred.
    """
    for m in net.modules():
        if isinstance(m, kinds) and not m.weight.is_meta:  # a third of the time to load a small model, for nothing
            nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5, generator=generator)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    for m in net.modules():
        if hasattr(m, "branch_end"):
            zero(m.branch_end)


def zero(layer: nn.Module):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
