"""Say what a run will need, before anyone spends a night on it; and of a run in parts, how long each of them takes.

    python train.py CONFIG --dry_run
"""

import math
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace

import torch

from clips.decode import Bad
from clips.encoded import EncodedClips
from clips.encoder import all_samples
from clips.lists import Items, is_there
from sd import Settings, build
from sd.device import free_memory, pick_dtype
from sd.presets import ModelConfig
from sd.vae import encode_frames
from training.account import device_memory, host_memory, setting, shape_of, with_layout
from training.checkpoints import steps_done
from training.config import Config, stages
from training.muon import parameter_groups
from training.offload import OffloadAdamW
from training.setup import check_inputs, data_lists, loss_of, require_current, sample_spec, weights_dtype

SLOW = 2e13  # FLOP: a minute or so of a CPU


def dry_run(cfg: Config, example):
    """Print parameters, memory by kind, what the data is, and the time of a step where it fits.

    Under torchrun rank 0 does, for as many processes.
    """
    if int(os.environ.get("RANK", 0)):
        return
    if cfg.dtype == "float64":
        raise ValueError("dtype must be float32, bfloat16, float16 or auto for dry_run, got float64")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = replace(with_layout(cfg), dtype=str(pick_dtype(cfg.dtype, device)).removeprefix("torch."))
    gpu = device.type == "cuda" or cfg.dtype == "float16"  # that is for a GPU, if not for one of this machine
    world, shape = int(os.environ.get("WORLD_SIZE", 1)), shape_of(cfg)
    need = device_memory(cfg, example, shape, device.type)
    kinds = ("weights", "frozen", "gradients", "activations")
    on_device = sum(need[kind] for kind in kinds)
    host = host_memory(cfg, need["weights"], need["moments"], gpu, world)
    at_times = {name: host.pop(name) for name in ("showing", "saving")}
    on_host = sum(host.values())

    if cfg.init and not os.path.exists(cfg.init):
        line("model", f"{cfg.model}, as {cfg.init} is not on this machine")
    line("parameters", f"{need['parameters']:,} trained")
    line("memory of the device", f"{gigabytes(on_device)} at the peak of a step, without workspaces of kernels")
    more = "; up to a quarter more on a GPU, which normalises in float32" if device.type == "cpu" and gpu else ""
    for kind in kinds:
        line(f"  {kind}", gigabytes(need[kind]) + (more if kind == "activations" else ""))
    line("memory of the host", f"{gigabytes(on_host)} for {', '.join(name for name in host if host[name])}, in "
         f"{processes(world)}" + (f" with a GPU{'' if world == 1 else ' each'}" if gpu else ""))
    for name, size in at_times.items():
        if size:
            line(f"  while {name}", f"{gigabytes(size)} more on rank 0")
    line("computation", "not counted: this torch has no FLOP formula for the attention here" if need["flop"] is None
         else f"{need['flop'] / 1e12:,.2f} TFLOP a step and rank")
    if cfg.train == "unet":
        for source, text in data_lines(cfg, shape, world):
            line(f"data, {source}", text)
    wanted = on_device if device.type == "cuda" else on_device + on_host
    line("time of a step", time_of_step(cfg, example, shape, device, need["flop"], wanted))


def line(name: str, text: str):
    print(f"{name:<22}{text}")


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def processes(world: int) -> str:
    return f"{world} processes" if world > 1 else "one process"


# ---------------------------------------------------------------------------------------------------------------------
# Data


def data_lines(cfg: Config, shape: ModelConfig, world: int):
    """Yield (source, how many items it has, how long they last, what they take when encoded)."""
    if cfg.encoded and os.path.exists(cfg.encoded):
        clips = EncodedClips(cfg.encoded)
        for source in filter(cfg.mix.get, cfg.mix):
            yield source, epoch(cfg, world, source, clips.count(source))
        return
    for source, path in data_lists(cfg, render=False).items():
        if not is_there(path):
            yield source, f"{path} is not there yet"
            continue
        items, disk = Items(source, path, cfg.captions), ""
        if cfg.encoded:
            sizes = {what: len(items) * size for what, size in encoded_size(cfg, shape, items).items() if size}
            parts = " and ".join(f"{gigabytes(size)} of {what}" for what, size in sizes.items())
            disk = f", up to {gigabytes(sum(sizes.values()))} to encode: {parts}"
        yield source, epoch(cfg, world, source, len(items)) + disk


def epoch(cfg: Config, world: int, source: str, items: int) -> str:
    in_a_step = cfg.mix[source] / sum(cfg.mix.values()) * cfg.batch_size * cfg.accumulate * world
    return f"{items:,} items, {(items - cfg.validation) / in_a_step:,.0f} steps an epoch of {processes(world)}"


def encoded_size(cfg: Config, shape: ModelConfig, items: Items) -> dict[str, int]:
    """Bytes that an item takes when encoded in float16, at every FPS: moments, and with a frozen tower the contexts of
    its captions, of which each item is taken to have as many as the first."""
    factor, source = shape.vae.downsampling, items.source
    frames = 1 if source == "caption" else cfg.frames
    moments = frames * 2 * shape.vae.latent_channels * (cfg.height // factor) * (cfg.width // factor)
    samples = sample_spec(cfg).repeats(source) * (len(cfg.fps_values) if source == "video" else 1)
    captions = 1
    with suppress(Bad):
        captions = min(samples, len(items[0].captions))
    context = 0 if cfg.train_text else shape.text.length * shape.text.width
    return {"moments": 2 * samples * moments, "contexts": 2 * captions * context}


# ---------------------------------------------------------------------------------------------------------------------
# Time


def time_of_step(cfg: Config, example, shape: ModelConfig, device, flop: int | None, wanted: int) -> str:
    """Measure a step of one process, or say why not.

    wanted  bytes that it takes on the device
    """
    free = free_memory(device)
    if device.type == "cpu" and (flop is None or flop > SLOW):
        return "not measured: it would take minutes on this CPU"
    if wanted > free:
        return f"not measured: it needs {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB of this {device} are free"
    print("timing a step ...", file=sys.stderr, flush=True)
    parts = timed_stages(cfg, example, shape, device)
    each = ", then ".join(f"{seconds:.2f} s" for _, seconds in parts)
    whole = sum(steps * seconds for steps, seconds in parts)
    return f"{each} on one {device}, without reading data: {whole / 3600:.1f} h for {cfg.max_steps:,} steps"


def timed_stages(cfg: Config, example, shape: ModelConfig, device, done=0) -> list[tuple[int, float]]:
    """(steps, seconds a step) of each stage of a run that is left after some steps."""
    left = [stage for stage in stages(cfg) if stage.last > done]
    return [(stage.last - max(stage.first, done), seconds_a_step(stage.cfg, example, shape, device)) for stage in left]


def seconds_a_step(cfg: Config, example, shape: ModelConfig, device) -> float:
    """Seconds of a real step of one process, with random weights: the fastest of up to four within a minute."""
    with device:
        module, batch, _ = setting(cfg, example, shape)
    module.to(weights_dtype(cfg))
    if device.type == "cpu":
        module.to(memory_format=torch.channels_last)
    optimizer = OffloadAdamW(parameter_groups(module, cfg), cfg.ema)
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


# ---------------------------------------------------------------------------------------------------------------------
# A run in parts


def announce(parts):
    """Say what several runs do one after the other, and how long each takes by a trial of its steps, of its first clips
    and of a sheet. Under torchrun rank 0 does.

    parts  (config, example) of each
    """
    if int(os.environ.get("RANK", 0)):
        return
    last = replace(parts[-1][0], vae="")
    check_inputs(last)  # what is wrong with it is told now, not after the others
    if os.path.exists(last.encoded):
        require_current(last)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole, knew = 0, os.path.basename(parts[-1][0].init)
    for n, (cfg, example) in enumerate(parts, 1):
        cfg = replace(with_layout(cfg), dtype=str(pick_dtype(cfg.dtype, device)).removeprefix("torch."))
        around = seconds_of_clips(cfg) + seconds_of_sheets(cfg, example, device)
        parts_left = timed_stages(cfg, example, shape_of(cfg), device, steps_done(cfg.out_dir))
        steps, seconds = sum(n for n, _ in parts_left), sum(n * each for n, each in parts_left)
        what = "VAE" if cfg.train == "vae" else "UNet and text tower" if cfg.train_text else "UNet"
        print(f"part {n} of {len(parts)}: the {what}, {steps:,} steps of {seconds / max(1, steps):.2f} s and "
              f"{around:.0f} s for clips and sheets, {(seconds + around) / 60:.0f} min; {cfg.out_dir}", flush=True)
        if cfg.toy and not os.path.exists(cfg.toy):
            print(f"  and what it takes to render {cfg.toy}, and to read it", flush=True)
        whole += seconds + around
    print(f"in all {whole / 60:.0f} min", flush=True)
    if knew:
        print(f"It learns your clips and forgets what {knew} could draw: nothing of that is trained along", flush=True)


def seconds_of_clips(cfg: Config) -> float:
    """Seconds to read the clips of a run, and to encode them where it is ahead, by the first of each list."""
    vae, spec, seconds = build(shape_of(cfg), Settings()).vae, sample_spec(cfg), 0.0
    if cfg.encoded and os.path.exists(cfg.encoded):
        return seconds
    for source, path in data_lists(cfg, render=False).items():
        if not is_there(path):  # a world that is still to be rendered
            continue
        items, began = Items(source, path, cfg.captions), time.perf_counter()
        found = [sample for _, _, sample in all_samples(items, 0, spec) if not isinstance(sample, Bad)]
        if cfg.train == "unet":
            for sample in found:
                encode_frames(vae, sample.data)
        share = 1 / len(found) if cfg.train == "vae" and found else 1  # it reads each clip once
        seconds += (time.perf_counter() - began) * share * len(items)
    return seconds


def seconds_of_sheets(cfg: Config, example, device) -> float:
    """Seconds to sample the sheets of a run that are left, by one forward pass."""
    done = steps_done(cfg.out_dir)
    if cfg.train == "vae" or done >= cfg.max_steps:
        return 0.0
    with device:
        module, batch, _ = setting(cfg, example, shape_of(cfg))
    module.to(weights_dtype(cfg))
    seconds = []
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            loss_of(cfg, module, batch, device).cpu()
            seconds.append(time.perf_counter() - began)
    forwards = 2 * Settings().sampling_steps * (len(cfg.prompts) + cfg.sheet_clips) / cfg.batch_size
    return min(seconds) * forwards * (math.ceil(cfg.max_steps / cfg.sheet_every) - done // cfg.sheet_every)
