"""The three networks of Stable Diffusion: UNet, AutoencoderKL, TextEncoder. Nothing about files.

Every parameter has the name it has in the original single-file checkpoints, so a published file loads by name. What
ETC adds to the UNet is two lines of `UNet.forward`: mixed embedding on the latent, FPS embedding on the timestep.
"""

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from embed import mixed_embedding, projection, timestep_embedding

# ---------------------------------------------------------------------------------------------------------------------
# Configurations. Presets stand at the end of the file.


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a UNet. Of attention heads, `head_width` fixes the width (SD 2) or `num_heads` the number (SD 1)."""

    channels: int = 320  # width of the first level
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level in `channels`; each halves the sides
    num_res_blocks: int = 2  # a level (the decoder has one more)
    attention_levels: tuple[int, ...] = (0, 1, 2)  # which levels have attention; the middle always has
    context_dim: int = 1024  # width of the text tower's output
    head_width: int | None = 64
    num_heads: int | None = None
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


@dataclass(frozen=True)
class TextConfig:
    width: int = 1024
    layers: int = 24
    heads: int = 16
    skip_last: int = 1  # layers at the end that are there but not used: SD 2 reads the penultimate one
    quick_gelu: bool = False  # SD 1
    projection: int = 1024  # width of `text_projection`, in SD 2's files though SD never uses it; 0: none
    pad_id: int = 0  # SD 1: 49407
    vocab: int = 49408
    length: int = 77  # tokens, first and last included; what a prompt has beyond is cut


# ---------------------------------------------------------------------------------------------------------------------
# Residual block, down- and upsampling


def initialize(net: nn.Module, kinds=(nn.Conv2d, nn.Linear), generator: torch.Generator | None = None):
    """Fresh weights: layers of these kinds keep the variance of what passes, every residual branch starts at zero.

    PyTorch's default shrinks a signal by sqrt(3) a layer; through the twenty layers between the latent and the pixels
    of a VAE nothing is left of it, and a flat colour takes thousands of steps to learn instead of a hundred.
    """
    for m in net.modules():
        if isinstance(m, kinds):
            nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5, generator=generator)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    for m in net.modules():
        if isinstance(m, ResBlock):
            zero(m.out_layers[3])
        elif isinstance(m, (SpatialTransformer, VAEAttention)):
            zero(m.proj_out)
        elif isinstance(m, VAEResBlock):
            zero(m.conv2)


def zero(layer: nn.Module):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def norm_act_conv(groups: int, in_channels: int, out_channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(groups, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)]


class ResBlock(nn.Module):
    """x (B, in, H, W), emb (B, emb_dim) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, emb_dim: int, out_channels: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(*norm_act_conv(groups, in_channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels))
        norm, act, conv = norm_act_conv(groups, out_channels, out_channels)
        self.out_layers = nn.Sequential(norm, act, nn.Identity(), conv)  # dropout in the original; it keeps the number
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, emb):
        h = self.in_layers(x)
        with torch.autocast(x.device.type, enabled=False):  # E.2: per-block embedding layers stay in fp32
            e = self.emb_layers(emb)
        h = self.out_layers(h + e[:, :, None, None].to(h.dtype))
        return self.skip_connection(x) + h


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


# ---------------------------------------------------------------------------------------------------------------------
# Attention (Equations 7-8). Over a grid image, self-attention sees every frame: this is the whole temporal model.


def split_heads(x, heads: int):
    """(B, L, heads*d) -> (B, heads, L, d), without a copy."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(q, k, v):
    """Softmax(Q K^T / sqrt(d)) V: q (B, heads, L, d), k and v (B, heads, S, d) -> (B, heads, L, d)."""
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.shape[-2] * k.shape[-2] <= 2**17:
        # the backward pass of the fused CPU kernel is 2 to 10 times slower than this on a few hundred tokens
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] >= 1024:
        return AttentionByParts.apply(q, k, v)
    # the fused kernel scales q before the product and keeps the softmax in fp32: SD 2.1 overflows fp16 otherwise
    return F.scaled_dot_product_attention(q, k, v)


class AttentionByParts(torch.autograd.Function):
    """The same, so many queries of one head at a time: their logits stay in the cache, and backward makes them again.

    In bf16 on a CPU (Zen 5), on the 16,384 tokens of a grid, both passes take together 0.55 to 0.6 of what the fused
    kernel's do. Result and gradients are 0.4% to 0.6% off where those are 0.2% to 0.4% off: logits are rounded to bf16
    as well.
    """

    @staticmethod
    def parts(q, k):
        """(batch, head), and the queries of a part: 256, or fewer of more than 16,384 tokens."""
        part = min(256, 2**22 // k.shape[2])
        rows = [slice(i, i + part) for i in range(0, q.shape[2], part)]
        return product(product(range(q.shape[0]), range(q.shape[1])), rows)

    @staticmethod
    def forward(ctx, q, k, v):
        q = q * q.shape[-1] ** -0.5
        out = torch.empty_like(q)
        for head, rows in AttentionByParts.parts(q, k):
            out[head][rows] = (q[head][rows] @ k[head].mT).softmax(-1) @ v[head]
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """With P = softmax(Q K^T) and O = P V: dV = P^T dO, dS = P (dO V^T - sum(dO O)), dQ = dS K, dK = dS^T Q."""
        q, k, v, out = ctx.saved_tensors
        grad_q, common = torch.empty_like(q), (grad * out).sum(-1, keepdim=True)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))  # they are sums over all parts
        for head, rows in AttentionByParts.parts(q, k):
            weights = (q[head][rows] @ k[head].mT).softmax(-1)
            grad_v[head] += weights.mT @ grad[head][rows]
            grad_logits = (grad[head][rows] @ v[head].mT).sub_(common[head][rows]).mul_(weights)
            grad_q[head][rows] = grad_logits @ k[head]
            grad_k[head] += grad_logits.mT @ q[head][rows]
        return grad_q * q.shape[-1] ** -0.5, grad_k.to(k.dtype), grad_v.to(v.dtype)


class Attention(nn.Module):
    """Queries from x (B, L, C); keys and values from `encode`."""

    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def encode(self, context):
        """context (B, S, D) -> its keys and values, each (B, heads, S, d)."""
        return split_heads(self.to_k(context), self.heads), split_heads(self.to_v(context), self.heads)

    def forward(self, x, kv):
        k, v = kv
        q = split_heads(self.to_q(x), self.heads)
        out = attention(q, k, v)  # (B, heads, L, d)
        return self.to_out(out.transpose(1, 2).flatten(2))


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


class TransformerBlock(nn.Module):
    """Self-attention over all pixels, cross-attention to the text, feed-forward: (B, L, C) -> (B, L, C)."""

    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = Attention(channels, channels, heads)
        self.attn2 = Attention(channels, context_dim, heads)
        self.ff = FeedForward(channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x, kv):
        h = self.norm1(x)
        x = x + self.attn1(h, self.attn1.encode(h))
        x = x + self.attn2(self.norm2(x), kv)
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

    def forward(self, x, kv):
        B, C, H, W = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H*W, C)
        h = per_pixel(self.proj_in, h)
        h = self.transformer_blocks[0](h, kv)
        h = per_pixel(self.proj_out, h)
        return x + h.reshape(B, H, W, C).permute(0, 3, 1, 2)


def per_pixel(layer, x):
    """A linear layer, or the 1x1 convolution with the same weights, on x (B, L, C)."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


# ---------------------------------------------------------------------------------------------------------------------
# UNet


class Block(nn.Sequential):
    """The layers between two skip connections: each takes what it needs of (h, emb, kv)."""

    def forward(self, h, emb, kv):
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, kv)
            else:
                h = layer(h)
        return h


class UNet(nn.Module):
    """Stable Diffusion's denoiser, and with `fps` and `grid` given, ETC's.

    Raises ValueError on latent sides that the UNet cannot halve often enough.
    """

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
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
        # attention needs logits that differ from the start; convolutions keep PyTorch's default, from which a denoiser
        # sooner learns the high-pass that it is at low noise
        initialize(self, nn.Linear)
        zero(self.out[2])
        if cfg.fps_embedding:  # the branch adds nothing to Stable Diffusion before it is trained
            zero(self.time_proj[-1])
            zero(self.fps_proj[-1])

    def blocks(self):
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def embedding(self, t, fps=None):
        """What the residual blocks receive (4.2), t (B,), fps (B,) or None -> (B, 4*channels).

        emb = e_t + time_proj(e_t) + fps_proj(e_f), both through the same sinusoid and the same `time_embed`.
        """

        def embed(value):
            return self.time_embed(timestep_embedding(value, self.cfg.channels).to(self.time_embed[0].weight.dtype))

        with torch.autocast(t.device.type, enabled=False):  # E.2: the embedding network stays in fp32
            emb = embed(t)
            if fps is None or not self.cfg.fps_embedding:
                return emb
            return emb + self.time_proj(emb) + self.fps_proj(embed(fps))

    def encode_context(self, context):
        """Keys and values of the text for every block, context (B, L, D) -> a list to pass to `forward` instead of it.

        The text does not change while a video is sampled, so this need not be done at every step.
        """
        transformers = [m for block in self.blocks() for m in block if isinstance(m, SpatialTransformer)]
        return [m.transformer_blocks[0].attn2.encode(context) for m in transformers]

    def forward(self, x, t, context, fps=None, grid=None):
        """Predict ε (or v) -> (B, 4, H, W).

        x        (B, 4, H, W) noisy latent; with `grid`, the frames folded into one image
        t        (B,) timestep, 0..999
        context  (B, L, D) output of the text tower, or what `encode_context` made of it
        fps      (B,) frame rate, 0..120; None: plain SD
        grid     (rows, cols); None: plain SD
        """
        B, C, H, W = x.shape
        factor = self.cfg.downsampling
        if H % factor or W % factor:
            raise ValueError(f"the UNet needs latent sides divisible by {factor}, not {H} x {W} (height x width)")
        emb = self.embedding(t, fps)
        if grid is not None and self.cfg.mixed_embedding:
            # 4.1.2: "the ME must be added to the noise before any attention or convolutional modules"; fp32
            x = x.float() + self.mixed_embedding(*grid, H, W, C, x.device)
        if isinstance(context, torch.Tensor):
            context = self.encode_context(context)

        kvs = iter(context)
        h = x.to(self.out[2].weight.dtype)
        skips = []
        for block in self.input_blocks:
            h = self.run(block, h, emb, kvs)
            skips.append(h)
        h = self.run(self.middle_block, h, emb, kvs)
        for block in self.output_blocks:
            h = self.run(block, torch.cat([h, skips.pop()], dim=1), emb, kvs)
        return self.out(h)

    def mixed_embedding(self, rows, cols, H, W, C, device):
        """Made once a grid, not once a step: for 16 frames of 32 x 32 it takes 1.5 ms, and the way to a GPU."""
        key = rows, cols, H, W, C, device
        if key not in self.mixed:
            self.mixed = {key: mixed_embedding(rows, cols, H // rows, W // cols, C).to(device)}
        return self.mixed[key]

    def run(self, block, h, emb, kvs):
        kv = next(kvs) if any(isinstance(layer, SpatialTransformer) for layer in block) else None
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, emb, kv, use_reentrant=False, preserve_rng_state=False)  # nothing is random
        return block(h, emb, kv)


# ---------------------------------------------------------------------------------------------------------------------
# VAE


class VAEResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

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


# ---------------------------------------------------------------------------------------------------------------------
# Text tower: open_clip's own, without the image tower


class TextEncoder(nn.Module):
    """Prompts -> context. `model` carries open_clip's names, which SD 2's files have under cond_stage_model.model."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        from open_clip.transformer import QuickGELU, TextTransformer  # seconds to import, and only needed here

        self.cfg = cfg
        self.model = TextTransformer(
            cfg.length, cfg.vocab, cfg.width, cfg.heads, cfg.layers, output_dim=cfg.projection or None,
            act_layer=QuickGELU if cfg.quick_gelu else nn.GELU)
        # open_clip starts tokens at 0.02, far below what a block adds: a tower that learns from a denoiser then forgets
        # the words of motion before the denoiser has a use for them, and never gets them back
        nn.init.normal_(self.model.token_embedding.weight)
        nn.init.normal_(self.model.positional_embedding, std=0.1)

    def unused(self) -> list[nn.Module | nn.Parameter]:
        """What the context does not depend on, and training must leave alone."""
        last = self.cfg.layers - self.cfg.skip_last
        projection = self.model.text_projection
        return [*self.model.transformer.resblocks[last:], *([] if projection is None else [projection])]

    def tokenize(self, prompts: list[str]):
        """Token ids (B, length), and for each prompt the text that did not fit ("" when all did)."""
        from open_clip.tokenizer import _tokenizer as bpe

        ids = torch.full((len(prompts), self.cfg.length), self.cfg.pad_id, dtype=torch.long)
        cut = []
        for row, prompt in zip(ids, prompts):
            words, room = bpe.encode(prompt), self.cfg.length - 2
            tokens = [bpe.sot_token_id, *words[:room], bpe.eot_token_id]
            row[: len(tokens)] = torch.tensor(tokens)
            cut.append(bpe.decode(words[room:]).strip())
        return ids, cut

    def forward(self, tokens):
        """tokens (B, length) -> context (B, length, width): the chosen layer, then the final norm."""
        m = self.model
        x = m.token_embedding(tokens) + m.positional_embedding
        mask = m.attn_mask.to(x.dtype)
        for block in m.transformer.resblocks[: self.cfg.layers - self.cfg.skip_last]:
            x = block(x, attn_mask=mask)
        return m.ln_final(x)


# ---------------------------------------------------------------------------------------------------------------------
# Presets: (UNet, VAE, text tower)


@dataclass(frozen=True)
class ModelConfig:
    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig


SD21 = ModelConfig(UNetConfig(), VAEConfig(), TextConfig())
SD15 = ModelConfig(
    UNetConfig(context_dim=768, head_width=None, num_heads=8, linear_projection=False),
    VAEConfig(),
    TextConfig(width=768, layers=12, heads=12, skip_last=0, quick_gelu=True, projection=0, pad_id=49407),
)
# The model that ships: the same classes, three levels instead of four, trained from nothing on two cores.
TINY = ModelConfig(
    UNetConfig(
        channels=64, channel_mult=(1, 2, 3), num_res_blocks=1, attention_levels=(1, 2), context_dim=64, head_width=64,
        norm_groups=8,
    ),
    # one group: a norm over few channels each would take the very colour out of a flat background
    VAEConfig(channels=16, channel_mult=(1, 2, 4, 8), num_res_blocks=1, norm_groups=1),
    # sixteen tokens: cross-attention starts out even, and among 77 that are mostly padding a word is not heard
    TextConfig(width=64, layers=2, heads=2, skip_last=0, projection=0, length=16),
)
# Small enough for a test to train.
MICRO = ModelConfig(
    UNetConfig(
        channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), context_dim=32, head_width=16,
        norm_groups=4,
    ),
    VAEConfig(channels=8, channel_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=1),
    TextConfig(width=32, layers=1, heads=2, skip_last=0, projection=0),
)
