r"""How far the posterior with the Gaussian approximation of counts is from the exact one, in one dimension.

x ~ Gamma with mean m and standard deviation s m; obs ~ Poisson(x). The exact posterior is a Gamma law. The approximation is N(obs; x, v) with the
same prior, by quadrature, with v taken from a posterior sample of the round before, as `emdiff fit` does it: v is drawn from the approximate
posterior anew until it has settled. Columns: deviation of the posterior mean, in exact posterior standard deviations (root mean square over data),
and the approximate standard deviation over the exact one (mean).

    python scripts/poisson_error.py
"""

from __future__ import annotations

import numpy as np
from scipy import stats

DATA, ROUNDS, GRID = 2000, 6, 4001


def errors(mean: float, spread: float, read: float, rng: np.random.Generator) -> tuple[float, float]:
    """Deviation of the mean in exact standard deviations, ratio of standard deviations; read is the std of the read-out noise, in counts."""
    shape, rate = spread**-2, spread**-2 / mean
    x = rng.gamma(shape, 1 / rate, DATA)
    grid = np.linspace(1e-6, mean * (1 + 12 * spread) + 12, GRID)
    prior = stats.gamma.logpdf(grid, shape, scale=1 / rate)
    obs = rng.poisson(x) + read * rng.standard_normal(DATA)
    exact = moments(prior + log_likelihood(obs, grid, read))
    estimate = np.maximum(obs, 0.5)
    for _ in range(ROUNDS):
        v = np.maximum(estimate, 0.5) + read**2
        logp = prior - (obs[:, None] - grid) ** 2 / (2 * v[:, None])
        found = moments(logp)
        cdf = np.exp(logp - logp.max(1, keepdims=True)).cumsum(1)
        estimate = grid[np.argmax(cdf >= rng.random((DATA, 1)) * cdf[:, -1:], axis=1)]
    return float(np.sqrt(np.mean(((found[0] - exact[0]) / exact[1]) ** 2))), float(np.mean(found[1] / exact[1]))


def log_likelihood(obs: np.ndarray, grid: np.ndarray, read: float) -> np.ndarray:
    """log p(obs | x), (data, grid): Poisson, or its convolution with the read-out noise."""
    if read == 0:
        return stats.poisson.logpmf(np.round(obs)[:, None], grid)
    counts = np.arange(0, int(grid[-1] * 1.5 + 20))
    return np.log(np.maximum(stats.norm.pdf(obs[:, None], counts, read) @ stats.poisson.pmf(counts[:, None], grid), 1e-300))


def moments(logp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of unnormalised log densities (data, grid), in steps of the grid."""
    p = np.exp(logp - logp.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    index = np.arange(p.shape[1])
    mean = p @ index
    return mean, np.sqrt(np.maximum(p @ index**2 - mean**2, 1e-12))


def main() -> None:
    """Print the table."""
    print("| mean count | read-out std | deviation of the mean / std | std / exact std |\n|---|---|---|---|")
    for mean in (1, 3, 10, 30, 100, 300):
        for read in (0.0, 1.0):
            deviation, ratio = errors(mean, 0.5, read, np.random.default_rng(0))
            print(f"| {mean} | {read:g} | {deviation:.3f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
