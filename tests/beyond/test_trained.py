"""Layouts train, save, load and sample, in every precision; and a new one is a class."""

import numpy as np
import pytest
import torch

import sd
from grid import fold
from model import Grid
from sample import NoiseSchedule, Request, generate
from sd.presets import MICRO
from sd.settings import LAYOUTS


class Blind(Grid):
    """What a layout of three lines can be: frames one by one, without time."""

    per_frame = True


@pytest.fixture
def layouts(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "blind", lambda cfg: Blind())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_grid_it_is_plain_stable_diffusion(layout):
    """Trained or not: to the bit."""
    unet, out = sd.build(MICRO, sd.Settings(layout=layout)).unet, []
    for p in unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p)
    x, context = torch.randn(1, 4, 32, 32), torch.randn(1, 7, MICRO.unet.context_dim)
    for layout in (unet.layout, Grid()):
        unet.layout = layout
        out.append(unet(x, torch.tensor([500]), context))
    assert torch.equal(*out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fresh_weights_are_the_same_with_any_layout(layout):
    plain, other = (sd.build(MICRO, sd.Settings(layout=name)) for name in seeded("grid", layout))
    for part, module in plain.parts().items():
        theirs = other.parts()[part].state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in module.state_dict().items())


def seeded(*names):
    for name in names:
        torch.manual_seed(0)
        yield name


@pytest.mark.parametrize("layout", ["pooled", "swap", "causal", "blind"])
def test_it_trains_saves_loads_and_samples(layout, layouts, tmp_path):
    torch.manual_seed(0)
    settings = sd.Settings(prediction="v", zero_snr=True, layout=layout, frames=4, width=32, height=32, fps=8,
                           fps_trained=(8,), grid_trained=True)
    model = sd.build(MICRO, settings)
    unet, schedule, grid = model.unet, NoiseSchedule(settings), (2, 2)
    unet.checkpointing = True
    # four frames of one colour each, and a square that moves
    x0 = torch.randn(4, 1, 4, 1, 1).expand(4, 4, 4, 4, 4).clone()
    for t in range(4):
        x0[:, t, :, 1:3, t] *= -1
    x0, eps, t = fold(x0, *grid), torch.randn(4, 4, 8, 8), torch.tensor([999, 700, 500, 300])
    context, fps = torch.randn(4, 7, MICRO.unet.context_dim), torch.full((4,), 8.0)
    before = [p.clone() for p in unet.layout.parameters()]
    optimizer, losses = torch.optim.AdamW(unet.parameters(), 3e-3), []
    for _ in range(10):
        error = unet(schedule.add_noise(x0, eps, t), t, context, fps, grid) - schedule.target(x0, eps, t)
        losses.append(error.square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, unet.layout.parameters()))

    path = str(tmp_path / "model.safetensors")
    sd.save(model, path)
    loaded = sd.load(path)
    assert loaded.settings == model.settings and type(loaded.unet.layout) is type(unet.layout)
    given = x0, t, context, fps, grid
    with torch.no_grad():
        whole = unet(*given)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = unet(*given)
        half = loaded.unet.bfloat16()(x0, t, context.bfloat16(), fps, grid)
    assert all((out.float() - whole).norm() < 0.05 * whole.norm() for out in (mixed, half))
    videos = [generate(m, Request("a red circle", steps=2)) for m in (model, sd.load(path))]
    assert np.array_equal(*videos) and videos[0].shape == (1, 4, 32, 32, 3)
