r"""The Gaussian start: x ~ N(mean, S) fitted to observations by EM, with exact posteriors.

E-step, for data with operators A and noise of their own. Few entries (d <= DENSE): the posterior mean and covariance of every datum in
closed form. Many: one exact sample per datum by pathwise conditioning,

    x = x0 + S At (A S At + cov_obs)^-1 (obs - A x0 - n0),     x0 ~ N(mean, S),  n0 ~ N(0, cov_obs),

the solve by conjugate gradients with S low rank plus diagonal. M-step: the moments of the posteriors.

Where A = I and the noise is the same everywhere no iteration is needed: S = Cov[obs] - cov_obs, its negative part cut off, is the
maximum-likelihood estimate.

Sources: Maximum likelihood from incomplete data via the EM algorithm (Dempster, Laird & Rubin 1977); Pathwise conditioning of Gaussian
processes (Wilson et al. 2021), Sec. 3; for low rank plus diagonal, EM algorithms for ML factor analysis (Rubin & Thayer 1982).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from emdiff.denoise import GaussianDenoiser
from emdiff.factors import DENSE, Moments, from_moments
from emdiff.linalg import Solve, cg
from emdiff.smooth import correlation, correlation_length

if TYPE_CHECKING:
    from emdiff.data import Data, Observations
    from observers import Observer

SMOOTH = 1024
"""Most entries of x of which what a low-rank factor leaves is kept as smooth as the observations say, and not white."""

CHUNK = 512
"""Data per batch."""

Total = Callable[[Tensor], Tensor]
"""From a sum over some data to that over all."""


def alone(value: Tensor) -> Tensor:
    """The total where there are no other data."""
    return value


class Conditional(NamedTuple):
    """Exact draws from a Gaussian posterior.

    Attributes:
        x: Samples of x | obs, shape (B, *S).
        xhat: E[x | obs], shape (B, *S).
    """

    x: Tensor
    xhat: Tensor


def solve_innovation(prior: GaussianDenoiser, observer: Observer, b: Tensor, iterations: int = 60, tolerance: float = 1e-5) -> Solve:
    """(A S At + cov_obs)^-1 b by conjugate gradients in units of the noise, with image S At of the solution; b (B, *O)."""
    std = observer.std()

    def product(p: Tensor) -> tuple[Tensor, Tensor]:
        q = p / std
        image = prior.prior_product(observer.adjoint(q))
        return (observer.forward(image) + observer.cov(q)) / std, image

    solve = cg(product, b / std, iterations, tolerance)
    return solve._replace(x=solve.x / std)


def condition(prior: GaussianDenoiser, observer: Observer, obs: Tensor, generator: torch.Generator | None = None) -> Conditional:
    """Sample x | obs by pathwise conditioning, and compute E[x | obs].

    Args:
        prior: N(mean, S).
        observer: Operators and noise of the batch.
        obs: Observations (B, *O).
        generator: Source of randomness.

    Returns:
        Conditional(x, xhat).
    """
    mean = prior.mean.expand(len(obs), *prior.mean.shape)
    xhat = mean + solve_innovation(prior, observer, obs - observer.forward(mean)).image
    return Conditional(pathwise(prior, observer, obs, generator), xhat)


def pathwise(prior: GaussianDenoiser, observer: Observer, obs: Tensor, generator: torch.Generator | None = None, tolerance: float = 1e-5) -> Tensor:
    """The sample alone, (B, *S); solves end at a relative residual of `tolerance`, in units of the noise."""
    x0 = prior.sample(len(obs), generator)
    return x0 + solve_innovation(prior, observer, obs - observer.simulate(x0, generator), tolerance=tolerance).image


def _dense_posteriors(prior: GaussianDenoiser, data: Observations) -> tuple[Tensor, Tensor]:
    """Posterior means (B, d) and the sum of the posterior covariances (d, d), in closed form."""
    shape, d, count = prior.mean.shape, prior.mean.numel(), len(data)
    eye = torch.eye(d, dtype=data.obs.dtype, device=data.obs.device)
    columns = [data.observer.forward(e.reshape(1, *shape).expand(count, *shape)).flatten(1) for e in eye]
    A = torch.stack(columns, dim=-1)
    AS = A @ prior.covariance()
    gain = torch.linalg.solve(AS @ A.mT + _noise_covariance(data), AS).mT
    gap = data.obs.flatten(1) - A @ prior.mean.flatten()
    xhat = prior.mean.flatten() + torch.einsum("bdo,bo->bd", gain, gap)
    return xhat, count * prior.covariance() - torch.einsum("bdo,boe->de", gain, AS)


def _noise_covariance(data: Observations) -> Tensor:
    """cov_obs of each datum, (B, o, o), column by column where it is not diagonal."""
    if data.observer.noise.diagonal:
        return torch.diag_embed(data.observer.std().square().expand(data.obs.shape).flatten(1))
    eye = torch.eye(data.obs[0].numel(), dtype=data.obs.dtype, device=data.obs.device)
    return torch.stack([data.observer.cov(e.reshape(1, *data.obs.shape[1:]).expand(data.obs.shape)).flatten(1) for e in eye], dim=-1)


def em_iteration(
    prior: GaussianDenoiser, data: Data, rank: int, generator: torch.Generator | None = None, total: Total = alone, root: Tensor | None = None
) -> GaussianDenoiser:  # fmt: skip
    """One EM iteration of a Gaussian prior on observations; exact where d <= DENSE, with one sample per datum above.

    Args:
        prior: N(mean, S) of iteration k.
        data: Observations.
        rank: Columns of the low-rank factor above DENSE entries.
        generator: Source of randomness.
        total: As in `fit_gaussian`.
        root: Of the correlation of what that factor leaves (`factor`).

    Returns:
        N(mean, S) of iteration k + 1.
    """
    d = prior.mean.numel()
    halves = [Moments(d) for _ in range(1 if d <= DENSE else 2)]
    for i in range(0, len(data), CHUNK):
        batch = data.rows(slice(i, i + CHUNK))
        if d <= DENSE:
            halves[0].add(*_dense_posteriors(prior, batch))
            continue
        x = pathwise(prior, batch.observer, batch.obs, generator, 1e-3).flatten(1)
        for half, part in zip(halves, (x[::2], x[1::2])):
            half.add(part)
    means, covs = zip(*[half.mean_and_covariance(prior.mean, total) for half in halves])
    return from_moments((sum(means) / len(means)).reshape(prior.mean.shape), list(covs), rank, sweeps=2, root=root)


def fit_gaussian(
    data: Data,
    iterations: int = 20,
    rank: int = 64,
    generator: torch.Generator | None = None,
    progress: Callable[[int], None] = lambda k: None,
    total: Total = alone,
    length: float | None = None,
) -> GaussianDenoiser:
    """Fit N(mean, S) to observations of standardised data.

    Args:
        data: Observations; x has about mean 0 and variance 1.
        iterations: EM iterations, where there is no closed form.
        rank: Columns of the low-rank factor above DENSE entries.
        generator: Source of randomness.
        progress: Called with the number of each finished iteration.
        total: From a sum over these data to that over the data of all who fit the same Gaussian to theirs.
        length: Correlation length of x in entries (smooth), the same for all who fit; None takes what these data say.

    Returns:
        The prior, a denoiser in closed form.
    """
    closed = identity_moments(data, total)
    if closed is not None:
        return from_moments(closed[0], [closed[1]], rank)
    prior, root = as_smooth(data, rank, correlation_length(data, generator) if length is None else length)
    for k in range(iterations):
        prior = em_iteration(prior, data, rank, generator, total, root)
        progress(k + 1)
    return prior


def as_smooth(data: Data, rank: int, length: float) -> tuple[GaussianDenoiser, Tensor | None]:
    """N(0, C) of variance 1, C of a correlation length (smooth), and a root (d, d) of C, None where x is white or has more than SMOOTH
    entries. What stays of C is what no datum sees, and white directions there would hold as much variance as the seen ones."""
    d = math.prod(data.shape)
    mean = data.rows(slice(0, 1)).obs.new_zeros(data.shape)
    if not length:
        return GaussianDenoiser(mean, mean.new_zeros(d, 1), mean.new_ones(d)), None
    W, psi = correlation(data.shape, length, d if d <= SMOOTH else rank)
    prior = GaussianDenoiser(mean, W.to(mean), psi.to(mean))
    return prior, prior.factor if d <= SMOOTH else None


def identity_moments(data: Data, total: Total = alone) -> tuple[Tensor, Tensor] | None:
    """Mean (*S,) and covariance (d, d) of x in closed form where every entry of every x is observed with the same noise, else None."""
    moments, differ = Moments(math.prod(data.shape)), torch.zeros((), dtype=torch.float64)
    for i in range(0, len(data), CHUNK):
        part = data.rows(slice(i, i + CHUNK))
        direct, std = part.observer.as_measurement(part.obs), part.observer.std()
        if direct is None or std.numel() != 1 or part.observer.diagonal() is None or not bool(direct[1].isfinite().all()):
            differ += 1
            break
        moments.add(direct[0].flatten(1))
    if total(differ) > 0:
        return None
    mean, cov = moments.mean_and_covariance(part.obs, total)
    noise = std.flatten()[0] ** 2
    return mean.reshape(data.shape), cov - noise * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
