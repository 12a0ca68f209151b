r"""The scale of the data: emdiff works on (x - mean) / std and hands everything back in the user's units.

mean and std are scalars estimated from the observations alone, as the moments of a white x:

    mean = argmin_m sum_i |obs_i - m A_i 1|^2 / n_i^2,
    std^2 = sum_i (|obs_i - mean A_i 1|^2 - tr cov_obs_i) / n_i^2  /  sum_i tr(A_i At_i) / n_i^2

with n_i^2 the mean noise variance of datum i, and tr(A At) by Hutchinson's estimate E |A xi|^2 over random signs xi. With A = I these are the
plain mean and standard deviation of all entries, less the noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emdiff.data import Data, Observations, View, batches
from emdiff.errors import UsageError


class Scale(NamedTuple):
    """The affine map between the user's units and standardised data.

    Attributes:
        mean: In the user's units.
        std: In the user's units, positive.
    """

    mean: float
    std: float

    def standardise(self, x: Tensor) -> Tensor:
        """(x - mean) / std, any shape."""
        return (x - self.mean) / self.std

    def restore(self, x: Tensor) -> Tensor:
        """mean + std x, any shape: back to the user's units."""
        return self.mean + self.std * x

    def observations(self, data: Observations) -> Observations:
        """The observations that standardised data would have given: (obs - A mean) / std, with noise_std / std."""
        ones = data.obs.new_full((1, *data.shape), self.mean)
        shift = torch.cat([part.observer.forward(ones.expand(len(part), *data.shape)) for _, part in batches(data)])
        observer = data.observer.with_noise(data.observer.noise_std / self.std)
        return Observations((data.obs - shift) / self.std, observer)

    def view(self, data: Data) -> View:
        """The same, made when asked for."""
        return View(len(data), data.shape, lambda index: self.observations(data.rows(index)))


def estimate_scale(data: Data, generator: torch.Generator) -> Scale:
    """Estimate mean and std of x from its observations.

    Args:
        data: Observations in the user's units.
        generator: Source of randomness for the trace estimate, on the CPU.

    Returns:
        Scale(mean, std).

    Raises:
        UsageError: if the observations vary no more than their noise alone would.
    """
    top = bottom = 0.0
    for _, part in batches(data):
        one = part.observer.forward(part.obs.new_ones(len(part), *data.shape))
        w = _weights(part)
        top += float((w * (one * part.obs).flatten(1).sum(1)).sum())
        bottom += float((w * one.square().flatten(1).sum(1)).sum())
    mean = top / max(bottom, 1e-30)
    power = noise = trace = 0.0
    for _, part in batches(data):
        ones = part.obs.new_full((len(part), *data.shape), mean)
        signs = torch.randint(0, 2, ones.shape, generator=generator).to(ones) * 2 - 1
        variance = (part.observer.std().square() * part.observer.observed()).expand(part.obs.shape)
        w = _weights(part)
        power += float((w * (part.obs - part.observer.forward(ones)).square().flatten(1).sum(1)).sum())
        noise += float((w * variance.flatten(1).sum(1)).sum())
        trace += float((w * part.observer.forward(signs).square().flatten(1).sum(1)).sum())
    variance_x = (power - noise) / max(trace, 1e-30)
    if not variance_x > 1e-3 * noise / max(trace, 1e-30) * (100 / len(data)) ** 0.5:
        raise UsageError(
            f"the observations vary by {(power / max(noise, 1e-30)) ** 0.5:.4g} times their stated noise_std, which leaves no signal to learn: "
            "check the noise level (it is in the units of the observations) and give the right one with --noise-std"
        )
    return Scale(mean, variance_x**0.5)


def _weights(part: Observations) -> Tensor:
    """1 / n_i^2 of each datum, shape (B,)."""
    variance = part.observer.std().square()
    return variance.expand(part.obs.shape).flatten(1).mean(1).reciprocal()
