r"""Accumulating measurements: one M-density walked from its first measurement to its last.

Appending measurements to y lowers the effective noise from tau to tau' < tau. The old measurements stay; were x known, the mean would be

    ybar' = (tau'/tau)^2 ybar + (1 - (tau'/tau)^2) x + tau' sqrt(1 - (tau'/tau)^2) eps.

x is not known; a *prediction* puts the jump xhat(y) in its place, which drops the spread V[x | y] of x about the jump. In the limit of many
small steps that is exact (stochastic localisation), but its error is of first order in the step h = 1 - (tau'/tau)^2. The *correction* returns the
lost spread at no cost. The prediction moved y' by noise e from its mean; the jump responds by w = xhat(y') - xhat(y) = J' e, with J' the Jacobian of
xhat at tau'. Were x normal given y, e would have to have the covariance tau'^2 h (I - h J')^-1 instead of tau'^2 h I:

    ybar'' = mean + (I - h J')^(-1/2) e = ybar' + h/2 w + 3/8 h^2 J' w + ...  ~  ybar' + ((1 - h r)^(-1/2) - 1)/r w,   r = w.w / w.e,

with r, the slope of the directions that respond, in the place of J'. xhat' + r (ybar'' - ybar') serves as the next prediction, so each level costs
one evaluation of the denoiser. In one dimension this is exact for normal x at any number of levels; along a direction of slope j among others a level
changes the variance by a factor 1 + 3/4 h^2 j (r - j) + O(h^3), where r = 0 (half of w) gives 1 - 3/4 h^2 j^2, and no correction 1 - h j
(docs/method.md; tests/test_accumulate.py computes these without sampling).

Where a denoiser's estimates are no martingale (moment matching), w holds more than J' e, r would make too much of it, and half of w is added: the
first term of the series.

Between levels the walk may take Langevin steps at the current tau.

Sources: Chain of log-concave Markov chains (Saremi, Park & Bach 2023); for the limit, Sampling from the Sherrington-Kirkpatrick Gibbs
measure via algorithmic stochastic localization (El Alaoui, Montanari & Sellke 2022); the correction is derived in docs/method.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from emdiff.denoise import Denoiser
from emdiff.langevin import Step, sachs, start_velocity, walk

STEEPEST = 0.98
"""Largest h r that a correction reckons with; 1 is that of the first measurement of what is not known at all."""


class Sample(NamedTuple):
    """What a walk over accumulating measurements ends with.

    Attributes:
        y: The last mean of the measurements, shape (B, *S), of level tau.
        xhat: The jump from there, shape (B, *S).
        tau: The last level.
    """

    y: Tensor
    xhat: Tensor
    tau: float


def levels(tau_first: float, tau_last: float, count: int, n: float = math.inf) -> list[float]:
    """Levels of a walk, the coarsest first, such that the levels fused with an observation of noise n fall geometrically.

    With n infinite this is a plain geometric sequence from tau_first; else the fused noise (tau^-2 + n^-2)^(-1/2) of the sequence is
    geometric, which spends the levels where the observation leaves something to learn. tau_first may be infinite if n is finite; the level
    itself is then left out, since nothing has been measured there.

    Raises:
        ValueError: for fewer than 2 levels.

    >>> [round(t, 3) for t in levels(8.0, 1.0, 3)]
    [8.0, 2.828, 1.0]
    """
    if count < 2:
        raise ValueError(f"{count} levels; a walk has at least 2")
    fuse = lambda tau: (tau**-2 + n**-2) ** -0.5  # noqa: E731
    a, b = fuse(tau_first), fuse(tau_last)
    skip = math.isinf(tau_first)
    ladder = [a * (b / a) ** (i / (count - (not skip))) for i in range(skip, count + skip)]
    return [(f**-2 - n**-2) ** -0.5 for f in ladder[:-1]] + [tau_last]


def correction(w: Tensor, e: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """What a prediction lacks, ((I - h J)^(-1/2) - I) e for J of slope r = w.w / w.e, shape (B, *S); and r, shape (B, 1, ...).

    Args:
        w: J e, the change of the jump by the prediction's noise, shape (B, *S).
        e: That noise, shape (B, *S).
        h: The share of the appended measurements in their mean with the old ones.
    """
    inner = lambda a, b: (a * b).flatten(1).sum(1)  # noqa: E731
    along = inner(w, e)
    r = torch.where(along > 0, inner(w, w) / along, 0.0).clamp(1e-4, min(1.0, STEEPEST / h))
    r = r.reshape(-1, *[1] * (w.ndim - 1))
    return ((1 - h * r).rsqrt() - 1) / r * w, r


def accumulate(
    denoiser: Denoiser,
    y: Tensor,
    tau: float,
    taus: list[float],
    generator: torch.Generator | None = None,
    corrected: bool = True,
    steps: int = 0,
    delta: float = 1.0,
    gamma: float = 1.0,
    step: Step = sachs,
) -> Sample:
    """Walk from a measurement y of level tau down the levels taus, appending measurements.

    Args:
        denoiser: Of the prior, or of a posterior (guidance).
        y: The first mean of measurements, shape (B, *S); any finite value if tau is infinite.
        tau: Its level; infinite where nothing has been measured.
        taus: The next levels, decreasing, below tau.
        generator: Source of randomness.
        corrected: Correct each prediction for the spread that it drops.
        steps: Langevin steps at each level after appending.
        delta: Their step, in units of the level's tau.
        gamma: Their friction, per unit time in which tau is 1.
        step: Their discretisation.

    Returns:
        Sample(y, xhat, tau) at the last level.
    """
    at = lambda y, tau: denoiser.xhat(y[:, None], y.new_full((1,), tau))  # noqa: E731
    xhat = at(y, tau)
    for tau_next in taus:
        keep = (tau_next / tau) ** 2
        e = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device).mul_(tau_next * math.sqrt(1 - keep))
        y = (keep * y).add_(xhat, alpha=1 - keep).add_(e)
        xhat, before, tau = at(y, tau_next), xhat, tau_next
        if corrected:
            w, h = xhat - before, 1 - keep
            add, r = correction(w, e, h) if denoiser.coherent else (h / 2 * w, 0.0)
            y, xhat = y + add, xhat + r * add
        if steps:
            score = lambda z, s=y.new_full((1,), tau): denoiser.score(z, s)  # noqa: E731
            state = start_velocity(y[:, None], 1.0, generator)
            y = walk(score, state, steps, delta * tau, gamma / tau, 1.0, generator, step).y[:, 0]
            xhat = at(y, tau)
    return Sample(y, at(y, tau) if corrected and not steps else xhat, tau)
