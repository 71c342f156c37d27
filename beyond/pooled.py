"""Pooled attention: a frame sees itself in full, and of the other frames only averages.

Nothing is learned, so it works with any file that was trained on grids, and for training too. Pooling commutes with
linear layers, so the normed input of attn1 is pooled and then projected. One softmax over all of a frame's keys:

    softmax [ q K_own^T / sqrt(d)  |  q K_far^T / sqrt(d) + log n ] [ V_own | V_far ]

where a far key is the mean of n tokens. Tokens that are equal are counted right that way, so with pools of one token
this is the grid's full attention; with larger ones it is an approximation.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F

from grid import fold, unfold
from model import Attention, Clip, Grid, UNetConfig, attention, split_heads


class Pooled(Grid):
    """Grid attention in which the tokens of other frames are averaged over squares.

    squares  along the shorter side of a frame, at least. 8 are 4 x 4 tokens each on the first level of 256x256 frames.
             With 2, which is all that pooling leaves of the shipped model's 4 x 4 tokens a frame, that model no
             longer draws and moves what it is told; so it is left as it is
    reach    frames that are this far apart, or farther, see squares of twice the side; from four times as far, four
             times; and so on, which makes the cost of T frames T log T and not T^2

    Clips of at most `reach` frames are pooled on the largest level with attention alone, where most of the cost is;
    longer ones on every level. Where a cell of the grid is no whole number of tokens, attention is full. Raises
    ValueError on options that are out of range.
    """

    def __init__(self, cfg: UNetConfig, squares: int = 8, reach: int = 16):
        super().__init__()
        for name, value in (("squares", squares), ("reach", reach)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        self.squares, self.reach = squares, reach
        self.largest = min(cfg.attention_levels, default=len(cfg.channel_mult) - 1)

    def self_attention(self, attn: Attention, h, clip: Clip):
        (_, H, W, _), (rows, cols) = h.shape, clip.grid or (1, 1)
        T, shorter, smaller = rows * cols, min(H // rows, W // cols), clip.x.shape[2] // H > 2**self.largest
        if T == 1 or H % rows or W % cols or T <= self.reach and (smaller or self.side(shorter, 1) == 1):
            return super().self_attention(attn, h, clip)
        return pooled_attention(attn, h, (rows, cols), lambda distance: self.side(shorter, distance))

    def side(self, shorter: int, distance: int) -> int:
        """Side of the squares that frames see of one another, whose shorter side is given; in tokens."""
        while distance >= self.reach:
            shorter, distance = 2 * shorter, distance // 4
        return max(1, shorter // self.squares)


def pooled_attention(attn: Attention, h, grid, side_at):
    """Self-attention of the frames of a grid h (B, H, W, C) -> (B, H, W, C).

    side_at  distance in frames, >= 1 -> side of the squares, in tokens
    """
    frames = unfold(h.permute(0, 3, 1, 2), *grid)  # (B, T, C, h, w)
    own = frames.flatten(3).mT
    T, N = own.shape[1:3]
    q, own_k, own_v = attn.to_q(own), attn.to_k(own), attn.to_v(own)
    far = {}  # keys and values of every frame, and the logits' share, by side
    for side in {side_at(distance) for distance in range(1, T)}:
        tokens, count = pool(frames, side)
        far[side] = attn.to_k(tokens), attn.to_v(tokens), count.log()
    out = []
    for t in range(T):  # one by one: together, their keys would be T times as many
        seen = defaultdict(list)
        for other in range(T):
            if other != t:
                seen[side_at(abs(other - t))].append(other)
        k, v, bias = [own_k[:, t]], [own_v[:, t]], [own.new_zeros(N)]
        for side, others in seen.items():
            keys, values, log_count = far[side]
            k.append(keys[:, others].flatten(1, 2))
            v.append(values[:, others].flatten(1, 2))
            bias.append(log_count.repeat(len(others)))
        heads = (split_heads(x, attn.heads) for x in (q[:, t], torch.cat(k, 1), torch.cat(v, 1)))
        out.append(attention(*heads, torch.cat(bias)).transpose(1, 2).flatten(2))
    out = attn.to_out(torch.stack(out, 1))
    return fold(out.mT.unflatten(3, frames.shape[3:]), *grid).permute(0, 2, 3, 1)


def pool(frames, side: int):
    """Average squares of side x side tokens, frames (B, T, C, h, w) -> (B, T, n, C), and the tokens of each (n,).

    Squares at the lower and the right edge hold fewer where the sides are not divisible.
    """
    kernel = [min(side, length) for length in frames.shape[3:]]
    means = F.avg_pool2d(frames.flatten(0, 1), kernel, ceil_mode=True, count_include_pad=False)
    ones = torch.ones(1, *frames.shape[3:], device=frames.device)
    count = F.avg_pool2d(ones, kernel, ceil_mode=True, divisor_override=1).flatten()
    return means.flatten(2).mT.unflatten(0, frames.shape[:2]), count
