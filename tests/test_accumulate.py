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

from emdiff.accumulate import STEEPEST, accumulate, correction, levels
from emdiff.data import Observations
from emdiff.denoise import GaussianDenoiser
from emdiff.em import Walk, walk_batch, walk_levels
from emdiff.guidance import FusedPosterior, PosteriorDenoiser
from emdiff.streams import stream
from observers import Identity

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
        slope = new**-2 / (1 / s + new**-2 + 1 / N**2)
        y = (1 - share) * y + share * jump + new * math.sqrt(share / (1 - corrected * share * slope)) * unit[i + 1]
        jump, tau = bayes(y, new), new
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


def bias(s: float, count: int) -> float:
    return abs(1 - ratio(recursion(s, levels(math.inf, TAU, count, N), False), s))


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("s", [0.003, 0.4, 30.0])
def test_the_library_is_the_recursion(monkeypatch: pytest.MonkeyPatch, s: float, corrected: bool) -> None:
    for taus in (levels(math.inf, TAU, 7, N), [3.0, 0.9, 0.8]):
        np.testing.assert_allclose(library(monkeypatch, s, taus, corrected), recursion(s, taus, corrected), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("corrected", [False, True])
def test_an_e_step_leaves_the_correction_out_where_asked(monkeypatch: pytest.MonkeyPatch, corrected: bool) -> None:
    s, asked = 0.4, Walk(levels=5, corrected=corrected)
    obs = torch.zeros(6, 1, dtype=torch.float64)
    obs[0] = 1
    data = Observations(obs, Identity((1,), torch.tensor(N, dtype=torch.float64)))
    taus = walk_levels(data, asked)
    assert len(taus) == 5
    monkeypatch.setattr(torch, "randn", UnitNoise(1))
    end = walk_batch(scalar_prior(s), data, None, asked, taus, torch.Generator(), 0.0)
    np.testing.assert_allclose(end.x[:, 0], recursion(s, taus, corrected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("count", [3, 8, 32])
def test_corrected_levels_keep_the_posterior_variance_of_one_dimension_exactly_and_plain_ones_do_not(count: int) -> None:
    taus = levels(math.inf, TAU, count, N)
    np.testing.assert_allclose([ratio(recursion(s, taus, True), s) for s in SPREADS], 1, rtol=1e-9)
    plain = [ratio(recursion(s, taus, False), s) for s in SPREADS]
    assert max(plain) < 1 and min(plain) < {3: 0.3, 8: 0.6, 32: 0.85}[count]


def test_a_correction_is_the_square_root_along_its_slope_and_off_by_what_the_docstring_says_along_others() -> None:
    """e and w = J e for a diagonal J: the share of the variance I / (1 - h J) that each direction gets."""
    J, h = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64), 0.02
    e = normal(6, 3).double()
    add, r = correction(J * e, e, h)
    np.testing.assert_allclose(r[:, 0], ((J * e) ** 2).sum(1) / (J * e * e).sum(1))
    kept = ((e + add) / e).square() * (1 - h * J)
    torch.testing.assert_close(kept - 1, 0.75 * h**2 * J * (r - J), atol=2 * h**3, rtol=0)
    alone, slope = correction(0.7 * e, e, 0.6)
    torch.testing.assert_close(e + alone, e / math.sqrt(1 - 0.6 * 0.7))
    torch.testing.assert_close(slope, torch.full_like(slope, 0.7))


def test_where_estimates_are_no_martingale_half_of_the_change_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """One level of x ~ N(0, s) from tau = 1: by hand. Conjugate gradients are such a denoiser."""
    s, tau, new = 0.7, 1.0, 0.4
    target, y, h = scalar_prior(s), normal(5, 1).double(), 1 - (0.4 / 1.0) ** 2
    target.coherent = False
    e = normal(5, 1, seed=8).double()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *shape, **like: e.clone())
        end = accumulate(target, y, tau, [new])
    before = s / (s + tau**2) * y
    predicted = (1 - h) * y + h * before + new * math.sqrt(h) * e
    torch.testing.assert_close(end.y, predicted + h / 2 * (s / (s + new**2) * predicted - before))
    assert not PosteriorDenoiser.coherent and FusedPosterior.coherent


@pytest.mark.parametrize("w", [0.0, -1.0, 40.0])
def test_a_jump_that_does_not_respond_or_responds_too_much_is_corrected_by_finite_steps(w: float) -> None:
    e = normal(4, 5).double()
    add, r = correction(w * e, e, 1.0)
    assert add.isfinite().all() and (r > 0).all() and (r <= STEEPEST).all()
    assert (add == 0).all() if w == 0 else (add / (w * e) > 0).all()


def test_several_slopes_at_once_keep_the_variance_to_a_few_percent() -> None:
    """The eigenvalues of x fall over four decades; 24 levels, by sampling. Halves of w, the scheme of second order, lose 5 % of the widest."""
    s = torch.logspace(1, -3, 64, dtype=torch.float64)
    prior = GaussianDenoiser.from_covariance(torch.zeros(64, dtype=torch.float64), s.diag())
    obs = torch.zeros(20_000, 64, dtype=torch.float64)
    target = FusedPosterior(prior, obs, torch.full((1, 64), N, dtype=torch.float64))
    end = accumulate(target, obs, math.inf, levels(math.inf, TAU, 24, N), stream(0, "w"))
    kept = (end.y.var(0) - TAU**2) * (1 / s + 1 / N**2)
    wide = s > 0.1
    assert (kept[wide] - 1).abs().max() < 0.05 and abs(float(kept[wide].mean()) - 1) < 0.01


def test_8_predictions_with_3_langevin_steps_keep_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third number of accumulate's docstring, in units of the level's tau: delta = 1, gamma = 1."""
    taus = levels(math.inf, TAU, 8, N)
    kept = [ratio(library(monkeypatch, float(s), taus, False, 3, delta=1.0, gamma=1.0), s) for s in SPREADS]
    assert (round(min(kept), 3), round(max(kept), 3)) == (0.919, 1.0)


@pytest.mark.parametrize("s", [0.05, 1.0, 20.0])
def test_the_prediction_is_of_first_order(s: float) -> None:
    for count in (64, 128, 256):
        assert bias(s, count) / bias(s, 2 * count) == pytest.approx(2, rel=0.12), count


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
