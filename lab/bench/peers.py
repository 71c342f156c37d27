"""What bench.py measures ours against: the implementations of others. Nothing else imports this."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from clips.media import View, cover, fit_frame, frames_at, opened
from model import UNet, UNetConfig
from sd.checkpoint import parameters, unet_layers

# ---------------------------------------------------------------------------------------------------------------------
# UNets of diffusers, with random weights, and a pipeline around them


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
    """Our UNet on the very tensors of diffusers': the same weights, and one copy of them."""
    with torch.device("meta"):
        unet = UNet(cfg)
    state, names = theirs.state_dict(), parameters(unet_layers(len(cfg.channel_mult), cfg.num_res_blocks), "")
    unet.load_state_dict({name: state[names[name][0]] for name in unet.state_dict()}, assign=True)
    return unet


def plain(cfg: UNetConfig) -> UNetConfig:
    """Without what ETC adds."""
    return replace(cfg, mixed_embedding=False, fps_embedding=False)


def modelscope_unet():
    """ModelScope's text-to-video UNet: 2-D blocks, each followed by convolutions and attention over time."""
    from diffusers import UNet3DConditionModel

    return UNet3DConditionModel(sample_size=32)  # the other defaults are ModelScope's


def animatediff_unet():
    """AnimateDiff's: Stable Diffusion 1.5 with motion modules."""
    from diffusers import UNetMotionModel

    return UNetMotionModel(sample_size=64, cross_attention_dim=768)


def pipeline(unet, text, steps, device, dtype):
    """The first of 50 guided steps of 16 frames of 256x256, as diffusers' pipelines take them; text: shape of the
    context."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(50)
    noise, context = torch.randn(1, 4, 16, 32, 32).to(device), torch.randn(text).to(device, dtype)

    def work():
        x = noise
        with torch.no_grad():
            for t in scheduler.timesteps[:steps]:
                output = unet(torch.cat([x, x]).to(dtype), t, encoder_hidden_states=context).sample.float()
                without, with_prompt = output.chunk(2)
                x = scheduler.step(without + 7.0 * (with_prompt - without), t, x).prev_sample
    return work


# ---------------------------------------------------------------------------------------------------------------------
# Readers of clips


def read_ours(path: str, times, side: int) -> torch.Tensor:
    """uint8 (T, 3, side, side) at some times in seconds, as all of them."""
    with opened(path) as video:
        return torch.stack([fit_frame(frame, video.aspect, side, side, View()) for frame in frames_at(video, times)])


def resized(frames: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 (T, 3, H, W) as a torchcodec or decord user would bring it to size: antialiased, on uint8, cropped."""
    w, h = cover(frames.shape[-1], frames.shape[-2], side, side)
    frames = F.interpolate(frames, (h, w), mode="bicubic", antialias=True)
    top, left = (h - side) // 2, (w - side) // 2
    return frames[..., top : top + side, left : left + side]


def read_torchcodec(path: str, times, side: int) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode="approximate")
    return resized(decoder.get_frames_played_at(list(times)).data, side)


def read_decord(path: str, times, side: int) -> torch.Tensor:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    frames = reader.get_batch([int(t * reader.get_avg_fps() + 1e-6) for t in times]).asnumpy()
    return resized(torch.from_numpy(frames).permute(0, 3, 1, 2), side)


# ---------------------------------------------------------------------------------------------------------------------
# A plain optimizer's whole step


def whole_step(params, update, clip=1.0, scale=1024.0):
    """Unscale, global norm, clip, update."""
    grads = [p.grad for p in params]
    torch._foreach_mul_(grads, 1 / scale)
    torch.nn.utils.clip_grad_norm_(params, clip, foreach=True)
    update()
