"""What scripts/real_work.py measures with: galaxies have the radius and shape they were given, and naive images are pseudo-inverses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from real_cases import CASES, SHAPE, THREE_NOISE, naive  # noqa: E402
from real_galaxies import distances, ellipticity, galaxies, half_light, sersic, telescope  # noqa: E402


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(-1, 1, 1)


def test_half_of_the_light_of_a_sersic_profile_is_within_its_radius() -> None:
    """But for what is beyond the aperture, less than 2 % of the light of these, and the size of pixels."""
    R, n, zero = column(1.6, 2.0, 2.5, 2.5), column(1.0, 1.0, 1.0, 0.7), column(0.0, 0.3, -0.4, 0.2)
    x = sersic(R, n, torch.ones(4, 1, 1), column(0.0, 0.0, 0.0, 0.0), zero, -zero)
    torch.testing.assert_close(half_light(x), R.flatten(), rtol=0, atol=0.1)
    torch.testing.assert_close(half_light(7 * x), half_light(x))
    assert ellipticity(x).max() < 0.02


def test_ellipticity_is_that_of_the_weighted_profile_whatever_its_angle() -> None:
    """A Gaussian (n = 1/2) of axis ratio q under a Gaussian weight w: variances a w/(a + w) along each axis."""
    R, q = 2.0, column(0.8, 0.6, 0.6)
    x = sersic(torch.full((3, 1, 1), R), torch.full((3, 1, 1), 0.5), q, column(0.0, 0.9, 2.0), column(0.0, 0.3, -0.3), column(0.0, 0.0, 0.2))
    s, w = (R / 1.1774) ** 2, 3.0**2
    under = lambda a: (a + 1 / 12) * w / (a + 1 / 12 + w)  # noqa: E731
    a, b = under(s / q.flatten()), under(s * q.flatten())
    torch.testing.assert_close(ellipticity(x), (a - b) / (a + b), rtol=0.02, atol=0)


def test_telescopes_keep_the_flux_and_make_galaxies_larger_and_rounder() -> None:
    x, A = galaxies(400, generator()), telescope(400, generator())
    assert A.count == 400 and A.psf.sum((1, 2)).sub(1).abs().max() < 1e-5 and 0.1 <= float(A.noise_std.min()) < float(A.noise_std.max()) <= 0.3
    seen = A.forward(x)
    assert (half_light(seen) > half_light(x)).float().mean() > 0.99 and (ellipticity(seen) < ellipticity(x)).float().mean() > 0.9
    far, near = distances(seen, x), distances(galaxies(400, torch.Generator().manual_seed(2)), x)
    assert all(far[key] > 0.25 for key in far) and all(near[key] < 0.12 for key in near)


def test_the_naive_image_is_the_pseudo_inverse_of_averages_and_else_the_best_multiple_of_the_adjoint() -> None:
    x, A = galaxies(5, generator()), CASES["downsample"].draw(SHAPE, 5, generator())
    back = naive(A, A.forward(x))
    torch.testing.assert_close(A.forward(back), A.forward(x), atol=1e-4, rtol=0)
    assert (back.square().sum((1, 2)) <= x.square().sum((1, 2)) * 1.0001).all(), "the one of least norm"
    A = CASES["fourier4"].draw(SHAPE, 5, generator())
    obs, seen = A.forward(x), A.forward(naive(A, A.forward(x)))
    inner = ((obs - seen) * seen).flatten(1).sum(1)
    assert (inner.abs() < 1e-4 * obs.square().flatten(1).sum(1)).all() and ((obs - seen).square().sum() < obs.square().sum())


def test_each_of_three_instruments_has_a_noise_of_its_own() -> None:
    A = CASES["mixed"].draw(SHAPE, 300, generator())
    std = [float(part.unique()) for part in A.noise_std.split([576, 576, 144], dim=1)]
    assert std == pytest.approx(THREE_NOISE)
    shares = [float(part.any(1).float().mean()) for part in A.observed().split([576, 576, 144], dim=1)]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0.25
