r"""The Gaussian multimeasurement noise model: x is measured M times, y_m = x + sigma_m eps_m.

All that y says of x is said by the precision-weighted mean

    ybar = tau^2 sum_m y_m / sigma_m^2,    tau = (sum_m sigma_m^-2)^(-1/2),    ybar | x ~ N(x, tau^2),

so p(x | y) = p(x | ybar). A level may differ between data and between entries of x, and may be infinite: that entry was not measured.
An observation whose At cov_obs^-1 A is diagonal is therefore one more measurement.

Source: Multimeasurement Generative Models (Saremi & Srivastava 2022), Sec. 2.2; the sufficiency of ybar is the factorisation theorem.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Pooled(NamedTuple):
    """The sufficient statistic of M measurements.

    Attributes:
        ybar: Precision-weighted mean, shape (B, *S); 0 where nothing was measured.
        precision: 1 / tau^2 >= 0, broadcastable against ybar.
    """

    ybar: Tensor
    precision: Tensor


def align(sigma: Tensor, y: Tensor) -> Tensor:
    """Give noise levels as many axes as measurements have.

    Args:
        sigma: Levels, shape () or (M,) or (B or 1, M, ...), trailing axes may be missing.
        y: Measurements (B, M, *S).

    Returns:
        The levels, shape (1, M, 1, ...) or (B or 1, M, ...), broadcastable against y.

    >>> align(torch.tensor([1.0, 2.0]), torch.zeros(5, 2, 28, 28)).shape
    torch.Size([1, 2, 1, 1])
    """
    if sigma.ndim <= 1:
        return sigma.reshape(1, -1, *[1] * (y.ndim - 2))
    return sigma.reshape(*sigma.shape, *[1] * (y.ndim - sigma.ndim))


def effective(sigma: Tensor) -> Tensor:
    """tau = (sum_m sigma_m^-2)^(-1/2) of levels (M,); sigma / sqrt(M) for equal ones. Shape ()."""
    return sigma.square().reciprocal().sum(-1).rsqrt()


def pool(y: Tensor, sigma: Tensor) -> Pooled:
    """Reduce measurements to their sufficient statistic.

    Args:
        y: Measurements (B, M, *S), finite everywhere.
        sigma: Noise levels as in `align`; infinite where an entry was not measured.

    Returns:
        Pooled(ybar, precision).

    >>> pool(torch.tensor([[[1.0], [3.0]]]), torch.tensor([1.0, 1.0])).ybar
    tensor([[2.]])
    """
    weight = align(sigma, y).square().reciprocal()
    if y.shape[1] == 1:
        return Pooled(torch.where(weight > 0, y, 0.0)[:, 0], weight[:, 0])
    weight = weight.expand(-1, y.shape[1], *weight.shape[2:])
    precision = weight.sum(1)
    return Pooled((weight * y).sum(1) / torch.where(precision > 0, precision, 1.0), precision)


def measure(x: Tensor, sigma: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw y_m = x + sigma_m eps_m.

    Args:
        x: Clean data (B, *S).
        sigma: Finite levels, shape (M,) or (B or 1, M, ...).
        generator: Source of randomness.

    Returns:
        Measurements (B, M, *S).
    """
    M = 1 if sigma.ndim == 0 else sigma.shape[0] if sigma.ndim == 1 else sigma.shape[1]
    y = x[:, None].expand(-1, M, *x.shape[1:])
    return y + align(sigma, y) * torch.randn(y.shape, generator=generator, dtype=x.dtype, device=x.device)


def log_likelihood(y: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """log p(y | x) = sum_m log N(y_m; x, sigma_m^2 I), shape (B,), for finite levels (eq. 6)."""
    s = align(sigma, y).expand(y.shape)
    terms = -0.5 * ((y - x[:, None]) / s).square() - s.log() - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).sum(1)
