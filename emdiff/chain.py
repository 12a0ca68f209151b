r"""Walk-jump sampling of one M-density: chains of any length in constant memory, with diagnostics.

A prior of the channel view is walked in R^{Md}. A pooled one is walked collapsed: the mean of a sigma x M walk with inverse mass u is the walk of
one measurement
of level sigma / sqrt(M) with inverse mass u / M (langevin), so M costs nothing.

delta, gamma, u are the paper's, in the units of the data: with data divided by std, y' = y/std, the same walk has inverse mass u / std^2.

Start (Remark 4): U[0, 1] in the units of the data, plus N(0, sigma^2) unless the plain start of Algorithm 1 is wanted. A learned density is known
only near the data's measurements, and where tau is small a chain may stay far from them for good; the warm start of a pooled prior, our own, is a
draw of the M-density by accumulating measurements (accumulate).

Step: Algorithm 1 has the score half a drift away from y, where the noise's variance is tau^2 (1 + delta^2 u / (4 sigma^2)): for delta = sigma and
u = 1 a quarter more than the denoiser was told of, part of which it takes for structure.

A chain never breaks: when its state stops to be finite, or its size leaves what the M-density holds by a factor ESCAPE, it goes back to its last good
state with a fresh velocity, and that is counted.

Source: Multimeasurement Generative Models (Saremi & Srivastava 2022), App. D, Remarks 4-6.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from emdiff.accumulate import accumulate, levels
from emdiff.chain_figures import ChainFigures
from emdiff.langevin import STEPS, State, start_velocity, walk
from emdiff.measurement import effective
from emdiff.models import fixed_levels
from emdiff.prior import TAU_FIRST, Prior

ESCAPE = 4.0
"""A chain has diverged when the root mean square of its y exceeds this times that of the M-density."""

WARM_LEVELS = 32
"""Levels of a warm start."""


class ChainWalk(NamedTuple):
    """How to walk one M-density; all in the units of the data.

    Attributes:
        sigma: Levels (M,); for a prior of the channel view, its own.
        delta: Step.
        gamma: Friction, per unit time.
        u: Inverse mass.
        step: A key of `langevin.STEPS`: sachs (Algorithm 1), cheng (Algorithm 2), overdamped.
        noisy_start: Start with noise added to U[0, 1].
        warm_start: Start at a draw of the M-density instead; pooled priors only.
    """

    sigma: tuple[float, ...]
    delta: float
    gamma: float = 1.0
    u: float = 1.0
    step: str = "sachs"
    noisy_start: bool = True
    warm_start: bool = False


class Density(NamedTuple):
    """What a walk sees: an M-density in standardised units.

    Attributes:
        score: (B, M or 1, *S) -> the same.
        xhat: (B, M or 1, *S) -> (B, *S).
        sigma: Levels (M or 1,).
        u: Inverse mass.
    """

    score: Callable[[Tensor], Tensor]
    xhat: Callable[[Tensor], Tensor]
    sigma: Tensor
    u: float


def own_levels(prior: Prior) -> tuple[float, ...] | None:
    """The levels (M,) that a prior of the channel view was made for, in the units of the data; None where it takes any."""
    own = fixed_levels(prior.denoiser)
    return None if own is None else tuple((own * prior.scale.std).tolist())


def density(prior: Prior, chain: ChainWalk, device: str | torch.device) -> Density:
    """The M-density of a prior; collapsed where the prior is pooled.

    Raises:
        ValueError: if a pooled prior is asked for unequal levels, which have no collapsed walk with one inverse mass.
    """
    std = prior.scale.std
    fixed = fixed_levels(prior.denoiser)
    if fixed is None and len(set(chain.sigma)) > 1:
        raise ValueError(f"a pooled prior walks equal levels only, not {list(chain.sigma)}")
    own = torch.tensor([s / std for s in chain.sigma], device=device) if fixed is None else fixed
    sigma = effective(own)[None] if fixed is None else own
    u = chain.u / std**2 / (len(chain.sigma) if fixed is None else 1)
    at = lambda f: lambda y: f(y, sigma)
    return Density(at(prior.denoiser.score), at(prior.denoiser.xhat), sigma, u)


def start(prior: Prior, chain: ChainWalk, target: Density, count: int, generator: torch.Generator, x: Tensor | None = None) -> State:
    """States (count, M or 1, *S): y by Remark 4 or Algorithm 1, velocities 0; or by accumulating measurements, or of x, velocities N(0, u).

    Raises:
        ValueError: for a warm start of a prior of fixed levels, which has no coarser ones to come from.
    """
    device, M = generator.device, len(target.sigma)
    if chain.warm_start:
        if fixed_levels(prior.denoiser) is not None:
            raise ValueError("a prior of fixed levels has no warm start")
        tau = float(target.sigma)
        taus = levels(max(TAU_FIRST, 2 * tau), tau, WARM_LEVELS)
        y = math.sqrt(1 + taus[0] ** 2) * torch.randn((count, *prior.shape), generator=generator, device=device)
        return start_velocity(accumulate(prior.denoiser, y, taus[0], taus[1:], generator).y[:, None], target.u, generator)
    shape = (count, M, *prior.shape)
    uniform = prior.scale.standardise(torch.rand(shape, generator=generator, device=device))
    noise = torch.randn(shape, generator=generator, device=device) * target.sigma.reshape(1, -1, *[1] * len(prior.shape))
    if x is not None:
        return start_velocity(prior.scale.standardise(x.to(device))[:, None] + noise, target.u, generator)
    return State(uniform + chain.noisy_start * noise, torch.zeros(shape, device=device))


def escaped(y: Tensor, sigma: Tensor) -> Tensor:
    """Which chains (B,) have left the M-density: standardised data have mean square 1, their measurements 1 + sigma^2."""
    size = (y.flatten(2).square().mean(2) / (1 + sigma.square())).amax(1)
    return ~(size < ESCAPE**2)


def in_float32(prior: Prior) -> Prior:
    """The prior with its network in float32, sharing weights: for one image at a time, bfloat16 spends more on casts than it saves (2.9 ms a step on
    a CPU against 1.8, docs/paper.md)."""
    if not getattr(prior.denoiser, "bf16", False):
        return prior
    denoiser = copy.copy(prior.denoiser)
    denoiser.bf16 = False
    return prior._replace(denoiser=denoiser)


@torch.inference_mode()
def run_chain(
    prior: Prior,
    chain: ChainWalk,
    steps: int,
    every: int,
    generator: torch.Generator,
    figures: ChainFigures | None = None,
    count: int = 1,
    progress: Callable[[int], None] = lambda done: None,
    x: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Walk `count` chains and jump every `every` steps.

    Args:
        prior: On the generator's device, in eval mode.
        chain: How to walk.
        steps: Steps in all.
        every: Steps between jumps (Delta k).
        generator: Source of randomness.
        figures: Told of every jump of the first chain.
        count: Chains.
        progress: Called with the steps done.
        x: Data (count, *S) whose measurements the chains start at, in the user's units; None for the starts that `chain` names.

    Returns:
        The last jumps (count, *S) in the units of the data, on the CPU, and the number of times that a chain was set back.
    """
    prior = in_float32(prior) if count == 1 and generator.device.type == "cpu" else prior
    target = density(prior, chain, generator.device)
    state = start(prior, chain, target, count, generator, x)
    good, restarts, jumps = state.y, 0, torch.zeros(count, *prior.shape)
    for done in [*range(every, steps + 1, every)] or [steps]:
        state = walk(target.score, state, min(every, steps), chain.delta, chain.gamma, target.u, generator, STEPS[chain.step])
        lost = escaped(state.y, target.sigma)
        if bool(lost.any()):
            restarts += int(lost.sum())
            again = start_velocity(good, target.u, generator)
            pick = lost.reshape(-1, *[1] * (good.ndim - 1))
            state = State(torch.where(pick, again.y, state.y), torch.where(pick, again.v, state.v))
        good = state.y
        jumps = prior.scale.restore(target.xhat(state.y)).cpu()
        if figures is not None:
            figures.add(jumps[0], done, bool(lost[0]))
        progress(done)
    return jumps, restarts
