"""train.py: the loss against the formula, batches that do not depend on the number of ranks, and whole runs."""

import dataclasses
import json
import os
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import torch
from runs import (
    BY_TWO,
    LIMIT,
    ONE_THREAD,
    ROOT,
    assert_same_run,
    ci_options,
    few_labels,
    metrics,
    torchrun,
    train_here,
    weights,
)

import sd
import train
from grid import fold, grid_shape, unfold
from lab import toy
from model import UNet
from sample import SHIPPED, NoiseSchedule, denoise
from sd.presets import PRESETS, ModelConfig
from training.config import read_config, stages
from training.ranks import Ranks
from training.setup import loss_of, make_model

CI = f"{ROOT}/configs/ci.py"

# ---------------------------------------------------------------------------------------------------------------------
# The loss


def denoising_of_ci():
    torch.manual_seed(0)
    cfg = read_config([CI])
    model = make_model(cfg)
    return model, train.Denoising(model, cfg, model.text)


def test_the_loss_is_that_of_the_timestep():
    """Mean squared error of v at each sample's own t, one by one and by hand."""
    model, denoising = denoising_of_ci()
    torch.nn.init.normal_(model.unet.out[2].weight, std=0.1)  # a fresh UNet answers 0 to everything
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


def test_given_frames_enter_as_they_are_told_and_do_not_count():
    """Clean, a little noised, none: frame by frame and by hand."""
    model, denoising = denoising_of_ci()
    torch.nn.init.normal_(model.unet.out[2].weight, std=0.1)
    (rows, cols), g = denoising.grid, torch.Generator().manual_seed(0)
    T = rows * cols
    latents, eps = torch.randn(3, T, 4, 8, 8, generator=g), torch.randn(3, 4, rows * 8, cols * 8, generator=g)
    tokens, fps = model.text.tokenize(["a", "b", "c"])[0], torch.tensor([4.0, 8.0, 120.0])
    given = torch.full((3, T), -1)
    given[0, 0], given[1, :2] = 0, 70
    times = [866, 300, 500]
    with torch.no_grad():
        losses = denoising(latents, tokens, fps, torch.tensor(times), eps, given)
        a, context = NoiseSchedule(model.settings).alphas_cumprod, model.text(tokens)
        for i in range(3):
            noise, x, targets, told = unfold(eps[i, None], rows, cols)[0], [], [], []
            for n in range(T):
                t = times[i] if given[i, n] < 0 else int(given[i, n])
                told.append(t)
                clean = given[i, n] == 0
                x.append(latents[i, n] if clean else a[t].sqrt() * latents[i, n] + (1 - a[t]).sqrt() * noise[n])
                targets.append(a[t].sqrt() * noise[n] - (1 - a[t]).sqrt() * latents[i, n])
            output = model.unet(fold(torch.stack(x)[None], rows, cols), torch.tensor([told]), context[i, None],
                                fps[i, None], (rows, cols))
            errors = [(out - target).square().mean() for out, target, level in
                      zip(unfold(output, rows, cols)[0], targets, given[i]) if level < 0]
            assert torch.allclose(losses[i], torch.stack(errors).mean(), rtol=1e-5)
        none = denoising(latents, tokens, fps, torch.tensor(times), eps)
        assert torch.allclose(losses[2], none[2], rtol=1e-5) and not torch.allclose(losses[0], none[0], rtol=1e-3)


def test_overfits_one_clip():
    """The whole path learns one clip: from noise, through the VAE, it comes back at 25 dB or better."""
    T, grid = 4, grid_shape(4)
    shipped = sd.load(SHIPPED)
    vae, scale = shipped.vae, shipped.settings.latent_scale
    path = toy.trajectory("right", np.arange(T) / 1.5, np.random.default_rng(0))
    frames = torch.tensor(toy.draw("red", "circle", "teal", path)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(frames)[0]
        reconstruction = vae.decode(mean)

    model, denoising = denoising_of_ci()
    optimizer = torch.optim.AdamW(denoising.train().parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0)
    tokens, fps = model.text.tokenize(["a red circle moving right"])[0].expand(4, -1), torch.full((4,), 8.0)
    latents, losses, steps = (mean * scale).expand(4, -1, -1, -1, -1), [], 200
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, 2 * (steps - step) / steps)
        t = ((torch.arange(4) + torch.rand(4)) * 250).long().clamp(max=999)
        loss = denoising(latents, tokens, fps, t, torch.randn(4, 4, 16, 16)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.3 * np.mean(losses[:5])
    context = model.text(tokens[:1]).detach()
    run = denoise(model.unet, NoiseSchedule(model.settings), fold(torch.randn(1, T, 4, 8, 8), *grid), context, context,
                  fps[:1], grid, steps=20, guidance=1)
    *_, (_, _, sample, _) = run
    with torch.no_grad():
        error = (vae.decode(unfold(sample, *grid)[0] / scale) - reconstruction).square().mean()
    assert 10 * torch.log10(2**2 / error) >= 25


def test_a_tower_that_trains_has_a_gradient_in_every_weight():
    """Stable Diffusion 2 does not use its last layer and projection: they are left alone."""
    preset = PRESETS["micro"]
    text = dataclasses.replace(preset.text, layers=3, skip_last=1, projection=16)
    model = sd.build(dataclasses.replace(preset, text=text), sd.Settings(prediction="v"))
    denoising = train.Denoising(model, read_config([CI]), model.text)
    for p in model.unet.parameters():  # zeros at the end of a branch keep gradients from it
        torch.nn.init.normal_(p, std=0.1)
    tokens = model.text.tokenize(["a red circle"] * 2)[0]
    loss = denoising(torch.randn(2, 4, 4, 4, 4), tokens, torch.full((2,), 8.0), torch.tensor([500, 900]),
                     torch.randn(2, 4, 8, 8))
    loss.mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in denoising.parameters())
    frozen = {name.split(".")[1] for name, p in model.text.named_parameters() if not p.requires_grad}
    assert frozen == {"transformer", "text_projection"}


@pytest.mark.parametrize("shift, width", [(1.0, 1.0), (2.0, 1.0), (2.5, 0.5)])
def test_timesteps_of_a_step_have_a_stratum_each(shift, width):
    """logit t' = log s + w logit u, t = first + (last - first) t': however a step is cut, u covers 0..1 evenly."""
    cfg = read_config([CI, "--timesteps=(600,1000)", f"--timestep_shift={shift}", f"--timestep_width={width}",
                       "--batch_size=4", "--accumulate=2"])
    draws = []
    for step in range(3):
        positions = list(range(24 * step, 24 * step + 24))  # of 3 ranks
        parts = [train.draw_timesteps(cfg, positions[at : at + 4], 3) for at in range(0, 24, 4)]
        alone = dataclasses.replace(cfg, batch_size=24, accumulate=1)
        assert torch.equal(torch.cat(parts), train.draw_timesteps(alone, positions, 1))
        draws.append(torch.cat(parts).tolist())
        for n, t in enumerate(sorted(draws[-1])):
            ends = np.array([n / 24, (n + 1) / 24])
            low, high = 600 + 400 * scipy.special.expit(np.log(shift) + width * scipy.special.logit(ends))
            assert int(low + 1e-3) <= t <= high + 1e-3 and t <= 999
    assert draws[0] != draws[1] and draws[1] != sorted(draws[1])


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def make_task(folder, rank=0, world=1, **options):
    cfg = dataclasses.replace(read_config([CI, f"--encoded={folder}/encoded"]), drop_caption=0.5, **options)
    torch.manual_seed(0)
    ranks = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"), patient=nullcontext)
    task = train.UNetTask(cfg, make_model(cfg), {}, ranks)
    task.begin(stages(cfg, world)[0], 0)
    return task


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_step_is_the_same_however_it_is_cut(finished, share):
    """Into ranks and micro-batches: latents, captions, FPS, timesteps, noise and which frames are given."""
    whole = make_task(finished[0], batch_size=8, given_share=share)
    ranks = [make_task(finished[0], rank, 2, batch_size=2, accumulate=2, given_share=share) for rank in range(2)]
    for _ in range(3):
        sources, expected = whole.batch()
        parts = [part.batch() for _ in range(2) for part in ranks]
        assert sources == [name for names, _ in parts for name in names] and len(expected) == 5 + (share > 0)
        for n, tensor in enumerate(expected):
            assert torch.equal(tensor, torch.cat([arguments[n] for _, arguments in parts]))
    assert len({tuple(row) for row in expected[1].tolist()}) > 2  # captions differ


def test_validation_is_on_what_is_never_trained_on(finished):
    task = make_task(finished[0], batch_size=4, validation=2)
    trained = {task.stream.item_at(position) for position in range(400)}
    batch = task.stream.validation()
    assert batch.sources == ["video"] * 2 + ["label"] * 2 + ["caption"] * 2 and "" not in batch.captions
    for source, n in (("video", 8), ("label", 72), ("caption", 8)):
        assert {item for name, item in trained if name == source} == set(range(n - 2))
        last = task.stream.clips.lines(source, n - 1)
        kept = [s.caption for s, name in zip(batch.samples, batch.sources) if name == source]
        assert last[0]["caption"] == kept[-1]


def test_validation_loss_is_that_of_fixed_noise(finished):
    """The same at every call and for every seed and batch size."""
    task, other = (make_task(finished[0], batch_size=n, validation=2, seed=n) for n in (4, 3))
    torch.nn.init.normal_(task.module.unet.out[2].weight, std=0.1)
    other.module.load_state_dict(task.module.state_dict())
    alone = Ranks(timeout=1)
    first = train.validate(task.cfg, alone, task)
    assert list(first) == [f"val_loss_{t}" for t in (100, 300, 500, 700, 900)] and len(set(first.values())) == 5
    assert first == train.validate(task.cfg, alone, task)
    for name, loss in train.validate(other.cfg, alone, other).items():
        assert loss == pytest.approx(first[name], rel=1e-5)


def test_validation_loss_is_also_that_of_every_kind_of_given_frames(finished):
    task = make_task(finished[0], batch_size=4, validation=2, given_share=0.5)
    torch.nn.init.normal_(task.module.unet.out[2].weight, std=0.1)
    losses = train.validate(task.cfg, Ranks(timeout=1), task)
    times = (100, 300, 500, 700, 900)
    assert list(losses) == [f"val_loss_{kind}{t}" for kind in ("", "first_", "head_", "ends_", "some_") for t in times]
    assert len(set(losses.values())) == len(losses)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def test_values_change_where_the_schedule_says(processes, world, finished, tmp_path):
    """Single images first, then another part of the noise, then all: interrupted within each, to the bit."""
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    schedule = {3: {"frames": 1, "mix": {"caption": 1}, "batch_size": 8, "lr": 2e-3, "given_share": 0},
                6: {"timesteps": (600, 850), "mix": {"video": 1}, "batch_size": 2}}
    options = [*ci_options(world, tmp_path), "--max_steps=9", "--given_share=0.5", f"--schedule={schedule}",
               "--prompts=()", "--save_every=100", "--warmup=0"]
    seen = []

    def noted(cfg, module, batch, device):
        seen.append(batch)
        return loss_of(cfg, module, batch, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.setup.loss_of", noted)
        assert train_here(*options).returncode == 0
    latents, t = [batch[0].shape[:2] for batch in seen], [batch[3] for batch in seen]
    assert latents == [(8, 1)] * 3 + [(2, 4)] * 3 + [(4, 4)] * 3
    assert [len(batch) for batch in seen] == [5] * 3 + [6] * 6
    assert all(((600 <= part) & (part < 850)).all() for part in t[3:6]) and min(map(torch.min, t[6:])) < 600
    assert [batch[2].unique().tolist() == [120.0] for batch in seen[:6]] == [True] * 3 + [False] * 3
    noise = torch.cat([batch[4].flatten(1)[:, :16] for batch in seen])
    assert len(noise.unique(dim=0)) == 8 * 3 + 2 * 3 + 4 * 3  # never the same twice
    rates = metrics(tmp_path, "lr")
    assert rates[:3] == [2e-3] * 3 and rates[3:] == pytest.approx([1e-3] * 6)
    (tmp_path / "whole").mkdir()
    (tmp_path / "run").rename(tmp_path / "whole" / "run")
    for call in (2, 3):  # steps 2 and 5
        assert processes.run(options, die=(0, "SIGTERM", "train.loss_of", call)) == [75]
    assert train_here(*options).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path, 9)


def test_learning_rate():
    cfg = train.Config(lr=1.0, warmup=4, cooldown=5, max_steps=20)
    rates = [train.learning_rate(cfg, step) for step in range(20)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(rates[14:], [1, 1, 0.8, 0.6, 0.4, 0.2])


def test_loss_scale():
    """Half after each overflow, twice after 2,000 good steps in a row, never below 1; alone 1 for other dtypes."""
    scale, other = train.LossScale(True), train.LossScale(False)
    for finite in [False] * 3 + [True] * 1999 + [False] + [True] * 4000:
        scale.update(finite)
        other.update(finite)
    assert scale.value == 2**16 / 8 / 2 * 4 and other.value == 1 and scale.bad == 0
    for _ in range(30):
        scale.update(False)
    assert scale.value == 1 and scale.bad == 30


def test_run_writes_what_it_should(finished):
    folder, out = finished
    assert out.startswith("float32 on cpu\nrank 0 encoded ") and "\nstep 1/20  loss 0." in out and "0:00:00 left" in out
    assert [line for line in metrics(folder, "step")] == list(range(1, 21))
    losses = metrics(folder, "loss")
    assert losses[-1] < losses[0]
    assert set(os.listdir(folder / "run")) == {
        ".lock", "metrics.jsonl", "model.safetensors", "sheet-00000010.png", "sheet-00000020.png",
        "step-00000005.pt", "step-00000010.pt", "step-00000015.pt", "step-00000020.pt"}


def test_saved_model_is_the_average(finished):
    state, model = weights(finished[0]), sd.load(str(finished[0] / "run" / "model.safetensors"))
    assert model.settings.ema and model.settings.grid_trained
    names = [name for name in state["module"] if name.startswith("unet.")]
    parameters = dict(model.unet.named_parameters())
    for name, average in zip(names, state["optimizer"]["average"]):
        ours = parameters[name.removeprefix("unet.")]
        assert torch.equal(ours, average) and not torch.equal(ours, state["module"][name])


@pytest.mark.parametrize("option, says", [
    ("--prompts=('',)", "prompt must be given and not be empty"),
    ("--sampling_shift=50", "steps must be fewer with a shift of 50, got 50"),
])
def test_what_no_sheet_could_be_made_with_is_told_before_the_first_step(world, finished, copied, option, says):
    done = train_here(*ci_options(world, copied), f"--out_dir={copied}/other", option)
    assert done.returncode == 2 and says in done.stderr and "step 1/" not in done.stdout
    assert not list((copied / "other").glob("*.pt"))


def test_dtype_auto_is_resolved_and_said(finished, world, copied, monkeypatch):
    """A checkpoint of one precision goes on in another."""
    monkeypatch.setattr("sd.device.HAS_UNITS", True)
    options = [*ci_options(world, copied), "--prompts=()", "--dtype=auto", "--keep=9"]
    done = train_here(*options, "--max_steps=21")
    assert done.returncode == 0 and done.stdout.startswith("bfloat16 on cpu\nresume from")
    assert weights(copied, 21)["config"]["dtype"] == "bfloat16"
    monkeypatch.setattr("sd.device.HAS_UNITS", False)
    done = train_here(*options, "--max_steps=22")
    assert done.returncode == 0 and done.stdout.startswith("float32 on cpu\nresume from")


def test_two_ranks_equal_one_in_double_precision(world, by_two, finished, tmp_path):
    """The same global batch, whole runs: weights, moments and losses within 1e-8. Rank 0 encodes for both."""
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    done = train_here(*ci_options(world, tmp_path), *BY_TWO)
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path, 10), weights(by_two, 10)
    assert all(x.dtype == torch.float64 for x in one["module"].values() if x.is_floating_point())
    for name, tensor in one["module"].items():
        torch.testing.assert_close(tensor, two["module"][name], atol=1e-8, rtol=0)
    for name in ("loss", "loss_video", "val_loss_500"):
        np.testing.assert_allclose(metrics(tmp_path, name), metrics(by_two, name), atol=1e-8)
    assert len(metrics(by_two, "loss")) == 10 and len(metrics(by_two, "val_loss_500")) == 1
    index = "encoded/index.jsonl"
    assert (by_two / index).read_text() == (tmp_path / index).read_text()


def test_average_under_two_ranks_is_that_of_the_weights(by_two):
    """Counted out over the weights after each step; the exported model has it too."""
    model, denoising = denoising_of_ci()
    average = {name: p.detach().double() for name, p in denoising.named_parameters()}
    for n in range(10):
        decay, now = min(0.9, (1 + n) / (10 + n)), weights(by_two, n + 1)["module"]
        average = {name: decay * a + (1 - decay) * now[name].double() for name, a in average.items()}
    last, model = weights(by_two, 10), sd.load(str(by_two / "run" / "model.safetensors"), dtype=torch.float64)
    exported = dict(model.unet.named_parameters(prefix="unet")) | dict(model.text.named_parameters(prefix="text"))
    for (name, expected), kept in zip(average.items(), last["optimizer"]["average"]):
        torch.testing.assert_close(kept, expected, atol=1e-12, rtol=1e-9)
        assert torch.equal(exported[name], kept) and not torch.equal(kept, last["module"][name])


GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


def test_twenty_losses_are_the_committed_ones(finished):
    np.testing.assert_allclose(metrics(finished[0], "loss"), GOLDEN["one rank"], rtol=1e-4)


@pytest.mark.slow
def test_three_hundred_losses_of_two_ranks_are_the_committed_ones(world, finished, tmp_path):
    """golden.json is what this run logs, with that of the fixture `finished`; the same to the bit on one machine."""
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    options = ["--prompts=()", "--batch_size=2", "--max_steps=300", "--sheet_every=300", "--save_every=300"]
    done = subprocess.run([*torchrun(2), "train.py", "configs/ci.py", *ci_options(world, tmp_path), *options], cwd=ROOT,
                          text=True, capture_output=True, timeout=LIMIT, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(metrics(tmp_path, "loss"), GOLDEN["two ranks"], rtol=1e-4)


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("float16", 1e-3)])
def test_losses_are_the_same_live_and_encoded_ahead(run, world, micro, tmp_path, dtype, bound):
    """With VAE, text tower and decoder, and with none of them; the live ones read ahead by workers."""
    options = [f"--init={micro}", f"--vae={micro}", "--train_text=False", "--max_steps=8", "--prompts=()", "--starts=3"]
    lists = [f"--video={world}/videos.csv", f"--label={world}/labels", f"--caption={world}/images.jsonl"]
    made = run("clips.encode", tmp_path / "encoded", "--ckpt", micro, "--dtype", dtype, *lists, "--frames", "4",
               "--size", "32x32", "--fps", "(4, 8)", "--starts", "3", "--draws", "2", "--text")
    assert made.returncode == 0, made.stderr
    ahead = train_here(*ci_options(world, tmp_path), *options)
    live = train_here(*ci_options(world, tmp_path), *options, "--encoded=", "--workers=1",
                      f"--out_dir={tmp_path}/live/run")
    assert ahead.returncode == live.returncode == 0, ahead.stderr + live.stderr
    one, two = metrics(tmp_path, "loss"), metrics(tmp_path / "live", "loss")
    assert len(one) == len(two) == 8 and one[0] != one[1]
    np.testing.assert_allclose(one, two, atol=bound, rtol=0)


def test_a_stopped_run_says_so_and_goes_on(processes, world, finished, tmp_path):
    """SIGTERM to one of two ranks: both finish the step, save, and leave with the status that means: start it again."""
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    options = [*ci_options(world, tmp_path), "--prompts=()", "--batch_size=2", "--max_steps=5", "--save_every=99"]
    assert processes.run(options, ranks=2, die=(1, "SIGTERM", "train.loss_of", 3)) == [75, 75]
    text = processes.log.read_text()
    assert "stopped by SIGTERM after step 3, saved" in text and "stopped by another rank after step 3, saved" in text
    assert processes.run(options, ranks=2) == [0, 0]
    assert processes.log.read_text().count("step-00000003.pt") == 2
    assert metrics(tmp_path, "step") == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------------------------------------------------------------
# The paper's run, without its 0.9 billion numbers


def test_base_has_the_papers_size():
    cfg = read_config([f"{ROOT}/configs/base.py"])
    with torch.device("meta"):
        unet = UNet(PRESETS[cfg.model].unet)
    extra = sum(p.numel() for name, p in unet.named_parameters() if name.startswith(("time_proj", "fps_proj")))
    assert sum(p.numel() for p in unet.parameters()) - extra == 865_910_724 and extra == 78_666_240
    assert cfg.batch_size * cfg.accumulate * 8 == 48 and cfg.betas == (0.9, 0.9) and cfg.weight_decay == 0.03
    assert (cfg.max_steps, cfg.lr, cfg.frames, cfg.width, cfg.height) == (15_000, 1e-4, 16, 256, 256)


def test_a_narrow_base_takes_a_step(world, tmp_path, monkeypatch):
    """configs/base.py through the same code, with fewer channels, smaller frames and the toy world's files."""
    sd21 = PRESETS["sd21"]
    narrow = ModelConfig(dataclasses.replace(sd21.unet, channels=32, context_dim=64, head_width=16),
                         dataclasses.replace(sd21.vae, channels=32),
                         dataclasses.replace(sd21.text, width=64, layers=2, heads=2, projection=64))
    monkeypatch.setitem(PRESETS, "sd21", narrow)
    cfg = read_config([
        f"{ROOT}/configs/base.py", "--init=", f"--toy={world}", "--toy_clips=8", "--toy_images=4", "--toy_captioned=8",
        "--video=", f"--label={few_labels(world, tmp_path, 4)}", "--caption=", f"--encoded={tmp_path}/encoded",
        f"--out_dir={tmp_path}/run",
        "--width=32", "--height=32", "--fps_values=(4, 8)", "--batch_size=4", "--max_steps=1", "--dtype=bfloat16",
        "--prompts=()", "--draws=1", "--validation=2"])
    assert cfg.frames == 16 and cfg.checkpointing and cfg.mix == {"video": 2, "label": 1, "caption": 1}
    train.train(cfg)
    (loss,), (norm,), (held_out,) = (metrics(tmp_path, name) for name in ("loss", "grad_norm", "val_loss_500"))
    assert 0.5 < loss < 2 and norm > 0 and 0.5 < held_out < 2
    model = sd.load(str(tmp_path / "run" / "model.safetensors"))
    assert model.settings.prediction == "epsilon" and model.settings.fps_trained == (0, 4, 8, 120)
