"""Stable Diffusion's UNet, and the two things that ETC does to it.

Every parameter has the name it has in the original single-file checkpoints, so a published file loads by name. What is
ETC's: `UNet.forward` adds the mixed embedding to the latent grid, `UNet.embedding` the FPS embedding to the timestep's.
Self-attention is the temporal model, because its tokens are those of all frames: the `Grid` layout says so, and a
layout object of another kind (in beyond/) says otherwise.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from embed import mixed_embedding, projection, timestep_embedding
from grid import fold, frame_of_pixel, unfold
from layers import cpu
from layers.basic import Downsample, FeedForward, Upsample, initialize, norm_act_conv, per_pixel, zero


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a UNet; the defaults are Stable Diffusion 2's."""

    channels: int = 320  # width of the first level
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level, in `channels`; each level halves the sides
    num_res_blocks: int = 2  # per level (the decoder has one more)
    attention_levels: tuple[int, ...] = (0, 1, 2)  # levels with attention; the middle always has it
    context_dim: int = 1024  # width of the text tower's output
    head_width: int | None = 64  # SD 2 fixes the width of a head,
    num_heads: int | None = None  # SD 1 their number
    linear_projection: bool = True  # SD 2: linear layers around the attention; SD 1: 1x1 convolutions, the same sums
    norm_groups: int = 32
    latent_channels: int = 4
    mixed_embedding: bool = True  # the two additions of ETC, each off for ablations
    fps_embedding: bool = True

    @property
    def downsampling(self) -> int:
        """Latent sides must be divisible by this."""
        return 2 ** (len(self.channel_mult) - 1)

    def heads(self, channels: int) -> int:
        return self.num_heads or channels // self.head_width


# ---------------------------------------------------------------------------------------------------------------------
# Residual block


class ResBlock(nn.Module):
    """x (B, in, H, W), emb (B, E) -> (B, out, H, W). With emb (B, T, E) every frame of the grid has its own."""

    def __init__(self, in_channels: int, emb_dim: int, out_channels: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(*norm_act_conv(groups, in_channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels))
        norm, act, conv = norm_act_conv(groups, out_channels, out_channels)
        self.out_layers = nn.Sequential(norm, act, nn.Identity(), conv)  # dropout in the original; it keeps the number
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    @property
    def branch_end(self):
        return self.out_layers[3]

    def forward(self, x, emb, clip):
        h = self.in_layers(x)
        with torch.autocast(x.device.type, enabled=False):  # E.2: per-block embedding layers stay in fp32
            e = self.emb_layers(emb)
        if e.ndim == 3:  # (B, T, out) -> (B, out, H, W): the pixels of a cell get their frame's
            e = e[:, frame_of_pixel(*h.shape[2:], *clip.grid, device=h.device)].permute(0, 3, 1, 2)
        else:
            e = e[:, :, None, None]
        h = self.out_layers(h + e.to(h.dtype))
        return self.skip_connection(x) + h


# ---------------------------------------------------------------------------------------------------------------------
# Attention (Equations 7-8)


def split_heads(x, heads: int):
    """(B, L, heads*d) -> (B, heads, L, d), without a copy."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(q, k, v, bias=None):
    """Softmax(Q K^T / sqrt(d) + bias) V: q (B, heads, L, d), k and v (B, heads, S, d) -> (B, heads, L, d).

    bias  a number for each key, in a shape that spreads to (B, heads, 1, S); None is 0
    """
    if bias is not None:
        bias = bias.to(q.dtype).expand(*q.shape[:2], 1, k.shape[2])
    if q.device.type == "cpu":
        return cpu.attention(q, k, v, bias)
    # the fused kernel scales q before the product and keeps the softmax in fp32: SD 2.1 overflows fp16 otherwise
    return F.scaled_dot_product_attention(q, k, v, bias)


class Attention(nn.Module):
    """Queries from x (B, L, C), keys and values from context (B, S, D) -> (B, L, C)."""

    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.number = None  # of the block that it is in, as `Block` has it
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x, context):
        k, v = split_heads(self.to_k(context), self.heads), split_heads(self.to_v(context), self.heads)
        out = attention(split_heads(self.to_q(x), self.heads), k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------------------------------------------------------------
# How the tokens of a clip meet


@dataclass(frozen=True)
class Clip:
    """What a layout may want to know of the clip in work. An argument of every hook and never stored on the layout:
    activation checkpointing calls the hooks again in the backward pass."""

    grid: tuple[int, int] | None  # (rows, cols); None is plain Stable Diffusion
    t: torch.Tensor  # timesteps, (B,) or (B, T)
    emb: torch.Tensor  # what the residual blocks receive, (B, E) or (B, T, E)
    x: torch.Tensor  # what the first convolution receives, (B, 4, H, W): from its sides follows how deep a hook stands
    past: object = None  # what a layout keeps of frames before these


class Grid(nn.Module):
    """The paper: every token attends to every token of the clip.

    A layout answers five questions. `per_frame`: are frames taken one by one, that is unfolded before the first
    convolution and folded after the last (then B below is B*T)? `goes_on`: can frames be sampled one after the other,
    by a `past(unet)` as beyond/causal.py has it? And three hooks, on h (B, H, W, C) or (B, C, H, W).
    """

    per_frame = False
    goes_on = False
    positions = None  # the most frames of a clip; None: any number

    def self_attention(self, attn: Attention, h, clip: Clip):
        """What attn1 makes of the normed h (B, H, W, C) -> (B, H, W, C)."""
        tokens = h.flatten(1, 2)
        return attn(tokens, tokens).view_as(h)

    def cross_attention(self, attn: Attention, h, context, clip: Clip):
        """What attn2 makes of the normed h (B, H, W, C) and the context, (B, L, D) or one a frame (B, T, L, D)."""
        if context.ndim == 3:
            return attn(h.flatten(1, 2), context).view_as(h)
        frame = frame_of_pixel(*h.shape[1:3], *clip.grid, device=h.device).flatten()
        counts = frame.bincount(minlength=context.shape[1])
        order = frame.argsort(stable=True).split(counts.tolist())  # the tokens of each frame
        tokens, out = h.flatten(1, 2), torch.empty_like(h.flatten(1, 2))
        for t, mine in enumerate(order):
            out[:, mine] = attn(tokens[:, mine], context[:, t]).to(out.dtype)
        return out.view_as(h)

    def after(self, number: int, h, clip: Clip):
        """What becomes of h (B, C, H, W) behind a ResBlock and its transformer; `number` counts them in order."""
        return h


# ---------------------------------------------------------------------------------------------------------------------
# Transformer


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = Attention(channels, channels, heads)
        self.attn2 = Attention(channels, context_dim, heads)
        self.ff = FeedForward(channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x, context, layout, clip):
        x = x + layout.self_attention(self.attn1, self.norm1(x), clip)
        x = x + layout.cross_attention(self.attn2, self.norm2(x), context, clip)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of an image: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, cfg: UNetConfig):
        super().__init__()

        def project():
            return nn.Linear(channels, channels) if cfg.linear_projection else nn.Conv2d(channels, channels, 1)

        self.norm = nn.GroupNorm(cfg.norm_groups, channels, eps=1e-6)
        self.proj_in = project()
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, cfg.context_dim, cfg.heads(channels))])
        self.proj_out = project()

    @property
    def branch_end(self):
        return self.proj_out

    def forward(self, x, context, layout, clip):
        B, C, H, W = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H*W, C)
        h = per_pixel(self.proj_in, h).unflatten(1, (H, W))
        h = self.transformer_blocks[0](h, context, layout, clip)
        h = per_pixel(self.proj_out, h.flatten(1, 2))
        return x + h.reshape(B, H, W, C).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# UNet


class Block(nn.Sequential):
    """The layers between two skip connections."""

    def __init__(self, *layers):
        super().__init__(*layers)
        last = 1 if len(layers) > 1 and isinstance(layers[1], SpatialTransformer) else 0
        self.hooked = last if isinstance(layers[0], ResBlock) else None  # the layer behind which the layout is asked
        self.number = None  # of this block among those, in order of execution

    def forward(self, h, emb, context, layout, clip):
        for i, layer in enumerate(self):
            if isinstance(layer, ResBlock):
                h = layer(h, emb, clip)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context, layout, clip)
            else:
                h = layer(h)
            if i == self.hooked:
                h = layout.after(self.number, h, clip)
        return h


class UNet(nn.Module):
    """Stable Diffusion's denoiser, and with `fps` and `grid` given, ETC's.

    Raises ValueError on latent sides that the UNet cannot halve often enough.
    """

    def __init__(self, cfg: UNetConfig, layout: nn.Module | None = None):
        super().__init__()
        self.cfg, self.layout = cfg, layout or Grid()
        self.checkpointing = False  # recompute each block's activations in backward instead of keeping them
        self.mixed = {}  # the mixed embedding of the last grid
        emb_dim = 4 * cfg.channels
        self.time_embed = nn.Sequential(nn.Linear(cfg.channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        if cfg.fps_embedding:
            self.time_proj, self.fps_proj = projection(emb_dim), projection(emb_dim)

        def level(in_channels, out_channels, attention):
            layers = [ResBlock(in_channels, emb_dim, out_channels, cfg.norm_groups)]
            return layers + ([SpatialTransformer(out_channels, cfg)] if attention else [])

        widths = [cfg.channels * m for m in cfg.channel_mult]
        c, last = widths[0], len(widths) - 1
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(cfg.latent_channels, c, 3, padding=1))])
        skips = [c]
        for i, width in enumerate(widths):
            for _ in range(cfg.num_res_blocks):
                self.input_blocks.append(Block(*level(c, width, i in cfg.attention_levels)))
                c = width
                skips.append(c)
            if i < last:
                self.input_blocks.append(Block(Downsample(c)))
                skips.append(c)

        middle_end = ResBlock(c, emb_dim, c, cfg.norm_groups)
        self.middle_block = Block(*level(c, c, attention=True), middle_end)

        self.output_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            for j in range(cfg.num_res_blocks + 1):
                layers = level(c + skips.pop(), width, i in cfg.attention_levels)
                if i > 0 and j == cfg.num_res_blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(Block(*layers))
                c = width
        self.out = nn.Sequential(*norm_act_conv(cfg.norm_groups, c, cfg.latent_channels))
        for number, block in enumerate(block for block in self.blocks() if block.hooked is not None):
            for module in block.modules():
                if isinstance(module, (Block, Attention)):
                    module.number = number
        # attention needs logits that differ from the start; convolutions keep PyTorch's default, from which a denoiser
        # sooner learns the high-pass that it is at low noise
        initialize(self, nn.Linear)
        zero(self.out[2])
        if cfg.fps_embedding:  # the branch adds nothing to Stable Diffusion before it is trained
            zero(self.time_proj[-1])
            zero(self.fps_proj[-1])

    def blocks(self):
        """All blocks, in the order in which they run."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def embedding(self, t, fps=None):
        """What the residual blocks receive (4.2): t (B,) or (B, T), fps (B,) or None -> (B, E) or (B, T, E).

        emb = e_t + time_proj(e_t) + fps_proj(e_f), both through the same sinusoid and the same `time_embed`.
        """

        def embed(value):
            sinusoid = timestep_embedding(value.flatten(), self.cfg.channels).unflatten(0, value.shape)
            return self.time_embed(sinusoid.to(self.time_embed[0].weight.dtype))

        with torch.autocast(t.device.type, enabled=False):  # E.2: the embedding network stays in fp32
            emb = embed(t)
            if fps is None or not self.cfg.fps_embedding:
                return emb
            rate = self.fps_proj(embed(fps))
            return emb + self.time_proj(emb) + (rate[:, None] if t.ndim == 2 else rate)

    def forward(self, x, t, context, fps=None, grid=None, network=None):
        """Predict ε (or v) -> (B, 4, H, W).

        x        (B, 4, H, W) noisy latent; with `grid`, the frames folded into one image
        t        (B,) timestep, 0..999; or (B, T), one a frame
        context  (B, L, D) output of the text tower; or (B, T, L, D), one a frame
        fps      (B,) frame rate, 0..120; None: plain SD
        grid     (rows, cols); None: plain SD
        network  what runs in place of `network`, as in beyond/fast.py
        """
        B, C, H, W = x.shape
        T, factor = grid[0] * grid[1] if grid else 1, self.cfg.downsampling
        per_frame = self.layout.per_frame and grid is not None
        height, width = (H // grid[0], W // grid[1]) if per_frame else (H, W)
        if height % factor or width % factor:
            raise ValueError(f"the UNet needs latent sides divisible by {factor}, got {height} x {width} (height x "
                             "width)")
        if self.layout.positions and T > self.layout.positions:
            raise ValueError(f"the layout numbers at most {self.layout.positions} frames, got {T}")
        for name, frames in (("t", t.shape[1:]), ("context", context.shape[1:-2])):
            if frames and (grid is None or frames[0] != T):
                raise ValueError(f"{name} is given for {frames[0]} frames, and the grid {grid} has {T}")
        if per_frame:
            x, t, context, fps = frames_apart(x, t, context, fps, grid)
        elif grid is not None and self.cfg.mixed_embedding:
            # 4.1.2: "the ME must be added to the noise before any attention or convolutional modules"; fp32
            x = x.float() + self.mixed_embedding(*grid, H, W, C, x.device)

        out = (network or self.network)(x, context, Clip(grid, t, self.embedding(t, fps), x))
        return fold(out.unflatten(0, (B, T)), *grid) if per_frame else out

    def network(self, x, context, clip: Clip):
        """The layers, after all that `forward` does to what they are given."""
        given = clip.emb, context, self.layout, clip
        h, skips = self.down(x.to(self.out[2].weight.dtype), given)
        h = self.run(self.middle_block, h, given)
        return self.out(self.up(h, skips, given))

    def down(self, h, given):
        """The encoder -> what the middle block gets, and what the decoder takes from each block, in order."""
        skips = []
        for block in self.input_blocks:
            h = self.run(block, h, given)
            skips.append(h)
        return h, skips

    def up(self, h, skips, given):
        """The decoder; `skips` are left as they are."""
        for block, skip in zip(self.output_blocks, reversed(skips)):
            h = self.run(block, torch.cat([h, skip], dim=1), given)
        return h

    def run(self, block: Block, h, given):
        """One block; given: (emb, context, layout, clip)."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, *given, use_reentrant=False, preserve_rng_state=False)  # nothing is random
        return block(h, *given)

    def mixed_embedding(self, rows, cols, H, W, C, device):
        """Made once a grid, not once a step: for 16 frames of 32 x 32 it takes 1.5 ms, and the way to a GPU."""
        key = rows, cols, H, W, C, device
        if key not in self.mixed:
            self.mixed = {key: mixed_embedding(rows, cols, H // rows, W // cols, C).to(device)}
        return self.mixed[key]


def frames_apart(x, t, context, fps, grid):
    """The frames of a folded image one by one, each with its timestep, context and FPS: (B, ...) -> (B*T, ...)."""
    T = grid[0] * grid[1]
    t = t.flatten() if t.ndim == 2 else t.repeat_interleave(T)
    context = context.flatten(0, 1) if context.ndim == 4 else context.repeat_interleave(T, 0)
    return unfold(x, *grid).flatten(0, 1), t, context, None if fps is None else fps.repeat_interleave(T)
