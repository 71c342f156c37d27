"""Temporal layers: fresh they are per-frame Stable Diffusion to the bit; trained they are AnimateDiff's."""

import math
from dataclasses import replace

import pytest
import torch
from runs import ROOT, metrics, train_here
from torch import nn

import sd
from beyond.temporal import MotionModule, Temporal, frame_numbers
from grid import unfold
from model import UNet
from sd.presets import MICRO, SD15, TINY
from train import UNetTask
from training.account import setting, shape_of, with_layout
from training.config import read_config


def inputs(config, grid, side=8):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, grid[0] * side, grid[1] * side, generator=g)
    context = torch.randn(2, 7, config.unet.context_dim, generator=g)
    return x, torch.tensor([20, 900]), context, torch.tensor([4.0, 30.0])


def shaken(unet):
    """The same with random numbers where it has zeros, but not in its layers over time."""
    for name, p in unet.named_parameters():
        if not p.any() and not name.startswith("layout."):
            nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5)
    return unet.eval()


def plain(unet):
    """Stable Diffusion with the weights of another UNet's."""
    other = UNet(replace(unet.cfg, mixed_embedding=False)).eval()
    other.load_state_dict({name: t for name, t in unet.state_dict().items() if not name.startswith("layout.")})
    return other


@pytest.mark.parametrize("middle, parameters", [(True, 453_209_280), (False, 417_137_600)])
def test_as_many_parameters_as_animatediff_has(middle, parameters):
    with torch.device("meta"):
        layout = Temporal(SD15.unet, middle=middle)
    assert sum(p.numel() for p in layout.parameters()) == parameters and len(layout.motion) == 20 + middle


@pytest.mark.parametrize("config, grid", [(MICRO, (2, 2)), (TINY, (1, 3)), (TINY, (3, 4))])
@pytest.mark.parametrize("middle", [True, False])
def test_a_fresh_one_is_per_frame_stable_diffusion_to_the_bit(config, grid, middle):
    torch.manual_seed(0)
    unet = shaken(UNet(config.unet, Temporal(config.unet, middle=middle)))
    (x, t, context, fps), T = inputs(config, grid), grid[0] * grid[1]
    with torch.no_grad():
        found = unfold(unet(x, t, context, fps, grid), *grid)
        each = (y.repeat_interleave(T, 0) for y in (t, context, fps))
        expected = plain(unet)(unfold(x, *grid).flatten(0, 1), *each)
    assert torch.equal(found.flatten(0, 1), expected) and expected.std() > 0.1


def test_without_a_grid_nothing_is_added_and_with_one_frame_the_modules_run():
    torch.manual_seed(0)
    unet = shaken(UNet(MICRO.unet, Temporal(MICRO.unet)))
    for p in unet.layout.parameters():
        nn.init.normal_(p, std=0.1)
    x, t, context, fps = inputs(MICRO, (1, 1))
    with torch.no_grad():
        expected = plain(unet)(x, t, context, fps)
        assert torch.equal(unet(x, t, context, fps), expected)
        assert not torch.allclose(unet(x, t, context, fps, (1, 1)), expected, rtol=1e-2)


def test_a_module_is_a_transformer_over_time_at_every_pixel():
    """Against the formula, pixel by pixel and head by head, in float64."""
    torch.manual_seed(0)
    T, C, H, W = 3, 16, 2, 3
    module = MotionModule(C, 4).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2 * T, C, H, W, dtype=torch.float64)
    block, expected = module.transformer_blocks[0], x.clone()
    pe = torch.tensor([[f(p / 10000 ** (2 * i / C)) for i in range(C // 2) for f in (math.sin, math.cos)]
                       for p in range(T)], dtype=torch.float64)
    normed = torch.cat([module.norm(frame[None]) for frame in x])  # each frame by itself
    for b in range(2):
        for i in range(H):
            for j in range(W):
                h = module.proj_in(normed[b * T : b * T + T, :, i, j])  # (T, C)
                for attn, norm in zip(block.attention_blocks, block.norms):
                    n = norm(h) + pe
                    heads = []
                    for q, k, v in zip(*(to(n).chunk(8, -1) for to in (attn.to_q, attn.to_k, attn.to_v))):
                        heads.append((q @ k.T / (C / 8) ** 0.5).softmax(-1) @ v)
                    h = h + attn.to_out(torch.cat(heads, -1))
                h = h + block.ff(block.ff_norm(h))
                expected[b * T : b * T + T, :, i, j] += module.proj_out(h)
    torch.testing.assert_close(module(x, T), expected, rtol=1e-5, atol=1e-6)


def test_rows_apart_are_rows_together(monkeypatch):
    module, x = MotionModule(16, 4), torch.randn(4, 16, 5, 5)
    nn.init.normal_(module.proj_out.weight)
    whole = module(x, 2)
    monkeypatch.setattr("beyond.temporal.ROWS", 7)
    torch.testing.assert_close(module(x, 2), whole)


def test_frames_are_numbered_by_sine_and_cosine_in_turn():
    table = frame_numbers(24, 40)
    for p, c in ((0, 0), (0, 1), (5, 0), (5, 1), (23, 38), (23, 39)):
        expected = (math.sin, math.cos)[c % 2](p / 10000 ** (c // 2 * 2 / 40))
        assert abs(table[p, c].item() - expected) < 1e-5


def test_no_more_frames_than_are_numbered():
    model = sd.build(MICRO, sd.Settings(layout="temporal", layout_options={"positions": 8}))
    assert model.settings.layout_options == {"positions": 8, "middle": True}
    with pytest.raises(ValueError, match="frames must be <= 8, as many as the model numbers in time, got 9"):
        model.check_size(32, 32, 9)
    with pytest.raises(ValueError, match="at most 8 frames, got 9"):
        model.unet(*inputs(MICRO, (3, 3)), (3, 3))


def test_a_frame_and_not_the_grid_must_be_halved():
    model = sd.build(TINY, sd.Settings(layout="temporal"))
    model.check_size(64, 32, 4)
    with pytest.raises(ValueError, match="width must make a grid"):
        model.check_size(48, 32, 4)  # 6 latent pixels, 12 in a row of two
    with pytest.raises(ValueError, match="divisible by 4, got 6 x 6"):
        model.unet(*inputs(TINY, (2, 2), side=6), (2, 2))


@pytest.mark.parametrize("options, says", [
    ({"positions": 0}, "positions must be a whole number >= 1, got 0"),
    ({"positions": 2.5}, "positions must be a whole number >= 1, got 2.5"),
    ({"middle": 1}, "middle must be True or False, got 1"),
])
def test_options_out_of_range(options, says):
    with pytest.raises(ValueError, match=says):
        sd.build(MICRO, sd.Settings(layout="temporal", layout_options=options))


def test_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    unet = shaken(UNet(MICRO.unet, Temporal(MICRO.unet)))
    for module in unet.layout.motion.values():
        nn.init.normal_(module.proj_out.weight, std=0.1)
    gradients = []
    for unet.checkpointing in (False, True):
        unet.zero_grad()
        unet(*inputs(MICRO, (2, 2)), (2, 2)).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(unet.named_parameters()).keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_it_trains_saves_loads_and_samples(world, finished, tmp_path, run):
    """From a model of grids, on the same encoded clips."""
    base = finished[0] / "run" / "model.safetensors"
    done = train_here(f"--toy={world}", f"--encoded={finished[0]}/encoded", f"--out_dir={tmp_path}/run", "--lr=3e-3",
                      f"--init={base}", "--layout=temporal", "--layout_options={'positions': 9}", "--save_every=20",
                      "--sheet_every=20", "--prompts=()", "--ema=0")
    assert done.returncode == 0, done.stderr
    losses = metrics(tmp_path, "loss")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    path = tmp_path / "run" / "model.safetensors"
    model = sd.load(path)
    assert model.settings.layout_options == {"positions": 9, "middle": True} and model.settings.grid_trained
    assert model.unet.layout.motion["0"].proj_out.weight.any(), "time was learned from the first step on"
    done = run("sample.py", "a red circle moving right", "--ckpt", path, "--steps=2", "--out", tmp_path / "a.gif")
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    done = run("sample.py", "a red circle moving right", "--ckpt", path, "--frames=12")
    assert done.returncode == 2 and "sample.py: frames must be <= 9, as many as the model" in done.stderr


@pytest.mark.parametrize("layout", ["temporal", "causal", "swap"])
def test_a_fresh_one_is_said_to_be_untrained(layout, micro, tmp_path, run):
    done = run("sample.py", "a", "--ckpt", micro, f"--layout={layout}", "--steps=1", "--out", tmp_path / "a.gif")
    assert done.returncode == 0, done.stderr
    assert f"was trained with the layout 'grid', not {layout!r}" in done.stderr
    assert ("motion modules with --motion" in done.stderr) == (layout == "temporal"), "only there do they have a place"
    assert "layers over time were never trained" in done.stderr and "never saw a grid" not in done.stderr


def test_a_dry_run_counts_its_layers(tmp_path):
    path = str(tmp_path / "model.safetensors")
    sd.save(sd.build(MICRO, sd.Settings(prediction="v", layout="temporal", layout_options={"middle": False})), path)
    counts = []
    for options in (["--layout=grid"], ["--layout=temporal"], [f"--init={path}"]):
        cfg = with_layout(read_config([f"{ROOT}/configs/ci.py", *options]))
        module, *_ = setting(cfg, UNetTask.example, shape_of(cfg))
        counts.append(sum(p.numel() for p in module.parameters()))
    with torch.device("meta"):
        layers = [sum(p.numel() for p in Temporal(MICRO.unet, middle=middle).parameters()) for middle in (True, False)]
    assert [count - counts[0] for count in counts[1:]] == layers
