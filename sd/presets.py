"""The models that are known by name."""

from dataclasses import dataclass

from model import UNetConfig
from sd.text import TextConfig
from sd.vae import VAEConfig


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
# The same classes, three levels instead of four: trained from nothing on two cores.
TINY = ModelConfig(
    UNetConfig(
        channels=32, channel_mult=(1, 2, 4), num_res_blocks=1, attention_levels=(1, 2), context_dim=64, head_width=32,
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
PRESETS = {"micro": MICRO, "tiny": TINY, "sd15": SD15, "sd21": SD21}
