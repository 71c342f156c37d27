"""training/account.py: counts against what PyTorch's allocator and profiler see in a real step, and by hand."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from runs import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import train
from layers.cpu import AttentionByParts
from training.account import Options, Uncounted, costs, count_flop, device_memory, host_memory, plan, setting, shape_of
from training.config import Config, read_config
from training.setup import loss_of

# ---------------------------------------------------------------------------------------------------------------------
# FLOP


def attend(B=2, heads=3, L=300, S=500, d=16, dtype=torch.float32):
    """torch's fused attention, with a backward pass."""
    q, k, v = (torch.randn(B, heads, n, d, dtype=dtype, requires_grad=True) for n in (L, S, S))
    F.scaled_dot_product_attention(q, k, v).sum().backward()


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_attention_is_counted_once(fake, dtype):
    """Whether this torch has a formula of its own or not: two products forward, five backward."""
    forward = 4 * 2 * 3 * 300 * 500 * 16
    if fake:
        with FakeTensorMode():
            assert count_flop(lambda: attend(dtype=dtype)) == 3.5 * forward
    else:
        assert count_flop(lambda: attend(dtype=dtype)) == 3.5 * forward


def test_attention_by_parts_is_counted_as_fused_attention_is():
    q, k, v = (torch.randn(1, 2, n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (300, 500, 500))
    assert count_flop(lambda: AttentionByParts.apply(q, k, v).sum().backward()) == 3.5 * 4 * 2 * 300 * 500 * 16


def test_an_attention_that_cannot_be_counted_is_named(monkeypatch):
    """Rather than missed: here that of a backend which no formula is for."""
    library = torch.library.Library("etc_test", "DEF")
    library.define("_attention(Tensor q) -> Tensor")
    library.impl("_attention", lambda q: q.clone(), "CPU")
    with pytest.raises(Uncounted, match="has no FLOP formula for etc_test._attention"):
        count_flop(lambda: torch.ops.etc_test._attention(torch.randn(3, 3) @ torch.randn(3, 3)))
    monkeypatch.setattr("training.account.FORMULAS", {torch.ops.etc_test._attention: lambda q, **_: 7})
    assert count_flop(lambda: torch.ops.etc_test._attention(torch.randn(3, 3))) == 7


def test_what_needs_no_attention_is_counted():
    assert count_flop(lambda: torch.randn(3, 5) @ torch.randn(5, 7)) == 2 * 3 * 5 * 7
    assert count_flop(lambda: None) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def allocated(work) -> int:
    """Bytes at the peak of work(), beyond those before it, as the profiler hears from the CPU's allocator.

    Without the scratch memory of kernels, which differs from CPU to CPU and is no tensor: what a convolution or an
    attention allocates inside and frees before it returns.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = []

    def walk(node, kernel):
        if hasattr(node.extra_fields, "alloc_size"):
            events.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size, kernel))
        is_kernel = "convolution" in node.name or "dot_product" in node.name
        for child in node.children:
            walk(child, kernel or (node.start_time_ns if is_kernel else None))

    for root in profiler.profiler.kineto_results.experimental_event_tree():
        walk(root, None)
    events.sort(key=lambda event: event[0])
    made, scratch, now, peak = {}, set(), 0, 0
    for n, (_, place, size, kernel) in enumerate(events):
        if size > 0:
            made[place] = n, kernel
        elif place in made:
            before, maker = made.pop(place)
            scratch |= {before, n} if kernel and kernel == maker else set()
    for n, (_, _, size, _) in enumerate(events):
        now += size if n not in scratch else 0
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("options", [
    {}, {"dtype": "bfloat16", "checkpointing": True}, {"train_text": False}, {"train": "vae"},
    {"train_text": False, "lora_rank": 8}], ids=str)
def test_memory_is_what_a_real_step_allocates(options):
    cfg = read_config([f"{ROOT}/configs/ci.py", "--frames=9", "--width=64", "--height=64", "--batch_size=2"])
    cfg = dataclasses.replace(cfg, **options)
    example, shape = train.TASKS[cfg.train].example, shape_of(cfg)
    module, batch, _ = setting(cfg, example, shape)
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)

    def step():
        loss_of(cfg, module, batch, torch.device("cpu")).mean().backward()

    step()
    measured, need = allocated(step), device_memory(cfg, example, shape)
    assert need["parameters"] == sum(p.numel() for p in trained)
    assert need["weights"] == need["gradients"] == 4 * need["parameters"]
    assert need["activations"] == pytest.approx(measured, rel=0.03)


TFLOP = {"base": 115.9, "highres": 488.1, "long": 5921.0, "finetune": 154.5}  # of a step and rank


@pytest.mark.parametrize("name", ["long", *(pytest.param(name, marks=pytest.mark.slow)
                                            for name in ("base", "highres", "finetune"))])
def test_the_full_size_fits_a_card_of_24_gb(name):
    """By the account: never allocated here. Parameters are Stable Diffusion's and ETC's."""
    cfg = read_config([f"{ROOT}/configs/{name}.py", "--dtype=float16"])
    need = device_memory(cfg, train.UNetTask.example, shape_of(cfg))
    assert need["parameters"] == 865_910_724 + 78_666_240
    assert need["weights"] + need["frozen"] + need["gradients"] + 1.25 * need["activations"] < 24e9
    assert need["flop"] / 1e12 == pytest.approx(TFLOP[name], abs=0.05)
    tokens = cfg.frames * cfg.width // 8 * cfg.height // 8
    attention = 5 * 4 * tokens**2 * 320 * cfg.batch_size * cfg.accumulate  # of the finest level, forward alone
    assert 4 * attention < need["flop"] < 40 * attention


def test_memory_of_the_host_is_that_of_the_shards():
    """100 MB of weights; tests/training/test_offload.py has it against what is allocated."""
    mega = 10**6
    pinned = {world: world * 2**size for world, size in ((1, 27), (8, 24))}  # 100 and 12.5 MB, rounded up
    for world, gpu, ema, showing, saving in (
            (1, True, 0.0, 0, 0), (1, True, 0.9, 0, 0), (8, True, 0.0, 100, 200), (8, True, 0.9, 100, 300),
            (1, False, 0.9, 100, 0), (2, False, 0.9, 200, 300)):
        assert host_memory(Config(ema=ema), 100 * mega, 200 * mega, gpu, world) == {
            "masters": pinned[world] if gpu else 0, "gradients": pinned[world] if gpu else 0, "moments": 200 * mega,
            "moving average": 100 * mega * bool(ema), "showing": showing * mega, "saving": saving * mega}


# ---------------------------------------------------------------------------------------------------------------------
# A plan


def test_the_costs_of_a_plan_are_those_of_a_run():
    cfg = dataclasses.replace(read_config([f"{ROOT}/configs/ci.py"]), train_text=False, dtype="float32")
    shape = shape_of(cfg)
    cost = costs(cfg, shape)
    step = device_memory(cfg, train.UNetTask.example, shape)
    assert cfg.batch_size * cost["step"] == pytest.approx(step["flop"], rel=1e-3)
    assert cost["gradients"] == step["gradients"] and cost["context"] == 2 * shape.text.length * shape.text.width
    assert cost["frame"] > 0 < cost["caption"]
    assert costs(dataclasses.replace(cfg, train_text=True), shape)["context"] == 0


def test_a_plan_is_the_sum_of_its_parts():
    """By hand: a thousand clips of two rates, of which half are kept, on two and on three GPUs."""
    cfg = Config(frames=4, fps_values=(4, 8), starts=3, max_steps=100)
    cost = {"step": 6e12, "frame": 1e12, "caption": 5e11, "moments": 4e6, "context": 1e6, "gradients": 3e9}
    o = Options("c.py", clips=1000, keep=0.5, batch=4, tflops=10, cores=5, decode_ms=20, link=2, disk=0.5)
    two = {job: {part: 3600 * hours for part, hours in parts.items()} for job, parts in plan(o, cfg, cost, 2).items()}
    assert two["filter"] == pytest.approx({"decoding": 1000 * 0.02 / 10, "CLIP": 1000 * 4 * 3.3e11 / 2e13})
    assert two["encode"] == pytest.approx({"decoding": 500 * 6 * 0.02 / 10, "VAE": 500 * 6 * 4 * 1e12 / 2e13,
                                           "text tower": 500 * 5e11 / 2e13, "disk": 500 * 5e6 / 5e8})
    assert two["train"] == pytest.approx({"UNet": 100 * 2 * 6e12 / 1e13, "gradients": 100 * 3e9 * 2 / 2 / 2e9})
    assert plan(o, cfg, cost, 3)["train"]["UNet"] == plan(o, cfg, cost, 2)["train"]["UNet"]  # one of three has two
    assert plan(o, cfg, cost, 1)["train"]["gradients"] == 0


def test_a_plan_is_printed(run):
    done = run("training.account", "configs/ci.py", "--clips", "1_000", "--gpus", "1,2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1,000 clips, 1,000 of them encoded, 20 steps of 48 samples\n")
    assert "\n1 GPU, hours:\n  filter" in done.stdout and "\n2 GPUs, hours:\n" in done.stdout
    done = run("training.account", "configs/tiny_vae.py")
    assert done.returncode == 2 and done.stderr.endswith('must be of train = "unet", got configs/tiny_vae.py\n')
