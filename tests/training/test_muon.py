"""training/muon.py: against singular values, against torch's Muon, and what it is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_same_run, ci_options, train_here

from sd import Settings, build
from sd.presets import MICRO, TINY
from train import Denoising, UNetTask
from training.account import device_memory
from training.config import Config
from training.muon import MOMENTUM, muon_step, orthogonalized, parameter_groups
from training.offload import OffloadAdamW


def by_singular_values(matrix):
    """The iteration's polynomial, five times on each singular value."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (s.square().sum().sqrt() + 1e-12)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 90), rank=st.integers(0, 40), scale=st.floats(1e-6, 1e6),
       seed=st.integers(0, 99))
def test_every_singular_value_is_drawn_to_one(rows, columns, rank, scale, seed):
    g = torch.Generator().manual_seed(seed)
    matrix = scale * torch.randn(rows, rank, generator=g, dtype=torch.float64) @ torch.randn(
        rank, columns, generator=g, dtype=torch.float64)
    expected = by_singular_values(matrix)
    torch.testing.assert_close(orthogonalized(matrix), expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(orthogonalized(matrix.float()), expected.float(), atol=2e-3, rtol=0)
    values = torch.linalg.svdvals(expected)[: min(rank, rows, columns)]
    assert not len(values) or 0.67 < values[0] < 1.21


def test_equals_torch_over_twenty_steps():
    """torch rounds to bfloat16 inside; the paths agree as far as that goes."""
    torchs = getattr(torch.optim, "Muon", None) or pytest.skip(f"torch {torch.__version__} has no Muon")
    for shape in ((24, 40), (96, 32)):
        g = torch.Generator().manual_seed(0)
        start = torch.randn(shape, generator=g)
        theirs, ours, momentum = torch.nn.Parameter(start.clone()), start.clone().flatten(), torch.zeros(start.numel())
        optimizer = torchs([theirs], lr=0.02, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
        for step in range(20):
            theirs.grad = torch.randn(shape, generator=g) * 10 ** (step % 3)
            muon_step(ours, theirs.grad.flatten().clone(), momentum, shape[0], 0.02, 0.1)
            optimizer.step()
        moved = (theirs.detach() - start).norm()
        assert (ours.view(shape) - theirs.detach()).norm() < 0.02 * moved


def test_layers_are_trained_with_it_and_nothing_else():
    cfg = Config(optimizer="muon", train_text=True)
    module = Denoising(build(TINY, Settings()), cfg, build(TINY, Settings()).text)
    names = {id(p): name for name, p in module.named_parameters()}
    rest, layers = ([names[id(p)] for p in group["params"]] for group in parameter_groups(module, cfg))
    assert all(module.get_parameter(name).ndim > 1 for name in layers) and len(layers) > 100
    apart = {name.split(".")[1] for name in rest if module.get_parameter(name).ndim > 1} - {"model"}
    assert apart == {"time_embed", "time_proj", "fps_proj", "input_blocks", "out"}
    assert [name for name in rest if "blocks" in name and module.get_parameter(name).ndim > 1] == [
        "unet.input_blocks.0.0.weight"]
    assert [name for name in rest if name.startswith("text") and module.get_parameter(name).ndim > 1] == [
        "text.model.positional_embedding", "text.model.token_embedding.weight"]
    assert parameter_groups(module, Config())[1]["params"] == []


def test_the_account_has_its_one_moment():
    cfg = Config(model="micro", optimizer="muon", train_text=True, width=32, height=32, frames=4, batch_size=1)
    model = build(MICRO, Settings())
    module = Denoising(model, cfg, model.text)
    optimizer = OffloadAdamW(parameter_groups(module, cfg))
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.inner.state.values() for name, t in state.items() if name != "step")
    assert device_memory(cfg, UNetTask.example, MICRO)["moments"] == held < 2 * sum(p.nbytes for p in optimizer.params)


def test_a_run_goes_on_exactly_and_not_with_another_optimizer(world, finished, tmp_path):
    options = [*ci_options(world, tmp_path), f"--encoded={finished[0]}/encoded", "--prompts=()", "--keep=9"]
    muon = [*options, "--optimizer=muon"]
    assert train_here(*muon, "--max_steps=4").returncode == 0
    (tmp_path / "run").rename(tmp_path / "whole")
    (tmp_path / "whole").joinpath("run").symlink_to(".")
    for last in (2, 4):
        assert train_here(*muon, f"--max_steps={last}").returncode == 0
    assert_same_run(tmp_path, tmp_path / "whole", 4)
    done = train_here(*options, "--max_steps=5")
    assert done.returncode == 2 and "step-00000004.pt is of another model or optimizer" in done.stderr
