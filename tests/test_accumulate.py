r"""Accumulating measurements on x ~ N(0, s) observed with noise n, without sampling: gain and variance of what a walk ends with.

The jump is linear in the observation and in the noises of the walk. `recursion` writes their coefficients down from the formulas of the scheme, in
numpy; `library` reads them off `accumulate`. A walk keeps the posterior if its jump's variance plus V at the last level is s n^2 / (s + n^2), and if
its gain on the observation is s / (s + n^2).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exact import UnitNoise, normal
from torch import Tensor

from emdiff.accumulate import accumulate, levels
from emdiff.denoise import GaussianDenoiser
from emdiff.guidance import FusedPosterior

N, TAU = 1.62, 0.1
SPREADS = np.logspace(-3, math.log10(50), 60)


def scalar_prior(s: float) -> GaussianDenoiser:
    zero = torch.zeros(1, dtype=torch.float64)
    return GaussianDenoiser(zero, zero.reshape(1, 1) + math.sqrt(s), zero)


def recursion(s: float, taus: list[float], corrected: bool) -> np.ndarray:
    """Coefficients of the last jump on (obs, eps_1, ..., eps_K), from tau = infinity."""
    unit = np.eye(len(taus) + 1)

    def bayes(y: np.ndarray, tau: float) -> np.ndarray:
        return (y / tau**2 + unit[0] / N**2) / (1 / s + 1 / tau**2 + 1 / N**2)

    y, jump, tau = np.zeros(len(taus) + 1), bayes(np.zeros(len(taus) + 1), math.inf), math.inf
    for i, new in enumerate(taus):
        share = 1 - (new / tau) ** 2
        y = (1 - share) * y + share * jump + new * math.sqrt(share) * unit[i + 1]
        later = bayes(y, new)
        y = y + corrected * share / 2 * (later - jump)
        jump, tau = later, new
    return bayes(y, tau)


def library(monkeypatch: pytest.MonkeyPatch, s: float, taus: list[float], corrected: bool, steps: int = 0, **walk: float) -> np.ndarray:
    """The same coefficients, and those of the Langevin noises, read off `accumulate`."""
    rows = 1 + len(taus) * (1 + (steps > 0) + steps)
    obs = torch.zeros(rows, 1, dtype=torch.float64)
    obs[0] = 1
    unit = UnitNoise(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", unit)
        target = FusedPosterior(scalar_prior(s), obs, torch.full((1, 1), N, dtype=torch.float64))
        start = torch.full((rows, 1), 7.0, dtype=torch.float64)  # any finite value: nothing has been measured
        end = accumulate(target, start, math.inf, taus, None, corrected, steps, **walk)
    assert unit.row == rows and end.tau == taus[-1] and (start == 7).all()
    torch.testing.assert_close(end.xhat, target.xhat(end.y[:, None], torch.tensor([end.tau], dtype=torch.float64)))
    return end.xhat[:, 0].numpy()


def ratio(coefficients: np.ndarray, s: float, tau: float = TAU) -> float:
    """Variance of x given obs at the end of a walk, over the exact one."""
    return float((np.sum(coefficients[1:] ** 2) + 1 / (1 / s + 1 / tau**2 + 1 / N**2)) * (1 / s + 1 / N**2))


def bias(s: float, count: int, corrected: bool) -> float:
    return abs(1 - ratio(recursion(s, levels(math.inf, TAU, count, N), corrected), s))


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("s", [0.003, 0.4, 30.0])
def test_the_library_is_the_recursion(monkeypatch: pytest.MonkeyPatch, s: float, corrected: bool) -> None:
    for taus in (levels(math.inf, TAU, 7, N), [3.0, 0.9, 0.8]):
        np.testing.assert_allclose(library(monkeypatch, s, taus, corrected), recursion(s, taus, corrected), rtol=1e-11, atol=1e-14)


def test_32_corrected_levels_keep_the_posterior_variance_and_plain_ones_do_not() -> None:
    """The numbers of accumulate's docstring."""
    taus = levels(math.inf, TAU, 32, N)
    corrected = [ratio(recursion(s, taus, True), s) for s in SPREADS]
    plain = [ratio(recursion(s, taus, False), s) for s in SPREADS]
    assert (round(min(corrected), 3), round(max(corrected), 3)) == (0.967, 1.0)
    assert (round(min(plain), 3), round(max(plain), 3)) == (0.844, 0.999)


def test_8_predictions_with_3_langevin_steps_keep_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third number of accumulate's docstring, in units of the level's tau: delta = 1, gamma = 1."""
    taus = levels(math.inf, TAU, 8, N)
    kept = [ratio(library(monkeypatch, float(s), taus, False, 3, delta=1.0, gamma=1.0), s) for s in SPREADS]
    assert (round(min(kept), 3), round(max(kept), 3)) == (0.919, 1.0)


@pytest.mark.parametrize("s", [0.05, 1.0, 20.0])
def test_the_correction_is_of_second_order_and_the_prediction_of_first(s: float) -> None:
    for corrected, fold in ((True, 4), (False, 2)):
        for count in (64, 128, 256):
            assert bias(s, count, corrected) / bias(s, 2 * count, corrected) == pytest.approx(fold, rel=0.12), (corrected, count)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_gain_on_the_observation_is_the_posterior_s(corrected: bool) -> None:
    """Exact at every number of levels for predictions; the correction adds nothing, since the jump is a martingale."""
    for s in (0.01, 1.0, 30.0):
        for count in (2, 8, 32):
            assert recursion(s, levels(math.inf, TAU, count, N), corrected)[0] == pytest.approx(s / (s + N**2), rel=1e-9)


def test_langevin_steps_at_each_level_draw_the_variance_towards_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    taus = levels(math.inf, TAU, 6, N)
    off = [abs(1 - ratio(library(monkeypatch, 1.0, taus, False, steps, delta=0.7, gamma=0.8), 1.0)) for steps in (0, 2, 8, 32)]
    assert off == sorted(off, reverse=True) and off[-1] < 1e-2 < off[0]


def test_a_walk_from_a_measurement_appends_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a certain x the mean of the old and the appended measurements is exact: bias of the first vanishes as (tau'/tau)^2."""
    point = GaussianDenoiser(torch.full((1,), 0.7, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    y = normal(4, 1)
    taus = [1.3, 0.6]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *shape, **like: torch.zeros(*shape, dtype=torch.float64))
        end = accumulate(point, y, 2.0, taus)
    torch.testing.assert_close(end.y, 0.7 + (0.6 / 2.0) ** 2 * (y - 0.7))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", UnitNoise(1))
        columns = accumulate(point, torch.full((3, 1), 0.7, dtype=torch.float64), 2.0, taus).y[1:] - 0.7
    assert columns.square().sum().item() == pytest.approx(0.6**2 * (1 - (0.6 / 2.0) ** 2))


def fused(tau: Tensor, n: float) -> Tensor:
    return (tau**-2 + n**-2).rsqrt()


@pytest.mark.parametrize("first, n", [(8.0, math.inf), (20.0, N), (math.inf, N), (math.inf, 0.3)])
@pytest.mark.parametrize("count", [2, 5, 32])
def test_levels_end_at_the_last_and_fall_geometrically_once_fused(first: float, n: float, count: int) -> None:
    taus = torch.tensor(levels(first, TAU, count, n), dtype=torch.float64)
    assert len(taus) == count and taus[-1].item() == pytest.approx(TAU, rel=1e-9)
    assert taus.isfinite().all() and (taus.diff() < 0).all()
    assert math.isinf(first) or taus[0].item() == pytest.approx(first, rel=1e-9)
    ladder = fused(taus, n) if math.isfinite(first) else torch.cat([fused(torch.tensor([math.inf]).double(), n), fused(taus, n)])
    torch.testing.assert_close(ladder.log().diff(), ladder.log().diff()[:1].expand(len(ladder) - 1), rtol=1e-6, atol=1e-9)
