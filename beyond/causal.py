"""Multi-scale causal attention: frames one by one, and each sees averages of those before it.

A reconstruction of MSC (arXiv 2412.09828), of which no code and no formula was found. Known from its abstract: a fine
branch with local attention and a coarse one with global, a causal mask over frames, a timestep for every frame, and
scales that are weighed by the timestep, because noise destroys fine detail first. Ours is all else: that Stable
Diffusion's own projections serve both branches, the gate, the two sizes of squares, the formula of the weights, the
band, and the cache.

    out = O_own + g(emb) (O_far - O_own)                    g is linear, a number a head, zero at first
    O_far: softmax over the squares of the last W frames, logits + log n + log max(λ, 0.0001) + learned
    λ = n ρ ᾱ / (n ρ ᾱ + 1 - ᾱ)                             the share of signal in a mean of n tokens

n is the number of tokens of a square, ᾱ that of the frame it is from, ρ the share of the latents' variance that such
means keep: a noisy past speaks through its large squares. A frame without a past is O_own, plain Stable Diffusion.
Folded into a grid none of this would hold: convolutions and norms would see the future.
"""

import torch
from torch import nn

from beyond.pooled import pool
from beyond.temporal import attended_widths
from embed import timestep_embedding
from model import Attention, Clip, Grid, UNet, UNetConfig, attention, split_heads

SIDES = 2, 8  # of the squares, in tokens of the level; no larger than a frame
NUMBERED = 256  # a training clip begins with a frame of any number below this, so that long videos are no news


class Causal(Grid):
    """A frame sees itself in full and the `window` frames before it in squares. A fresh one changes nothing.

    window                  frames, in training and in sampling
    kept_small, kept_large  ρ of the two sizes of squares; by default that of the shipped VAE's latents of the toy world
    alphas_cumprod          ᾱ of all timesteps

    Frames are numbered: α ∘ sinusoid(number) is added to the normed input of attn1, α zero at first. Raises ValueError
    on options that are out of range.
    """

    per_frame = True
    goes_on = True

    def __init__(self, cfg: UNetConfig, window: int = 8, kept_small: float = 0.47, kept_large: float = 0.31, *,
                 alphas_cumprod):
        super().__init__()
        if type(window) is not int or window < 1:
            raise ValueError(f"window must be a whole number >= 1, got {window!r}")
        for name, share in (("kept_small", kept_small), ("kept_large", kept_large)):
            if not (isinstance(share, (int, float)) and 0 < share <= 1):
                raise ValueError(f"{name} must be > 0 and <= 1, got {share!r}")
        self.window, self.kept = window, (kept_small, kept_large)
        self.register_buffer("alphas_cumprod", alphas_cumprod.clone())
        self.blocks = nn.ModuleDict({str(number): CausalBlock(channels, 4 * cfg.channels, cfg.heads(channels))
                                     for number, channels in attended_widths(cfg).items()})

    def self_attention(self, attn: Attention, h, clip: Clip):
        """The normed h (B*T, H, W, C) of all frames -> the same shape."""
        if clip.grid is None:
            return super().self_attention(attn, h, clip)
        block, past, T = self.blocks[str(attn.number)], clip.past, clip.grid[0] * clip.grid[1]
        number = timestep_embedding(frame_numbers(clip, T), h.shape[3]).to(h.dtype)
        h = h + (block.alpha * number)[:, None, None]
        tokens = h.flatten(1, 2)
        q, k, v = (split_heads(layer(tokens), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v))
        own = attention(q, k, v)  # (B*T, heads, N, d)

        far = self.squares(attn, h, clip.t, T)
        if past:
            far = past.joined(attn, far)
        k, v, weight, scale = far  # (B, frames, n, ...), of which the last T are these frames
        bias = weight[:, :, None] + block.learned[:, scale]  # (B, frames, heads, n)
        with torch.autocast(h.device.type, enabled=False):  # as the other layers that take emb, in fp32
            gate = block.gate(clip.emb).to(own.dtype)[:, :, None, None]
        out, (q, own, gate) = [], (x.unflatten(0, (-1, T)) for x in (q, own, gate))
        for t in range(T):
            out.append(own[:, t])
            end = k.shape[1] - T + t
            if end > 0:
                seen = slice(max(0, end - self.window), end)
                keys, values = (split_heads(x[:, seen].flatten(1, 2), attn.heads) for x in (k, v))
                logits = bias[:, seen].transpose(1, 2).flatten(2)[:, :, None]  # (B, heads, 1, keys)
                out[t] = out[t] + gate[:, t] * (attention(q[:, t], keys, values, logits) - out[t])
        return attn.to_out(torch.stack(out, 1).flatten(0, 1).transpose(1, 2).flatten(2)).view_as(h)

    def past(self, unet: UNet) -> "Past":
        """What lets frames be sampled one after the other, before the first of them."""
        return Past(unet)

    def squares(self, attn: Attention, h, t, T: int):
        """What later frames see of frames h (B*T, H, W, C) at timesteps t (B*T,): keys and values (B, T, n, C), the
        part of their logits that is not learned (B, T, n), and their scales, 0 or 1 (n,)."""
        frames = h.permute(0, 3, 1, 2).unflatten(0, (-1, T))
        alpha = self.alphas_cumprod[t.long()].float().view(-1, T, 1)
        tokens, weight, scale = [], [], []
        for i, (side, share) in enumerate(zip(SIDES, self.kept)):
            mean, count = pool(frames, side)
            signal = count * share * alpha
            tokens.append(mean)
            weight.append(count.log() + (signal / (signal + 1 - alpha)).clamp(min=1e-4).log())
            scale += [i] * len(count)
        tokens = torch.cat(tokens, 2)
        return attn.to_k(tokens), attn.to_v(tokens), torch.cat(weight, 2), torch.tensor(scale, device=h.device)


class CausalBlock(nn.Module):
    """What the layout learns for one self-attention; all zero at first."""

    def __init__(self, channels: int, emb_dim: int, heads: int):
        super().__init__()
        self.gate = nn.Linear(emb_dim, heads)
        self.learned = nn.Parameter(torch.zeros(heads, len(SIDES)))  # added to the logits of each size of squares
        self.alpha = nn.Parameter(torch.zeros(channels))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    @property
    def branch_end(self):
        return self.gate


def frame_numbers(clip: Clip, T: int):
    """The numbers of the frames (B*T,): from 0, or going on from the past. In training they begin anywhere, drawn from
    the digits of the noisy latent, so that they follow from the sample and are the same when a hook is run again."""
    first = torch.zeros(len(clip.x) // T, dtype=torch.long, device=clip.x.device)
    if clip.past:
        first += clip.past.number
    elif torch.is_grad_enabled():
        first = (clip.x[::T, 0, 0, 0].abs() * 2**16).long() % NUMBERED
    return (first[:, None] + torch.arange(T, device=first.device)).flatten()


# ---------------------------------------------------------------------------------------------------------------------
# Frame by frame


class Past:
    """The squares of the last frames for every self-attention, and with them the UNet: past(x, t, context, fps) is its
    output for the frame that follows, x (B, 4, h, w).

    Time and memory of a frame do not depend on how many there were. With guidance, B holds both halves; a call with
    fewer gets the last ones.
    """

    def __init__(self, unet: UNet):
        self.unet, self.window, self.number, self.kept, self.noting = unet, unet.layout.window, 0, {}, False

    def __call__(self, x, t, context, fps=None, grid=None, network=None):
        unet = self.unet
        return (network or unet.network)(x, context, Clip((1, 1), t, unet.embedding(t, fps), x, self))

    @torch.no_grad()
    def add(self, x, context, fps=None):
        """Note a finished frame x (B, 4, h, w), by a forward at timestep 0."""
        self.noting = True
        try:
            self(x, torch.zeros(len(x), dtype=torch.long, device=x.device), context, fps)
        finally:
            self.noting = False
        self.number += 1

    def joined(self, attn: Attention, new):
        """The squares before this frame, and its own, for one self-attention."""
        k, v, weight, scale = new
        if attn in self.kept:
            k, v, weight = (torch.cat([old[-len(x):], x], 1) for old, x in zip(self.kept[attn], (k, v, weight)))
        if self.noting:
            self.kept[attn] = [x[:, -self.window:].clone() for x in (k, v, weight)]
        return k, v, weight, scale
