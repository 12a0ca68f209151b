r"""Where chains restart: samples of the prior, chosen by what the observations say of them.

Moment matching holds where tau is small, and a chain that re-enters there never leaves the neighbourhood it was in: under a prior with several ways
to explain an observation, the chains of an E-step are stuck with those of the first samples. Walked down from coarse levels instead, 2 to 6 % of
chains ended where their observation rules them out, on a curve in five dimensions with an exact denoiser (docs/exact.md). Sampling-importance-
resampling has neither fault. With x_j ~ p(x), j = 1..J, one pool for all data,

    P(start = x_j | obs)  prop. to  exp(-|obs - A x_j|^2_{cov_obs^-1} / 2f),        f the least of 1, 4, 16, ... with 1 / sum_j P_j^2 >= LEAST,

is p(x | obs) for f = 1 and J to infinity; f > 1 widens the noise until some of the pool explain the observation. The walk that follows needs to
mend no more than that, which it does if the noise added by widening, (f - 1)^(1/2) n, is below tau_first, whose noise all chains get. Else the
pool is too small for what the observation tells (many precise entries), and the chain goes on from where it was.

Source: A noniterative sampling/importance resampling alternative to data augmentation (Rubin 1987).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from emdiff.data import Data, Observations
from emdiff.gaussian import DENSE
from emdiff.prior import Prior, sample_prior
from emdiff.rows import Array, Store

LEAST = 2.0
"""Least effective number of pool members that explain an observation."""

WIDEST = 4.0**10
"""Largest factor f of the noise variance."""

PAIRS = 2**23
"""Pairs of data and pool members whose distances are held in memory."""

LEVELS = 32
"""Levels of the walk that samples the pool."""


class Chosen(NamedTuple):
    """Pool members chosen for data.

    Attributes:
        x: Shape (N, *S).
        widening: f of each datum, shape (N,).
    """

    x: Tensor
    widening: Tensor


def applies(data: Data) -> bool:
    """Whether a pool can serve these data: vectors of few entries, whose operators are formed in full."""
    return math.prod(data.shape) <= DENSE


def choose(pool: Tensor, data: Observations, generator: torch.Generator) -> Chosen:
    """Resample the pool by the likelihood of each observation.

    Args:
        pool: Samples of the prior (J, *S).
        data: Observations in the same units, at most DENSE entries in x.
        generator: Source of randomness, on the pool's device.

    Returns:
        Chosen(x, widening).
    """
    parts = []
    rows = max(1, PAIRS // len(pool))
    for i in range(0, len(data), rows):
        parts.append(_choose(pool, data.rows(slice(i, i + rows)).to(pool.device), generator))
    return Chosen(*(torch.cat(part) for part in zip(*parts)))


def _choose(pool: Tensor, data: Observations, generator: torch.Generator) -> Chosen:
    chi2 = distances(pool, data)
    chi2 = chi2 - chi2.amin(1, keepdim=True)
    index = torch.zeros(len(data), dtype=torch.long, device=pool.device)
    widening, todo, f = torch.zeros(len(data), device=pool.device), torch.arange(len(data), device=pool.device), 1.0
    while len(todo):
        share = (-chi2[todo] / (2 * f)).softmax(1)
        enough = (share.square().sum(1) <= 1 / LEAST) | (f >= WIDEST)
        done = todo[enough]
        if len(done):
            index[done] = torch.multinomial(share[enough], 1, generator=generator)[:, 0]
            widening[done] = f
        todo, f = todo[~enough], 4 * f
    return Chosen(pool[index], widening)


def distances(pool: Tensor, data: Observations) -> Tensor:
    """|obs_i - A_i x_j|^2_{cov_obs_i^-1} over what was observed, for x_j (J, *S) of the pool, shape (N, J)."""
    count, d = len(data), math.prod(data.shape)
    eye = torch.eye(d, dtype=data.obs.dtype, device=pool.device)
    white = lambda r: data.observer.whiten(r).flatten(1)
    A = torch.stack([white(data.observer.forward(e.reshape(1, *data.shape).expand(count, *data.shape))) for e in eye], dim=-1)
    obs = white(data.obs)
    total = torch.zeros(count, len(pool), dtype=data.obs.dtype, device=pool.device)
    for row in range(obs.shape[1]):
        total += (obs[:, row, None] - A[:, row] @ pool.flatten(1).T).square()
    return total


@torch.no_grad()
def restart(
    prior: Prior, data: Data, chains: Array | None, count: int, tau_first: float, generator: torch.Generator, store: Store | None = None
) -> Array:
    """States from which chains re-enter their walk at tau_first.

    Args:
        prior: The prior, on the generator's device.
        data: All observations, standardised.
        chains: Where the chains are (N, *S), standardised; a datum that the pool cannot serve stays there. None takes the pool for all.
        count: Size J of the pool.
        tau_first: Level at which the chains re-enter, in units of the data's std.
        generator: Source of randomness.
        store: Makes the array "restart" of the states; None takes a tensor.

    Returns:
        States (N, *S), on the CPU.
    """
    pool = prior.scale.standardise(sample_prior(prior, count, generator, LEVELS, batch=2048)).to(generator.device)
    states = (store or (lambda name, shape: torch.empty(shape, dtype=pool.dtype)))("restart", (len(data), *data.shape))
    rows = max(1, PAIRS // len(pool))
    for i in range(0, len(data), rows):
        span = slice(i, min(i + rows, len(data)))
        part = data.rows(span)
        chosen = choose(pool, part, generator)
        x, added = chosen.x.cpu(), (chosen.widening.cpu() - 1).sqrt() * noise(part).cpu()
        states[span] = x if chains is None else torch.where((added < tau_first).reshape(-1, *[1] * (x.ndim - 1)), x, chains[span])
    return states


def noise(data: Observations) -> Tensor:
    """The noise of each datum in units of x, (tr cov_obs / tr A At)^(1/2) over what was observed, shape (N,); for unit rows the noise itself."""
    d = math.prod(data.shape)
    eye = torch.eye(d, dtype=data.obs.dtype, device=data.obs.device)
    power = sum(data.observer.forward(e.reshape(1, *data.shape).expand(len(data), *data.shape)).flatten(1).square().sum(1) for e in eye)
    seen = data.observer.observed().expand(data.obs.shape).flatten(1)
    variance = (data.observer.std().square().expand(data.obs.shape).flatten(1) * seen).sum(1)
    return (variance / power.clamp(min=1e-30)).sqrt()
