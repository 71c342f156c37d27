"""Where networks are, in which precision they work, and whether there is room for them."""

import math
import os
import re
from contextlib import contextmanager, nullcontext

import torch

from layers.cpu import HAS_UNITS

DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_device(name: str = "") -> torch.device:
    """Parse a device name, "cuda:1"; "" picks the first of cuda, mps, cpu that is there. Raises ValueError."""
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    name = name or next(device for device, count in there.items() if count)
    kind, _, number = name.partition(":")
    number = number or os.environ.get("LOCAL_RANK", "") * (kind == "cuda")  # torchrun's: to each process its own
    if not re.fullmatch(r"\d*", number) or int(number or 0) >= there.get(kind, 0):
        raise ValueError(f"device {name} is not here: choose one of {', '.join(d for d in there if there[d])}")
    return torch.device(kind, int(number or 0)) if kind == "cuda" else torch.device(name)  # "cuda" is not "cuda:0"


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Parse the name of a precision; "auto" picks float16 on CUDA, bfloat16 on CPUs with units for it, else float32.

    Without such units oneDNN passes bfloat16 on to kernels that are ten times slower than those of float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if device.type == "cpu" and HAS_UNITS else torch.float32


def precision(dtype: torch.dtype, device: torch.device):
    """Context manager: autocast to float16 or bfloat16 (E.2); nothing for float32 and float64."""
    return torch.autocast(device.type, dtype) if dtype in (torch.float16, torch.bfloat16) else nullcontext()


class NotFinite(ValueError):
    """NaN or infinity where latents or images should be."""


def require_finite(x: torch.Tensor, what: str, model):
    """Raise NotFinite unless all numbers of a model's output are finite; it names the cause as far as it can be known.

    what  a name of the output
    """
    if x.isfinite().all():
        return
    bad, dtype = model.bad_tensors(), str(model.unet.out[2].weight.dtype).removeprefix("torch.")
    also = f", nor are {len(bad)} tensors of the weights, like {bad[0]}" if bad else ""
    hint = "is guidance too high?" if not bad else "the file is damaged, or was trained until it diverged"
    if dtype != "float32":  # it may be too narrow for what the model computes, or for the weights themselves
        hint = f"try --dtype float32 instead of {dtype}"
    raise NotFinite(f"{what} is not finite{also}: {hint}")


def size_of(tensors) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def has_room(device: torch.device, networks) -> bool:
    """Whether all networks can be on a device at once and leave half of what is free on a GPU to their work."""
    weights = sum(size_of(network.parameters()) for network in networks)
    return device.type != "cuda" or weights < torch.cuda.mem_get_info(device)[0] / 2


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU or in this machine: all of its memory where only Linux could say more, else inf."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps what it had
        return torch.cuda.mem_get_info(device)[0] + unused
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(text.split()[1]) * 1024 for text in file if text.startswith("MemAvailable"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf


def check_memory(model, frames: int, width: int, height: int, batch=1, device: torch.device | None = None):
    """Raise ValueError when a UNet's pass over a batch of clips, or a VAE's over a frame, surely needs too much memory.

    At its peak the UNet of any preset holds 15 to 30 activations of its first level, the VAE 5 or 6 of its last, so
    what is refused is too large by far, and what is not may still be. training/account.py counts exactly.

    device  where it will work (default: where the UNet is)
    """
    device = device or model.unet.out[2].weight.device
    pixels, unet, vae = width * height, model.unet.cfg, model.vae.cfg
    wide = 12 * unet.channels * batch * frames * (pixels // vae.downsampling**2)
    need = 2 * max(wide, 5 * vae.channels * pixels) + 3 * batch * frames * pixels  # two bytes a number, as in float16
    free = free_memory(device)
    if need > free:
        raise ValueError(f"frames and size must fit into memory: {frames} frames of {width}x{height} take at least "
                         f"{need / 1e9:,.0f} GB, and {free / 1e9:,.0f} GB of this {device.type} are free")


@contextmanager
def at_work(network, device: torch.device):
    """Context manager: have a network on a device. Weights from elsewhere stay there too: nothing is copied back."""
    home = network.state_dict()
    elsewhere = any(tensor.device != device for tensor in home.values())
    if elsewhere:
        network.load_state_dict({name: tensor.to(device) for name, tensor in home.items()}, assign=True)
    try:
        yield
    finally:
        if elsewhere:  # in another precision where that was needed, see sd.vae.decode
            now = network.state_dict()
            network.load_state_dict({name: tensor.to(now[name].dtype) for name, tensor in home.items()}, assign=True)
