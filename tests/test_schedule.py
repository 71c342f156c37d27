"""sample.py's schedule, samplers and denoise: the same numbers as diffusers', all the way down a trajectory."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sample import SAMPLERS, NoiseSchedule, denoise
from sd import Settings

EPSILON = Settings()
V = Settings(prediction="v")
ZERO_SNR = Settings(prediction="v", zero_snr=True, spacing="trailing")
LINEAR = Settings(beta_schedule="linear")  # what AnimateDiff's modules were trained with
ALL = pytest.mark.parametrize("settings", [EPSILON, V, ZERO_SNR, LINEAR], ids=["epsilon", "v", "zero_snr", "linear"])
quick = hypothesis_settings(max_examples=60, deadline=None)


def diffusers_scheduler(kind, settings, **options):
    """diffusers' scheduler as published Stable Diffusion pipelines configure it."""
    if kind is DDIMScheduler:
        options["set_alpha_to_one"] = False
    prediction = {"epsilon": "epsilon", "v": "v_prediction"}[settings.prediction]
    return kind(beta_schedule=settings.beta_schedule, beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
                prediction_type=prediction, timestep_spacing=settings.spacing, rescale_betas_zero_snr=settings.zero_snr,
                clip_sample=False, steps_offset=1, **options)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Network:
    """Stands where the UNet stands: a smooth function of (x, t, context), and a record of what it was called with.

    Pixels see their neighbours, and the context both shifts and scales, so prompt and negative pull different ways.
    """

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, context, fps=None, grid=None):
        self.calls.append((x, t, context, fps, grid))
        a, b = context.mean(1)[:, :2].reshape(len(x), 2, 1, 1, 1).unbind(1)
        phase = t.view(-1, 1, 1, 1) / 300
        return 0.8 * torch.tanh(x + 0.3 * x.roll(1, -1)) * (1 + 0.05 * a) + 0.1 * b * torch.sin(phase + x)


X = randn(2, 4, 6, 6)
PROMPT, NEGATIVE = randn(2, 5, 3, seed=1), randn(2, 5, 3, seed=2)


# ---------------------------------------------------------------------------------------------------------------------
# Noise schedule


@ALL
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_alphas_cumprod_are_diffusers(settings, kind):
    """To the rounding of diffusers' fp32 cumulative product (ours is taken in float64)."""
    ours = NoiseSchedule(settings).alphas_cumprod
    theirs = diffusers_scheduler(kind, settings).alphas_cumprod
    assert ours.shape == (1000,) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_alphas_cumprod_are_the_formula():
    a, sums = 1.0, []
    for i in range(1000):
        a *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2
        sums.append(a)
    np.testing.assert_allclose(NoiseSchedule(EPSILON).alphas_cumprod, sums, rtol=1e-7)


def test_zero_snr_ends_in_pure_noise_and_begins_as_before():
    plain, zero = NoiseSchedule(V).alphas_cumprod, NoiseSchedule(ZERO_SNR).alphas_cumprod
    assert zero[-1] == 0 and plain[-1] > 0.004
    assert zero[0] == pytest.approx(plain[0].item(), rel=1e-7)
    assert (zero.diff() < 0).all() and (zero[1:] < plain[1:]).all()
    x0, eps = randn(1, 4, 2, 2), randn(1, 4, 2, 2, seed=1)
    assert torch.equal(NoiseSchedule(ZERO_SNR).add_noise(x0, eps, torch.tensor([999])), eps)


@pytest.mark.parametrize("wrong", [
    {"beta_schedule": "cosine"}, {"zero_snr": True},
    {"zero_snr": True, "prediction": "epsilon"}, {"prediction": "sample"}, {"spacing": "linspace"},
])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        NoiseSchedule(Settings(**wrong))


# ---------------------------------------------------------------------------------------------------------------------
# Adding noise, and what the network is to predict


@ALL
def test_add_noise_and_target_are_diffusers(settings):
    ours, theirs = NoiseSchedule(settings), diffusers_scheduler(DDPMScheduler, settings)
    t = torch.cat([torch.arange(0, 1000, 9), torch.tensor([998, 999])])
    x0, eps = 3 * randn(len(t), 4, 2, 2), randn(len(t), 4, 2, 2, seed=1)
    torch.testing.assert_close(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t), rtol=0, atol=2e-5)
    target = theirs.get_velocity(x0, eps, t) if settings.prediction == "v" else eps
    torch.testing.assert_close(ours.target(x0, eps, t), target, rtol=0, atol=2e-5)


@ALL
@quick
@given(t=st.lists(st.integers(0, 999), min_size=1, max_size=4), scale=st.floats(0.01, 10), seed=st.integers(0, 2**32),
       sides=st.lists(st.integers(1, 4), max_size=3))
def test_x0_and_eps_undoes_add_noise_and_target(settings, t, scale, seed, sides):
    """In fp32, for latents of any rank; ε-prediction loses what dividing by sqrt(ᾱ) must lose."""
    schedule, times = NoiseSchedule(settings), torch.tensor(t)
    x0, eps = scale * randn(len(t), *sides, seed=seed), randn(len(t), *sides, seed=seed + 1)
    x = schedule.add_noise(x0, eps, times)
    found_x0, found_eps = schedule.x0_and_eps(x, schedule.target(x0, eps, times), times)
    slack = 1e-6 * (x0.abs().max() + eps.abs().max()).item()
    if settings.prediction == "epsilon":
        assert torch.equal(found_eps, eps)
        slack /= schedule.alphas_cumprod[times].min().sqrt().item()
    torch.testing.assert_close(found_x0, x0, rtol=0, atol=slack)
    torch.testing.assert_close(found_eps, eps, rtol=0, atol=slack)


# ---------------------------------------------------------------------------------------------------------------------
# Timesteps of a sampler


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 25, 50, 999, 1000])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_leading_timesteps_are_diffusers(kind, steps):
    """Only the timestep 1000 of a 1000-step sampler, which no schedule has and diffusers fails on, becomes 999."""
    theirs = diffusers_scheduler(kind, EPSILON)
    theirs.set_timesteps(steps)
    assert NoiseSchedule(EPSILON).sampling_timesteps(steps) == theirs.timesteps.clamp(max=999).tolist()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20, 25, 40, 50, 60, 1000])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_trailing_timesteps_are_diffusers(kind, steps):
    theirs = diffusers_scheduler(kind, ZERO_SNR)
    theirs.set_timesteps(steps)
    assert NoiseSchedule(ZERO_SNR).sampling_timesteps(steps) == theirs.timesteps.tolist()


@pytest.mark.parametrize("settings", [EPSILON, ZERO_SNR], ids=["leading", "trailing"])
def test_any_number_of_steps_walks_down_inside_the_schedule(settings):
    schedule = NoiseSchedule(settings)
    for steps in range(1, 1001):
        timesteps = schedule.sampling_timesteps(steps)
        assert len(timesteps) == steps and 0 <= timesteps[-1] and timesteps[0] <= 999
        assert all(a > b for a, b in zip(timesteps, timesteps[1:])) or (steps, settings.spacing) == (1000, "leading")
        assert settings.spacing == "leading" or timesteps[0] == 999


@pytest.mark.parametrize("steps, shift", itertools.product((1, 2, 7, 50, 200), (1.5, 2.0, 3.0)))
def test_a_shift_multiplies_the_odds_of_noise(steps, shift):
    schedule = NoiseSchedule(EPSILON)
    for t, moved in zip(schedule.sampling_timesteps(steps), schedule.sampling_timesteps(steps, shift), strict=True):
        odds = Fraction(t + 1, 1000 - (t + 1)) * Fraction(shift)
        assert abs(moved + 1 - 1000 * odds / (1 + odds)) <= Fraction(1, 2)


def test_a_shift_of_the_timesteps_is_that_of_diffusers_flow_matching():
    """Where its sigma, the share of noise of flow matching, is our (t + 1) / 1000."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for steps in (2, 5, 10, 50):
        theirs.set_timesteps(sigmas=[i / steps for i in range(steps, 0, -1)])
        expected = [round(1000 * sigma) - 1 for sigma in theirs.sigmas[:-1].tolist()]
        assert NoiseSchedule(ZERO_SNR).sampling_timesteps(steps, 3.0) == expected


def test_shifted_steps_that_fall_on_one_timestep_are_refused():
    schedule = NoiseSchedule(ZERO_SNR)
    assert len(set(schedule.sampling_timesteps(300, 3.0))) == 300
    with pytest.raises(ValueError, match="steps must be fewer with a shift of 3, got 600: some fall on one timestep"):
        schedule.sampling_timesteps(600, 3.0)


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("settings", [EPSILON, ZERO_SNR], ids=["leading", "trailing"])
def test_steps_out_of_range_are_refused(settings, steps):
    with pytest.raises(ValueError, match=f"1..1000, got {steps}"):
        NoiseSchedule(settings).sampling_timesteps(steps)


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories


def diffusers_trajectory(kind, settings, steps, guidance, eta):
    """diffusers' sampling loop on Network: a list of (t, x, predicted x_0)."""
    scheduler, generator = diffusers_scheduler(kind, settings), torch.Generator().manual_seed(5)
    scheduler.set_timesteps(steps)
    network, x, path = Network(), X, []
    options = {"eta": eta} if kind is DDIMScheduler else {}
    for t in scheduler.timesteps:
        times = t.expand(len(x))
        with_prompt, without = network(x, times, PROMPT), network(x, times, NEGATIVE)
        output = without + guidance * (with_prompt - without)
        x, x0 = scheduler.step(output, t, x, generator=generator, return_dict=False, **options)
        path.append((t.item(), x, x0))
    return path


def our_trajectory(settings, steps, guidance, prompt=PROMPT, network=None, **options):
    """The same with our denoise: a list of (i, t, x, predicted x_0)."""
    generator = torch.Generator().manual_seed(5)
    return list(denoise(network or Network(), NoiseSchedule(settings), X, prompt, NEGATIVE, steps=steps,
                        guidance=guidance, noise=lambda: torch.randn(X.shape, generator=generator), **options))


def assert_same_paths(ours, theirs, tolerance=1e-5):
    """Within `tolerance` of the largest value, at each step."""
    assert [t for _, t, *_ in ours] == [t for t, *_ in theirs]
    for (_, _, x, x0), (_, their_x, their_x0) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, their_x, rtol=0, atol=tolerance * their_x.abs().max().item())
        torch.testing.assert_close(x0, their_x0, rtol=0, atol=tolerance * their_x0.abs().max().item())


RUNS = [  # all but η = 1 at zero SNR, where diffusers' first step takes the root of -6e-8: test_eta_1_is_ancestral
    (settings, kind, options)
    for settings in (EPSILON, V, ZERO_SNR)
    for kind, options in [(DDIMScheduler, {"sampler": "ddim"}), (DDIMScheduler, {"sampler": "ddim", "eta": 0.5}),
                          (DDIMScheduler, {"sampler": "ddim", "eta": 1.0}), (DDPMScheduler, {"sampler": "ddpm"})]
    if settings is not ZERO_SNR or options.get("eta") != 1
]
NAMES = [f"{'zero_snr' if s.zero_snr else s.prediction}-{o['sampler']}-{o.get('eta', 0)}" for s, _, o in RUNS]


@pytest.mark.parametrize("guidance", [7.0, 1.0])
@pytest.mark.parametrize("settings, kind, options", RUNS, ids=NAMES)
def test_fifty_steps_are_diffusers_step_by_step(settings, kind, options, guidance):
    """x_t and the predicted x_0 after each step, both sides drawing their noise from equal generators."""
    theirs = diffusers_trajectory(kind, settings, 50, guidance, options.get("eta", 0.0))
    assert_same_paths(our_trajectory(settings, 50, guidance, **options), theirs)


@ALL
def test_eta_1_is_ancestral(settings):
    """DDIM with η = 1 is DDPM but for the last step, where its ᾱ ends; also where diffusers' DDIM gives NaN."""
    theirs = diffusers_trajectory(DDPMScheduler, settings, 50, 7.0, None)
    assert_same_paths(our_trajectory(settings, 50, 7.0, sampler="ddim", eta=1.0)[:-1], theirs[:-1])


@pytest.mark.parametrize("settings, steps", [
    (EPSILON, 1), (EPSILON, 7), (EPSILON, 20), (V, 1), (V, 7), (V, 20), (ZERO_SNR, 1), (ZERO_SNR, 8), (ZERO_SNR, 20),
])
@pytest.mark.parametrize("kind, sampler", [(DDIMScheduler, "ddim"), (DDPMScheduler, "ddpm")])
def test_other_numbers_of_steps_are_diffusers(settings, steps, kind, sampler):
    theirs = diffusers_trajectory(kind, settings, steps, 7.0, 0.0)
    assert_same_paths(our_trajectory(settings, steps, 7.0, sampler=sampler), theirs)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_thousand_steps_stay_at_999_once(sampler):
    """Where diffusers asks for a timestep 1000: our first step goes from 999 to 999, and so changes nothing."""
    run = denoise(Network(), NoiseSchedule(EPSILON), X, PROMPT, NEGATIVE, steps=1000, sampler=sampler)
    (_, t, x, _), (_, t_next, x_next, _) = next(run), next(run)
    assert (t, t_next) == (999, 999)
    torch.testing.assert_close(x, X, rtol=0, atol=1e-5)
    assert (x_next - x).abs().max() > 1e-3


@ALL
@pytest.mark.parametrize("options", [{"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "ddpm"}])
def test_a_network_that_knows_the_answer_gets_there(settings, options):
    """No reference needed: where x_0 is known, every step predicts it, and the last leaves the noise of ᾱ_0 or none."""
    schedule, answer = NoiseSchedule(settings), randn(2, 4, 6, 6, seed=7)

    class Oracle(Network):
        def __call__(self, x, t, context, fps=None, grid=None):
            signal, noise = schedule.signal_and_noise(t, x)
            return schedule.target(answer, (x - signal * answer) / noise, t)

    path = our_trajectory(settings, 50, 1.0, network=Oracle(), **options)
    for _, t, _, x0 in path:
        slack = 1e-5 if settings.prediction == "v" else 1e-5 / schedule.alphas_cumprod[t].sqrt().item()
        torch.testing.assert_close(x0, answer, rtol=0, atol=slack)
    *_, (_, _, x, _) = path
    if options["sampler"] == "ddpm":
        torch.testing.assert_close(x, answer, rtol=0, atol=1e-4)
    else:
        left = (x - schedule.alphas_cumprod[0].sqrt() * answer) / (1 - schedule.alphas_cumprod[0]).sqrt()
        assert 0.8 < left.std() < 1.2


# ---------------------------------------------------------------------------------------------------------------------
# denoise, as its callers use it


def test_denoise_yields_after_every_step():
    schedule, network = NoiseSchedule(EPSILON), Network()
    run = denoise(network, schedule, X, PROMPT, NEGATIVE, steps=6)
    assert not network.calls
    expected, seen = schedule.sampling_timesteps(6), X
    for count, (i, t, x, x0) in enumerate(run):
        assert (i, t) == (count, expected[count])
        assert len(network.calls) == count + 1  # nothing is computed ahead: a caller may stop
        assert torch.equal(network.calls[-1][0], torch.cat([seen, seen]))
        assert x.shape == x0.shape == X.shape
        seen = x
    assert count == 5 and seen is x


def test_without_guidance_the_network_sees_the_prompts_alone():
    network, fps = Network(), torch.tensor([4.0, 30.0])
    (_, t, _, _), *_ = denoise(network, NoiseSchedule(EPSILON), X, PROMPT, NEGATIVE, fps, (2, 3), steps=3, guidance=1)
    assert len(network.calls) == 3
    x, times, context, given_fps, grid = network.calls[0]
    assert torch.equal(x, X) and times.tolist() == [t] * 2 and torch.equal(context, PROMPT)
    assert torch.equal(given_fps, fps) and grid == (2, 3)


@pytest.mark.parametrize("guidance", [7.0, 0.0, -1.0])
def test_with_guidance_the_network_sees_both_halves(guidance):
    network, fps = Network(), torch.tensor([4.0, 30.0])
    (_, t, _, _), *_ = denoise(network, NoiseSchedule(EPSILON), X, PROMPT, NEGATIVE, fps, (2, 3), steps=3,
                               guidance=guidance)
    assert len(network.calls) == 3
    x, times, context, given_fps, grid = network.calls[0]
    assert torch.equal(x, torch.cat([X, X])) and times.tolist() == [t] * 4
    assert torch.equal(context, torch.cat([NEGATIVE, PROMPT]))
    assert given_fps.tolist() == [4, 30, 4, 30] and grid == (2, 3)


def test_guidance_may_depend_on_the_timestep():
    """Step by step the result of the number that the function gives; where it gives 1 the pair is not computed."""
    network, scales = Network(), {}

    def guidance(t):
        return scales.setdefault(t, 5.0 if 300 < t < 700 else 1.0)

    path = our_trajectory(V, 10, guidance, network=network)
    assert [len(x) for x, *_ in network.calls] == [4 if 300 < t < 700 else 2 for _, t, *_ in path]
    before = X
    for _, t, x, x0 in path:
        _, _, _, expected = next(denoise_from(before, t, scales[t]))
        assert torch.equal(x0, expected)
        before = x


def denoise_from(x, t, guidance):
    """denoise, whose first step is at t."""
    schedule = NoiseSchedule(V)
    schedule.sampling_timesteps = lambda *_: [t]
    return denoise(Network(), schedule, x, PROMPT, NEGATIVE, steps=1, guidance=guidance)


def test_a_sampler_is_a_class_and_a_line(monkeypatch):
    """A second-order one that keeps its last prediction, by the seam alone."""

    class Averaging:
        def __init__(self, schedule, timesteps, eta, noise):
            self.timesteps, self.before = timesteps, None

        def step(self, i, x, x0, eps):
            x, self.before = x0 if self.before is None else (x0 + self.before) / 2, x0
            return x

    monkeypatch.setitem(SAMPLERS, "averaging", Averaging)
    path = our_trajectory(V, 4, 7.0, sampler="averaging")
    for (*_, before), (_, _, x, x0) in zip(path, path[1:]):
        assert torch.equal(x, (x0 + before) / 2)


@pytest.mark.parametrize("guidance", [7.0, 1.0])
def test_an_image_has_neither_fps_nor_grid(guidance):
    network = Network()
    list(denoise(network, NoiseSchedule(EPSILON), X, PROMPT, NEGATIVE, steps=2, guidance=guidance))
    assert all(call[3:] == (None, None) for call in network.calls)


def test_guidance_0_is_the_negative_prompt():
    zero = our_trajectory(EPSILON, 5, 0.0)
    negative = our_trajectory(EPSILON, 5, 1.0, prompt=NEGATIVE)
    assert_same_paths(zero, [step[1:] for step in negative])


@pytest.mark.parametrize("options, draws", [
    ({"sampler": "ddim"}, 0), ({"sampler": "ddim", "eta": 0.5}, 10), ({"sampler": "ddpm"}, 9),
])
def test_noise_is_drawn_where_a_sampler_adds_some(options, draws):
    count = []
    list(denoise(Network(), NoiseSchedule(EPSILON), X, PROMPT, NEGATIVE, steps=10,
                 noise=lambda: count.append(1) or X, **options))
    assert len(count) == draws


def test_noise_comes_from_torch_unless_given():
    def last(seed):
        torch.manual_seed(seed)
        *_, (_, _, x, _) = denoise(Network(), NoiseSchedule(EPSILON), X, PROMPT, NEGATIVE, steps=4, sampler="ddpm")
        return x

    assert torch.equal(last(0), last(0)) and not torch.equal(last(0), last(1))


def test_gradients_are_off_inside_and_untouched_outside():
    class Learning(Network):
        weight = torch.nn.Parameter(torch.ones(()))

        def __call__(self, *args):
            return super().__call__(*args) * self.weight

    for _, _, x, x0 in denoise(Learning(), NoiseSchedule(V), X, PROMPT, NEGATIVE, steps=3):
        assert torch.is_grad_enabled()
        assert not x.requires_grad and not x0.requires_grad


def test_a_network_in_bf16_is_guided_in_fp32():
    """Its output is rounded, but neither x nor the guidance, which would multiply another rounding by seven."""

    class Half(Network):
        def __call__(self, *args):
            return super().__call__(*args).bfloat16()

    class HalfAsFloat(Half):
        def __call__(self, *args):
            return super().__call__(*args).float()

    path, expected = (our_trajectory(EPSILON, 3, 7.0, network=network) for network in (Half(), HalfAsFloat()))
    for (_, _, x, x0), (_, _, expected_x, expected_x0) in zip(path, expected):
        assert x.dtype == x0.dtype == torch.float32
        assert torch.equal(x, expected_x) and torch.equal(x0, expected_x0)
