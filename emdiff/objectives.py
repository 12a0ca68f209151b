r"""Objectives of Multimeasurement Generative Models (Saremi & Srivastava 2022): x is known, its measurements are drawn anew for every step.

With the M squared errors L^(m) = E |x - xhat^(m)(y)|^2 (eq. 12):

    mean       (1/M) sum_m L^(m)                                                    (eq. 14)
    softmax    sum_m w_m L^(m),   w = softmax(L^(1), ..., L^(M)), not differentiated: the larger losses count more   (Sec. 3.1)
    mdsm       sum_m E |-grad_m f(y) + (y_m - x)/sigma_m^2|^2 = sum_m L^(m) / sigma_m^4                              (eq. 16)

For equal levels mdsm is M/sigma^4 times the mean. It equals the score-matching objective E |grad f + grad log p(y)|^2 (eq. 15) up to a constant for
any levels.

A pooled denoiser has one estimate for all m, and any level can be trained: `ManyLevels` draws them, `OneSet` is the paper's. Where it shall meet
observations of which entries are missing or noisier than others, it is shown such levels too: `patchy`.
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
        masks: Let entries of half of the data have levels of their own (patchy).
    """

    def __init__(self, data: Batches, tau_last: float, tau_first: float, masks: bool = False) -> None:
        super().__init__(data)
        self.tau_last, self.tau_first, self.masks = tau_last, tau_first, masks

    def __call__(self, denoiser: Denoiser, stored: Any, generator: torch.Generator) -> Tensor:
        """The mean of `denoiser.loss` over a batch of what is stored, shape ()."""
        x = self.data.batch(stored, generator)
        tau = self.levels(len(x), generator).reshape(-1, *[1] * (x.ndim - 1))
        if self.masks:
            tau = patchy(tau, self.levels(len(x), generator).reshape(tau.shape), tuple(x.shape[1:]), generator)
        y = torch.where(tau.isinf(), 0.0, x + tau * torch.randn(x.shape, generator=generator, device=x.device))
        return denoiser.loss(x, y[:, None], tau[:, None]).mean()

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Levels (count,), one from each of `count` equal shares of the log-normal's mass, shuffled."""
        like = {"generator": generator, "device": generator.device}
        share = ((torch.rand(count, **like) + torch.arange(count, device=generator.device)) / count)[torch.randperm(count, **like)]
        return (CENTRE + WIDTH * math.sqrt(2) * torch.erfinv(2 * share.clamp(1e-3, 1 - 1e-3) - 1)).exp().clamp(self.tau_last, self.tau_first)


def patchy(tau: Tensor, other: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Levels of data of which an observation saw a part: half of the data keep theirs; of each other one a random share of the entries has the finer
    of its two levels, the rest the coarser or, of every fourth, none.

    Args:
        tau, other: Levels (B, 1, ...).
        shape: S. Where it has two axes or more, entries of half of the data are seen or missed in squares of 2, 4 or 8 along the last two, and all
            that lie behind one another along the others together in half.
        generator: On the levels' device.

    Returns:
        Levels (B, *S), infinite where nothing was measured.
    """
    B, like = len(tau), {"generator": generator, "device": tau.device}
    draw = lambda: torch.rand(tau.shape, **like)  # noqa: E731
    field = torch.rand(B, *shape, **like)
    if len(shape) > 1:
        side = 2 ** torch.randint(-2, 4, (B, 1, 1, 1), **like).clamp(min=0)
        field = field.reshape(B, -1, *shape[-2:])
        field = torch.where(torch.rand(B, 1, 1, 1, **like) < 0.5, field[:, :1], field)
        for axis in (2, 3):
            at = torch.arange(field.shape[axis], device=tau.device).reshape(-1, *[1] * (3 - axis)) // side
            field = field.gather(axis, at.expand(field.shape))
        field = field.reshape(B, *shape)
    rest = torch.where(draw() < 0.25, math.inf, torch.maximum(tau, other))
    levels = torch.where(field < draw(), torch.minimum(tau, other), rest)
    return torch.where(draw() < 0.5, tau, levels)
