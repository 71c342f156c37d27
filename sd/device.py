"""Where networks are, and in which precision they work."""

import re
from contextlib import contextmanager, nullcontext

import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_device(name: str = "") -> torch.device:
    """Parse a device name, "cuda:1"; "" picks the first of cuda, mps, cpu that is there. Raises ValueError."""
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    name = name or next(device for device, count in there.items() if count)
    kind, _, number = name.partition(":")
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
    units = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return torch.bfloat16 if units and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def precision(dtype: torch.dtype, device: torch.device):
    """Context manager: autocast to float16 or bfloat16 (E.2); nothing for float32 and float64."""
    return torch.autocast(device.type, dtype) if dtype in (torch.float16, torch.bfloat16) else nullcontext()


def size_of(tensors) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def has_room(device: torch.device, networks) -> bool:
    """Whether all networks can be on a device at once and leave half of what is free on a GPU to their work."""
    weights = sum(size_of(network.parameters()) for network in networks)
    return device.type != "cuda" or weights < torch.cuda.mem_get_info(device)[0] / 2


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
        if elsewhere:
            network.load_state_dict(home, assign=True)
