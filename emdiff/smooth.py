r"""How smooth x is, read off its observations: what operators that weigh directions differently leave open in any second moment.

The power |A x|^2 of a blur, of sampled low frequencies or of averages tells the std of x only together with how x is correlated: a white x loses most
of it, a smooth one next to nothing. So x is taken for stationary with

    Cov[x_i, x_j] = s^2 prod_a exp(-|i_a - j_a| / l)     over its axes of space, and independent over the others,

l = 0 for white. With t = At (obs - A mean) / n, and c0, c1 the sums of t^2 and of t_i t_j over neighbours at LAGS along each axis, l solves

    (c1 - c1 of noise) / (c0 - c0 of noise) = E c1(At A xi_l) / E c0(At A xi_l),

xi_l of that covariance. s^2 cancels; scale takes it from |A x|^2 with the same xi_l. In the Gaussian start that covariance is what directions keep
that no datum sees: next to nothing at high frequencies, where a white one would leave the variance of all others (gaussian).

Where A is diagonal nothing is weighed by direction, and l is left at 0.

Source: method of moments; the separable exponential covariance is that of Ornstein & Uhlenbeck along each axis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emdiff.data import Data
from emdiff.rows import evenly

LENGTHS = (0.0, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
"""Correlation lengths tried, in entries; between them the ratio is interpolated."""

LAGS = (1, 2, 4)

MOST = 512
"""Data looked at."""


def space(shape: tuple[int, ...]) -> int:
    """How many of the last axes of S are space: those of images, volumes and series long enough for a convolutional network; 0 for vectors."""
    if len(shape) == 2 and shape[0] < 8 and shape[1] >= 64:
        return 1
    axes = len(shape) - 1 if len(shape) > 2 else len(shape)
    return axes if 2 <= axes <= 3 and min(shape[-axes:]) >= 8 else 0


def smoothed(eps: Tensor, axes: int, length: float) -> Tensor:
    """White eps (B, *S) as draws of variance 1 that are correlated along the last `axes` axes."""
    if not length:
        return eps
    for axis in range(eps.ndim - axes, eps.ndim):
        root = torch.linalg.cholesky(_exponential(eps.shape[axis], length)).to(eps)
        eps = torch.tensordot(eps, root, dims=([axis], [1])).movedim(-1, axis)
    return eps


def correlation(shape: tuple[int, ...], length: float, rank: int) -> tuple[Tensor, Tensor]:
    """The correlation of x as W W^T + diag(psi): its first `rank` principal components, and the variance that is left; (d, rank) and (d,)."""
    axes = space(shape)
    along = [_exponential(n, length if i >= len(shape) - axes else 0.0) for i, n in enumerate(shape)]
    values, bases = zip(*map(torch.linalg.eigh, along))
    flat = values[0]
    for other in values[1:]:
        flat = (flat[:, None] * other).flatten()
    top = flat.topk(min(rank, len(flat)))
    W = torch.ones(1, len(top.indices), dtype=torch.float64)
    for basis, index in zip(bases, torch.unravel_index(top.indices, shape)):
        W = (W[:, None] * basis[:, index]).flatten(0, 1)
    W = W * top.values.clamp(min=0).sqrt()
    return W.float(), (1 - W.square().sum(1)).clamp(min=0).float()


def correlation_length(data: Data, generator: torch.Generator | None = None) -> float:
    """The length l of x in entries, from at most MOST evenly spaced data; 0 for vectors, and where A is diagonal.

    Args:
        data: Observations, in any units.
        generator: Source of randomness, on the CPU.
    """
    axes = space(data.shape)
    some = data.rows(evenly(len(data), MOST))
    A = some.observer
    if not axes or A.diagonal() is not None:
        return 0.0
    seen, std = A.observed(), A.std().expand(len(A.std()), *A.obs_shape).square().flatten(1).mean(1).sqrt()
    weight = (1 / std).reshape(-1, *[1] * len(data.shape))
    one = A.forward(some.obs.new_ones(len(some), *data.shape))
    mean = (one * some.obs).sum() / one.square().sum().clamp(min=torch.finfo(one.dtype).tiny)
    noise = A.noise.colour(torch.randn(some.obs.shape, generator=generator).to(some.obs), seen)
    found, of_noise = (_power(weight * A.adjoint(w), axes) for w in (some.obs - mean * one, torch.where(seen, noise, 0.0)))
    c0, c1 = found.sum(1) - of_noise.sum(1)
    if not c0 > 4 * math.sqrt(len(some)) * (found[0].var() + of_noise[0].var()).sqrt():
        return 0.0  # not told from noise
    eps, ratios = torch.randn(len(some), *data.shape, generator=generator).to(some.obs), []
    for length in LENGTHS:
        s0, s1 = _power(weight * A.adjoint(A.forward(smoothed(eps, axes, length))), axes).sum(1)
        ratios.append(float(s1 / s0))
        if ratios[-1] >= float(c1 / c0):
            break
    return _crossing(float(c1 / c0), ratios)


def _crossing(wanted: float, ratios: list[float]) -> float:
    """Where the ratios, of the first of LENGTHS, reach what is wanted; the last length where they do not."""
    k = len(ratios) - 1
    if ratios[k] < wanted or k == 0:
        return LENGTHS[k]
    share = (wanted - ratios[k - 1]) / (ratios[k] - ratios[k - 1])
    return LENGTHS[k - 1] + share * (LENGTHS[k] - LENGTHS[k - 1])


def _exponential(n: int, length: float) -> Tensor:
    """exp(-|i - j| / length), (n, n), float64."""
    i = torch.arange(n, dtype=torch.float64)
    return torch.exp(-(i[:, None] - i).abs() / max(length, 1e-6))


def _power(t: Tensor, axes: int) -> Tensor:
    """Sums of t^2 and of products of neighbours of each datum of (B, *S), (2, B)."""
    t = t.double()
    pairs = [t.narrow(a, lag, t.shape[a] - lag) * t.narrow(a, 0, t.shape[a] - lag) for a in range(t.ndim - axes, t.ndim) for lag in LAGS]
    return torch.stack([t.square().flatten(1).sum(1), sum(pair.flatten(1).sum(1) for pair in pairs)])
