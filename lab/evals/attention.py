"""Draw who looks at whom (Figure 11): how the frames of a video attend to each other while it is sampled.

    python -m lab.evals.attention "a red circle moving right" --out map.png

The picture has a row for each of seven steps and a column for each head of the UNet's middle block; in a map, row i is
frame i and column j is the frame that it looks at. The brighter, the more.
"""

import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import sd
from cli import beside, check_writable, option, parse, run
from clips.write import contact_sheet
from grid import frame_of_pixel, grid_shape
from model import split_heads
from sample import SHIPPED, Request, generate
from sd.device import DTYPES, pick_device, pick_dtype


class AttentionMaps:
    """Context manager: collect in `maps`, at each step, how the middle block of a UNet spreads its attention over the
    frames: (heads, T, T), from frame i to frame j in the order of Equation 1; rows add up to 1.

    Of a batch it is the last video, with its prompt.
    """

    def __init__(self, unet, frames: int):
        self.unet, self.grid, self.maps = unet, grid_shape(frames), []

    def __enter__(self):
        attention = self.unet.middle_block[1].transformer_blocks[0].attn1
        self.hooks = [self.unet.middle_block.register_forward_pre_hook(self.enter_block),
                      attention.register_forward_pre_hook(self.enter_attention)]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def enter_block(self, block, inputs):
        """Note which frame each token belongs to."""
        h, (rows, cols) = inputs[0], self.grid
        frame = frame_of_pixel(*h.shape[-2:], rows, cols, device=h.device).flatten()
        self.member = F.one_hot(frame, rows * cols).float()  # (L, T)

    def enter_attention(self, attention, inputs):
        x, context = inputs
        q = split_heads(attention.to_q(x[-1:]), attention.heads)[0].float()  # (heads, L, d)
        k = split_heads(attention.to_k(context[-1:]), attention.heads)[0].float()
        scores = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
        tokens = self.member.sum(0)[:, None].clamp(min=1)  # a small frame may have none
        self.maps.append((self.member.T @ scores @ self.member / tokens).cpu())


def check_mapped(model: sd.Model, request: Request):
    """Raise ValueError unless a resolved request is for one grid, each step of which is sampled whole."""
    if request.frames == 1 or len(request.windows(model)) > 1 or model.unet.layout.per_frame or len(request.prompt) > 1:
        raise ValueError("attention can be shown of one grid only: choose the layout grid, one prompt, fewer frames")
    if request.reuse > 1:
        raise ValueError("attention cannot be shown where deep features are reused: leave out reuse")


def draw_maps(maps: list[torch.Tensor], timesteps: list[int], shown=7, gap=12) -> Image.Image:
    """A picture of `shown` of the steps, with their timesteps beside them and the heads above."""
    chosen = np.linspace(0, len(maps) - 1, min(shown, len(maps))).round().astype(int)
    heads, T, _ = maps[0].shape
    cell, left = max(1, 96 // T), 60  # pixels: a frame in a map, and the margin
    relative = torch.cat([maps[i] / maps[i].amax(dim=(1, 2), keepdim=True) for i in chosen])
    levels = (relative * 255).round().byte().numpy().repeat(cell, 1).repeat(cell, 2)
    sheet = contact_sheet(levels[..., None].repeat(3, -1), cols=heads, gap=gap)
    picture = Image.new("RGB", (left + sheet.shape[1], gap + sheet.shape[0]), "white")
    picture.paste(Image.fromarray(sheet), (left, gap))
    draw, step = ImageDraw.Draw(picture), T * cell + gap
    for head in range(heads):
        draw.text((left + head * step, 0), f"head {head}", fill="black")
    for n, i in enumerate(chosen):
        draw.text((2, gap + n * step), f"t = {timesteps[i]}", fill="black")
    return picture


@dataclass
class Options(Request):
    out: str = option("attention.png", "the picture", metavar="FILE.png")
    ckpt: str = option("", "the model (default: the tiny one that ships)")
    device: str = option("", "cuda, mps or cpu (default: the first of them that is there)")
    dtype: str = option("auto", "precision; auto is float16 on cuda, bfloat16 on a CPU with units for it, else float32",
                        choices=DTYPES)


def main():
    o = parse(Options, __doc__)
    if not o.out.lower().endswith(".png"):
        raise ValueError(f"out must end in .png, got {o.out}")
    if os.path.lexists(o.out):
        raise ValueError(f"{o.out} is there already: choose another out, or remove it")
    o.check()
    check_writable(o.out)  # now, not after a model is loaded
    device = pick_device(o.device)
    model = sd.load(o.ckpt or SHIPPED, device, pick_dtype(o.dtype, device))
    o = o.resolve(model)
    check_mapped(model, o)
    with AttentionMaps(model.unet, o.frames) as watch, tqdm(total=o.steps, unit="step", file=sys.stderr) as bar:
        generate(model, o, progress=lambda *_: bar.update())
    with beside(o.out) as part:
        draw_maps(watch.maps, o.timesteps(model)).save(part, "PNG")
    print(o.out)


if __name__ == "__main__":
    run(main)
