"""Stable Diffusion's own: its networks beside the UNet, the names of its tensors, the files it comes in.

    model = sd.load("weights/tiny.safetensors")
    sd.save(model, "copy.safetensors")
"""

from sd.checkpoint import load, save
from sd.settings import Model, Settings, build

__all__ = ["Model", "Settings", "build", "load", "save"]
