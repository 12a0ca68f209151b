r"""Over-relaxation by strata: where the prior has variance that the observations do not bear out, and only there, samples give it up at once.

Exact EM takes variance out of a prior slowly where noise hides it (relax), and what all observations say together hides what they say of a part:
behind masks, a prior of digits has chi2 of .885 in the pixels far from ink and above 1.3 near it, and 1.03 over all. So entries are told apart by how
much the prior lets x vary there. Let y be the draw's measurement of the sample x, of level tau, and y_r = y + (TAU^2 - tau^2)^(1/2) eps, a coarser
one. The stratum of an entry is the mean of (y - xhat(y_r))^2 over the WINDOW x WINDOW entries around it, with xhat the prior's own. The observation's
noise has no part in it: at the fixed point of EM, where x is exchangeable with the truth, z - y has variance n^2 + tau^2 in every stratum, whatever
p(x) is.

Along a direction in which the prior has variance V and the truth V - Delta,

    E (z - y)^2 = n^2 + tau^2 - a^2 Delta,    a = n^2 / (V + n^2),

and an exact iteration leaves V - g Delta, g = (V / (V + n^2))^2 (0 where nothing was observed). Delta is estimated in each stratum by least squares,
less one standard error, and never below 0; what an exact iteration would leave of it, (1 - g) Delta, is taken out of the samples' deviation from the
fused jump x_r = xhat(y_r, obs), whose mean square is V: it is multiplied by 1 - k, (1 - k)^2 = 1 - (1 - g) Delta / V. With

    y' = x_r + (1 - k) (y - x_r) + tau (1 - (1 - k)^2)^(1/2) eps,     xhat' = x_r + (1 - k) (xhat - x_r),

y' is a measurement of x' = x_r + (1 - k) (x - x_r) of the same level, and xhat' = E[x' | y', obs]: a pair as exact as (y, xhat), of the law of x'.
Where the observations object to nothing, k is 0. Ours; docs/method.md, By strata, has figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from emdiff.ahead import ahead
from emdiff.data import Data
from emdiff.denoise import Denoiser
from emdiff.em import Draws
from emdiff.guidance import FusedPosterior
from emdiff.near import near_data
from emdiff.rows import Store, steps

TAU = 1.0
"""Level of the coarser measurement, in units of the data's std: fine enough to tell strokes from ground, and coarse enough to hide grain."""

WINDOW = 5
"""Side of the square over which deviations are averaged."""

EDGES = (0.003, 0.006, 0.009, 0.013, 0.018, 0.024, 0.032, 0.042, 0.06, 0.09, 0.13, 0.2, 0.3, 0.5, 1.0)
"""Between strata, in units of the data's variance."""

COUNT = len(EDGES) + 1


class Sums(NamedTuple):
    """What the strata add up to, float64, (COUNT,) each.

    Attributes:
        weight: Of a^4-weighted squared residuals: 1 / weight is half of the variance of Delta.
        lack: The same sum of what they lack; lack / weight is Delta.
        count: Entries, observed or not.
        square: Squares of their deviations from x_r.
    """

    weight: Tensor
    lack: Tensor
    count: Tensor
    square: Tensor


class Strata(NamedTuple):
    """What the samples have too much of.

    Attributes:
        variance: Mean square deviation V of x from x_r in each stratum (COUNT,).
        excess: Delta in each, not below 0 (COUNT,).
    """

    variance: Tensor
    excess: Tensor


def local_mean(square: Tensor) -> Tensor:
    """Means over WINDOW x WINDOW entries of images (B, ..., H, W), at the border over those that are there."""
    planes = square.reshape(-1, 1, *square.shape[-2:])
    return F.avg_pool2d(planes, WINDOW, 1, WINDOW // 2, count_include_pad=False).reshape(square.shape)


def tally(stratum: Tensor, y: Tensor, deviation: Tensor, z: Tensor, sigma_z: Tensor, tau: float) -> Sums:
    """The sums of a batch.

    Args:
        stratum: Of each entry, int64 (B, *S).
        y: The draws' measurements (B, *S).
        deviation: Of their jumps from x_r (B, *S).
        z: Observations as measurements (B, *S).
        sigma_z: Their levels (B, *S), infinite where nothing was observed.
        tau: Level of y.
    """
    seen, edges = sigma_z.isfinite(), torch.tensor([0.0, *EDGES, 2 * EDGES[-1]], dtype=torch.float64, device=y.device)
    n2 = torch.where(seen, sigma_z, 1.0).double().square()
    V = ((edges[1:] + edges[:-1]) / 2)[stratum]
    a2, total = (n2 / (V + n2)).square(), n2 + tau**2
    residual = torch.where(seen, z - y, 0.0).double().square()
    values = (seen * (a2 / total).square(), seen * a2 * (total - residual) / total.square(), torch.ones_like(V), deviation.double().square())
    return Sums(*(V.new_zeros(COUNT).index_add_(0, stratum.flatten(), value.flatten()) for value in values))


def estimate(sums: Sums, tau: float) -> Strata:
    """Delta and V of the strata; V with what a jump of level tau lacks of the sample's variance."""
    jump = sums.square / sums.count.clamp(min=1)
    known = sums.weight > 0
    weight = torch.where(known, sums.weight, 1.0)
    excess = (sums.lack - (2 * weight).sqrt()) / weight
    return Strata(jump + tau**2 * jump / (tau**2 + jump), torch.where(known, excess, 0.0).clamp(min=0))


def shrinkage(strata: Strata, stratum: Tensor, sigma_z: Tensor) -> Tensor:
    """k in [0, 1] of each entry (B, *S), of strata (B, *S) and levels of observations (B, *S), infinite where nothing was observed."""
    V, excess = strata.variance[stratum].clamp(min=1e-30), strata.excess[stratum]
    g = (V / (V + sigma_z.double().square())).square()
    return 1 - (1 - (1 - g) * excess / V).clamp(min=0).sqrt()


def survey(prior: Denoiser, z: Tensor, sigma_z: Tensor, y: Tensor, tau: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_r (B, *S) and strata (B, *S), int64, of measurements y (B, *S) of level tau, whose data were observed as z (B, *S) with levels sigma_z."""
    coarse = y + math.sqrt(TAU**2 - tau**2) * torch.randn(y.shape, generator=generator, device=y.device)
    level = y.new_full((1,), TAU)
    deviation = y - prior.xhat(coarse[:, None], level)
    stratum = torch.bucketize(local_mean(deviation.square()) - tau**2, torch.tensor(EDGES, device=y.device))
    return FusedPosterior(prior, z, sigma_z).xhat(coarse[:, None], level), stratum


@torch.no_grad()
def relaxed_by_strata(
    prior: Denoiser,
    data: Data,
    draws: Draws,
    generator: torch.Generator,
    store: Store,
    batch: int,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Draws, float]:
    """The draws of an exact E-step without the variance that the observations object to.

    Args:
        prior: That of the E-step.
        data: Its observations, measurements of images x, standardised.
        draws: What it ended with, at a level tau below TAU.
        generator: Source of randomness, on the device of the prior.
        store: Makes the arrays "relaxed_y", "relaxed_x" and "stratum"; in a team, those of this process.
        batch: Data at once.
        total: The sum of all processes' tensors.
        progress: Called with the number of data done, of twice as many.

    Returns:
        Draws, and the mean of k over all entries.
    """
    device, tau, data = generator.device, draws.tau, near_data(data, generator.device)
    y, x, strata = (store(name, tuple(draws.y.shape)) for name in ("relaxed_y", "relaxed_x", "stratum"))
    parts, sums = steps(0, len(data), batch), torch.zeros(4, COUNT, dtype=torch.float64, device=device)
    read = lambda span: (data.rows(span), draws.y[span], draws.x[span])  # noqa: E731
    for span, (part, last, jump) in zip(parts, ahead(read, parts, device)):
        z, sigma_z = part.observer.as_measurement(part.obs)
        reference, stratum = survey(prior, z, sigma_z, last, tau, generator)
        good = torch.ones(len(part), dtype=torch.bool) if draws.kept is None else ~draws.kept[span].cpu()
        looked = (a.expand(last.shape)[good.to(device)] for a in (stratum, last, jump - reference, z, sigma_z))
        sums += torch.stack(tally(*looked, tau))
        x[span], strata[span] = reference, stratum.float()
        progress(span.stop)
    found, k_sum = estimate(Sums(*total(sums)), tau), 0.0
    read = lambda span: (data.rows(span), draws.y[span], draws.x[span], x[span], strata[span])  # noqa: E731
    for span, (part, last, jump, reference, stratum) in zip(parts, ahead(read, parts, device)):
        sigma_z = part.observer.as_measurement(part.obs)[1].expand(last.shape)
        k = shrinkage(found, stratum.long(), sigma_z).to(last)
        eps = torch.randn(last.shape, generator=generator, device=device)
        y[span] = reference + (1 - k) * (last - reference) + tau * (1 - (1 - k).square()).clamp(min=0).sqrt() * eps
        x[span] = jump - k * (jump - reference)
        k_sum += float(k.double().sum())
        progress(len(data) + span.stop)
    share = total(torch.tensor([k_sum, math.prod(draws.y.shape)], dtype=torch.float64))
    return draws._replace(y=y, x=x), float(share[0] / share[1])
