"""task.py: the loss against the formula, batches that do not depend on the number of ranks, the paper's run."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch
from conftest import ROOT

import model as models
import train
from grid import fold, unfold
from lab import toy
from sample import SHIPPED, NoiseSchedule, denoise
from sd.checkpoint import UserError, load, save
from training import config, task
from training.ranks import Ranks

# ---------------------------------------------------------------------------------------------------------------------
# The paper's run, without its 0.9 billion numbers


def test_base_has_the_papers_size():
    cfg = config.read_config(f"{ROOT}/configs/base.py", [])
    with torch.device("meta"):
        unet = models.UNet(config.PRESETS[cfg.model].unet)
    extra = sum(p.numel() for name, p in unet.named_parameters() if name.startswith(("time_proj", "fps_proj")))
    assert sum(p.numel() for p in unet.parameters()) - extra == 865_910_724 and extra == 78_666_240
    assert cfg.batch_size * cfg.accumulate * 8 == 48 and cfg.betas == (0.9, 0.9) and cfg.weight_decay == 0.03
    assert (cfg.max_steps, cfg.lr, cfg.frames, cfg.width, cfg.height) == (15_000, 1e-4, 16, 256, 256)


def test_a_narrow_base_takes_a_step(world, tmp_path, monkeypatch):
    """configs/base.py through the same code, with fewer channels, smaller frames and the toy world's files."""
    sd21 = config.PRESETS["sd21"]
    narrow = models.ModelConfig(
        dataclasses.replace(sd21.unet, channels=32, context_dim=64, head_width=16),
        dataclasses.replace(sd21.vae, channels=32),
        dataclasses.replace(sd21.text, width=64, layers=2, heads=2, projection=64),
    )
    monkeypatch.setitem(config.PRESETS, "sd21", narrow)
    overrides = ["--init=", f"--toy={world}", "--toy_clips=8", "--toy_images=4", "--toy_captioned=8", "--video=",
                 "--label=", "--caption=", f"--encoded={tmp_path}/encoded",
                 f"--out_dir={tmp_path}/run", "--width=32", "--height=32", "--fps_values=(4, 8)", "--batch_size=4",
                 "--max_steps=1", "--dtype=bfloat16", "--prompts=()", "--draws=1", "--validation=2"]
    cfg = config.read_config(f"{ROOT}/configs/base.py", overrides)
    assert cfg.frames == 16 and cfg.checkpointing and cfg.mix == {"video": 2, "label": 1, "caption": 1}
    train.train(cfg)
    line, validation = map(json.loads, Path(tmp_path, "run", "metrics.jsonl").read_text().splitlines())
    assert line["step"] == 1 and 0.5 < line["loss"] < 2 and line["grad_norm"] > 0
    assert 0.5 < validation["val_loss_500"] < 2
    model = load(str(tmp_path / "run" / "model.safetensors"))
    assert model.settings.prediction == "epsilon" and model.settings.fps_trained == (0, 4, 8, 120)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def test_overfits_one_clip():
    """The whole path learns one clip: from noise, through the VAE, it comes back at 25 dB or better."""
    torch.manual_seed(0)
    T, grid = 4, (2, 2)
    shipped = load(SHIPPED)
    vae, scale = shipped.vae, shipped.settings.latent_scale
    path = toy.trajectory("right", np.arange(T) / 1.5, np.random.default_rng(0))
    frames = torch.tensor(toy.draw("red", "circle", "teal", path)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(frames)[0]
        reconstruction = vae.decode(mean)
    clip = mean * scale  # (T, 4, 8, 8)

    cfg = config.read_config(f"{ROOT}/configs/ci.py", [])
    model = task.make_model(cfg)
    denoising = task.Denoising(model, cfg, model.text).train()
    optimizer = torch.optim.AdamW(denoising.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0)
    tokens, fps = model.text.tokenize(["a red circle moving right"])[0].expand(8, -1), torch.full((8,), 8.0)
    latents, losses, steps = clip.expand(8, -1, -1, -1, -1), [], 400
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (steps - step) / 200)
        t = ((torch.arange(8) + torch.rand(8)) * 125).long().clamp(max=999)
        loss = denoising(latents, tokens, fps, t, torch.randn(8, 4, 16, 16)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.1 * np.mean(losses[:5])
    context = model.text(tokens[:1]).detach()
    run = denoise(model.unet, NoiseSchedule(model.settings), fold(torch.randn(1, T, 4, 8, 8), *grid), context, context,
                  fps[:1], grid, steps=20, guidance=1)
    *_, (_, _, sample, _) = run
    with torch.no_grad():
        error = (vae.decode(unfold(sample, *grid)[0] / scale) - reconstruction).square().mean()
    assert 10 * torch.log10(2**2 / error) >= 25


def test_the_loss_is_that_of_the_timestep():
    """Mean squared error of v at each sample's own t, one by one and by hand."""
    torch.manual_seed(0)
    cfg = config.read_config(f"{ROOT}/configs/ci.py", [])
    model = task.make_model(cfg)
    torch.nn.init.normal_(model.unet.out[2].weight, std=0.1)  # a fresh UNet answers 0 to everything
    denoising = task.Denoising(model, cfg, model.text)
    rows, cols = denoising.grid
    latents, eps = torch.randn(3, rows * cols, 4, 8, 8), torch.randn(3, 4, rows * 8, cols * 8)
    tokens, fps, times = model.text.tokenize(["a", "b", "c"])[0], torch.tensor([4.0, 0.0, 120.0]), [0, 866, 999]
    with torch.no_grad():
        losses = denoising(latents, tokens, fps, torch.tensor(times), eps)
        a, x0, context = NoiseSchedule(model.settings).alphas_cumprod, fold(latents, rows, cols), model.text(tokens)
        for i, t in enumerate(times):
            signal, noise = a[t].sqrt(), (1 - a[t]).sqrt()
            x = signal * x0[i] + noise * eps[i]
            output = model.unet(x[None], torch.tensor([t]), context[i, None], fps[i, None], (rows, cols))[0]
            expected = (output - (signal * eps[i] - noise * x0[i])).square().mean()
            assert torch.allclose(losses[i], expected, rtol=1e-5)


@pytest.mark.parametrize("shift, width", [(1.0, 1.0), (2.0, 1.0), (2.5, 0.5)])
def test_timesteps_of_a_step_have_a_stratum_each(shift, width):
    """logit t' = log s + w logit u, t = first + (last - first) t': however a step is cut, u covers 0..1 evenly."""
    options = ["--timesteps=(600,1000)", f"--timestep_shift={shift}", f"--timestep_width={width}", "--batch_size=4",
               "--accumulate=2"]
    cfg = config.read_config(f"{ROOT}/configs/ci.py", options)
    draws = []
    for step in range(3):
        positions = list(range(24 * step, 24 * step + 24))  # of 3 ranks
        parts = [task.draw_timesteps(cfg, positions[at : at + 4], 3) for at in range(0, 24, 4)]
        alone = dataclasses.replace(cfg, batch_size=24, accumulate=1)
        assert torch.equal(torch.cat(parts), task.draw_timesteps(alone, positions, 1))
        draws.append(torch.cat(parts).tolist())
        for n, t in enumerate(sorted(draws[-1])):
            ends = np.array([n / 24, (n + 1) / 24])
            low, high = 600 + 400 * scipy.special.expit(np.log(shift) + width * scipy.special.logit(ends))
            assert int(low + 1e-3) <= t <= high + 1e-3 and t <= 999
    assert draws[0] != draws[1] and draws[1] != sorted(draws[1])


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def make_task(folder, rank=0, world=1, **options):
    cfg = config.read_config(f"{ROOT}/configs/ci.py", [f"--encoded={folder}/encoded"])
    cfg = dataclasses.replace(cfg, drop_caption=0.5, **options)
    torch.manual_seed(0)
    model = task.make_model(cfg)
    made = task.UNetTask(model, cfg, task.open_clips(cfg, model, {}, torch.device("cpu")), rank, world)
    made.begin(0, 100)
    return made


def test_a_step_is_the_same_however_it_is_cut(finished):
    """Into ranks and micro-batches: latents, captions, FPS, timesteps and noise."""
    whole = make_task(finished[0], batch_size=8)
    ranks = [make_task(finished[0], rank, 2, batch_size=2, accumulate=2) for rank in range(2)]
    for _ in range(3):
        sources, expected = whole.batch()
        parts = [part.batch() for _ in range(2) for part in ranks]
        assert sources == [name for names, _ in parts for name in names]
        for n, tensor in enumerate(expected):
            assert torch.equal(tensor, torch.cat([arguments[n] for _, arguments in parts]))
    assert len({tuple(row) for row in expected[1].tolist()}) > 2  # captions differ


def test_validation_is_on_what_is_never_trained_on(finished):
    made = make_task(finished[0], batch_size=4, validation=2)
    trained = {made.stream.item_at(position) for position in range(400)}
    batch = made.stream.validation()
    assert batch.sources == ["video"] * 2 + ["label"] * 2 + ["caption"] * 2 and "" not in batch.captions
    for source, n in (("video", 8), ("label", 72), ("caption", 8)):
        assert {item for name, item in trained if name == source} == set(range(n - 2))
        last = made.stream.clips.lines(source, n - 1)
        kept = [s.caption for s, name in zip(batch.samples, batch.sources) if name == source]
        assert last[0]["caption"] == kept[-1]


def test_validation_loss_is_that_of_fixed_noise(finished):
    """The same at every call and for every seed and batch size; by hand for one timestep."""
    made, other = (make_task(finished[0], batch_size=n, validation=2, seed=n) for n in (4, 3))
    torch.nn.init.normal_(made.module.unet.out[2].weight, std=0.1)
    other.module.load_state_dict(made.module.state_dict())
    alone = Ranks(timeout=1)
    first = train.validate(made.cfg, alone, made)
    assert list(first) == [f"val_loss_{t}" for t in (100, 300, 500, 700, 900)] and len(set(first.values())) == 5
    assert first == train.validate(made.cfg, alone, made)
    for name, loss in train.validate(other.cfg, alone, other).items():
        assert loss == pytest.approx(first[name], rel=1e-5)


@pytest.mark.parametrize("n", [8, 80])
def test_validation_that_leaves_nothing_is_refused(finished, n):
    with pytest.raises(UserError, match=f"validation = {n} leaves nothing to train on of 8 video samples"):
        make_task(finished[0], batch_size=4, validation=n)


@pytest.mark.parametrize("options, says", [
    (["--width=100"], "the width 100 is not divisible by 8"), (["--width=40", "--frames=6"], "divisible by 2"),
    (["--prediction=x"], "prediction"), (["--prediction=epsilon"], "zero_snr needs prediction"),
    (["--init=INIT", "--fps_embedding=False"], "are switched off for models that start from nothing")])
def test_what_cannot_be_trained_is_refused_before_anything_is_encoded(micro, options, says):
    cfg = config.read_config(f"{ROOT}/configs/ci.py", [option.replace("INIT", micro) for option in options])
    with pytest.raises(UserError, match=says):
        task.make_model(cfg)


def test_latents_of_another_vae_are_refused(finished):
    cfg = config.read_config(f"{ROOT}/configs/ci.py", [f"--encoded={finished[0]}/encoded"])
    torch.manual_seed(1)
    with pytest.raises(UserError, match="was encoded by another VAE than the model's"):
        task.open_clips(cfg, task.make_model(cfg), {}, torch.device("cpu"))


@pytest.fixture
def encoding(world, micro, tmp_path):
    """A config that encodes with the text tower, and its model."""
    options = [f"--init={micro}", f"--toy={world}", f"--encoded={tmp_path}/encoded", f"--out_dir={tmp_path}/run",
               "--train_text=False"]
    cfg = config.read_config(f"{ROOT}/configs/ci.py", options)
    return cfg, task.make_model(cfg)


def test_contexts_of_another_tower_are_refused(encoding):
    cfg, model = encoding
    lists = task.make_ready(cfg, model, torch.device("cpu"))
    task.open_clips(cfg, model, lists, torch.device("cpu"))
    torch.nn.init.normal_(next(model.text.parameters()))
    with pytest.raises(UserError, match="was encoded by another text tower than the model's"):
        task.open_clips(cfg, model, lists, torch.device("cpu"))


def test_latents_of_other_lists_are_told(encoding, world, capsys):
    cfg, model = encoding
    task.make_ready(cfg, model, torch.device("cpu"))
    capsys.readouterr()
    assert task.make_ready(cfg, model, torch.device("cpu")) == {} and not capsys.readouterr().err
    task.make_ready(dataclasses.replace(cfg, video="mine.csv"), model, torch.device("cpu"))
    assert f"encoded from {world}/videos.csv, is used, and mine.csv is not read" in capsys.readouterr().err


def test_a_source_without_a_list_is_refused_before_anything_is_encoded(encoding, world):
    cfg, model = encoding
    cfg = dataclasses.replace(cfg, toy="", video=f"{world}/videos.csv", label=f"{world}/labels")
    with pytest.raises(UserError, match="mix asks for caption samples, of which there is no list"):
        task.make_ready(cfg, model, torch.device("cpu"))
    assert not os.path.exists(cfg.encoded) and not os.path.exists(cfg.encoded + ".part")


def test_a_world_of_other_options_is_refused(encoding, tmp_path):
    cfg, _ = encoding
    with pytest.raises(UserError, match="was rendered with clips 8, the config says 54: choose another folder"):
        task.data_lists(dataclasses.replace(cfg, toy_clips=54))
    for place in ("/dev/null/toy", str(tmp_path)):  # not to be made; no world
        with pytest.raises(UserError, match=f"the toy world {place}: "):
            task.data_lists(dataclasses.replace(cfg, toy=place))


def test_a_vae_from_elsewhere_leaves_the_origin_of_the_rest(encoding, micro, tmp_path):
    cfg, model = encoding
    model.settings = dataclasses.replace(model.settings, origin={"licence": "OpenRAIL++-M", "vae": {"steps": 1}})
    save(model, str(tmp_path / "base.safetensors"))
    cfg = dataclasses.replace(cfg, init=str(tmp_path / "base.safetensors"), vae=micro)
    assert task.make_model(cfg).settings.origin == {"licence": "OpenRAIL++-M", "vae": {"file": micro}}


def test_a_tower_that_trains_has_a_gradient_in_every_weight():
    """Stable Diffusion 2 does not use its last layer and projection: they are left alone."""
    cfg = config.read_config(f"{ROOT}/configs/ci.py", [])
    preset = config.PRESETS["micro"]
    text = dataclasses.replace(preset.text, layers=3, skip_last=1, projection=16)
    model = task.build(dataclasses.replace(preset, text=text), task.Settings(prediction="v"))
    denoising = task.Denoising(model, cfg, model.text)
    torch.nn.init.normal_(model.unet.out[2].weight)
    for p in model.unet.parameters():  # zeros at the end of a branch keep gradients from it
        torch.nn.init.normal_(p, std=0.1)
    tokens = model.text.tokenize(["a red circle"] * 2)[0]
    loss = denoising(torch.randn(2, 4, 4, 4, 4), tokens, torch.full((2,), 8.0), torch.tensor([500, 900]),
                     torch.randn(2, 4, 8, 8))
    loss.mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in denoising.parameters())
    frozen = {name.split(".")[1] for name, p in model.text.named_parameters() if not p.requires_grad}
    assert frozen == {"transformer", "text_projection"}
