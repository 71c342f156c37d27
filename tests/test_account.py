"""account.py: what --dry_run says, against what PyTorch's allocator and profiler see in a real step."""

import dataclasses

import pytest
import torch
from conftest import ROOT
from torch.profiler import ProfilerActivity, profile

import account
import config
import task


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
    module, batch, _ = account.setting(cfg, account.architecture(cfg))
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
