"""Who looks at whom (Figure 11)."""

import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from cli import check_writable
from grid import grid_shape
from model import split_heads

# ---------------------------------------------------------------------------------------------------------------------
# Who looks at whom (Figure 11)


class AttentionMaps:
    """Meanwhile `maps` gets, at each step, how the middle block of a UNet spreads its attention over the frames:
    (heads, T, T), from frame i to frame j in reading order of Equation 1; rows add up to 1. Of the last video of a
    batch, with its prompt."""

    def __init__(self, unet, frames: int):
        self.unet, self.rows, self.cols, self.maps = unet, *grid_shape(frames), []

    def __enter__(self):
        attention = self.unet.middle_block[1].transformer_blocks[0].attn1
        self.hooks = [self.unet.middle_block.register_forward_pre_hook(self.enter_block),
                      attention.register_forward_pre_hook(self.enter_attention)]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def enter_block(self, block, inputs):
        """Which frame each token belongs to, by its middle: tokens may straddle frames."""
        H, W = inputs[0].shape[-2:]
        row = ((torch.arange(H) + 0.5) * self.rows / H).long()
        col = ((torch.arange(W) + 0.5) * self.cols / W).long()
        frame = (row[:, None] + col * self.rows).flatten()
        self.member = F.one_hot(frame, self.rows * self.cols).float().to(inputs[0].device)  # (L, T)

    def enter_attention(self, attention, inputs):
        x, (k, v) = inputs
        q, k = split_heads(attention.to_q(x[-1:]), attention.heads)[0].float(), k[-1].float()  # (heads, L, d)
        scores = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
        tokens = self.member.sum(0)[:, None].clamp(min=1)  # a small frame may have none
        self.maps.append((self.member.T @ scores @ self.member / tokens).cpu())

    def write(self, path: str, timesteps: list[int], shown=7, gap=12):
        """A picture: `shown` of the steps from top to bottom, heads from left to right; the brighter, the more."""
        chosen = np.linspace(0, len(self.maps) - 1, min(shown, len(self.maps))).round().astype(int)
        heads, T, _ = self.maps[0].shape
        cell = max(1, 96 // T)  # pixels
        side, left = T * cell, 60
        picture = Image.new("RGB", (left + heads * (side + gap), gap + len(chosen) * (side + gap)), "white")
        draw = ImageDraw.Draw(picture)
        for head in range(heads):
            draw.text((left + head * (side + gap), 0), f"head {head}", fill="black")
        for n, i in enumerate(chosen):
            top = gap + n * (side + gap)
            draw.text((2, top), f"t = {timesteps[i]}", fill="black")
            for head, values in enumerate(self.maps[i] / self.maps[i].amax(dim=(1, 2), keepdim=True)):
                levels = (values * 255).round().byte().numpy().repeat(cell, 0).repeat(cell, 1)
                picture.paste(Image.fromarray(levels), (left + head * (side + gap), top))
        picture.save(path)


def check_map(args, paths: list[str]):
    """Raise ValueError on what --attention_map cannot show, or where it cannot be written."""
    if len(paths) > 1 or args.frames == 1:
        raise ValueError(f"--attention_map shows the frames of one video, not of {len(paths)} with {args.frames}")
    if not args.attention_map.lower().endswith(".png"):
        raise ValueError(f"--attention_map {args.attention_map}: the file must end in .png")
    if os.path.lexists(args.attention_map) or args.attention_map in paths:
        raise ValueError(f"{args.attention_map} is there already: choose another --attention_map, or remove it")
    check_writable(args.attention_map)
