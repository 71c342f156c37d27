"""What only a card can show: python -m pytest -n 0 tests/gpu -m gpu. Skipped where there is none."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import LIMIT, ONE_THREAD, ROOT, ci_options, keep, metrics, train_here, weights
from torch import nn

import layers.cpu
import sd
import train
from model import attention
from sample import SHIPPED, Request, generate
from sd.device import pick_device, pick_dtype
from training.account import device_memory, setting, shape_of
from training.config import read_config
from training.offload import OffloadAdamW
from training.setup import loss_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")]
CARD = torch.device("cuda", 0)


@pytest.fixture
def in_full(monkeypatch):
    """Convolutions without TensorFloat-32, whose numbers have 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_the_card_is_what_is_picked():
    assert pick_device() == CARD and pick_dtype("auto", CARD) == torch.float16


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_twenty_steps_are_those_of_the_cpu(world, tmp_path, in_full):
    options = [*ci_options(world, tmp_path), "--validation=1"]
    done = train_here(*options)
    assert done.returncode == 0 and done.stdout.startswith("float32 on cuda:0"), done.stderr
    there = subprocess.run([sys.executable, "train.py", "configs/ci.py", *options, f"--out_dir={tmp_path}/cpu/run"],
                           cwd=ROOT, env=ONE_THREAD | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, timeout=LIMIT)
    assert there.returncode == 0, there.stderr
    for name in ("loss", "grad_norm", "val_loss_500"):
        np.testing.assert_allclose(metrics(tmp_path, name), metrics(tmp_path / "cpu", name), rtol=1e-2)
    ours, theirs = weights(tmp_path), weights(tmp_path / "cpu")
    for kind in ("average", "exp_avg"):
        for a, b in zip(ours["optimizer"][kind], theirs["optimizer"][kind]):
            assert torch.dist(a, b) < 0.05 * b.norm() + 1e-4


def test_a_resumed_run_sees_the_same_inputs(world, tmp_path, in_full):
    """Its results are close, not equal to the bit: sums are in no fixed order."""
    options = [*ci_options(world, tmp_path), "--prompts=()", "--save_every=10"]
    assert train_here(*options).returncode == 0
    whole = metrics(tmp_path, "loss")
    keep(tmp_path, 10)
    assert "resume from" in train_here(*options).stdout
    np.testing.assert_allclose(metrics(tmp_path, "loss"), whole, rtol=1e-2)
    assert metrics(tmp_path, "loss")[10] == pytest.approx(whole[10], rel=1e-4)


def test_an_overflow_in_float16_costs_its_step(world, tmp_path, monkeypatch):
    """From a loss scale that is too large, down to one that is not."""

    class Large(train.LossScale):
        def __init__(self, enabled):
            super().__init__(enabled)
            self.value = 2.0**25

    monkeypatch.setattr(train, "LossScale", Large)
    train.train(read_config([f"{ROOT}/configs/ci.py", *ci_options(world, tmp_path), "--prompts=()", "--dtype=auto"]))
    skipped, state = metrics(tmp_path, "skipped"), weights(tmp_path)
    assert skipped[0] == 1 and 1 <= skipped[-1] < 10 and state["config"]["dtype"] == "float16"
    assert state["scale"]["value"] == 2.0 ** (25 - skipped[-1])
    assert all(torch.isfinite(tensor).all() for tensor in state["module"].values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_optimizer_is_torchs(layout, in_full):
    """By two micro-batches a step; masters, gradients and moments on the host, the average seen on the card."""
    def network():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.SiLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 144, 1))
        return net.to(CARD, memory_format=layout)

    ours, theirs = network(), network()
    optimizer = OffloadAdamW([{"params": list(ours.parameters())}], ema=0.9)
    reference = torch.optim.AdamW(theirs.parameters())
    optimizer.attach(ours)
    average = [p.detach().clone() for p in theirs.parameters()]
    for step in range(20):
        for micro in range(2):
            x = torch.randn(4, 3, 16, 16, device=CARD, generator=torch.Generator(CARD).manual_seed(2 * step + micro))
            optimizer.last_micro_batch = micro == 1
            for net in (ours, theirs):
                net(x).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        assert optimizer.step(0.1) == pytest.approx(norm.item(), rel=1e-3)
        reference.step()
        ours.zero_grad()
        theirs.zero_grad()
        decay = min(0.9, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, theirs.parameters())]
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    with optimizer.averaged(ours) as in_host_memory:
        for a, b in zip(ours.parameters(), average):
            assert a.device == CARD
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
        with in_host_memory:
            assert all(p.device.type == "cpu" for p in ours.parameters())
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert all(master.is_pinned() for master in optimizer.masters)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_step_is_that_of_the_account(checkpointing):
    """And what kernels take beside, which is little."""
    cfg = read_config([f"{ROOT}/configs/tiny.py", "--batch_size=32", "--dtype=float16",
                       f"--checkpointing={checkpointing}"])
    shape = shape_of(cfg)
    need = device_memory(cfg, train.UNetTask.example, shape, "cuda")
    with CARD:
        module, batch, _ = setting(cfg, train.UNetTask.example, shape)
    for p in module.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_of(cfg, module, batch, CARD).mean().backward()
        peak = torch.cuda.max_memory_allocated() - before
    assert 0.95 * need["activations"] < peak < 1.1 * need["activations"] + 2**27


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

REQUEST = Request("a red circle moving right", steps=20, eta=0.0)


def test_samples_in_float16_are_those_of_float32():
    half, full = (generate(sd.load(SHIPPED, CARD, dtype), REQUEST)[0] for dtype in (torch.float16, torch.float32))
    there = generate(sd.load(SHIPPED), REQUEST)[0]
    for video in (half, full):
        assert np.abs(video.astype(float) - there).mean() < 3  # of 255


def test_networks_take_turns_on_the_card():
    """They come from the host and are there again afterwards; a peak holds one of them at a time."""
    model, there = sd.load(SHIPPED, dtype=torch.float16), sd.load(SHIPPED, CARD, torch.float16)
    np.testing.assert_array_equal(generate(model, REQUEST, device=CARD), generate(there, REQUEST))
    assert all(p.device.type == "cpu" for part in model.parts().values() for p in part.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_on_a_card_is_torchs(dtype, monkeypatch):
    """Never the CPU's own."""
    monkeypatch.setattr(layers.cpu, "attention", None)
    monkeypatch.setattr(layers.cpu.AttentionByParts, "apply", None)
    q, k, v = (torch.randn(1, 2, 2048, 64, device=CARD, dtype=dtype, requires_grad=True) for _ in range(3))
    out = attention(q, k, v)
    out.sum().backward()
    expected = (q.float() @ k.float().mT / 8).softmax(-1) @ v.float()
    torch.testing.assert_close(out.float(), expected, atol=1e-2, rtol=1e-2)
