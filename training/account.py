"""What a run will need, before anyone spends a night on it: `python train.py CONFIG --dry_run`.

Memory is counted, not estimated: the run's own forward and backward go through tensors without contents, and every
storage that comes and goes is written down. So a model of any size is accounted for in seconds, on any machine.
"""

import os
import sys
import time
import weakref
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from clips.encoded import EncodedClips
from clips.lists import Items
from sd import Settings, build, load
from sd.device import pick_dtype, size_of
from sd.presets import ModelConfig
from sd.vae import encode_frames
from training.config import Config
from training.offload import OffloadAdamW
from training.setup import architecture, data_lists, loss_of


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
    """Of the run's model: read off `init` when that lies here."""
    if not os.path.exists(cfg.init):
        return architecture(cfg)
    model = load(cfg.init)
    return ModelConfig(model.unet.cfg, model.vae.cfg, model.text.cfg)


def setting(cfg: Config, example, shape: ModelConfig):
    """The run's module, a batch of zeros for it, and its VAE where frames are encoded live; weights are random."""
    model = build(shape, Settings(prediction="v"))
    model.check_size(cfg.width, cfg.height, cfg.frames if cfg.train == "unet" else 1)
    module, batch = example(cfg, model)
    live = cfg.train == "unet" and not cfg.encoded
    return module, batch, model.vae.requires_grad_(False) if live else None


def memory(cfg: Config, example, device="cpu") -> dict[str, int]:
    """Bytes on the device by kind, number of parameters, and FLOP of a step, without allocating any of it."""
    shape = shape_of(cfg)  # read before: what is made inside has no contents
    with FakeTensorMode(), torch.device(device), Account() as account:
        module, batch, vae = setting(cfg, example, shape)
        everything = [*module.parameters(), *(vae.parameters() if vae else ())]
        trained = [p for p in everything if p.requires_grad]
        frozen = [p for p in everything if not p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p)  # under DDP they are there from the beginning
        activations = account.during(lambda: loss_of(cfg, module, batch, torch.device(device)).mean().backward())
        with FlopCounterMode(display=False) as flop:
            loss_of(cfg, module, batch, torch.device(device)).mean().backward()
        operations = flop.get_total_flops() * cfg.accumulate
        if vae:
            frames = torch.zeros(cfg.frames, 3, cfg.height, cfg.width, dtype=torch.uint8)
            activations = max(activations, account.during(lambda: encode_frames(vae, frames)))
    return {"parameters": sum(p.numel() for p in trained), "weights": size_of(trained), "frozen": size_of(frozen),
            "gradients": size_of(trained), "activations": activations, "flop": operations}


def seconds_a_step(cfg: Config, example, device) -> float:
    """Of a real step on one process, with random weights: the fastest of up to four within a minute."""
    with device:
        module, batch, _ = setting(cfg, example, shape_of(cfg))
    if device.type == "cpu":
        module.to(memory_format=torch.channels_last)
    optimizer = OffloadAdamW([{"params": list(module.parameters()), "lr": cfg.lr, "betas": cfg.betas}], cfg.ema)
    optimizer.attach(module)
    seconds = []
    while len(seconds) < 4 and sum(seconds) < 60:
        began = time.perf_counter()
        for micro in range(cfg.accumulate):
            optimizer.last_micro_batch = micro == cfg.accumulate - 1
            loss_of(cfg, module, batch, device).mean().backward()
        optimizer.step(cfg.clip)
        module.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


SLOW = 2e13  # FLOP: a minute or so of a CPU


def free_memory(device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    if not os.path.exists("/proc/meminfo"):  # not Linux: all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def epochs(cfg: Config, world: int):
    """(source, how many steps its items last)."""
    if cfg.encoded and os.path.exists(cfg.encoded):
        clips = EncodedClips(cfg.encoded)
        for source in filter(cfg.mix.get, cfg.mix):
            yield source, epoch(cfg, world, source, clips.count(source))
        return
    for source, path in data_lists(cfg, render=False).items():
        there = os.path.exists(path)
        yield source, epoch(cfg, world, source, len(Items(source, path))) if there else f"{path} is not there yet"


def epoch(cfg: Config, world: int, source: str, items: int) -> str:
    a_step = cfg.mix[source] / sum(cfg.mix.values()) * cfg.batch_size * cfg.accumulate * world
    left = items - cfg.validation
    return f"{left:,} items, {left / a_step:,.0f} steps an epoch of {processes(world)}"


def processes(world: int) -> str:
    return f"{world} processes" if world > 1 else "one process"


def dry_run(cfg: Config, example):
    """Print parameters, memory by kind, steps an epoch, and the time of a step where it fits. Under torchrun rank 0
    does, for as many processes."""
    if int(os.environ.get("RANK", 0)):
        return
    if cfg.dtype == "float64":
        raise ValueError("dry_run accounts for dtype = float32, bfloat16 and float16, not float64")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = replace(cfg, dtype=str(pick_dtype(cfg.dtype, device)).removeprefix("torch."))
    world = int(os.environ.get("WORLD_SIZE", 1))
    need = memory(cfg, example, device.type)
    kinds = ("weights", "frozen", "gradients", "activations")
    together = sum(need[kind] for kind in kinds)
    gpu, average = int(device.type != "cpu"), int(bool(cfg.ema))
    state = {"masters": gpu, "gradients": gpu, "moments": 2, "moving average": average}
    host = need["weights"] * sum(state.values())
    saving = need["weights"] * (2 + average) if world > 1 else 0  # of the other ranks, too

    def line(name, text):
        print(f"{name:<22}{text}")

    if cfg.init and not os.path.exists(cfg.init):
        line("model", f"{cfg.model}, as {cfg.init} is not on this machine")
    line("parameters", f"{need['parameters']:,} trained")
    line("memory of the device", f"{together / 1e9:.2f} GB at the peak of a step")
    for kind in kinds:
        line("  " + kind, f"{need[kind] / 1e9:.2f} GB")
    kept = ", ".join(name for name, copies in state.items() if copies)
    line("memory of the host", f"{host / 1e9:.2f} GB for {kept}, in {processes(world)}")
    if saving:
        line("  while saving", f"{saving / 1e9:.2f} GB more on rank 0")
    line("computation", f"{need['flop'] / 1e12:,.2f} TFLOP a step and rank")
    if cfg.train == "unet":
        for source, text in epochs(cfg, world):
            line(f"data, {source}", text)
    free, wanted = free_memory(device), together + (0 if gpu else host)
    if not gpu and need["flop"] > SLOW:
        line("time of a step", "not measured: it would take minutes on this CPU")
        return
    if wanted > free:
        line("time of a step", f"not measured: it needs {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB of this {device} "
             "are free")
        return
    print("timing a step ...", file=sys.stderr, flush=True)
    seconds = seconds_a_step(cfg, example, device)
    line("time of a step", f"{seconds:.2f} s on one {device}, without reading data: "
         f"{seconds * cfg.max_steps / 3600:.1f} h for {cfg.max_steps:,} steps")
