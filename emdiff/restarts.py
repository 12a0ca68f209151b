"""Several fits of a mixture to the same observations: their starts, and which of them ended at a maximum worth keeping (components says why)."""

from __future__ import annotations

import math
import warnings

import torch
from scipy.cluster.vq import kmeans2

from emdiff.deconvolution import Fit, Mixture, Whitened, clipped, fit
from emdiff.mixture import MixtureDenoiser

CLUSTERS = 16
"""Clusters for further starts of each fit, in all: more starts of few, where bad maxima are. As many components or more start from clusters only."""


def starts(components: int) -> int:
    """How many starts a fit has at least, where that can be afforded."""
    return 1 + min(components, CLUSTERS // components) * (1 < components < CLUSTERS)


def fits_from(
    J: int, model: Mixture, one: Mixture, data: Whitened, floor: float, count: int, iterations: int, plain: bool, generator: torch.Generator
) -> list[Fit]:
    """Fits of J components from several starts.

    Args:
        J: Components.
        model: The first start, of J components; not used where J >= CLUSTERS and EM is plain.
        one: A Gaussian fitted to the observations; under it x is drawn for the other starts (clustered).
        data: Observations.
        floor: Least eigenvalue of a covariance.
        count: Fits.
        iterations: Most E-steps of each.
        plain: Take plain steps instead of accelerated ones.
        generator: Source of randomness, on the CPU.

    Returns:
        `count` fits, that of `model` first.
    """
    first = [] if plain and J >= CLUSTERS else [model]
    others = [clustered(J, one, data, floor, generator) for _ in range(count - len(first))]
    return [fit(start, data, floor, iterations, accelerated=not plain) for start in [*first, *others]]


def good(fits: list[Fit], count: int) -> list[Fit]:
    """Fits to `count` observations without those of a bad maximum: less likely than the best by more than half a unit for each parameter. Among
    the others the likelihood says how far a fit has followed the noise, so they stay in the order they come in.

    >>> like = lambda value: Fit(Mixture(torch.ones(2), torch.zeros(2, 1), torch.ones(2, 1, 1)), value, 1)
    >>> [f.log_likelihood for f in good([like(-1.01), like(-1.0), like(-1.03)], 100)]  # of 5 parameters
    [-1.01, -1.0]
    """
    (J, d), best = fits[0].mixture.means.shape, max(f.log_likelihood for f in fits)
    return [f for f in fits if count * (best - f.log_likelihood) <= (J * (1 + d + d * (d + 1) / 2) - 1) / 2]


def clustered(components: int, one: Mixture, data: Whitened, floor: float, generator: torch.Generator) -> Mixture:
    """Weights, means (J, d) and covariances (J, d, d) of clusters (k-means) of one draw of x | obs under `one` Gaussian for every observation.

    Clusters of at most d + 1 draws are left out, so that J can be less than `components`; it is at least 1. Source: k-means++ (Arthur & Vassilvitskii
    2007), scipy.cluster.vq.kmeans2.
    """
    N, d = len(data.obs), one.means.shape[1]
    draw = MixtureDenoiser(*one).given(data).draw(one.means.new_zeros(N, 1, d), one.means.new_tensor([math.inf]), generator)
    seed = int(torch.randint(2**31, (), generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty cluster is left out below
        label = torch.from_numpy(kmeans2(draw.numpy(), min(components, N), minit="++", seed=seed)[1])
    parts = [part for j in range(components) if len(part := draw[label == j]) > d + 1] or [draw]
    weights = torch.tensor([float(len(part)) for part in parts], dtype=draw.dtype)
    covs = torch.stack([torch.cov(part.T).reshape(d, d) for part in parts])
    return Mixture(weights / weights.sum(), torch.stack([part.mean(0) for part in parts]), clipped(covs, floor))


def average(models: list[Mixture], shares: list[float] | None = None) -> Mixture:
    """The mixture of mixtures, in these shares of any sum, or all alike."""
    shares = shares or [1.0] * len(models)
    weights, means, covs = (torch.cat(parts) for parts in zip(*models))
    each = torch.cat([torch.full_like(model.weights, share / sum(shares)) for model, share in zip(models, shares)])
    return Mixture(weights * each, means, covs)
