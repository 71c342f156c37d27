"""UNets of diffusers with random weights, which the benchmarks measure ours against."""

from dataclasses import replace

import torch

from model import UNet, UNetConfig
from sd.names import parameters, unet_layers


def diffusers_unet(cfg: UNetConfig):
    """UNet2DConditionModel of our shape, without what ETC adds."""
    from diffusers import UNet2DConditionModel

    levels = range(len(cfg.channel_mult))
    kinds = [("CrossAttn" if level in cfg.attention_levels else "") for level in levels]
    widths = tuple(cfg.channels * m for m in cfg.channel_mult)
    return UNet2DConditionModel(
        block_out_channels=widths, layers_per_block=cfg.num_res_blocks, cross_attention_dim=cfg.context_dim,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)), norm_num_groups=cfg.norm_groups,
        attention_head_dim=tuple(cfg.heads(width) for width in widths),  # the name is theirs, the number is of heads
        use_linear_projection=cfg.linear_projection)


def ours_with_weights_of(theirs, cfg: UNetConfig) -> UNet:
    """Our UNet, without what ETC adds, on the very tensors of diffusers': the same weights, and one copy of them."""
    with torch.device("meta"):
        unet = UNet(replace(cfg, mixed_embedding=False, fps_embedding=False))
    state, names = theirs.state_dict(), parameters(unet_layers(len(cfg.channel_mult), cfg.num_res_blocks), "")
    unet.load_state_dict({name: state[names[name][0]] for name in unet.state_dict()}, assign=True)
    return unet


def modelscope_unet():
    """ModelScope's text-to-video UNet: 2-D blocks, each followed by convolutions and attention over time."""
    from diffusers import UNet3DConditionModel

    return UNet3DConditionModel(sample_size=32)  # the other defaults are ModelScope's


def animatediff_unet():
    """AnimateDiff's: Stable Diffusion 1.5 with motion modules."""
    from diffusers import UNetMotionModel

    return UNetMotionModel(sample_size=64, cross_attention_dim=768)
