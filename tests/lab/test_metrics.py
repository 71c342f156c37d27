"""metrics.py: against closed forms, scipy and scikit-image."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lab.metrics import Gaussian, frechet_distance, psnr, ssim_map, wilson


@pytest.mark.parametrize("right, n", [(0, 10), (3, 10), (10, 10), (183, 192), (192, 192)])
def test_wilson_interval_solves_its_equation(right, n):
    """Each end p is where the observed share is 1.96 standard deviations of p away, found here by bisection."""
    share = right / n
    for end, outside in zip(wilson(right, n), (0.0, 1.0)):
        inside = share
        if inside != outside:
            for _ in range(200):
                p = (inside + outside) / 2
                far = abs(share - p) > 1.96 * math.sqrt(p * (1 - p) / n)
                inside, outside = (inside, p) if far else (p, outside)
        assert end == pytest.approx(inside, abs=1e-9)


def gaussian(features):
    g = Gaussian(features.shape[1])
    g.add(torch.from_numpy(features))
    return g


def reference(one, two):
    """The formula in float64, with scipy's matrix root."""
    a, b = (np.cov(x, rowvar=False) for x in (one, two))
    root = scipy.linalg.sqrtm(a @ b).real
    return ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 24), st.floats(0.01, 100))
def test_frechet_distance_is_scipys(seed, dim, scale):
    """Correlated Gaussians, full rank."""
    rng = np.random.default_rng(seed)
    one, two = (rng.normal(size=(6 * dim, dim)) @ rng.normal(size=(dim, dim)) * scale + rng.normal() for _ in range(2))
    assert frechet_distance(gaussian(one), gaussian(two)) == pytest.approx(reference(one, two), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_frechet_distance_of_deficient_ranks(seed, rank):
    """Features in a common subspace are as far apart as their coordinates in it, which have full rank."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(40, rank)))[0]
    one, two = (rng.normal(size=(50, rank)) * rng.uniform(0.1, 5, rank) + rng.normal(size=rank) for _ in range(2))
    expected = reference(one, two) if rank > 1 else (
        (one.mean() - two.mean()) ** 2 + (one.std(ddof=1) - two.std(ddof=1)) ** 2)
    assert frechet_distance(gaussian(one @ basis.T), gaussian(two @ basis.T)) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_diagonal_gaussians_has_a_closed_form():
    """|μ1 - μ2|² + Σ (σ1 - σ2)²"""
    one, two = Gaussian(3), Gaussian(3)
    for g, mean, deviation in ((one, [0, 1, 2], [1, 2, 3]), (two, [3, 1, 0], [4, 0, 1])):
        g.n, g.mean = 2, torch.tensor(mean, dtype=torch.float64)
        g.scatter = torch.diag(torch.tensor(deviation, dtype=torch.float64) ** 2)
    assert frechet_distance(one, two) == pytest.approx(13 + 9 + 4 + 4, rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 39, 41])
def test_few_features_give_a_number(n):
    """Never complex, never NaN, never negative; and a set is no distance from itself."""
    rng = np.random.default_rng(n)
    one, two = gaussian(rng.normal(size=(n, 40))), gaussian(rng.normal(size=(n, 40)) * 1e-3)
    assert math.isfinite(frechet_distance(one, two)) and frechet_distance(one, two) > 0
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9 * one.covariance.trace().item())
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(one, gaussian(rng.normal(size=(1, 40))))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 30), min_size=2, max_size=6))
def test_streaming_is_all_at_once(seed, sizes):
    """Also far from zero, where sums of squares would lose all their digits."""
    features = np.random.default_rng(seed).normal(size=(sum(sizes), 7)) + 1e6
    streamed = Gaussian(7)
    for part in np.split(features, np.cumsum(sizes)[:-1]):
        streamed.add(torch.from_numpy(part))
    np.testing.assert_allclose(streamed.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance, np.cov(features, rowvar=False), rtol=1e-6, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(7, 20), st.integers(7, 20), st.floats(0, 0.5))
def test_ssim_and_psnr_are_scikit_images(seed, height, width, noise):
    rng = np.random.default_rng(seed)
    one = rng.random((2, 3, height, width))
    two = (one + rng.normal(0, noise + 1e-3, one.shape)).clip(0, 1)
    expected = np.mean([structural_similarity(a, b, data_range=1.0, channel_axis=0) for a, b in zip(one, two)])
    assert ssim_map(torch.from_numpy(one), torch.from_numpy(two)).mean().item() == pytest.approx(expected, abs=1e-9)
    assert psnr(torch.from_numpy(one), torch.from_numpy(two)) == pytest.approx(
        peak_signal_noise_ratio(one, two, data_range=1.0), rel=1e-9)


def test_psnr_of_a_part():
    one, two = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.1, 0.0], [0.0, 1.0]]]])
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert psnr(one, two, weight) == pytest.approx(-10 * math.log10(0.005))
    assert psnr(one, one) == math.inf
