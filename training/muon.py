"""Muon (Jordan et al., 2024; arXiv:2502.16982 for its scale): momentum, with all singular values made about 1.

    u = U V^T  of  g + momentum = U S V^T,     w <- (1 - lr decay) w - lr 0.2 sqrt(max(rows, columns)) u

AdamW follows what is large in the gradient of a matrix. What words mean is small in it, and with Muon counts as much as
the rest. The scale gives a matrix steps of AdamW's usual size, so that one learning rate serves both.
"""

import re

import torch
from torch import nn

from training.config import Config

MOMENTUM = 0.95
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315  # of s in a round: it draws singular values in 0..1 to near 1
ROUNDS = 5
NARROW = 16  # rows or columns: fewer are of a layer that reads or writes latents or pictures


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T of a matrix U S V^T (rows, columns), roughly: its singular values end within 0.68..1.21; those that were
    below 0.0015 of its norm end smaller.

    By Newton and Schulz's iteration. It multiplies the matrix by functions of M = X X^T, so that all products but the
    first and the last are between small squares.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.mT).mT
    x = matrix / (matrix.norm() + 1e-12)
    m, linear = x @ x.mT, LINEAR * torch.eye(len(x), dtype=x.dtype, device=x.device)
    factor = product = linear + torch.addmm(m, m, m, beta=CUBIC, alpha=QUINTIC)
    for _ in range(ROUNDS - 1):
        m = factor @ m @ factor
        factor = linear + torch.addmm(m, m, m, beta=CUBIC, alpha=QUINTIC)
        product = factor @ product
    return product @ x


@torch.no_grad()
def muon_step(weight, grad, momentum, rows: int, lr: float, decay: float, device=None):
    """Update a matrix and its momentum in place; both and the gradient are flat, row by row.

    device  where the products are made; without, where the matrix is
    """
    momentum.lerp_(grad, 1 - MOMENTUM)
    matrix = grad.lerp(momentum, MOMENTUM).view(rows, -1)
    update = orthogonalized(matrix.to(device)).to(weight.device)
    weight.mul_(1 - lr * decay).sub_(update.reshape(-1), alpha=lr * 0.2 * max(matrix.shape) ** 0.5)


def parameter_groups(module: nn.Module, cfg: Config) -> list[dict]:
    """Groups for OffloadAdamW: with optimizer = "muon" the weights of layers are in one of their own.

    Left to AdamW are vectors, all that embeds tokens, positions, timesteps, frames and FPS, and layers that read or
    write latents or pictures.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    layers = {name for name, p in named.items() if cfg.optimizer == "muon" and p.ndim > 1
              and min(p.shape[:2]) >= NARROW and not re.search("embed|time_proj|fps_proj", name)}
    options = {"lr": cfg.lr, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
    return [options | {"params": [p for name, p in named.items() if (name in layers) == muon], "muon": muon}
            for muon in (False, True)]
