"""Temporal layers: frames one by one, and behind every residual block a small transformer over time.

The usual way to give an image model time, and the paper's baseline (W-TA). The layers are AnimateDiff's motion modules
(Guo et al. 2023), under their names, so that published ones load: see sd/motion.py.
"""

import torch
from torch import nn

from layers.basic import FeedForward
from model import Attention, Clip, Grid, UNetConfig

HEADS = 8  # at every width
ROWS = 4096  # pixels that attend over time at once: CUDA's kernels take 65,535 pairs of pixel and head


class Temporal(Grid):
    """A motion module behind every residual block and its transformer, before upsampling. A fresh one adds nothing.

    positions  the most frames of a clip
    middle     whether the middle block has a module too: AnimateDiff's v2 does, v1 and v3 do not

    Raises ValueError on options that are out of range.
    """

    per_frame = True

    def __init__(self, cfg: UNetConfig, positions: int = 32, middle: bool = True):
        super().__init__()
        if type(positions) is not int or positions < 1:
            raise ValueError(f"positions must be a whole number >= 1, got {positions!r}")
        if type(middle) is not bool:
            raise ValueError(f"middle must be True or False, got {middle!r}")
        self.positions = positions
        without = () if middle else (middle_number(cfg),)
        self.motion = nn.ModuleDict({str(number): MotionModule(channels, cfg.norm_groups)
                                     for number, channels in enumerate(hooked_widths(cfg)) if number not in without})

    def after(self, number: int, h, clip: Clip):
        """h (B*T, C, H, W) of all frames -> the same with what the module over time adds."""
        if clip.grid is None or str(number) not in self.motion:
            return h
        return self.motion[str(number)](h, clip.grid[0] * clip.grid[1])


def hooked_widths(cfg: UNetConfig) -> list[int]:
    """Channels behind each block that a layout's `after` is called for, in order of execution."""
    return [cfg.channels * cfg.channel_mult[level] for level in hooked_levels(cfg)]


def attended_widths(cfg: UNetConfig) -> dict[int, int]:
    """Channels of those of them that have a transformer, by number."""
    return {number: width for number, (level, width) in enumerate(zip(hooked_levels(cfg), hooked_widths(cfg)))
            if level in cfg.attention_levels or number == middle_number(cfg)}


def hooked_levels(cfg: UNetConfig) -> list[int]:
    """The level of each of them."""
    levels = range(len(cfg.channel_mult))
    down = [level for level in levels for _ in range(cfg.num_res_blocks)]
    return [*down, levels[-1], *(level for level in reversed(levels) for _ in range(cfg.num_res_blocks + 1))]


def middle_number(cfg: UNetConfig) -> int:
    """The number that the middle block has among those."""
    return len(cfg.channel_mult) * cfg.num_res_blocks


class MotionModule(nn.Module):
    """A transformer over the frames at every pixel: (B*T, C, H, W) -> (B*T, C, H, W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # of each frame alone
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([MotionBlock(channels)])
        self.proj_out = nn.Linear(channels, channels)

    @property
    def branch_end(self):
        return self.proj_out

    def forward(self, x, T: int):
        _, C, H, W = x.shape
        h = self.norm(x).unflatten(0, (-1, T)).permute(0, 3, 4, 1, 2).flatten(0, 2)  # (B*H*W, T, C)
        h = self.proj_out(self.transformer_blocks[0](self.proj_in(h)))
        return x + h.view(-1, H, W, T, C).permute(0, 3, 4, 1, 2).flatten(0, 1)


class MotionBlock(nn.Module):
    """Two self-attentions over time, feed-forward: (N, T, C) -> (N, T, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.attention_blocks = nn.ModuleList([Attention(channels, channels, HEADS) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(2)])
        self.ff, self.ff_norm = FeedForward(channels), nn.LayerNorm(channels)

    def forward(self, h):
        time = frame_numbers(h.shape[1], h.shape[2], h.device).to(h.dtype)
        for attn, norm in zip(self.attention_blocks, self.norms):
            h = h + torch.cat([attn(rows, rows) for rows in (norm(h) + time).split(ROWS)])
        return h + self.ff(self.ff_norm(h))


def frame_numbers(T: int, C: int, device=None):
    """The numbers of T frames as (T, C): sin(t / 10000^(2i/C)) in channel 2i, cos of the same in channel 2i + 1."""
    rate = 10000 ** (-torch.arange(0, C, 2, device=device) / C)
    angle = torch.arange(T, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
