r"""Objectives of Multimeasurement Generative Models (Saremi & Srivastava 2022): x is known, its measurements are drawn anew for every step.

With the M squared errors L^(m) = E |x - xhat^(m)(y)|^2 (eq. 12):

    mean       (1/M) sum_m L^(m)                                                    (eq. 14)
    softmax    sum_m w_m L^(m),   w = softmax(L^(1), ..., L^(M)), not differentiated: the larger losses count more   (Sec. 3.1)
    mdsm       sum_m E |-grad_m f(y) + (y_m - x)/sigma_m^2|^2 = sum_m L^(m) / sigma_m^4                              (eq. 16)

For equal levels mdsm is M/sigma^4 times the mean. It equals the score-matching objective E |grad f + grad log p(y)|^2 (eq. 15) up to a constant for
any levels.

A pooled denoiser has one estimate for all m, and any level can be trained: `ManyLevels` draws them, `OneSet` is the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from emdiff.denoise import Denoiser
from emdiff.measurement import measure

CENTRE, WIDTH = -0.3, 1.3
"""Mean and std of log tau in `ManyLevels`, in units of the data's std."""


def errors(denoiser: Denoiser, x: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
    """L^(m) of every datum: |x - xhat^(m)(y)|^2, shape (B, M)."""
    return (denoiser.nu(y, sigma) - x[:, None]).square().flatten(2).sum(2)


def mean_loss(L: Tensor, sigma: Tensor) -> Tensor:
    """Eq. 14; L (B, M) of `errors`, sigma (M,); shape ()."""
    return L.mean()


def softmax_loss(L: Tensor, sigma: Tensor) -> Tensor:
    """The softmax-weighted sum of the M losses, shape ()."""
    L = L.mean(0)
    return (L.detach().softmax(0) * L).sum()


def mdsm_loss(L: Tensor, sigma: Tensor) -> Tensor:
    """Eq. 16, shape ()."""
    return (L.mean(0) / sigma**4).sum()


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean_loss, "softmax": softmax_loss, "mdsm": mdsm_loss}


class Batches(Protocol):
    """Data that a loss draws from."""

    def read(self, index: Tensor) -> Any:
        """What is stored at indices (B,), where it lies, in terms of `ahead.ahead`."""
        ...

    def batch(self, stored: Any, generator: torch.Generator) -> Tensor:
        """Standardised data (B, *S) from what is stored, both on the generator's device."""
        ...


class CleanLoss:
    """A loss of clean data.

    Args:
        data: Standardised data.
    """

    def __init__(self, data: Batches) -> None:
        self.data, self.read = data, data.read


class OneSet(CleanLoss):
    """The loss of measurements of one set of levels, per entry of x.

    Args:
        data: Standardised data.
        sigma: Levels (M,), in units of the data's std.
        objective: A key of OBJECTIVES.
    """

    def __init__(self, data: Batches, sigma: Tensor, objective: str = "mean") -> None:
        super().__init__(data)
        self.sigma, self.objective = sigma, OBJECTIVES[objective]

    def __call__(self, denoiser: Denoiser, stored: Any, generator: torch.Generator) -> Tensor:
        """The loss of a batch of what is stored, shape ()."""
        x = self.data.batch(stored, generator)
        sigma = self.sigma.to(x)
        return self.objective(errors(denoiser, x, measure(x, sigma, generator), sigma), sigma) / x[0].numel()


class ManyLevels(CleanLoss):
    """The loss of one measurement whose level is log-normal, cut to [tau_last, tau_first] and stratified over the batch.

    Args:
        data: Standardised data.
        tau_last, tau_first: Finest and coarsest level, in units of the data's std.
    """

    def __init__(self, data: Batches, tau_last: float, tau_first: float) -> None:
        super().__init__(data)
        self.tau_last, self.tau_first = tau_last, tau_first

    def __call__(self, denoiser: Denoiser, stored: Any, generator: torch.Generator) -> Tensor:
        """The mean of `denoiser.loss` over a batch of what is stored, shape ()."""
        x = self.data.batch(stored, generator)
        tau = self.levels(len(x), generator).reshape(-1, *[1] * (x.ndim - 1))
        y = x + tau * torch.randn(x.shape, generator=generator, device=x.device)
        return denoiser.loss(x, y[:, None], tau[:, None]).mean()

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Levels (count,), one from each of `count` equal shares of the log-normal's mass, shuffled."""
        like = {"generator": generator, "device": generator.device}
        share = ((torch.rand(count, **like) + torch.arange(count, device=generator.device)) / count)[torch.randperm(count, **like)]
        return (CENTRE + WIDTH * math.sqrt(2) * torch.erfinv(2 * share.clamp(1e-3, 1 - 1e-3) - 1)).exp().clamp(self.tau_last, self.tau_first)
