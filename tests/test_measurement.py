r"""Sufficiency: all that M measurements say of x is said by their precision-weighted mean ybar and its precision 1 / tau^2."""

from __future__ import annotations

import math

import pytest
import torch
from exact import LEVELS, SIGMA, M, normal, uniform, with_infinite
from torch import Tensor

from emdiff.measurement import align, effective, log_likelihood, measure, pool

B, S = 4, (2, 3)


KINDS = {
    "one for all": torch.tensor(SIGMA, dtype=torch.float64),
    "per measurement": LEVELS,
    "per datum and measurement": 0.3 + uniform(B, M),
    "shared map": 0.3 + uniform(1, M, *S),
    "per datum, channel broadcast": 0.3 + uniform(B, M, 1, 3),
    "per entry": 0.3 + uniform(B, M, *S),
    "per entry, some infinite": with_infinite(),
}
kinds = pytest.mark.parametrize("sigma", KINDS.values(), ids=KINDS.keys())


def full(sigma: Tensor) -> Tensor:
    """Levels (B, M, *S), axis by axis: scalars and (M,) belong to measurements, else the axes are those of y from the left."""
    if sigma.ndim <= 1:
        return sigma.expand(M)[None, :, None, None].expand(B, M, *S)
    return sigma[(...,) + (None,) * (4 - sigma.ndim)].expand(B, M, *S)


@kinds
def test_the_likelihood_of_x_is_that_of_the_pooled_measurement(sigma: Tensor) -> None:
    y, levels = normal(B, M, *S), full(sigma)
    ybar, precision = pool(y, sigma)

    def log_p(x: Tensor) -> Tensor:
        return (-0.5 * ((y - x[:, None]) / levels).square()).flatten(1).sum(1)

    def log_pooled(x: Tensor) -> Tensor:
        return (-0.5 * precision * (ybar - x).square()).flatten(1).sum(1)

    a, b = 3 * normal(B, *S, seed=1), normal(B, *S, seed=2) - 5
    torch.testing.assert_close(log_p(a) - log_p(b), log_pooled(a) - log_pooled(b))


def test_the_log_likelihood_is_the_normal_density() -> None:
    y, x, sigma = normal(B, M, *S), normal(B, *S, seed=1), KINDS["per entry"]
    expected = torch.distributions.Normal(x[:, None].expand(y.shape), sigma).log_prob(y).sum((1, 2, 3))
    torch.testing.assert_close(log_likelihood(y, x, sigma), expected)
    expected = torch.distributions.Normal(x[:, None].expand(y.shape), LEVELS[:, None, None]).log_prob(y).sum((1, 2, 3))
    torch.testing.assert_close(log_likelihood(y, x, LEVELS), expected)


def test_an_entry_that_was_never_measured_is_zero_and_has_no_precision() -> None:
    sigma, y = with_infinite(), 1e6 * normal(B, M, *S)
    ybar, precision = pool(y, sigma)
    unseen = sigma.isinf().all(1)
    assert unseen[1, 0, 2]
    assert torch.equal(precision == 0, unseen) and (ybar[unseen] == 0).all()
    assert ybar.isfinite().all() and precision.isfinite().all()


def test_pooling_is_associative_and_an_infinite_level_adds_nothing() -> None:
    y, sigma = normal(B, M, *S), KINDS["per entry"]
    first = pool(y[:, :2], sigma[:, :2])
    again = pool(torch.stack([first.ybar, y[:, 2]], 1), torch.stack([first.precision.rsqrt(), sigma[:, 2]], 1))
    for got, expected in zip(again, pool(y, sigma)):
        torch.testing.assert_close(got, expected)
    hidden = torch.cat([sigma[:, :1], torch.full_like(sigma[:, :1], math.inf)], 1)
    for got, expected in zip(pool(y[:, :2], hidden), pool(y[:, :1], sigma[:, :1])):
        torch.testing.assert_close(got, expected)


def test_the_effective_level_is_the_pooled_one_and_sigma_over_root_m_for_equal_levels() -> None:
    torch.testing.assert_close(effective(LEVELS).square().reciprocal().expand(1, 1, 1), pool(normal(B, M, *S), LEVELS).precision)
    assert effective(torch.full((M,), SIGMA, dtype=torch.float64)).item() == pytest.approx(SIGMA / math.sqrt(M), rel=1e-14)
    assert effective(torch.tensor([3.0, 4.0])).item() == pytest.approx(2.4)
    assert effective(torch.tensor([SIGMA, math.inf])).item() == pytest.approx(SIGMA)


@kinds
def test_levels_broadcast_against_measurements_from_the_left(sigma: Tensor) -> None:
    y = normal(B, M, *S)
    assert align(sigma, y).ndim == y.ndim
    assert torch.equal(align(sigma, y).expand(y.shape), full(sigma))


@pytest.mark.parametrize("sigma", [LEVELS, 0.3 + uniform(1, M, *S)], ids=["per measurement", "map"])
def test_measurements_have_independent_noise_of_the_stated_levels(sigma: Tensor) -> None:
    count = 20_000
    x = normal(1, *S).expand(count, *S)
    y = measure(x, sigma, torch.Generator().manual_seed(0))
    assert torch.equal(y, measure(x, sigma, torch.Generator().manual_seed(0)))
    eps = ((y - x[:, None]) / align(sigma, y)).flatten(1)
    expected = torch.eye(eps.shape[1], dtype=torch.float64)
    assert (eps.mean(0).abs() < 5 / math.sqrt(count)).all()
    assert (eps.T @ eps / count - expected).abs().max() < 5 * math.sqrt(2 / count)
