"""account.py: what --dry_run says, against what PyTorch's allocator and profiler see in a real step."""

import dataclasses
import os
import re

import pytest
import torch
from conftest import ROOT
from torch.profiler import ProfilerActivity, profile

from training import account, config, task


def allocated(work) -> int:
    """Bytes at the peak of work(), beyond those before it, as the profiler hears from the CPU's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("options", [
    {"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "checkpointing": True},
    {"train": "vae", "dtype": "float32"}, {"train_text": False}], ids=str)
def test_memory_is_what_a_real_step_allocates(options):
    cfg = config.read_config(f"{ROOT}/configs/tiny.py", ["--vae=", "--batch_size=4"])
    cfg = dataclasses.replace(cfg, **options)
    module, batch, _ = account.setting(cfg, account.shape_of(cfg))
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)

    def step():
        task.loss_of(cfg, module, batch, torch.device("cpu")).mean().backward()

    step()
    measured, need = allocated(step), account.memory(cfg)
    assert need["parameters"] == sum(p.numel() for p in trained)
    assert need["weights"] == need["gradients"] == 4 * need["parameters"]
    assert need["activations"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("name", ["base", "highres", "long", "finetune"])
def test_the_full_size_fits_a_card_of_24_gb(name):
    """By the account: never allocated here. Parameters are Stable Diffusion's and ETC's."""
    need = account.memory(config.read_config(f"{ROOT}/configs/{name}.py", []))
    assert need["parameters"] == 865_910_724 + 78_666_240
    assert need["weights"] + need["frozen"] + need["gradients"] + need["activations"] < 24e9
    tokens = {"base": 128 * 128, "highres": 160 * 256, "long": 512 * 320, "finetune": 128 * 128}[name]
    cfg = config.read_config(f"{ROOT}/configs/{name}.py", [])
    attention = 5 * 4 * tokens**2 * 320 * cfg.batch_size * cfg.accumulate  # of the finest level, forward alone
    assert 4 * attention < need["flop"] < 40 * attention


def test_dry_run_says_what_a_run_needs(run, world, finished, tmp_path):
    done = run("train.py", "configs/ci.py", "--dry_run", f"--toy={world}", f"--encoded={finished[0]}/encoded",
               f"--out_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    lines = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in done.stdout.splitlines())
    model = task.make_model(config.read_config(f"{ROOT}/configs/ci.py", []))
    trained = sum(p.numel() for network in (model.unet, model.text) for p in network.parameters())
    assert lines["parameters"] == f"{trained:,} trained"
    assert lines["data, video"] == "8 items, 4 steps an epoch of one process"
    assert re.fullmatch(r"\d+\.\d\d s on one cpu, without reading data: 0.0 h for 20 steps", lines["time of a step"])
    assert not os.listdir(tmp_path)


def test_dry_run_needs_neither_data_nor_weights(run, tmp_path):
    done = run("train.py", "configs/long.py", "--dry_run", "--batch_size=4", f"--video={tmp_path}/clips.csv")
    assert done.returncode == 0, done.stderr
    assert "sd21, as runs/base/model.safetensors is not on this machine" in done.stdout
    assert f"{tmp_path}/clips.csv is not there yet" in done.stdout
    assert "not measured: it would take minutes on this CPU" in done.stdout
    done = run("train.py", "configs/ci.py", "--dry_run", "--width=36")
    assert done.returncode == 2 and "the width 36 is not divisible by 8" in done.stderr
