"""LoRA: train changes of low rank in the place of all weights, and write them as other tools do.

    W x + b  becomes  W x + b + up(down(x))          up is zero at first

sd/lora.py reads such a file and adds it to the weights of a model.
"""

import re

import torch
from torch import nn
from torch.nn.functional import linear

from model import UNet
from sd import Model
from sd.checkpoint import header, write_tensors
from sd.lora import unet_names

ADAPTED = r"\.to_(q|k|v|out\.0)\.weight"  # all that is linear in an Attention


class LowRank(nn.Module):
    """A linear layer as it is, and a change of its weight, up @ down, none at first: (..., in) -> (..., out)."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.normal_(self.down.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return linear(x, self.weight, self.bias) + self.up(self.down(x))


def add_low_rank(unet: UNet, rank: int):
    """Freeze a UNet, and put a LowRank in the place of each layer of its attention that other tools have a name for.

    Raises ValueError when the rank is larger than a layer is wide.
    """
    unet.requires_grad_(False)
    for parameter in filter(re.compile(ADAPTED).search, unet_names(unet)):
        name = parameter.removesuffix(".weight")
        layer = unet.get_submodule(name)
        if rank > min(layer.weight.shape):
            raise ValueError(f"lora_rank must be <= {min(layer.weight.shape)}, the width of {name}, got {rank}")
        unet.set_submodule(name, LowRank(layer, rank))


def save_lora(model: Model, path: str):
    """Write the changes of a model that is trained so: under kohya's names, or, as those know no motion modules, with
    these under diffusers'. In the header are the settings, as in a whole model."""
    names, tensors = unet_names(model.unet), {}
    layers = {name: layer for name, layer in model.unet.named_modules() if isinstance(layer, LowRank)}
    motion = any(name.startswith("layout.") for name in layers)
    for name, layer in layers.items():
        theirs, pair = names[f"{name}.weight"][0].removesuffix(".weight"), (layer.down.weight, layer.up.weight)
        if motion:
            tensors |= zip((f"unet.{theirs}.lora_A.weight", f"unet.{theirs}.lora_B.weight"), pair)
        else:
            home = "lora_unet_" + theirs.replace(".", "_")
            tensors |= zip((f"{home}.lora_down.weight", f"{home}.lora_up.weight"), pair)
            tensors[f"{home}.alpha"] = torch.tensor(float(len(pair[0])))  # alpha / rank is 1
    write_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, header(model))
