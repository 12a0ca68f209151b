r"""Calibration: do posterior samples x_1..x_L | obs spread as the truth x* does about them?

If (x*, obs) and the samples share one law given obs, the rank of any scalar t(x*) among t(x_1..L) is uniform on 0..L (simulation-based
calibration, Talts et al. 2018). All figures here are of that form, with the rank r spread over its cell at random,

    u = (r + U) / (L + 1),  U ~ U[0, 1]        uniform on [0, 1] if calibrated, for every L.

coverage     of the central interval of level c: the share of u with |2 u - 1| <= c, over all entries of x and all data.
SBC          t: projections of x on random directions, and the residual chi2; one uniformity test each. Data are independent, entries are not, so
             only such t are tested.
TARP         t: distance to a random reference point, a sample of another datum (Lemos et al. 2023): sees what marginals do not.

Uniformity is tested by Kolmogorov & Smirnov's test on u; several t at once count by the least p-value times their number (Bonferroni).

Sources: Validating Bayesian inference algorithms with simulation-based calibration (Talts et al. 2018); Simulation-based calibration checking for
Bayesian computation: the choice of test quantities shapes sensitivity (Modrak et al. 2023); Sampling-based accuracy testing of
posterior estimators (Lemos et al. 2023); Monte Carlo methods in statistical mechanics (Sokal 1997) for the autocorrelation time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import kstest
from torch import Tensor

LEVELS = (0.5, 0.8, 0.95)
"""Levels of the intervals that are reported."""


class Uniformity(NamedTuple):
    """Tests of uniformity of several statistics at once.

    Attributes:
        pvalue: Least p-value of the statistics, times their number, at most 1.
        deviation: Largest distance of an empirical distribution function of u from the uniform one.
    """

    pvalue: float
    deviation: float


def ranks(samples: Tensor, truth: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Rank of each entry of the truth among the samples; ties are broken at random.

    Args:
        samples: (N, L, *T).
        truth: (N, *T).
        generator: Source of randomness.

    Returns:
        Integers 0..L, shape (N, *T).
    """
    below = (samples < truth[:, None]).sum(1)
    ties = (samples == truth[:, None]).sum(1)
    draw = torch.rand(truth.shape, generator=generator)
    return below + torch.minimum((draw * (ties + 1)).long(), ties)


def spread_ranks(rank: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """u = (rank + U) / (count + 1) in [0, 1], of the shape of rank, float64."""
    draw = torch.rand(rank.shape, generator=generator, dtype=torch.float64)
    return (rank + draw) / (count + 1)


def coverage(u: Tensor, level: float) -> float:
    """Share of spread ranks u (any shape) inside the central interval of this level."""
    return float(((2 * u - 1).abs() <= level).double().mean())


def weighted_coverage(samples: Tensor, truth: Tensor, level: float, generator: torch.Generator | None = None) -> float:
    """Coverage in which every entry counts by its posterior variance, so that entries which hardly vary do not decide.

    Half of the samples give the variances and the other half the ranks: weights and ranks taken from the same samples would depend on each other.

    Args:
        samples: (N, L, *S), L at least 4.
        truth: (N, *S).
        level: Of the central interval.
        generator: Source of randomness.
    """
    weight, rest = samples[:, ::2].double().var(1), samples[:, 1::2]
    u = spread_ranks(ranks(rest, truth, generator), rest.shape[1], generator)
    inside = ((2 * u - 1).abs() <= level).double()
    return float((weight * inside).sum() / weight.sum().clamp(min=1e-300))


def uniformity(u: Tensor) -> Uniformity:
    """Test spread ranks u (N, T) of T statistics of N independent data."""
    tests = [kstest(column.numpy(), "uniform") for column in u.double().T]
    least = min(float(test.pvalue) for test in tests)
    return Uniformity(min(1.0, least * len(tests)), max(float(test.statistic) for test in tests))


def projections(x: Tensor, directions: int, seed: int = 0) -> Tensor:
    """Statistics (..., directions) of data (..., *S) flattened to (..., d): projections on fixed random directions."""
    theta = torch.randn(x.shape[-1], directions, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return x @ (theta / theta.norm(dim=0))


def sbc(t: Tensor, t_true: Tensor, generator: torch.Generator | None = None) -> Uniformity:
    """Simulation-based calibration.

    Args:
        t: Statistics of the samples (N, L, T), such as `projections` and the chi2 of their residuals: data-dependent statistics see errors of the
            likelihood that functions of x alone do not (Modrak et al. 2023).
        t_true: The same of the truth (N, T).
        generator: Source of randomness for ties and spreading.

    Returns:
        Uniformity(pvalue, deviation).
    """
    return uniformity(spread_ranks(ranks(t, t_true, generator), t.shape[1], generator))


def tarp(samples: Tensor, truth: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Spread ranks (N,) of the truth's distance to a reference, a sample of another datum, among those of the samples.

    Args:
        samples: (N, L, *S), N at least 2.
        truth: (N, *S).
        generator: Source of randomness.
    """
    N, L = samples.shape[:2]
    other = (torch.arange(N) + torch.randint(1, N, (N,), generator=generator)) % N
    reference = samples[other, torch.randint(L, (N,), generator=generator)].flatten(1)
    distance = (samples.flatten(2) - reference[:, None]).norm(dim=2)
    rank = ranks(distance, (truth.flatten(1) - reference).norm(dim=1), generator)
    return spread_ranks(rank, L, generator)


def expected_coverage(u: Tensor, levels: Tensor) -> Tensor:
    """Empirical distribution function of spread ranks u (N,) at levels (k,) in [0, 1]: TARP's expected coverage, the diagonal if calibrated."""
    return (u[:, None] <= levels).double().mean(0)


def interval_width(samples: Tensor, level: float) -> float:
    """Mean width of the central interval over entries and data, by quantiles of the L samples at (L + 1) p (Weibull); samples (N, L, *S)."""
    ends = np.quantile(samples.numpy(), [(1 - level) / 2, (1 + level) / 2], axis=1, method="weibull")
    return float((ends[1] - ends[0]).mean())


def crps(samples: Tensor, truth: Tensor, chunk: int = 100_000) -> float:
    """Continuous ranked probability score per entry, by torchmetrics; samples (N, L, *S), truth (N, *S)."""
    from torchmetrics.regression import ContinuousRankedProbabilityScore

    score = ContinuousRankedProbabilityScore()
    members, entries = samples.transpose(0, 1).flatten(1).T, truth.flatten()
    for part, target in zip(members.split(chunk), entries.split(chunk)):
        score.update(part, target)
    return float(score.compute())


def autocorrelation_time(states: Tensor) -> float:
    r"""Integrated autocorrelation time of chains, in states: 1 + 2 sum of rho_l, up to the first that is not clearly positive.

    Each chain has a law of its own whose mean is unknown, and subtracting a chain's mean would bias short chains; so by the variogram,
    g_l = E (s_t - s_{t+l})^2 / 2 = variance (1 - rho_l), with the variance from the lags of at least L/2, where rho is taken for 0.

    Args:
        states: Scalar statistics of N chains at L successive states, (N, L).

    Returns:
        1 for independent states; NaN where nothing moves or there are fewer than 4 states. Too low where the time is not small against L/2.
    """
    N, L = states.shape
    if L < 4:
        return float("nan")
    s = states.double()
    g = torch.stack([(s[:, lag:] - s[:, :-lag]).square().mean() / 2 for lag in range(1, L)])
    pairs = torch.arange(L - 1, 0, -1, dtype=torch.float64)
    far = slice(L // 2 - 1, None)
    variance = float((g[far] * pairs[far]).sum() / pairs[far].sum())
    if not variance > 0:
        return float("nan")
    rho = (1 - g / variance).tolist()
    end = next((i for i, r in enumerate(rho) if r <= 3 / (N * (L - 1 - i)) ** 0.5), len(rho))
    return 1 + 2 * sum(rho[:end])
