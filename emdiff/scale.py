r"""The scale of the data: emdiff works on (x - mean) / std and hands everything back in the user's units.

mean and std are estimated from the observations alone, as the moments of an x as smooth as they say (smooth; white for vectors and diagonal A):

    mean = argmin_m sum_i |obs_i - m A_i 1|^2 / n_i^2,
    std^2 = sum_i (|obs_i - mean A_i 1|^2 - tr cov_obs_i) / n_i^2  /  sum_i E |A_i xi|^2 / n_i^2

with n_i^2 the mean noise variance of datum i, and xi of mean 0, variance 1 and that smoothness, for a white x random signs. With A = I these are the
plain mean and standard deviation of all entries, less the noise.

Channels, the first axis of S, have a mean and std each where these differ (`channels`). With 1_c the indicator of channel c, the means solve
the same least squares over A_i 1_c; the variances v solve, with t = At (obs - A mean) and xi_c such draws on channel c and 0 elsewhere,

    sum_i |t_ic|^2 / n_i^2 = sum_c' v_c' sum_i |(At A xi_c')_c|^2 / n_i^2 + sum_i |(At R xi)_c|^2 / n_i^2,       R R^T = cov_obs,

both sides' expectation. All sums are in units of the noise, so that no flux is too small or too large for float32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emdiff.data import Data, Observations, View, batches
from emdiff.errors import UsageError
from emdiff.smooth import correlation_length, smoothed, space
from observers.scaled import Scaled

ALIKE = 1.5
"""Channels whose stds differ by no more than this factor, and their means by half a std, share one scale."""


class Scale(NamedTuple):
    """The affine map between the user's units and standardised data.

    Attributes:
        mean: Of all entries, in the user's units.
        std: Of all entries about it, in the user's units, positive.
        channels: (mean, std) of each channel; empty where one scale serves all.
        space: Axes of S after the channels.
    """

    mean: float
    std: float
    channels: tuple[tuple[float, float], ...] = ()
    space: int = 0

    @classmethod
    def of(cls, stored: list[Any]) -> Scale:
        """From the list that a file holds.

        Raises:
            TypeError, ValueError: It holds something else.
        """
        mean, std, channels, space = [*stored, *[(), 0][len(stored) - 2 :]]
        return cls(float(mean), float(std), tuple((float(m), float(s)) for m, s in channels), int(space))

    def standardise(self, x: Tensor) -> Tensor:
        """(x - mean) / std, any shape that ends in S."""
        mean, std = self._moments(x)
        return (x - mean) / std

    def restore(self, x: Tensor) -> Tensor:
        """mean + std x, any shape that ends in S: back to the user's units."""
        mean, std = self._moments(x)
        return mean + std * x

    def observations(self, data: Observations) -> Observations:
        """The observations that standardised data would have given: (obs - A mean) / std, with noise_std / std.

        With channels, one std divides all: the operator is A diag(std_c / std).
        """
        like = data.obs.new_zeros((1, *data.shape))
        mean, std = self._moments(like)
        centre = like + mean
        shift = torch.cat([part.observer.forward(centre.expand(len(part), *data.shape)) for _, part in batches(data)])
        observer = data.observer.with_noise(data.observer.noise.scaled(1 / self.std, data.observer.obs_shape))
        if self.channels:
            observer = Scaled(observer, (std / self.std).expand(1, -1, *[1] * self.space))
        return Observations((data.obs - shift) / self.std, observer)

    def view(self, data: Data) -> View:
        """The same, made when asked for."""
        return View(len(data), data.shape, lambda index: self.observations(data.rows(index)))

    def _moments(self, x: Tensor) -> tuple[Any, Any]:
        """mean and std, numbers or tensors (C, 1, ...) like x."""
        if not self.channels:
            return self.mean, self.std
        both = torch.tensor(self.channels, dtype=torch.float64).to(x).reshape(-1, 2, *[1] * self.space)
        return both[:, 0], both[:, 1]


def channels(shape: tuple[int, ...]) -> int:
    """Number of channels of data of shape S: its first axis, of 2 to 16 entries, before two axes or more, or one 8 times as long; else 1."""
    many = len(shape) >= 3 or (len(shape) == 2 and shape[1] >= 8 * shape[0])
    return shape[0] if many and 2 <= shape[0] <= 16 else 1


def _units(data: Data) -> float:
    """The noise's typical std, as a power of two, by which everything may be divided without rounding."""
    return 2.0 ** round(math.log2(float(data.rows(slice(0, 1024)).observer.std().double().median())))


def _divided(part: Observations, unit: float) -> Observations:
    return Observations(part.obs / unit, part.observer.with_noise(part.observer.noise.scaled(1 / unit, part.observer.obs_shape)))


def estimate_scale(data: Data, generator: torch.Generator) -> Scale:
    """Estimate mean and std of x from its observations.

    Args:
        data: Observations in the user's units.
        generator: Source of randomness for the trace estimate, on the CPU.

    Returns:
        Scale(mean, std), with channels where these differ.

    Raises:
        UsageError: if the observations vary no more than their noise alone would.
    """
    unit, top, bottom = _units(data), 0.0, 0.0
    for _, part in batches(data):
        part = _divided(part, unit)
        one = part.observer.forward(part.obs.new_ones(len(part), *data.shape))
        w = _weights(part)
        top += float((w * (one * part.obs).flatten(1).sum(1)).sum())
        bottom += float((w * one.square().flatten(1).sum(1)).sum())
    mean, length = top / max(bottom, 1e-30), correlation_length(data, generator)
    power = noise = trace = 0.0
    for _, part in batches(data):
        part = _divided(part, unit)
        ones = part.obs.new_full((len(part), *data.shape), mean)
        xi = _probe(ones, length, generator)
        variance = (part.observer.std().square() * part.observer.observed()).expand(part.obs.shape)
        w = _weights(part)
        power += float((w * (part.obs - part.observer.forward(ones)).square().flatten(1).sum(1)).sum())
        noise += float((w * variance.flatten(1).sum(1)).sum())
        trace += float((w * part.observer.forward(xi).square().flatten(1).sum(1)).sum())
    variance_x = (power - noise) / max(trace, 1e-30)
    if not variance_x > 1e-3 * noise / max(trace, 1e-30) * (100 / len(data)) ** 0.5:
        raise UsageError(
            f"the observations vary by {(power / max(noise, 1e-30)) ** 0.5:.4g} times their stated noise_std, which leaves no signal to learn: "
            "check the noise level (it is in the units of the observations) and give the right one with --noise-std"
        )
    whole = Scale(mean * unit, variance_x**0.5 * unit)
    return whole if channels(data.shape) == 1 else _by_channel(data, unit, whole, length, generator)


def _by_channel(data: Data, unit: float, whole: Scale, length: float, generator: torch.Generator) -> Scale:
    """A scale for each channel, or the whole one where the channels are alike or one of them cannot be told from noise."""
    C, space = channels(data.shape), len(data.shape) - 1
    like = data.rows(slice(0, 1)).obs
    indicator = torch.eye(C, dtype=like.dtype).reshape(C, 1, C, *[1] * space).expand(C, 1, *data.shape)
    G, b = torch.zeros(C, C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    for _, part in batches(data):
        part = _divided(part, unit)
        seen = torch.stack([part.observer.forward(one.expand(len(part), *data.shape)).flatten(1) for one in indicator])
        weighted = seen * _weights(part)[:, None]
        G += torch.einsum("cbo,dbo->cd", seen, weighted).double()
        b += torch.einsum("cbo,bo->c", weighted, part.obs.flatten(1)).double()
    mean = torch.linalg.pinv(G, hermitian=True) @ b
    T, q = torch.zeros(C, C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    centre = mean.to(like).reshape(1, C, *[1] * space).expand(1, *data.shape)
    for _, part in batches(data):
        part, w = _divided(part, unit), _weights(_divided(part, unit))
        power = lambda t, w=w: (w[:, None] * t.flatten(2).square().sum(2)).sum(0).double()
        xi = _probe(part.obs.new_empty(len(part), *data.shape), length, generator)
        noise = torch.randint(0, 2, part.obs.shape, generator=generator).to(part.obs) * 2 - 1
        A, seen = part.observer, part.observer.observed()
        T += torch.stack([power(A.adjoint(A.forward(xi * one))) for one in indicator], dim=1)
        q += power(A.adjoint(part.obs - A.forward(centre.expand(len(part), *data.shape))))
        q -= power(A.adjoint(torch.where(seen, A.noise.colour(noise, seen), 0.0)))
    variance = torch.linalg.pinv(T, rtol=1e-6) @ q
    if not bool((variance > 0).all()):
        return whole
    std = variance.sqrt()
    alike = float(std.max() / std.min()) < ALIKE and float(mean.max() - mean.min()) < 0.5 * float(std.min())
    if alike:
        return whole
    overall = math.sqrt(float(variance.mean() + mean.var(unbiased=False)))
    found = tuple((float(m) * unit, float(s) * unit) for m, s in zip(mean, std))
    return Scale(float(mean.mean()) * unit, overall * unit, found, space)


def _probe(like: Tensor, length: float, generator: torch.Generator) -> Tensor:
    """Draws like (B, *S) of variance 1 and correlation length l: random signs for a white x, whose power is exact where A is diagonal."""
    if not length:
        return torch.randint(0, 2, like.shape, generator=generator).to(like) * 2 - 1
    return smoothed(torch.randn(like.shape, generator=generator).to(like), space(tuple(like.shape[1:])), length)


def _weights(part: Observations) -> Tensor:
    """1 / n_i^2 of each datum, shape (B,)."""
    variance = part.observer.std().square()
    return variance.expand(part.obs.shape).flatten(1).mean(1).reciprocal()
