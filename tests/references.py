"""Stable Diffusion as diffusers and transformers implement it, at reduced width, with random weights."""

import functools
import os

import torch

FAMILIES = ("SD 1", "SD 2")


@functools.cache
def reference(family: str):
    """(UNet, VAE, text tower, scheduler) of diffusers and transformers."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    sd1 = family == "SD 1"
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(64, 128, 128, 128), cross_attention_dim=64, sample_size=96,
        attention_head_dim=8 if sd1 else [1, 2, 2, 2], use_linear_projection=not sd1)
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, scaling_factor=0.2)
    text = CLIPTextModel(CLIPTextConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=1, projection_dim=64,
        hidden_act="quick_gelu" if sd1 else "gelu"))
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False, prediction_type="epsilon" if sd1 else "v_prediction")
    for network in (unet, vae, text):
        shake(network)
    return unet, vae, text, scheduler


def shake(network):
    """Random biases and norms too, and nothing left at zero that could hide a mistake."""
    for p in network.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return network.eval()


def save_reference(family: str, folder, **options) -> str:
    for name, part in zip(("unet", "vae", "text_encoder", "scheduler"), reference(family)):
        part.save_pretrained(os.path.join(folder, name), **options)
    return str(folder)


def error(ours, theirs):
    """Largest difference, relative to the largest value of the reference."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def inputs(h=16, w=16, context=64, batch=2):
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(batch, 4, h, w, generator=g), torch.randn(batch, 77, context, generator=g)
    return x, torch.tensor([999, 7])[:batch], text
