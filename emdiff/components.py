r"""The mixture start: how many Gaussians the observations can tell apart, and an average of fits that trusts no single number and no local optimum.

From one Gaussian on, components are doubled by splitting and fitted again (deconvolution), on four fifths of the observations; the likelihood of the
last fifth, in closed form, says where to stop. Where that is soon done it is done for each of five fifths: one fifth of some thousand observations
does not tell 8 Gaussians from 16. One Gaussian is kept unless more of them are better by more than a standard error of the difference, and is then
fitted to all observations until the likelihood stands still: the maximum-likelihood estimate. (Where x has many entries and operators differ from
datum to datum, a budget of work ends the fits before that.)

Where several Gaussians are better, how many is seldom certain, and a wrong choice costs as much as an average of fits gains. So none is made: the
densities p_J that were fitted with J Gaussians are mixed with the shares s_J that maximise the held-out likelihood, sum_i log sum_J s_J p_J(obs_i)
(stacking), a concave problem solved by EM. Up to MEMBERS fits to all observations, as many of each J as its share says, are averaged. A mixture of
mixtures is a mixture; by Jensen's inequality its log-likelihood is at least the members' mean, on observations that no fit has seen too.

Fits start smooth and end early: where the truth is no mixture further steps fit the noise (docs/exact.md). Where that can be afforded (cheap)
they take PLAIN steps of plain EM, which is slow where the observations say little; elsewhere STEPS accelerated ones. Starts are clusters of draws of
x | obs under one Gaussian, which are wider than x.

The likelihood has many maxima, and with few Gaussians some are bad. Every J is therefore fitted from several starts, held-out fifths included: once
by splitting, else from clusters. A fit whose likelihood is less than the best's by more than what its parameters can have gained by fitting noise,
half a unit for each over the N observations (Akaike 1974), is at a bad one and is left out (good).

Sources: Extreme deconvolution (Bovy, Hogg & Roweis 2011); Linearly combining density estimators via stacking (Smyth & Wolpert 1999); Bagging
predictors (Breiman 1996) for the average; A new look at the statistical model identification (Akaike 1974).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from emdiff.deconvolution import Mixture, Whitened, expect, fit, split, whitened
from emdiff.mixture import MixtureDenoiser
from emdiff.restarts import average, fits_from, good, starts

if TYPE_CHECKING:
    from torch import Tensor

    from emdiff.data import Data

MOST = 16384
"""Observations that the start looks at."""

COMPONENTS = 64
"""Most components of one fit."""

AVERAGED = 192
"""Most components of an average."""

MEMBERS = 12
"""Most fits that are averaged."""

STACKING = 500
"""EM iterations for the shares of numbers of components."""

STEPS = 40
"""Accelerated E-steps of a fit with several components."""

MEMBER_STEPS = 60
"""Accelerated E-steps of a fit that is averaged with others; it starts further away."""

PLAIN = 120
"""Plain ones of either, where they can be afforded."""

WORK = 1e10
"""Multiplications that a fit of several components may take, some ten seconds of a processor core; one Gaussian may take three times as many."""


class Start(NamedTuple):
    """A fitted mixture.

    Attributes:
        denoiser: Its exact denoiser, float32.
        members: Fits that it averages, by their number of components.
        held_out: Mean log-likelihood of held-out observations by number of components, as far as they were doubled.
        iterations: E-steps of the last fit.
    """

    denoiser: MixtureDenoiser
    members: dict[int, int]
    held_out: dict[int, float]
    iterations: int


class Candidates(NamedTuple):
    """Fits with 1, 2, 4, ... components to four fifths of the observations.

    Attributes:
        models: By number of components.
        held_out: log-likelihood of each observation that a fit has not seen (n,), by number of components; under the average of its good fits.
        best: Number of components of the best; 1 unless more are better by a standard error.
    """

    models: dict[int, Mixture]
    held_out: dict[int, Tensor]
    best: int

    def shares(self) -> dict[int, float]:
        """Shares of 2, 4, ... components, of sum 1, that maximise the held-out likelihood of the fits' weighted average."""
        several = [J for J in self.held_out if J > 1]
        log_p = torch.stack([self.held_out[J] for J in several], 1)
        share = torch.full_like(log_p[0], 1 / len(several))
        for _ in range(STACKING):
            share = torch.softmax(log_p + share.log(), 1).mean(0)
        return dict(zip(several, share.tolist()))


def fit_mixture(data: Data, generator: torch.Generator, progress: Callable[[int], None] = lambda done: None) -> Start:
    """Fit a mixture of Gaussians to observations of standardised vectors.

    Args:
        data: Observations, at most gaussian.DENSE entries in x.
        generator: Source of randomness, on the CPU.
        progress: Called with the number of fits done, at most STAGES.

    Returns:
        Start.
    """
    order = torch.randperm(len(data), generator=generator)[:MOST]
    seen = whitened(data.rows(order))
    floor = least_variance(seen)
    found = candidates(seen, floor, generator, progress)
    J, held_out = found.best, {J: float(value.mean()) for J, value in found.held_out.items()}
    if J == 1:
        done = fit(found.models[1], seen, floor, steps(seen, 1, 3 * WORK, 300), 1e-10)
        return Start(denoiser(done.mixture), {1: 1}, held_out, done.iterations)
    plain = cheap(seen)
    few = PLAIN if plain else MEMBER_STEPS
    members = share_out(found.shares(), J, lambda J: few * work(seen, J))
    if members == {J: 1}:
        done = fit(found.models[J], seen, floor, STEPS)
        return Start(denoiser(done.mixture), members, held_out, done.iterations)
    parts, weights, kept, done = [], [], {}, STAGES - MEMBERS
    for J, count in members.items():
        tried = fits_from(J, found.models[J], found.models[1], seen, floor, max(count, starts(J)), few, plain, generator)
        fits = good(tried, len(seen.obs))[:count]
        parts, weights, kept[J], done = parts + [f.mixture for f in fits], weights + [count / len(fits)] * len(fits), len(fits), done + count
        progress(done)
    return Start(denoiser(average(parts, weights)), kept, held_out, fits[-1].iterations)


STAGES = round(math.log2(COMPONENTS)) + 1 + MEMBERS
"""Fits that `fit_mixture` makes at most, as its progress counts them."""


def share_out(shares: dict[int, float], best: int, cost: Callable[[int], float]) -> dict[int, int]:
    """How many fits of each number of components to average: as many as MEMBERS, AVERAGED and WORK allow, in these shares (largest remainders).

    Args:
        shares: By number of components, of sum 1.
        best: Number of components of the only fit, where there is to be one.
        cost: Multiplications of a fit with some number of components.

    >>> share_out({8: 0.3, 16: 0.5, 32: 0.2}, 16, lambda J: J * 1e6)
    {8: 4, 16: 6, 32: 2}
    """
    for total in range(MEMBERS, 1, -1):
        members = {J: math.floor(total * share) for J, share in shares.items()}
        rest = sorted(shares, key=lambda J: members[J] - total * shares[J])[: total - sum(members.values())]
        members = {J: count + (J in rest) for J, count in members.items() if count + (J in rest)}
        if sum(J * count for J, count in members.items()) <= AVERAGED and sum(cost(J) * count for J, count in members.items()) <= WORK:
            return members
    return {best: 1}


def cheap(data: Whitened) -> bool:
    """Whether plain fits of all five fifths can be afforded."""
    return 5 * PLAIN * work(data, COMPONENTS) < WORK / 2


def candidates(data: Whitened, floor: float, generator: torch.Generator, progress: Callable[[int], None] = lambda done: None) -> Candidates:
    """Fit one component, and twice as many as before until held-out fifths say that they are too many, or work or data do."""
    N, d = len(data.obs), data.A.shape[-1]
    cut, many = N - max(1, N // 5), cheap(data)
    turned = [torch.arange(N).roll(i * (N - cut)) for i in range(5 if many else 1)]
    folds = [(data.rows(order[:cut]), data.rows(order[cut:])) for order in turned]
    like = {"dtype": data.obs.dtype, "device": data.obs.device}
    models = [Mixture(torch.ones(1, **like), torch.zeros(1, d, **like), torch.eye(d, **like)[None])] * len(folds)
    J, found = 1, Candidates({}, {}, 1)
    while True:
        plain, count, fitted = many and J > 1, starts(J) if many else 1, []
        few = PLAIN if plain else steps(folds[0][0], J, WORK, STEPS)
        for model, (seen, _) in zip(models, folds):
            tried = fits_from(J, model, found.models.get(1, model), seen, floor, count, few, plain, generator)
            fitted.append(good(tried, cut))
        value = torch.cat([expect(average([f.mixture for f in fits]), other).log_likelihood for fits, (_, other) in zip(fitted, folds)])
        models = [max(fits, key=lambda f: f.log_likelihood).mixture for fits in fitted]
        found.models[J], found.held_out[J] = models[0], value
        progress(len(found.models))
        gain = value - found.held_out[1]
        if value.mean() > found.held_out[found.best].mean() and gain.mean() > gain.std() / len(gain) ** 0.5:
            found = found._replace(best=J)
        elif value.mean() < found.held_out[max(J // 2, 1)].mean():
            return found
        if 2 * J > COMPONENTS or STEPS * work(data, 2 * J) > WORK or cut < 20 * J * d:
            return found
        J, models = 2 * J, [split(model, floor) for model in models]


def work(data: Whitened, components: int) -> float:
    """Multiplications of an E-step."""
    operators, m, d = data.A.shape
    return components * m * d * (operators * (m + d) + len(data.obs))


def steps(data: Whitened, components: int, budget: float, most: int) -> int:
    """E-steps that a budget of multiplications allows, from 10 to `most`."""
    return int(min(most, max(10, budget / work(data, components))))


def least_variance(data: Whitened) -> float:
    """A tenth of n^2 / N^(1/2), n^2 = 1 / mean of a diagonal entry of A^T A: less than N observations could tell from no variance at all."""
    precision = data.A.square().sum((1, 2)).median() / data.A.shape[-1]
    return float(0.1 / precision.clamp(min=1e-12) / len(data.obs) ** 0.5)


def denoiser(model: Mixture) -> MixtureDenoiser:
    """The float32 denoiser of a mixture; components that hold less than a hundred-thousandth of the mass are left out."""
    keep = model.weights > 1e-5
    weights = model.weights[keep] / model.weights[keep].sum()
    return MixtureDenoiser(weights, model.means[keep], model.covs[keep]).float()
