"""What a run needs, counted and not estimated: memory, and floating-point operations (FLOP).

The run's own forward and backward go through tensors without contents, and every storage that comes and goes is written
down. So a model of any size is accounted for in seconds, on any machine. What a kernel allocates inside for itself (the
workspaces of cuDNN and cuBLAS) is no tensor, and comes on top.
"""

import os
import weakref
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from sd import Settings, build, load
from sd.device import size_of
from sd.presets import ModelConfig
from sd.vae import encode_frames
from training.config import Config
from training.low_rank import add_low_rank
from training.setup import architecture, loss_of

# ---------------------------------------------------------------------------------------------------------------------
# FLOP


class Uncounted(ValueError):
    """An operator that torch has no FLOP formula for."""


def attention_flop(q, k, v, *args, **kwargs) -> int:
    """FLOP of attention, from the shapes of q (B, heads, L, d) and k, v (B, heads, S, d): two products."""
    *batch, queries, width = q
    return 4 * torch.Size(batch).numel() * queries * k[-2] * width


def attention_backward_flop(grad, q, k, v, *args, **kwargs) -> int:
    """FLOP of its backward pass: five products, one of which makes the logits again."""
    return attention_flop(q, k, v) * 5 // 2


aten = torch.ops.aten
# up to torch 2.14 FlopCounterMode has no formula for a CPU's fused attention, and counts nothing for it
FORMULAS = {aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flop}


class AttentionSeen(TorchDispatchMode):
    """Names of all attention operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rpartition(".")[0]  # without the overload
        if "attention" in name:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def count_flop(work) -> int:
    """FLOP of work(). Raises Uncounted when attention runs in an operator without a formula, rather than miss it."""
    with AttentionSeen() as seen, FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        work()
    missed = seen.names - {str(operator) for operator in counter.get_flop_counts().get("Global", {})}
    if missed:
        raise Uncounted(f"torch {torch.__version__} has no FLOP formula for {', '.join(sorted(missed))}")
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class Account(TorchDispatchMode):
    """Bytes of all tensors made inside that are still alive, `now` and at the `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.enter, result)
        return result

    def enter(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        if storage in self.seen:
            return  # a view
        self.seen.add(storage)
        self.add(storage.nbytes())
        weakref.finalize(storage, self.add, -storage.nbytes())

    def add(self, size: int):
        self.now += size
        self.peak = max(self.peak, self.now)

    def during(self, work) -> int:
        """Bytes at the peak of work(), beyond those before it."""
        before = self.peak = self.now
        work()
        return self.peak - before


def shape_of(cfg: Config) -> ModelConfig:
    """The architecture of the run's model: read off `init` when that lies here."""
    if not os.path.exists(cfg.init):
        return architecture(cfg)
    model = load(cfg.init)
    return ModelConfig(model.unet.cfg, model.vae.cfg, model.text.cfg)


def with_layout(cfg: Config) -> Config:
    """The same with the layout that `init` brings, where the config says none and that lies here."""
    if cfg.layout or not os.path.exists(cfg.init):
        return cfg
    settings = load(cfg.init).settings
    return replace(cfg, layout=settings.layout, layout_options=settings.layout_options | cfg.layout_options)


def setting(cfg: Config, example, shape: ModelConfig):
    """The run's module, a batch of zeros for it, and its VAE where frames are encoded live; weights are random.

    example  a task's function of (cfg, model) that gives module and batch
    """
    model = build(shape, Settings(prediction="v", layout=cfg.layout or "grid", layout_options=cfg.layout_options))
    model.check_size(cfg.width, cfg.height, cfg.frames if cfg.train == "unet" else 1)
    if cfg.lora_rank:
        add_low_rank(model.unet, cfg.lora_rank)
    module, batch = example(cfg, model)
    live = cfg.train == "unet" and not cfg.encoded
    return module, batch, model.vae.requires_grad_(False) if live else None


def device_memory(cfg: Config, example, shape: ModelConfig, device="cpu") -> dict[str, int | None]:
    """Count a step of one process: bytes on its device by kind, trained parameters, and FLOP (None: not countable)."""
    with FakeTensorMode(), torch.device(device), Account() as account:
        module, batch, vae = setting(cfg, example, shape)
        everything = [*module.parameters(), *(vae.parameters() if vae else ())]
        trained = [p for p in everything if p.requires_grad]
        frozen = [p for p in everything if not p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p)  # under DDP they are there from the beginning

        def work():
            loss_of(cfg, module, batch, torch.device(device)).mean().backward()

        activations = account.during(work)
        try:
            flop = count_flop(work) * cfg.accumulate
        except Uncounted:
            flop = None
        if vae:
            frames = torch.zeros(cfg.frames, 3, cfg.height, cfg.width, dtype=torch.uint8)
            activations = max(activations, account.during(lambda: encode_frames(vae, frames)))
    return {"parameters": sum(p.numel() for p in trained), "weights": size_of(trained), "frozen": size_of(frozen),
            "gradients": size_of(trained), "activations": activations, "flop": flop}


def host_memory(cfg: Config, weights: int, gpu: bool, world: int) -> dict[str, int]:
    """Bytes in host memory that training/offload.py takes, by kind, of all processes together.

    "showing" and "saving" come on top on rank 0, one after the other.
    """
    pinned = world * (1 << (weights // world - 1).bit_length()) if gpu else 0  # torch rounds up to a power of two
    average = weights if cfg.ema else 0
    gathered = average if world > 1 else 0  # the moving average of all ranks
    at_home = gpu and (cfg.ema or world == 1)  # what is saved is in host memory, laid out as the file wants it
    return {"masters": pinned, "gradients": pinned, "moments": 2 * weights, "moving average": average,
            "showing": gathered + (0 if at_home else weights), "saving": 2 * weights + average if world > 1 else 0}
