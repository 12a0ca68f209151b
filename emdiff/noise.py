r"""Noise levels that nobody knows, and noise that depends on the signal: what is taken for them at the start, and what EM makes of them.

Unknown level, cov_obs = n^2 I. The covariance of the observations is that of A x plus n^2 I, so the variance of any direction bounds n^2 from above,
closely where A x has next to none. The start is the least of three such bounds: of the entries that vary least, of the whole observations' smallest
eigenvalues, and, as smooth signals leave high frequencies empty, of the least eigenvalue of small patches; the last two where all is observed. Then
the M-step, with x ~ p(x | obs),

    n^2 = E |obs - A x|^2 / dim + w^2,     |obs - A x|^2 = E |obs - A y|^2 - tau^2 tr A At   for y = x + tau eps, independent of obs given x:

the walk's last measurement y carries the spread V[x | obs] that its jump lacks, so nothing has to be drawn. For w = 0 this is EM's exact M-step. But
x + (n^2 - m^2)^(1/2) eps with noise m < n gives the same observations: EM stays on the line n^2 + w^2 = const, w^2 the white part of A x, and drifts
along it as the prior takes up noise (by 6 % in five rounds on vectors in a plane, from a start that was 1 % off). Observations only tell the largest
n; so the white part that the prior has taken is given back, measured as at the start.

Counts (observers.noise.Poisson) have the variance g A x + s^2 of an estimate of A x: at the start each entry shrunk towards its mean over the data,
in later rounds A of the last samples.

Sources: EM for the noise of a linear model, Dempster, Laird & Rubin (1977), Sec. 4.5; the smallest eigenvalue of patches, Chen, Zhu & Heng (2015), An
efficient statistical method for image noise level estimation.
"""

from __future__ import annotations

import math

import torch
from scipy.stats import chi2
from torch import Tensor

from emdiff.data import Data, Observations, View, batches
from emdiff.rows import Array, evenly
from observers.noise import Poisson

QUANTILE = 0.1
"""Share of entries, or directions, that are taken for empty at the start."""

PATCH = 7
"""Side of the patches of images; series have patches of 16."""

MOST = 2048
"""Data from which the start is taken."""


def first_noise(data: Data) -> float:
    """n at the start, from at most MOST evenly spaced data: the least of three upper bounds."""
    some = data.rows(evenly(len(data), MOST))
    return math.sqrt(white_part(some.obs, some.observer.observed()))


def white_part(a: Tensor, seen: Tensor) -> float:
    """The variance of the directions in which vectors a (N, *O) vary least, over what was seen, bool (N or 1, *O or ones): an upper bound on the
    variance of white noise in them."""
    seen = seen.to(a.device).expand(a.shape)
    a = torch.where(seen, a, 0.0).double()
    bounds = [_of_entries(a.flatten(1), seen.flatten(1).double())]
    if bool(seen.all()):
        bounds += [_of_spectrum(a.flatten(1)), *_of_patches(a)]
    return max(min(bounds), 1e-12 * float(a.square().mean()))


def _of_entries(obs: Tensor, seen: Tensor) -> float:
    """From the variance of each entry over the data that saw it, (N, o): their QUANTILE over that of chi-squared with as many degrees of freedom."""
    count = seen.sum(0)
    keep = count > 10
    if not bool(keep.any()):
        return math.inf
    mean = (obs * seen).sum(0) / count.clamp(min=1)
    variance = (((obs - mean) * seen).square().sum(0) / (count - 1).clamp(min=1))[keep]
    freedom = float(count[keep].median()) - 1
    return float(variance.quantile(QUANTILE)) / (float(chi2.ppf(QUANTILE, freedom)) / freedom)


def _of_spectrum(obs: Tensor) -> float:
    """From the eigenvalues of the covariance of whole observations (N, o): their QUANTILE over that of the law of Marchenko and Pastur."""
    Y = obs - obs.mean(0)
    N, o = Y.shape
    eigenvalues = torch.linalg.eigvalsh(Y.T @ Y / (N - 1) if o <= N else (Y @ Y.T)[1:, 1:] / o)
    return float(eigenvalues.quantile(QUANTILE)) / _marchenko_pastur(QUANTILE, min(o / N, N / o))


def _marchenko_pastur(share: float, ratio: float) -> float:
    """The quantile of the eigenvalues of a sample covariance of white noise of variance 1, entries over data (or data over entries) = ratio <= 1."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    angle = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    x = (low + high) / 2 - (high - low) / 2 * angle.cos()
    mass = (angle.sin().square() / x.clamp(min=1e-12)).cumsum(0)
    return float(x[int((mass < share * mass[-1]).sum())])


def _of_patches(obs: Tensor) -> list[float]:
    """From the least eigenvalue of the covariance of small patches of (N, *O); none where O is too small, or has one axis."""
    if obs.ndim > 2 and min(obs.shape[-2:]) >= PATCH:
        patches = obs.unfold(-2, PATCH, 2).unfold(-2, PATCH, 2).reshape(-1, PATCH * PATCH)
    elif obs.shape[-1] >= 64 and obs.ndim > 2:
        patches = obs.unfold(-1, 16, 4).reshape(-1, 16)
    else:
        return []
    centred = patches - patches.mean(0)
    least = float(torch.linalg.eigvalsh(centred.T @ centred / len(patches))[0])
    return [least / (1 - min(math.sqrt(patches.shape[1] / len(patches)), 0.5)) ** 2]


def with_level(data: Data, n: float) -> View:
    """The same observations with noise of standard deviation n."""

    def change(part: Observations) -> Observations:
        return Observations(part.obs, part.observer.with_noise(part.obs.new_tensor(n)))

    return View(len(data), data.shape, lambda index: change(data.rows(index)))


def updated_level(data: Data, x: Array, tau: float, generator: torch.Generator) -> float:
    """The M-step for n: (E |obs - A x|^2 / dim + w^2)^(1/2), w^2 the white part of A x.

    Args:
        data: Observations (N, *O), in any units; n is in the same.
        x: For each a sample of x | obs (tau = 0), or a measurement of level tau of one (N, *S).
        tau: Its level.
        generator: For the trace of A At, on the CPU.
    """
    total = dim = 0.0
    for where, part in batches(data):
        seen = part.observer.observed().expand(part.obs.shape)
        y = x[where].to(part.obs)
        total += float(((part.obs - part.observer.forward(y)) * seen).double().square().sum())
        if tau:
            total -= tau**2 * _power(part, generator)
        dim += float(seen.sum())
    return math.sqrt(max(total / dim + _absorbed(data, x, tau, generator), 1e-12))


def _power(part: Observations, generator: torch.Generator) -> float:
    """An unbiased estimate of tr A At over the data and what was observed."""
    signs = torch.randint(0, 2, (len(part), *part.shape), generator=generator).to(part.obs) * 2 - 1
    return float((part.observer.forward(signs) * part.observer.observed()).double().square().sum())


def _absorbed(data: Data, x: Array, tau: float, generator: torch.Generator) -> float:
    """The white part w^2 of A x, at least 0; with a measurement for x, less what its level adds. Where A picks entries, that of x itself, of which no
    entry is hidden."""
    index = evenly(len(data), MOST)
    some, y = data.rows(index), x[index]
    if some.observer.as_measurement(some.obs) is not None:
        return max(white_part(y, torch.ones([1] * y.ndim, dtype=torch.bool)) - tau**2, 0.0)
    seen = some.observer.observed()
    added = tau**2 * _power(some, generator) / float(seen.expand(some.obs.shape).sum()) if tau else 0.0
    return max(white_part(some.observer.forward(y.to(some.obs)), seen) - added, 0.0)


def depends_on_signal(data: Data) -> bool:
    """Whether the noise is that of counts."""
    return isinstance(data.rows(slice(0, 1)).observer.noise, Poisson)


def with_counts(data: Data, x: Array | None) -> View:
    """The same observations with the variance of their counts taken from x (N, *S), or from the observations themselves."""
    if x is None:
        mean, variance = _moments(data)

    def change(part: Observations, index: Tensor | slice) -> Observations:
        if x is not None:
            estimate = part.observer.forward(x[index].to(part.obs))
        else:
            noise = part.observer.noise.at(part.obs.clamp(min=0)).std(tuple(part.obs.shape[1:])).square()
            signal = (variance - noise).clamp(min=0)
            estimate = mean + signal / (signal + noise) * (part.obs - mean)
        return Observations(part.obs, part.observer.with_noise(part.observer.noise.at(estimate)))

    return View(len(data), data.shape, lambda index: change(data.rows(index), index))


def _moments(data: Data) -> tuple[Tensor, Tensor]:
    """Mean and variance of each entry of obs over the data that saw it, (*O,)."""
    first = second = count = 0.0
    for _, part in batches(data):
        seen = part.observer.observed().expand(part.obs.shape)
        first, second, count = first + part.obs.sum(0).double(), second + part.obs.double().square().sum(0), count + seen.sum(0)
    mean = first / torch.as_tensor(count).clamp(min=1)
    return mean.float(), (second / torch.as_tensor(count).clamp(min=1) - mean**2).clamp(min=0).float()
