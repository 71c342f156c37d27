"""What a run needs, counted and not estimated: memory, and floating-point operations (FLOP).

    python -m training.account configs/base.py --clips 10_000_000 --gpus 1,8,64       # hours, terabytes: docs/scale.md

The run's own forward and backward go through tensors without contents, and every storage that comes and goes is written
down. So a model of any size is accounted for in seconds, on any machine. What a kernel allocates inside for itself (the
workspaces of cuDNN and cuBLAS) is no tensor, and comes on top.
"""

import math
import os
import weakref
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from cli import option, parse, run
from grid import fold, grid_shape
from sd import Settings, build, load
from sd.device import size_of
from sd.presets import ModelConfig
from sd.vae import encode_frames
from training.config import Config, read_config
from training.low_rank import add_low_rank
from training.muon import parameter_groups
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
        moments = sum(size_of(group["params"]) * (2 - group["muon"]) for group in parameter_groups(module, cfg))
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
            "moments": moments, "gradients": size_of(trained), "activations": activations, "flop": flop}


def host_memory(cfg: Config, weights: int, moments: int, gpu: bool, world: int) -> dict[str, int]:
    """Bytes in host memory that training/offload.py takes, by kind, of all processes together.

    "showing" and "saving" come on top on rank 0, one after the other.
    """
    pinned = world * (1 << (weights // world - 1).bit_length()) if gpu else 0  # torch rounds up to a power of two
    average = weights if cfg.ema else 0
    gathered = average if world > 1 else 0  # the moving average of all ranks
    at_home = gpu and (cfg.ema or world == 1)  # what is saved is in host memory, laid out as the file wants it
    return {"masters": pinned, "gradients": pinned, "moments": moments, "moving average": average,
            "showing": gathered + (0 if at_home else weights), "saving": moments + average if world > 1 else 0}


# ---------------------------------------------------------------------------------------------------------------------
# A plan: what millions of clips take, from the counts above and a few numbers of the reader's machines

CLIP_FRAMES, CLIP_FLOP = 4, 3.3e11  # that the filter scores, and of ViT-H/14: 32 layers of width 1280 on 257 tokens
INDEX_BYTES = 300  # a sample's line, and its share of index.npy


@dataclass
class Options:
    config: str = option(None, "config of the training run", positional=True)
    clips: int = option(10_000_000, "clips to filter", low=1)
    keep: float = option(1.0, "share of them that is kept and encoded", above=0, high=1)
    gpus: tuple[int, ...] = option((1, 8, 64), "numbers of GPUs, like 1,8,64", low=1, high=10**6)
    batch: int = option(48, "samples that a training step sees, on all GPUs together", low=1)
    tflops: float = option(100.0, "TFLOP/s that a GPU sustains", above=0)
    cores: int = option(12, "CPU cores beside each GPU", low=1)
    decode_ms: float = option(143.0, "core-milliseconds to decode a sample, see `python -m lab.bench data`", above=0)
    link: float = option(10.0, "GB/s between machines, for each GPU", above=0)
    disk: float = option(1.0, "GB/s of the shared disk, for all", above=0)


def costs(cfg: Config, shape: ModelConfig) -> dict[str, float]:
    """FLOP of a sample in training, of a frame in the VAE's encoder and of a caption in the text tower; bytes of a
    clip's moments, of a context, and of the gradients."""
    T, vae = cfg.frames, shape.vae
    latent = vae.latent_channels, cfg.height // vae.downsampling, cfg.width // vae.downsampling
    with FakeTensorMode():
        model = build(shape, Settings(prediction="v", layout=cfg.layout or "grid", layout_options=cfg.layout_options))
        model.unet.checkpointing = cfg.checkpointing
        x = fold(torch.zeros(1, T, *latent), *grid_shape(T))
        t, context = torch.zeros(1).long(), torch.zeros(1, shape.text.length, shape.unet.context_dim)
        frame = torch.zeros(1, 3, cfg.height, cfg.width, dtype=torch.uint8)
        tokens = torch.zeros(1, shape.text.length).long()
        return {"step": count_flop(lambda: model.unet(x, t, context, t.float(), grid_shape(T)).sum().backward()),
                "frame": count_flop(lambda: encode_frames(model.vae, frame)),
                "caption": count_flop(lambda: model.text(tokens)),
                "moments": len(cfg.fps_values) * cfg.starts * T * 2 * math.prod(latent) * 2,
                "context": 0 if cfg.train_text else 2 * shape.text.length * shape.text.width,
                "gradients": size_of(model.unet.parameters())}


def plan(o: Options, cfg: Config, cost: dict[str, float], n: int) -> dict[str, dict[str, float]]:
    """Hours of each part of each job on n GPUs. The parts of a job run beside one another, so the longest counts."""
    flops, cores, kept = n * o.tflops * 1e12, n * o.cores, o.keep * o.clips
    samples = kept * len(cfg.fps_values) * cfg.starts
    each = -(-o.batch // n)  # samples of a GPU
    seconds = {
        "filter": {"decoding": o.clips * o.decode_ms / 1e3 / cores, "CLIP": o.clips * CLIP_FRAMES * CLIP_FLOP / flops},
        "encode": {"decoding": samples * o.decode_ms / 1e3 / cores, "VAE": samples * cfg.frames * cost["frame"] / flops,
                   "text tower": kept * cost["caption"] / flops if cost["context"] else 0.0,
                   "disk": kept * (cost["moments"] + cost["context"]) / o.disk / 1e9},
        "train": {"UNet": cfg.max_steps * each * cost["step"] / o.tflops / 1e12,
                  "gradients": cfg.max_steps * 2 * cost["gradients"] * (n - 1) / n / o.link / 1e9}}
    return {job: {part: s / 3600 for part, s in parts.items()} for job, parts in seconds.items()}


def main():
    o = parse(Options, __doc__)
    cfg = with_layout(read_config([o.config]))
    if cfg.train != "unet":
        raise ValueError(f'config must be of train = "unet", got {o.config}')
    cost, kept = costs(cfg, shape_of(cfg)), o.keep * o.clips
    size, samples = kept * (cost["moments"] + cost["context"]) / 1e12, kept * len(cfg.fps_values) * cfg.starts
    print(f"{o.clips:,} clips, {kept:,.0f} of them encoded, {cfg.max_steps:,} steps of {o.batch} samples")
    print(f"TFLOP: {cost['step'] / 1e12:.2f} a sample in training, {cost['frame'] / 1e12:.3f} a frame in the VAE, "
          f"{cost['caption'] / 1e12:.3f} a caption")
    print(f"on disk {size:.2f} TB, of which contexts {kept * cost['context'] / 1e12:.2f}; index "
          f"{samples * INDEX_BYTES / 1e9:.1f} GB")
    for n in o.gpus:
        print(f"{n} GPU{'s' * (n > 1)}, hours:")
        for job, parts in plan(o, cfg, cost, n).items():
            inside = ", ".join(f"{part} {hours:,.1f}" for part, hours in sorted(parts.items(), key=lambda p: -p[1]))
            print(f"  {job:<7} {max(parts.values()):>9,.1f}   {inside}")


if __name__ == "__main__":
    run(main)
