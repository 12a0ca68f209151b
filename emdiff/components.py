r"""The mixture start: how many Gaussians the observations can tell apart, and an average of fits that leaves no single local optimum to trust.

From one Gaussian on, components are doubled by splitting and fitted again (deconvolution), on four fifths of the observations; the likelihood of the
last fifth, in closed form, says where to stop. Where that is soon done it is done for each of five fifths: one fifth of some thousand observations
does not tell 8 Gaussians from 16. One Gaussian is kept unless more of them are better by more than a standard error of the difference, and is then
fitted to all observations until the likelihood stands still: the maximum-likelihood estimate. (Where x has many entries and operators differ from
datum to datum, a budget of work ends the fits before that.)

Several Gaussians are fitted up to MEMBERS times to all observations from starts of their own and averaged. A mixture of mixtures is a mixture; by
Jensen's inequality its log-likelihood is at least the members' mean, on observations that no fit has seen too. Fits end after STEPS or MEMBER_STEPS
E-steps: on data whose truth is no mixture, further ones fit the noise (docs/exact.md).

Sources: Extreme deconvolution (Bovy, Hogg & Roweis 2011); Bagging predictors (Breiman 1996) for the average.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from emdiff.deconvolution import Mixture, Whitened, expect, fit, split, whitened
from emdiff.mixture import MixtureDenoiser

if TYPE_CHECKING:
    from emdiff.data import Data

MOST = 16384
"""Observations that the start looks at."""

COMPONENTS = 64
"""Most components of one fit."""

AVERAGED = 192
"""Most components of an average."""

MEMBERS = 12
"""Most fits that are averaged."""

STEPS = 40
"""E-steps of a fit with several components that stands alone."""

MEMBER_STEPS = 60
"""E-steps of a fit that is averaged with others: the average takes back part of what further ones fit of the noise."""

WORK = 1e10
"""Multiplications that a fit of several components may take, some ten seconds of a processor core; one Gaussian may take three times as many."""


class Start(NamedTuple):
    """A fitted mixture.

    Attributes:
        denoiser: Its exact denoiser, float32.
        components: Of each member.
        members: Fits averaged.
        held_out: Mean log-likelihood of held-out observations by number of components, as far as they were doubled.
        iterations: E-steps of the last fit.
    """

    denoiser: MixtureDenoiser
    components: int
    members: int
    held_out: dict[int, float]
    iterations: int


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
    best, held_out = choose(seen, floor, progress)
    J = len(best.weights)
    if J == 1:
        done = fit(best, seen, floor, steps(seen, 1, 3 * WORK, 300), 1e-10)
        return Start(denoiser(done.mixture), 1, 1, held_out, done.iterations)
    members = max(1, min(MEMBERS, AVERAGED // J, int(WORK / (MEMBER_STEPS * work(seen, J)))))
    if members == 1:
        done = fit(best, seen, floor, STEPS)
        return Start(denoiser(done.mixture), J, 1, held_out, done.iterations)
    fits = []
    for _ in range(members):
        fits.append(fit(scattered(best, seen, generator), seen, floor, MEMBER_STEPS))
        progress(STAGES - MEMBERS + len(fits))
    return Start(denoiser(average([f.mixture for f in fits])), J, members, held_out, fits[-1].iterations)


STAGES = round(math.log2(COMPONENTS)) + 1 + MEMBERS
"""Fits that `fit_mixture` makes at most, as its progress counts them."""


def choose(data: Whitened, floor: float, progress: Callable[[int], None] = lambda done: None) -> tuple[Mixture, dict[int, float]]:
    """The mixture whose number of components, a power of 2, is best on held-out fifths, fitted to the others; held-out values by number."""
    N, d = len(data.obs), data.A.shape[-1]
    cut, most = N - max(1, N // 5), 5 if 5 * STEPS * work(data, COMPONENTS) < WORK / 2 else 1
    turned = [torch.arange(N).roll(i * (N - cut)) for i in range(most)]
    folds = [(data.rows(order[:cut]), data.rows(order[cut:])) for order in turned]
    like = {"dtype": data.obs.dtype, "device": data.obs.device}
    models = [Mixture(torch.ones(1, **like), torch.zeros(1, d, **like), torch.eye(d, **like)[None])] * most
    best = one = None
    found: dict[int, float] = {}
    while True:
        few = steps(folds[0][0], len(models[0].weights), WORK, STEPS)
        models = [fit(model, seen, floor, few).mixture for model, (seen, _) in zip(models, folds)]
        J, value = len(models[0].weights), torch.cat([expect(model, other).log_likelihood for model, (_, other) in zip(models, folds)])
        found[J] = float(value.mean())
        progress(len(found))
        one = value if one is None else one
        gain = value - one
        if best is None or (found[J] > found[len(best.weights)] and bool(gain.mean() > gain.std() / len(gain) ** 0.5)):
            best = models[0]
        elif found[J] < found[max(J // 2, 1)]:
            return best, found
        if 2 * J > COMPONENTS or STEPS * work(data, 2 * J) > WORK or cut < 20 * J * d:
            return best, found
        models = [split(model, floor) for model in models]


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


def scattered(model: Mixture, data: Whitened, generator: torch.Generator) -> Mixture:
    """As many components, equal in weight, at draws of x | obs for random observations, each as wide as half a component of the model."""
    J, d = model.means.shape
    pick = torch.randperm(len(data.obs), generator=generator)[:J]
    posterior = MixtureDenoiser(*model).given(data.rows(pick))
    means = posterior.draw(model.means.new_zeros(J, 1, d), model.means.new_tensor([math.inf]), generator)
    cov = torch.einsum("j,jde->de", model.weights, model.covs) / 2
    return Mixture(torch.full_like(model.weights, 1 / J), means, cov.expand(J, d, d))


def average(models: list[Mixture]) -> Mixture:
    """The mixture of mixtures, all of the same weight."""
    weights, means, covs = (torch.cat(parts) for parts in zip(*models))
    return Mixture(weights / len(models), means, covs)


def denoiser(model: Mixture) -> MixtureDenoiser:
    """The float32 denoiser of a mixture; components that hold less than a hundred-thousandth of the mass are left out."""
    keep = model.weights > 1e-5
    weights = model.weights[keep] / model.weights[keep].sum()
    return MixtureDenoiser(weights, model.means[keep], model.covs[keep]).float()
