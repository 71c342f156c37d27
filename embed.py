"""The embeddings: what tells the model the timestep, the frame rate, and where in the grid it looks.

Only `projection` has anything to learn.
"""

import math

import torch
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# The sinusoid of Stable Diffusion, for the timestep and (4.2, "we share parameters") for the frame rate


def timestep_embedding(t, dim: int, max_period: float = 10_000.0):
    """Sinusoid of a timestep or an FPS value, t (B,) -> (B, dim) fp32: first the cosines, then the sines.

    An odd `dim` ends in a zero, as in the original code.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(max_period) * steps / half)  # in this order: the same bits as the original
    angles = t.float()[:, None] * frequencies  # (B, half)
    return nn.functional.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


# ---------------------------------------------------------------------------------------------------------------------
# Spatial-temporal mixed embedding (Equations 2-4 and 18-25)


def mixed_embedding(rows: int, cols: int, h: int, w: int, channels: int, theta: float = 10_000.0):
    """The embedding added to the noisy latent grid so that frames can be told apart -> (channels, rows*h, cols*w) fp32.

    The lower half of the channels says where inside its frame a latent pixel is, (i, j); the upper half says in which
    frame, t = row + col * rows, the number that Equation 1 gives it. Keeping the two apart (Equation 4) is what makes
    all positions different.

        channel c <  half:  sin(i / theta^(c/C)) + cos(j / theta^(c/C))
        channel c >= half:  sin(t / theta^(k/C)) + cos(t / theta^(k/C)),   k = c - half,  half = C // 2
    """
    half = channels // 2
    x, y = torch.arange(rows * h)[:, None], torch.arange(cols * w)[None, :]
    i, j = x % h, y % w  # (rows*h, 1), (1, cols*w)
    t = x // h + (y // w) * rows  # (rows*h, cols*w)
    # float64 for the angles: this is computed once a shape, and sin(255) deserves all its digits
    scale = theta ** (torch.arange(channels - half, dtype=torch.float64) / channels)[:, None, None]
    spatial = torch.sin(i / scale) + torch.cos(j / scale)  # Equation 2
    temporal = torch.sin(t / scale) + torch.cos(t / scale)  # Equation 3
    return torch.cat([spatial[:half], temporal]).float()  # Equation 4


# ---------------------------------------------------------------------------------------------------------------------
# FPS embedding (4.2): "three linear layers, where the channel dimension is first increased fourfold"


def projection(d: int) -> nn.Sequential:
    """d -> 4d -> 4d -> d with SiLU between. `UNet` sets the last layer to zero."""
    return nn.Sequential(nn.Linear(d, 4 * d), nn.SiLU(), nn.Linear(4 * d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d))
