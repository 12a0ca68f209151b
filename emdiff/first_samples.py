r"""First samples of a self-supervised start: its estimates xhat(z) of x, and deviations from them that make them samples of x | z.

Where every entry was observed, with levels sigma_z: xhat(z) + c V^(1/2) xi, V = sigma_z^2 d xhat / d z, by Lanczos. With E[x | z] for xhat, c would
be 1. The slope of a trained xhat has more trace than its error has, and Lanczos adds to that, since negative eigenvalues are 0; what such samples
vary too much EM takes many iterations to remove. So c^2 is the estimator's mean squared error over the mean square of V^(1/2) xi, on observations
that training did not see. Stein's estimate of the error needs no truth, and xi^T V xi is one of tr V:

    c^2 = (|z - xhat|^2 - sigma_z^2 + 2 xi^T V xi) / |V^(1/2) xi|^2,   each summed over entries and observations.

Where some entries were not observed, V of these has no such form. But estimates from less tell how estimates deviate: with z_S a random half of z's
observed entries, xhat(z_S) = E[xhat(z) | z_S], so

    D = xhat(z) - xhat(z_S)   has mean 0 given z_S and covariance V_S - V, which has the structure of x | z: strokes that are there or not.

x = xhat(z) +- c D with a random sign has mean xhat(z) given z; c makes the mean of its square that of an entry's posterior variance, both measured
without any truth: where entries were not observed v, the error of predicting hidden entries less their noise; where they were the mean of
sigma_z^2 - (z - xhat)^2, since E(z - x)^2 = sigma_z^2 for a sample x of x | z. White deviations of the same size tell unseen entries nothing of their
neighbours, and cost more than they give (docs/method.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from emdiff.data import Observations
from emdiff.denoise import Denoiser
from emdiff.linalg import lanczos_sqrt

LANCZOS = 4
"""Products for V^(1/2). On noisy digits 2 leave twice the white grain where V is next to 0 (std .053 in the corners, .028 with 4), and from 6 on more
negative eigenvalues of a learned V count as 0."""

FEW = 32
"""Entries to hide at least, if half of those seen are as many."""

SPREAD = (0.25, 1.5)
"""Range of c^2."""


def hidden_variance(denoiser: Denoiser, data: Observations, generator: torch.Generator | None = None, share: float = 0.05) -> float:
    """The variance of an entry given the others, v: the mean of (z - xhat)^2 - sigma_z^2 over a share of the observed entries that xhat is not shown.

    Args:
        denoiser: Trained on recorrupted observations, these not among them.
        data: Observations, each a measurement of x.
        generator: Source of randomness.
        share: Of the observed entries that are hidden at once; more where that would be fewer than FEW of them, but at most half.

    Returns:
        v, 0 at least; 0 where nothing could be hidden.
    """
    z, sigma_z = data.observer.as_measurement(data.obs)
    sigma_z = sigma_z.expand(z.shape)
    seen = sigma_z.isfinite()
    hide = seen & (_uniform(z, generator) < min(0.5, max(share, FEW / max(1, int(seen.sum())))))
    if not bool(hide.any()):
        return 0.0
    with torch.no_grad():
        excess = (z - _without(denoiser, z, sigma_z, hide)).square() - sigma_z.square()
    return max(float(excess[hide].mean()), 0.0)


class Deviations(NamedTuple):
    """What first samples' deviations are scaled by.

    Attributes:
        c: Factor, where every entry was observed.
        v: Variance of an entry given the others, where some were not; 0 for none.
    """

    c: float = 1.0
    v: float = 0.0


def deviations(denoiser: Denoiser, parts: Iterable[Observations], generator: torch.Generator | None = None) -> Deviations:
    """Measure, without any truth, how far first samples have to deviate.

    Args:
        denoiser: Trained on recorrupted observations, these not among them.
        parts: Batches of observations, each a measurement of x.
        generator: Source of randomness.

    Returns:
        Deviations, c^2 within SPREAD.

    Raises:
        ValueError: no observations to measure them on.
    """
    error, square, hidden, count = 0.0, 0.0, [], 0
    for part in parts:
        count += len(part)
        z, sigma_z = part.observer.as_measurement(part.obs)
        if not bool(sigma_z.isfinite().all()):
            hidden.append(hidden_variance(denoiser, part, generator))
            continue
        xhat, V = denoiser.moments(z[:, None], sigma_z[:, None])
        xi = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        error += float(((z - xhat).square() - sigma_z.square() + 2 * xi * V(xi)).sum())
        square += float(lanczos_sqrt(V, xi, LANCZOS).square().sum())
    if not count:
        raise ValueError("deviations are measured on observations that training did not see, and there are none")
    low, high = SPREAD
    c = 1.0 if square == 0 else min(max(error / square, low), high) ** 0.5
    return Deviations(c, sum(hidden) / max(1, len(hidden)))


def first_samples(denoiser: Denoiser, data: Observations, generator: torch.Generator | None = None, by: Deviations = Deviations()) -> Tensor:
    """Samples of x | obs from the self-supervised estimator.

    Args:
        denoiser: Trained on recorrupted observations.
        data: A batch of observations, each a measurement of x.
        generator: Source of randomness.
        by: How far they deviate from the estimates (`deviations`).

    Returns:
        Samples (B, *S).
    """
    z, sigma_z = data.observer.as_measurement(data.obs)
    if not bool(sigma_z.isfinite().all()):
        return _deviated(denoiser, z, sigma_z.expand(z.shape), by.v, generator)
    xhat, V = denoiser.moments(z[:, None], sigma_z[:, None])
    return xhat + by.c * lanczos_sqrt(V, torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device), LANCZOS)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _without(denoiser: Denoiser, z: Tensor, sigma_z: Tensor, hide: Tensor) -> Tensor:
    """The estimate from z (B, *S) without the entries to hide, bool (B, *S)."""
    sigma = torch.where(hide, math.inf, sigma_z)
    return denoiser.xhat(torch.where(sigma.isinf(), 0.0, z)[:, None], sigma[:, None])


@torch.no_grad()
def _deviated(denoiser: Denoiser, z: Tensor, sigma_z: Tensor, v: float, generator: torch.Generator | None) -> Tensor:
    """xhat(z) +- c D, shape (B, *S); no deviation where v is 0."""
    xhat, seen = denoiser.xhat(z[:, None], sigma_z[:, None]), sigma_z.isfinite()
    if v == 0:
        return xhat
    D = xhat - _without(denoiser, z, sigma_z, seen & (_uniform(z, generator) < 0.5))
    at_seen = (sigma_z.square() - (z - xhat).square())[seen].mean().clamp(min=0)
    c = lambda wanted, part: (wanted / D[part].square().mean().clamp(min=1e-12)).sqrt()  # noqa: E731
    D = torch.where(seen, c(at_seen, seen), c(v, ~seen)) * D
    sign = torch.where(_uniform(z.flatten(1)[:, 0], generator) < 0.5, -1.0, 1.0).reshape(-1, *[1] * (z.ndim - 1))
    return xhat + sign * D
