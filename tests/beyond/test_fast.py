"""Samplers against diffusers' and against DDIM, guidance and reuse against formulas and loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import sd
from beyond.fast import DPM, FAST, Reuse, StochasticDPM, pooling_pays, rescaled
from sample import DDIM, SAMPLERS, NoiseSchedule, Request, generate
from sd.presets import MICRO

EPSILON, V = sd.Settings(), sd.Settings(prediction="v", zero_snr=True, spacing="trailing")


def output_of(x, t):
    """What a UNet might say."""
    return 0.6 * x + 0.3 * torch.sin(3 * x) + 0.1 * math.cos(t / 100)


def run(kind, settings, steps, x, noise=None, eta=0.0):
    schedule = NoiseSchedule(settings)
    timesteps = schedule.sampling_timesteps(steps)
    sampler, path = kind(schedule, timesteps, eta, noise), []
    for i, t in enumerate(timesteps):
        x0, eps = schedule.x0_and_eps(x, output_of(x, t), torch.full((len(x),), t))
        x = sampler.step(i, x, x0, eps)
        path.append(x)
    return path


@pytest.mark.parametrize("kind, algorithm", [(DPM, "dpmsolver++"), (StochasticDPM, "sde-dpmsolver++")])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25])
def test_every_step_is_that_of_diffusers(kind, algorithm, spacing, prediction, steps):
    settings = sd.Settings(prediction=prediction, spacing=spacing)
    theirs = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", algorithm_type=algorithm, solver_order=2,
        prediction_type={"v": "v_prediction"}.get(prediction, prediction), timestep_spacing=spacing, steps_offset=1,
        final_sigmas_type="zero")
    theirs.set_timesteps(steps)
    timesteps = NoiseSchedule(settings).sampling_timesteps(steps)
    theirs.timesteps = torch.tensor(timesteps)  # with leading spacing its own are others: of steps + 1 all but the last
    all_sigmas = ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod) ** 0.5
    theirs.sigmas = torch.cat([all_sigmas[theirs.timesteps], torch.zeros(1)])
    g = torch.Generator().manual_seed(0)
    start = torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64)
    noises = torch.randn(steps, 2, 4, 8, 8, generator=g, dtype=torch.float64)
    left = iter(noises)
    ours, x = run(kind, settings, steps, start, lambda: next(left)), start
    for i, t in enumerate(timesteps):
        x = theirs.step(output_of(x, t), torch.tensor(t), x, variance_noise=noises[i]).prev_sample
        torch.testing.assert_close(ours[i], x, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("settings", [EPSILON, V])
@pytest.mark.parametrize("kind, eta", [(DPM, 0.0), (StochasticDPM, 1.0)])
def test_of_order_one_it_is_ddim(settings, kind, eta, monkeypatch):
    """Where no step looks back, up to the last one: this ends at α = 1, DDIM at ᾱ_0."""
    start, noises = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(10, 2, 4, 8, 8, dtype=torch.float64)
    class First(kind):
        def step(self, *given):
            self.previous = None
            return super().step(*given)

    paths = []
    for sampler in (First, DDIM):
        left = iter(noises)
        paths.append(run(sampler, settings, 10, start, lambda left=left: next(left), eta))
    for ours, ddim in list(zip(*paths))[:-1]:
        torch.testing.assert_close(ours, ddim, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [DPM, StochasticDPM])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_zero_snr_is_finite_and_its_second_step_does_not_look_back(kind, steps):
    g = torch.Generator().manual_seed(0)
    path = run(kind, V, steps, torch.randn(2, 4, 8, 8, generator=g), lambda: torch.randn(2, 4, 8, 8, generator=g))
    assert all(x.isfinite().all() for x in path)
    sampler = kind(NoiseSchedule(V), NoiseSchedule(V).sampling_timesteps(20), 0.0, lambda: torch.zeros(1))
    x = torch.randn(1)
    sampler.step(0, x, torch.tensor([1e6]), x)
    again = kind(NoiseSchedule(V), NoiseSchedule(V).sampling_timesteps(20), 0.0, lambda: torch.zeros(1))
    assert torch.equal(sampler.step(1, x, x, x), again.step(1, x, x, x))


def test_rescale_by_hand():
    output, with_prompt = torch.randn(2, 4, 4, 6) * 3, torch.randn(2, 4, 4, 6)
    counted = torch.zeros(4, 6, dtype=torch.bool)
    counted[:, 2:] = True
    for mask in (None, counted):
        found = rescaled(output, with_prompt, 0.7, mask)
        for o, c, f in zip(output, with_prompt, found):
            a, b = (x if mask is None else x[:, mask] for x in (o, c))
            torch.testing.assert_close(f, 0.7 * o * b.std() / a.std() + 0.3 * o)
    assert torch.equal(rescaled(output, with_prompt, 0.0), output)
    assert rescaled(output, with_prompt, 1.0).std() == pytest.approx(with_prompt.std().item(), rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Requests


@pytest.mark.parametrize("sampler", ["dpm++", "dpm++sde"])
def test_as_many_steps_as_timesteps_are_finite(sampler):
    """Leading ones begin with the same timestep twice."""
    schedule = NoiseSchedule(EPSILON)
    timesteps = schedule.sampling_timesteps(1000)
    assert timesteps[:2] == [999, 999]
    for x in run(SAMPLERS[sampler], EPSILON, 1000, torch.randn(1, 4, 2, 2), lambda: torch.randn(1, 4, 2, 2))[:5]:
        assert x.isfinite().all()


def test_steps_are_those_of_the_sampler_where_the_model_has_another(micro):
    model = sd.load(micro)
    model.settings = replace(model.settings, sampler="ddpm", sampling_steps=7, eta=0.5)
    for asked, expected in ((Request("x"), ("ddpm", 7, 0.0)), (Request("x", sampler="ddpm"), ("ddpm", 7, 0.0)),
                            (Request("x", sampler="dpm++"), ("dpm++", 20, 0.0)),
                            (Request("x", sampler="ddim", steps=3), ("ddim", 3, 0.5))):
        whole = asked.resolve(model)
        assert (whole.sampler, whole.steps, whole.eta) == expected


def test_fast_is_what_the_model_says_and_else_what_stands_here(micro):
    model = sd.load(micro)
    whole = Request("x", fast=True, guidance_interval=(5, 6)).resolve(model)
    assert {name: getattr(whole, name) for name in FAST} == FAST | {"guidance_interval": (5, 6)}
    model.settings = replace(model.settings, fast={"steps": 4, "sampler": "dpm++sde", "guidance_interval": [0, 500]})
    whole = Request("x", fast=True, reuse=1).resolve(model)
    assert (whole.sampler, whole.steps, whole.guidance_interval, whole.reuse) == ("dpm++sde", 4, (0, 500), 1)
    for wrong, says in (({"stepz": 4}, "`fast` must be about .*steps.*, got 'stepz'"),
                        ({"steps": 0}, "steps must be in"), ({"sampler": "euler"}, "sampler must be one of")):
        model.settings = replace(model.settings, fast=wrong)
        with pytest.raises(ValueError, match=says):
            Request("x", fast=True).resolve(model)


@pytest.mark.parametrize("change, says", [
    ({"eta": 0.5, "sampler": "dpm++"}, "eta belongs to the sampler ddim, got 0.5 for dpm"),
    ({"guidance_interval": (700, 100)}, "guidance_interval must be LOW,HIGH with LOW <= HIGH, got 700,100"),
    ({"guidance_interval": (0, 1000)}, "guidance_interval must be in 0..999"), ({"reuse": 0}, "reuse must be >= 1"),
    ({"guidance_rescale": 1.5}, "guidance_rescale must be in 0..1"),
])
def test_what_cannot_be_is_told_in_terms_of_the_fields(micro, change, says):
    with pytest.raises(ValueError, match=says):
        Request("x", **change).resolve(sd.load(micro))


def test_settings_survive_the_file(micro, tmp_path):
    model = sd.load(micro)
    model.settings = replace(model.settings, sampler="dpm++", sampling_steps=9, guidance_interval=(100, 700),
                             fast={"steps": 5, "guidance_interval": (0, 500)})
    sd.save(model, str(tmp_path / "a.safetensors"))
    again = Request("x").resolve(sd.load(str(tmp_path / "a.safetensors")))
    assert (again.sampler, again.steps, again.guidance_interval) == ("dpm++", 9, (100, 700))
    assert Request("x", fast=True).resolve(sd.load(str(tmp_path / "a.safetensors"))).guidance_interval == (0, 500)


def test_guidance_costs_only_where_it_is(micro):
    """Steps at 999, 749, 499, 249 of a zero-SNR schedule: both halves for 499 <= t <= 749."""
    model, sizes = sd.load(micro), []
    model.unet.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    request = Request("x", steps=4, guidance=3.0, guidance_interval=(499, 749))
    inside = generate(model, request)
    assert sizes == [1, 2, 2, 1]
    assert not np.array_equal(inside, generate(model, replace(request, guidance_interval=(0, 999))))
    assert np.array_equal(generate(model, replace(request, guidance_interval=(1, 2))),
                          generate(model, replace(request, guidance=1.0)))


@pytest.mark.parametrize("layout, frames", [("grid", 4), ("temporal", 4), ("causal", 4), ("causal", 7), ("grid", 8)])
def test_all_of_it_goes_together(micro, layout, frames):
    """Deep features, an interval, rescale, given frames and windows; a reuse of 1 is none."""
    model, steps = sd.load(micro, layout=layout), []
    model.settings = replace(model.settings, given_trained=True)
    known = {0: np.zeros((32, 32, 3), np.uint8)}
    request = Request("x", frames=frames, overlap=2, steps=6, sampler="dpm++sde", guidance=3.0, known=known,
                      guidance_interval=(300, 800), guidance_rescale=0.7, reuse=3, shift=2.0)
    model.unet.middle_block.register_forward_pre_hook(lambda *_: steps.append(1))
    video = generate(model, request)
    reused = len(steps)
    steps.clear()
    plain = generate(model, replace(request, reuse=1))
    assert video.shape == (1, frames, 32, 32, 3) and reused < len(steps)
    assert np.array_equal(video[:, 0], plain[:, 0]) and not np.array_equal(video, plain)


def test_pooling_pays_where_frames_are_large(micro):
    model = sd.load(micro)
    assert not pooling_pays(model, (32, 32), "cpu") and pooling_pays(model, (512, 256), "cpu")
    assert not pooling_pays(model, (512, 256), torch.device("cuda", 0))
    model.use_layout("pooled")
    assert model.settings.layout == "pooled" and model.settings.layout_options == {"squares": 8, "reach": 16}
    assert not pooling_pays(model, (512, 256), "cpu")


def test_the_command_says_what_fast_is(run, micro, tmp_path):
    for size, layout in (("32x32", "grid"), ("256x256", "pooled")):
        done = run("sample.py", "x", "--ckpt", micro, "--fast", "--size", size, "--steps=3", "--out",
                   tmp_path / f"{size}.gif")
        assert done.returncode == 0, done.stderr
        assert ("fast: sampler dpm++, steps 3, guidance_interval (100, 800), guidance_rescale 0.0, reuse 1, "
                f"layout {layout}\n") in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Feature reuse


@pytest.fixture
def unet():
    torch.manual_seed(0)
    unet = sd.build(MICRO, sd.Settings()).unet.eval()
    for p in unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        yield unet


def inputs(batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 4, 8, 8, generator=g), torch.randn(batch, 7, MICRO.unet.context_dim, generator=g),
            torch.full((batch,), 8.0))


def test_a_reused_step_takes_the_deep_features_of_the_last_full_one(unet):
    """By hand, with a hook on the last block of the decoder."""
    times, entered = [900, 700, 500, 300, 100], []
    reuse = Reuse(unet, times, 3)
    handle = unet.output_blocks[-1].register_forward_pre_hook(lambda module, given: entered.append(given[0]))
    calls = []
    others = unet.middle_block.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    for n, t in enumerate(times):
        x, context, fps = inputs(seed=n)
        out = reuse(x, torch.full((2,), t), context, fps, (2, 2))
        counts.append(len(calls))
        seen = entered.pop()
        full = unet(x, torch.full((2,), t), context, fps, (2, 2))
        whole, deep = entered.pop(), unet.cfg.channels * unet.cfg.channel_mult[0]
        if n in (0, 3, 4):
            assert torch.equal(out, full) and torch.equal(seen, whole)
            kept = whole
        else:
            assert torch.equal(seen[:, :-deep], kept[:, :-deep]) and torch.equal(seen[:, -deep:], whole[:, -deep:])
            assert not torch.equal(out, full)
        calls.clear()
    assert counts == [1, 0, 0, 1, 1]
    handle.remove()
    others.remove()


def test_every_step_is_full_with_one(unet):
    reuse = Reuse(unet, [900, 500, 100], 1)
    for n, t in enumerate([900, 500, 100]):
        x, context, fps = inputs(seed=n)
        assert torch.equal(reuse(x, torch.full((2,), t), context, fps, (2, 2)),
                           unet(x, torch.full((2,), t), context, fps, (2, 2)))


def test_guidance_that_ends_keeps_its_half_and_one_that_begins_is_full(unet):
    reuse, (x, context, fps) = Reuse(unet, [900, 700, 500, 300, 100], 9), inputs(4)
    reuse(x, torch.full((4,), 900), context, fps, (2, 2))
    deep = reuse.deep
    reuse(x[2:], torch.full((2,), 700), context[2:], fps[2:], (2, 2))
    assert reuse.deep is deep
    alone = Reuse(unet, [900, 700], 9)
    alone(x[2:], torch.full((2,), 900), context[2:], fps[2:], (2, 2))
    torch.testing.assert_close(alone.deep, deep[2:], rtol=1e-4, atol=1e-5)
    other = Reuse(unet, [900, 700, 500], 9)
    other(x[2:], torch.full((2,), 900), context[2:], fps[2:], (2, 2))
    full = other(x, torch.full((4,), 700), context, fps, (2, 2))
    assert torch.equal(full, unet(x, torch.full((4,), 700), context, fps, (2, 2)))
