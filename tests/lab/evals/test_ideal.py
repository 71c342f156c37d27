"""The best possible loss on the toy world."""

import math

import numpy as np
import pytest
import torch

import sd
from grid import fold, unfold
from lab import toy
from lab.evals import ideal
from sample import SHIPPED, NoiseSchedule
from sd.vae import encode


@pytest.mark.parametrize("direction", toy.DIRECTIONS)
@pytest.mark.parametrize("fps", (4, 15))
def test_places_are_those_of_true_clips(direction, fps):
    """Every true path has one within half a step and the little room that is left out, and all stay in the frame."""
    times, rng = np.arange(16) / fps, np.random.default_rng(0)
    paths = ideal.places(direction, times, 1.0)
    assert (paths >= toy.EXTENT / 2 + toy.MARGIN).all() and (paths <= toy.SIZE - toy.EXTENT / 2 - toy.MARGIN).all()
    for _ in range(100):
        start = rng.uniform(0, toy.SECONDS - times[-1])
        true = toy.trajectory(direction, times + start, rng)
        off = np.abs(paths - true).max(axis=1)
        assert off[off.sum(axis=1).argmin()].max() < 0.8
    assert len(np.unique(paths.round(6), axis=0)) == len(paths)


def test_best_x0_is_bayes_rule():
    """By a loop over the formula."""
    random = torch.Generator().manual_seed(0)
    known, x = torch.randn(5, 2, 3, generator=random), torch.randn(4, 2, 3, generator=random)
    for signal, noise in ((0.6, 0.8), (0.1, 0.99), (0.9, 0.4)):
        for seen, best in zip(x, ideal.best_x0(x, signal, noise, known)):
            far = [sum((a - signal * b) ** 2 for a, b in zip(seen.flatten().tolist(), one.flatten().tolist()))
                   for one in known]
            weights = [math.exp(-distance / (2 * noise**2)) for distance in far]
            expected = sum(weight * one for weight, one in zip(weights, known)) / sum(weights)
            assert torch.allclose(best, expected, atol=1e-5)


def test_best_x0_in_no_noise_and_in_nothing_else():
    known = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ideal.best_x0(known, 1.0, 0.01, known), known)
    assert torch.allclose(ideal.best_x0(known, 0.0, 1.0, known), known.mean(0).expand_as(known), atol=1e-6)


def test_all_clips_are_those_of_the_places():
    """Each is encoded by itself, as a clip for training is."""
    model, scene = sd.load(SHIPPED), toy.scenes("test")[5]
    clips = ideal.all_clips(model, scene, 16, 8.0, 10.0)
    paths = ideal.places(scene[2], np.arange(16) / 8, 10.0)
    assert len(clips) == len(paths)
    for n in (0, len(paths) // 2, -1):
        mean = encode(model, toy.draw(*scene[:2], scene[3], paths[n]))
        assert torch.allclose(clips[n], fold(mean[None], 4, 4)[0], atol=1e-3)


def test_no_model_is_better_and_frames_help_each_other():
    """Not on average over many noises: where little is left to know all are near."""
    model = sd.load(SHIPPED)
    seen = ideal.losses(model, toy.scenes("test")[0], 16, 4.0, 16, 10.0)
    assert all(best[-1] < mine for *best, mine in seen) and seen[0][-2] < 0.01
    assert all(few > more for *best, _ in seen[2:5] for few, more in zip(best, best[1:]))


def test_frames_by_themselves(monkeypatch):
    """The best of one frame is that of a clip of this frame alone."""
    known, seen, model = torch.randn(6, 4, 8, 12), [], sd.load(SHIPPED)
    monkeypatch.setattr(ideal, "all_clips", lambda *_: known)
    monkeypatch.setattr(ideal, "TIMESTEPS", (500,))
    true = ideal.best_x0

    def noted(x, *others):
        seen.append((x, true(x, *others)))
        return seen[-1][1]

    monkeypatch.setattr(ideal, "best_x0", noted)
    ((*best, _),) = ideal.losses(model, toy.scenes("test")[0], 6, 4.0, 2, 1.0)
    assert len(best) == 4 and [x.shape[1] for x, _ in seen] == [1] * 6 + [2, 2, 2, 4, 2, 6]
    signal, noise = (part.item() for part in NoiseSchedule(model.settings).signal_and_noise(torch.tensor([500]), known))
    frames = unfold(known, 2, 3)
    for t, (x, guess) in enumerate(seen[:6]):
        assert torch.allclose(guess[:, 0], true(x[:, 0], signal, noise, frames[:, t]), atol=1e-5)


def test_worth_in_frames():
    best, numbers = [0.5, 0.4, 0.2, 0.1], [1, 2, 4, 6]
    for loss, worth in ((0.5, 1), (0.4, 2), (0.1, 6), (0.3, 8**0.5), (0.15, 24**0.5), (0.7, 1), (0.05, 6)):
        assert ideal.frames_worth(best, loss, numbers) == pytest.approx(worth)
    for frames, expected in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])):
        assert ideal.numbers_of_frames(frames) == expected


def test_the_command(run):
    done = run("lab.evals.ideal", "--scenes", 1, "--videos", 4, "--apart", 10)
    assert done.returncode == 0 and done.stdout.count("\n| ") == len(ideal.TIMESTEPS), done.stderr
    done = run("lab.evals.ideal", "--fps", 2)
    assert done.returncode == 2 and "16 frames must be in the 5 s of a true clip, got 7.5 s" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
