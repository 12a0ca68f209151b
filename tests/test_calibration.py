r"""Calibration: ranks of exact samples are uniform, wrong ones are found; the walk with guidance passes, a wrong V does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exact import normal, uniform
from scipy.stats import chisquare, norm
from torch import Tensor

from emdiff import calibration as cal
from emdiff.denoise import Moments
from emdiff.em import Walk, e_step
from emdiff.mixture import MixtureDenoiser
from emdiff.observations import Observations
from observers import Projection

N, L, d = 4000, 9, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(500 + seed)


def posterior_samples(factor: float = 1.0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Truth and samples of one Gaussian law per datum, the samples with std times factor and mean plus shift."""
    centre = normal(N, 1, d, seed=3)
    return centre + shift + factor * normal(N, L, d, seed=1), (centre[:, 0] + normal(N, d, seed=2))


def test_ranks_count_the_samples_below_and_break_ties_evenly() -> None:
    samples = torch.tensor([[[0.0], [1.0], [1.0], [2.0]]]).expand(30_000, 4, 1)
    rank = cal.ranks(samples, torch.ones(30_000, 1), generator())
    assert chisquare(np.bincount(rank[:, 0].numpy(), minlength=5)[1:4]).pvalue > 1e-3 and set(rank[:, 0].tolist()) == {1, 2, 3}
    assert (cal.ranks(samples, torch.full((30_000, 1), 9.0)) == 4).all() and (cal.ranks(samples, torch.full((30_000, 1), -1.0)) == 0).all()


@pytest.mark.parametrize("level", [0.3, 0.5, 0.8, 0.95])
def test_coverage_is_the_level_for_any_number_of_samples_and_known_where_the_spread_is_wrong(level: float) -> None:
    samples, truth = posterior_samples()
    for count in (4, 9):
        u = cal.spread_ranks(cal.ranks(samples[:, :count], truth, generator()), count, generator(1))
        assert cal.coverage(u, level) == pytest.approx(level, abs=5 * math.sqrt(level * (1 - level) / u.numel()))
    many = 0.5 * normal(2000, 199, 1, seed=4)
    u = cal.spread_ranks(cal.ranks(many, normal(2000, 1, seed=5), generator()), 199, generator(1))
    expected = 2 * norm.cdf(0.5 * norm.ppf((1 + level) / 2)) - 1
    assert cal.coverage(u, level) == pytest.approx(expected, abs=0.05)


def test_weighted_coverage_looks_where_the_variance_is_and_has_no_bias() -> None:
    """Entry 0: calibrated, variance 1; entry 1: hardly varies and always covers; few samples, so weights fluctuate."""
    scale = torch.tensor([1.0, 0.01])
    samples, truth = scale * normal(20_000, 6, 2, seed=1), torch.stack([normal(20_000, seed=2), torch.zeros(20_000)], dim=1)
    assert cal.weighted_coverage(samples, truth, 0.8, generator()) == pytest.approx(0.8, abs=0.02)
    u = cal.spread_ranks(cal.ranks(samples, truth, generator()), 6, generator(1))
    assert cal.coverage(u, 0.8) > 0.87


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 0.0), (0.8, 0.0), (1.3, 0.0), (1.0, 0.2)])
def test_calibrated_samples_pass_and_others_fail(factor: float, shift: float) -> None:
    samples, truth = posterior_samples(factor, shift)
    right = (factor, shift) == (1.0, 0.0)
    test = cal.sbc(cal.projections(samples, 4), cal.projections(truth, 4), generator())
    assert (test.pvalue > 0.01) == right and (test.deviation < 0.035) == right
    u = cal.tarp(samples, truth, generator())
    if shift == 0:
        assert (cal.uniformity(u[:, None]).pvalue > 0.01) == right
    levels = torch.linspace(0, 1, 21, dtype=torch.float64)
    assert ((cal.expected_coverage(u, levels) - levels).abs().max() < 0.03) == (right or shift > 0)


def test_tarp_finds_a_wrong_correlation_that_no_marginal_shows() -> None:
    rho = 0.95
    mix = lambda a, b: torch.stack([a, rho * a + math.sqrt(1 - rho**2) * b], dim=-1)  # noqa: E731
    truth = mix(normal(N), normal(N, seed=1))
    samples = normal(N, L, 2, seed=2)
    u = cal.spread_ranks(cal.ranks(samples, truth, generator()), L, generator(1))
    assert all(cal.coverage(u, c) == pytest.approx(c, abs=0.03) for c in cal.LEVELS)
    assert cal.uniformity(cal.tarp(samples, truth, generator())[:, None]).pvalue < 1e-4


def test_the_width_of_an_interval_is_the_normal_quantile() -> None:
    assert cal.interval_width(normal(400, 399, 1), 0.8) == pytest.approx(2 * norm.ppf(0.9), rel=0.01)


def test_crps_of_a_large_normal_ensemble_is_the_closed_form() -> None:
    """E over y ~ N(0, 1) of the CRPS of N(0, 1) at y is 1 / sqrt(pi); of an ensemble of L: times (1 + 1/L)."""
    score = cal.crps(normal(3000, 40, 1), normal(3000, 1, seed=1), chunk=700)
    assert score == pytest.approx((1 + 1 / 40) / math.sqrt(math.pi), rel=0.03)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_the_autocorrelation_time_of_an_autoregression_is_the_closed_form(rho: float) -> None:
    """(1 + rho) / (1 - rho), from many short chains."""
    states, row = [normal(4000)], math.sqrt(1 - rho**2)
    for k in range(1, 40):
        states.append(rho * states[-1] + row * normal(4000, seed=k))
    assert cal.autocorrelation_time(torch.stack(states, dim=1)) == pytest.approx((1 + rho) / (1 - rho), rel=0.15)


def test_chains_that_are_too_short_or_stand_still_have_no_autocorrelation_time() -> None:
    assert math.isnan(cal.autocorrelation_time(normal(5, 2))) and math.isnan(cal.autocorrelation_time(torch.ones(5, 9)))


class Scaled(MixtureDenoiser):
    """The exact mixture denoiser with V times a factor."""

    factor = 1.0

    def moments(self, y: Tensor, sigma: Tensor) -> Moments:
        """As in the base."""
        xhat, V = super().moments(y, sigma)
        return Moments(xhat, lambda u: self.factor * V(u))


def mixture() -> Scaled:
    covs = [[[0.3, 0.1], [0.1, 0.2]], [[0.2, -0.1], [-0.1, 0.3]], [[0.15, 0.0], [0.0, 0.15]]]
    means = [[-1.0, -0.5], [1.0, -0.2], [0.2, 1.2]]
    return Scaled(*(torch.tensor(a, dtype=torch.float64) for a in ([0.5, 0.3, 0.2], means, covs)))


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (2.0, False), (0.5, False)])
def test_the_walk_with_guidance_is_calibrated_and_a_wrong_v_is_not(factor: float, passes: bool) -> None:
    """1,000 replications: x of a mixture, one projection of it with noise, 9 independent chains each, from cold."""
    count, prior = 1000, mixture()
    x, angle = prior.sample(count, generator()), 2 * math.pi * uniform(count)
    A = torch.stack([angle.cos(), angle.sin()], dim=1)[:, None, :]
    made = Projection((2,), torch.tensor(0.3, dtype=torch.float64), A)
    obs = made.simulate(x, generator(1))
    data = Observations(obs, made).rows(torch.arange(count).repeat_interleave(L))
    walk = Walk(guidance="cg", tau_first=0.5, tau_last=0.05, levels=16, iterations=2, batch=count * L)
    prior.factor, chains, draw = factor, torch.zeros(count * L, 2, dtype=torch.float64), generator(2)
    for _ in range(8):
        end = e_step(prior, data, chains, walk, draw)
        chains = end.y
    samples = end.x.reshape(count, L, 2)
    t = torch.cat([cal.projections(samples, 4), statistics(samples, obs, A)], dim=2)
    t_true = torch.cat([cal.projections(x, 4), statistics(x[:, None], obs, A)[:, 0]], dim=1)
    test = cal.sbc(t, t_true, generator(3))
    assert test.pvalue > 0.01 if passes else test.pvalue < 1e-6


def statistics(x: Tensor, obs: Tensor, A: Tensor) -> Tensor:
    """Residual chi2 (N, L, 1) of samples x (N, L, 2)."""
    return (obs[:, None] - torch.einsum("nod,nld->nlo", A, x)).square()
