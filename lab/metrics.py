"""Numbers that say how good videos are, from tensors alone: Wilson intervals, Fréchet distance, PSNR, SSIM."""

import math

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Shares


def wilson(right: int, n: int, z=1.96) -> tuple[float, float]:
    """95% Wilson interval of a share, `right` of n. It stays inside 0..1, and does not shrink to nothing at 0 and 1."""
    p, zz = right / n, z * z
    middle, spread = p + zz / (2 * n), z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    low, high = (middle - spread) / (1 + zz / n), (middle + spread) / (1 + zz / n)
    return max(low, 0.0), min(high, 1.0)  # rounding can lead outside, to a "-0"


# ---------------------------------------------------------------------------------------------------------------------
# Fréchet distance (Unterthiner et al. 2018, Section 3): between the Gaussians of two sets of features


class Gaussian:
    """Mean and covariance of features, in float64. They are added part by part, so memory does not grow with them."""

    def __init__(self, dim: int):
        self.n, self.mean = 0, torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    def add(self, features: torch.Tensor):
        """features (N, D). The update of Chan, Golub and LeVeque: nothing large is ever subtracted."""
        features = features.double()
        n, mean = len(features), features.mean(0)
        apart = mean - self.mean
        centered = features - mean
        self.scatter += centered.T @ centered + torch.outer(apart, apart) * (self.n * n / (self.n + n))
        self.mean += apart * (n / (self.n + n))
        self.n += n

    @property
    def covariance(self) -> torch.Tensor:
        return self.scatter / (self.n - 1)


def frechet_distance(one: Gaussian, two: Gaussian) -> float:
    """|μ1 - μ2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½).

    With Σ = A Aᵀ, the trace of the root is the sum of the singular values of A1ᵀ A2. It is never complex, whatever the
    rank, and no root is taken of a difference. Raises ValueError on fewer than two features.
    """
    if min(one.n, two.n) < 2:
        raise ValueError("a covariance needs at least two features")
    root = torch.linalg.svdvals(factor(one.covariance).T @ factor(two.covariance)).sum()
    spread = one.covariance.trace() + two.covariance.trace() - 2 * root
    return ((one.mean - two.mean).square().sum() + spread).clamp(min=0).item()


def factor(covariance: torch.Tensor) -> torch.Tensor:
    """A with A Aᵀ = covariance. Eigenvalues that are nothing but rounding count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    values[values < values.max() * len(values) * torch.finfo(values.dtype).eps] = 0
    return vectors * values.sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def psnr(one: torch.Tensor, two: torch.Tensor, weight: torch.Tensor | None = None) -> float:
    """Decibels between pictures (N, C, H, W) in 0..1; with weight (H, W), only where it is 1."""
    error = (one - two).square().mean(dim=(0, 1))
    mean = error.mean() if weight is None else (error * weight).sum() / weight.sum()
    return -10 * math.log10(mean) if mean else math.inf


def ssim_map(one: torch.Tensor, two: torch.Tensor, window=7) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004, Equation 13) of pictures (N, C, H, W) in 0..1, around each pixel where
    the window fits: (N, C, H - window + 1, W - window + 1). Uniform window, sample covariance."""
    one, two = one.double(), two.double()

    def local(x):
        return F.avg_pool2d(x, window, stride=1)

    sample = window**2 / (window**2 - 1)
    a, b = local(one), local(two)
    aa, bb, ab = ((local(x) - y) * sample for x, y in ((one * one, a * a), (two * two, b * b), (one * two, a * b)))
    c1, c2 = 0.01**2, 0.03**2
    return (2 * a * b + c1) * (2 * ab + c2) / ((a * a + b * b + c1) * (aa + bb + c2))
