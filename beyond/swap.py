"""Swapped attention: space asks time and time asks space, in windows of all frames.

A reconstruction of VideoFactory (Wang et al. 2023), whose method section and code were not found. Known from its
abstract and reviews: cross-attention between the spatial and the temporal stream inside 3-D windows, with the role of
the query alternating from block to block, on top of a model with temporal layers. Ours is all else: which block is
which, the sizes of the windows, norms and projections, and that the residual is the temporal stream in all blocks.

    S = what the spatial transformer gives, M = S + time(S) by the module of the `temporal` layout
    X, Y = S, M  in even blocks, counted in order of execution;  M, S  in odd ones
    x = W_x GN(X),  y = W_y GN(Y)
    a = x + attention(q = LN(x), kv = LN(y))                inside each window
    out = M + W_out (a + FF(LN(a)))                         W_out is zero at first

With S as the residual of half of the blocks, their modules over time would have no gradient while W_out is zero.
"""

from torch import nn

from beyond.temporal import Temporal, attended_widths
from layers.basic import FeedForward
from model import Attention, Clip, UNetConfig

LARGEST = 8  # side of a window in tokens, at most; a divisor of the frame's side


class Swap(Temporal):
    """The `temporal` layout, and swapped attention behind every transformer. A fresh one adds nothing.

    Options, and what is raised, are those of `Temporal`.
    """

    def __init__(self, cfg: UNetConfig, positions: int = 32, middle: bool = True):
        super().__init__(cfg, positions, middle)
        self.swap = nn.ModuleDict({str(number): SwappedAttention(channels, cfg, even=i % 2 == 0)
                                   for i, (number, channels) in enumerate(attended_widths(cfg).items())})

    def after(self, number: int, h, clip: Clip):
        """h (B*T, C, H, W) of all frames -> the same with what time, and both together, add."""
        mixed = super().after(number, h, clip)
        if clip.grid is None or str(number) not in self.swap:
            return mixed
        return self.swap[str(number)](h, mixed, clip.grid[0] * clip.grid[1])


class SwappedAttention(nn.Module):
    """Cross-attention between two streams, spatial and mixed (B*T, C, H, W) -> (B*T, C, H, W)."""

    def __init__(self, channels: int, cfg: UNetConfig, even: bool):
        super().__init__()
        self.even = even  # the spatial stream asks
        self.norm_x, self.norm_y = (nn.GroupNorm(cfg.norm_groups, channels, eps=1e-6) for _ in range(2))
        self.proj_x, self.proj_y = (nn.Linear(channels, channels) for _ in range(2))
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(3)])
        self.attn, self.ff = Attention(channels, channels, cfg.heads(channels)), FeedForward(channels)
        self.proj_out = nn.Linear(channels, channels)

    @property
    def branch_end(self):
        return self.proj_out

    def forward(self, spatial, mixed, T: int):
        x, y = (spatial, mixed) if self.even else (mixed, spatial)
        x = self.proj_x(windows(self.norm_x(x), T))
        y = self.proj_y(windows(self.norm_y(y), T))
        a = x + self.attn(self.norms[0](x), self.norms[1](y))
        a = self.proj_out(a + self.ff(self.norms[2](a)))
        return mixed + frames(a, T, *mixed.shape[2:])


def side(length: int) -> int:
    """Side of a window along a side of the frame: its largest divisor that is no larger than LARGEST."""
    return max(d for d in range(1, LARGEST + 1) if length % d == 0)


def windows(h, T: int):
    """Cut all frames of a clip into windows: (B*T, C, H, W) -> (B * windows, tokens, C)."""
    H, W = h.shape[2:]
    h = h.unflatten(3, (-1, side(W))).unflatten(2, (-1, side(H))).unflatten(0, (-1, T))  # (B, T, C, ., wh, ., ww)
    return h.permute(0, 3, 5, 1, 4, 6, 2).flatten(3, 5).flatten(0, 2)


def frames(tokens, T: int, H: int, W: int):
    """The inverse of `windows`: (B * windows, tokens, C) -> (B*T, C, H, W)."""
    h = tokens.unflatten(1, (T, side(H), side(W))).unflatten(0, (-1, H // side(H), W // side(W)))
    return h.permute(0, 3, 6, 1, 4, 2, 5).flatten(5, 6).flatten(3, 4).flatten(0, 1)
