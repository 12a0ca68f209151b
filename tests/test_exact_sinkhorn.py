"""The Sinkhorn divergence of laws: Gaussians in closed form, grids of two spacings, slow plans, and the densities of the benchmark's truths."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import ive
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from exact_mixtures import TRUTHS, points  # noqa: E402
from exact_sinkhorn import SPACING, THIN, axis, divergence, masses, mixture_density, to_truth, transport, truth_density  # noqa: E402

from emdiff.deconvolution import Mixture  # noqa: E402

COARSE = 0.08


def gaussians(weights: list[float], means: list[list[float]], variances: list[list[float]]) -> Mixture:
    """Gaussians with diagonal covariances."""
    w, m, v = (torch.tensor(part, dtype=torch.float64) for part in (weights, means, variances))
    return Mixture(w, m, torch.diag_embed(v))


def law(t: Tensor, *terms: list) -> Tensor:
    return masses(mixture_density(gaussians(*terms), t), t)


def entropic(s2: float, t2: float, reg: float) -> tuple[float, float]:
    """Sharp and dual T between N(0, s2) and N(0, t2): over the covariance c of the plan, of s2 + t2 - 2 c - reg/2 log(1 - c^2 / (s2 t2))."""
    c = -reg / 4 + math.sqrt(reg**2 / 16 + s2 * t2)
    return s2 + t2 - 2 * c, s2 + t2 - 2 * c - reg / 2 * math.log(1 - c * c / (s2 * t2))


@pytest.mark.parametrize("reg", [0.05, 0.2])
def test_a_translation_costs_its_squared_length_whatever_the_regularisation(reg: float) -> None:
    t = axis(COARSE)
    S = divergence(law(t, [1.0], [[-0.1, 0.2]], [[0.1, 0.04]]), law(t, [1.0], [[0.3, -0.1]], [[0.1, 0.04]]), t, reg)
    assert S.sharp == pytest.approx(0.25, abs=1e-6) and S.dual == pytest.approx(0.25, abs=1e-9)


@pytest.mark.parametrize("reg", [0.05, 0.2])
def test_gaussians_of_two_widths_have_their_closed_form(reg: float) -> None:
    """Both T and both S, axis by axis; sharp and dual differ by so much that neither can pass for the other."""
    t, a, b = axis(COARSE), (0.1, 0.05), (0.2, 0.04)
    one, two = law(t, [1.0], [[0.0, 0.0]], [list(a)]), law(t, [1.0], [[0.0, 0.0]], [list(b)])
    T = lambda p, q: np.array([entropic(s, u, reg) for s, u in zip(p, q)]).sum(0)
    found, plan = divergence(one, two, t, reg), transport(one, two, t, reg)
    expected = T(a, b) - T(a, a) / 2 - T(b, b) / 2
    assert abs(expected[0] / expected[1] - 1) > 0.005
    np.testing.assert_allclose(plan[:2], T(a, b), rtol=1e-5)
    np.testing.assert_allclose(found[:2], expected, rtol=1e-4)


def line(t: Tensor, shares: list[float], reg: float) -> tuple[np.ndarray, np.ndarray]:
    """Masses of two clouds on a line, at -1 and 1 and of variance .02, and exp(-C / reg)."""
    x = t.numpy()
    p = sum(share * np.exp(-((x - at) ** 2) / 0.04) for share, at in zip(shares, (-1, 1)))
    return p / p.sum(), np.exp(-((x[:, None] - x) ** 2) / reg)


def test_mass_that_moves_between_clouds_apart_is_found() -> None:
    """Both laws are products, alike along the second axis, where the closed form serves; along the first, 2,000 plain steps do, not 100."""
    reg, t, error = 0.05, axis(COARSE), []
    p, K = line(t, [0.6, 0.4], reg)
    q, v = line(t, [0.5, 0.5], reg)[0], np.ones(len(t))
    for _ in range(2000):
        u = 1 / (K @ (v * q))
        error.append(abs(v * (K @ (u * p)) - 1) @ q)
        v = 1 / (K @ (u * p))
    plan = p[:, None] * u[:, None] * K * v * q
    sharp = float(-reg * (plan * np.log(K)).sum())
    dual = reg * float(p @ np.log(u) + q @ np.log(v))
    where, variances = [[-1.0, 0.0], [1.0, 0.0]], [[0.02, 0.05]] * 2
    found = transport(law(t, [0.6, 0.4], where, variances), law(t, [0.5, 0.5], where, variances), t, reg)
    other = entropic(0.05, 0.05, reg)
    assert error[100] > 0.1 and error[-1] < 1e-9
    np.testing.assert_allclose(found[:2], (sharp + other[0], dual + other[1]), rtol=1e-5)


def test_a_divergence_is_nothing_between_a_law_and_itself_and_more_than_that_otherwise() -> None:
    t = axis(COARSE)
    p = [0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], [[0.1, 0.05], [0.05, 0.1]]
    same = divergence(law(t, *p), law(t, *p), t, 0.05)
    assert max(map(abs, same[:2])) < 1e-6
    assert divergence(law(t, *p), law(t, p[0], p[1], [[0.1, 0.05], [0.05, 0.11]]), t, 0.05).dual > 1e-5


@pytest.mark.parametrize("name", ["ring"])
def test_the_grid_is_fine_enough(name: str) -> None:
    """Twice the spacing gives the same divergence to a thousandth, of the thinnest truth from a mixture with Gaussians as thin as fits have."""
    model = gaussians([0.5, 0.3, 0.2], [[-0.7, 0.2], [0.5, -0.3], [0.1, 0.8]], [[0.25, 0.09], [0.0016, 0.2], [0.16, 0.0016]])
    fine, coarse = to_truth(name, model), to_truth(name, model, spacing=2 * SPACING)
    np.testing.assert_allclose(coarse[:2], fine[:2], rtol=1e-3)


@pytest.mark.parametrize("name", TRUTHS)
def test_a_density_of_a_truth_is_that_of_its_points(name: str) -> None:
    """It integrates to 1, and 200,000 points fall into cells of side .2 as it says: chi-squared of the cells that expect 20 points or more."""
    count, block, t = 200_000, round(0.2 / SPACING), axis()
    mass = truth_density(name, t) * SPACING**2
    assert float(mass.sum()) == pytest.approx(1, abs=1e-7)
    cells = mass.reshape(len(t) // block, block, len(t) // block, block).sum((1, 3)).numpy() * count
    edges = np.linspace(float(t[0]) - SPACING / 2, float(t[-1]) + SPACING / 2, len(cells) + 1)
    seen, many = np.histogram2d(*points(name, count, 3).T, bins=[edges, edges])[0], cells > 20
    assert many.sum() > 40 and cells[many].sum() > 0.99 * count
    assert abs(((seen - cells)[many] ** 2 / cells[many]).sum() / many.sum() - 0.7) < 0.7


def test_the_ring_has_its_closed_form() -> None:
    """N(x; c, s^2) over a circle: exp(-(r - 1)^2 / (2 s^2)) I0e(r / s^2) / (2 pi s^2)."""
    t, s2 = axis(), 0.03**2
    r = (t[:, None] ** 2 + t**2).sqrt().numpy()
    expected = np.exp(-((r - 1) ** 2) / (2 * s2)) * ive(0, r / s2) / (2 * math.pi * s2)
    np.testing.assert_allclose(truth_density("ring", t), expected, rtol=1e-9, atol=1e-12)


def test_what_the_grid_cannot_hold_is_refused_or_widened() -> None:
    t = axis(COARSE)
    with pytest.raises(ValueError, match="of the mass"):
        law(t, [1.0], [[2.5, 0.0]], [[0.1, 0.1]])
    thin, wide = law(t, [1.0], [[0.01, 0.0]], [[1e-8, 0.1]]), law(t, [1.0], [[0.01, 0.0]], [[(THIN * COARSE) ** 2, 0.1]])
    torch.testing.assert_close(thin, wide)
