r"""Walks on measurements y and jumps to x.

Underdamped Langevin diffusion (eq. 23; gamma: friction per unit time, u: inverse mass) has N(0, u) velocities and p(y) as its law:

    dv = -gamma v dt + u score(y) dt + sqrt(2 gamma u) dB,      dy = v dt

Three discretisations share the signature (score, state, delta, gamma, u, generator) -> state. On a Gaussian each is linear,
z' = F z + G eps, so its stationary covariance solves P = F P F^T + G G^T: the test suite holds them to it.

Collapsed walk: the mean of a sigma x M walk with inverse mass u is exactly the walk of one measurement of level tau = sigma / sqrt(M) with
inverse mass u / M. M therefore costs nothing: walk with M = 1.

Sources: Multimeasurement Generative Models (Saremi & Srivastava 2022), App. D, eq. 34-42; Langevin dynamics with variable coefficients and
nonconservative forces (Sachs, Leimkuhler & Danos 2017); Underdamped Langevin MCMC: a non-asymptotic analysis (Cheng et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]


class State(NamedTuple):
    """A chain's state.

    Attributes:
        y: Measurements (B, M, *S).
        v: Velocity, like y.
    """

    y: Tensor
    v: Tensor


Step = Callable[[Score, State, float, float, float, "torch.Generator | None"], State]


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def sachs(score: Score, state: State, delta: float, gamma: float, u: float, generator: torch.Generator | None = None) -> State:
    """One step of Algorithm 1: half a drift, half a kick, exact damping, half a kick, half a drift.

    Args:
        score: grad log p of the measurements, y (B, M, *S) -> (B, M, *S).
        state: y and v.
        delta: Step, positive, in units of time; stable on N(0, s) while delta < 2 sqrt(s / u).
        gamma: Friction per unit time; exp(-gamma delta) of the velocity stays.
        u: Inverse mass; both half-kicks carry it.
        generator: Source of randomness.

    Returns:
        The next state.
    """
    y = state.y + delta / 2 * state.v
    kick = u * delta / 2 * score(y)
    v = math.exp(-gamma * delta) * (state.v + kick) + kick + math.sqrt(-u * math.expm1(-2 * gamma * delta)) * _noise(y, generator)
    return State(y + delta / 2 * v, v)


def cheng(score: Score, state: State, delta: float, gamma: float, u: float, generator: torch.Generator | None = None) -> State:
    """One step of Algorithm 2: the diffusion solved exactly with the score frozen at y (eq. 34-41, any friction).

    Arguments and result as for `sachs`. Its law is biased at first order in delta: var y = 1.142 on N(0, 1) at delta = .25, gamma = u = 1.
    """
    g, keep = gamma * delta, math.exp(-gamma * delta)
    psi = score(state.y)
    mean_v = keep * state.v + u / gamma * (1 - keep) * psi
    mean_y = state.y + (1 - keep) / gamma * state.v + u / gamma * (delta - (1 - keep) / gamma) * psi
    cov_yy = u / gamma**2 * (2 * g - 4 * (1 - keep) + (1 - keep**2))
    cov_vv = u * (1 - keep**2)
    cov_yv = u / gamma * (1 - keep) ** 2
    e1, e2 = _noise(state.y, generator), _noise(state.y, generator)
    a, b = math.sqrt(cov_yy), cov_yv / math.sqrt(cov_yy)
    return State(mean_y + a * e1, mean_v + b * e1 + math.sqrt(max(cov_vv - b**2, 0.0)) * e2)


def overdamped(score: Score, state: State, delta: float, gamma: float, u: float, generator: torch.Generator | None = None) -> State:
    """One step without velocity, y + u delta^2/2 score(y) + delta sqrt(u) eps (eq. 42, there with u = 1).

    Arguments and result as for `sachs`; gamma has no part in it and v is handed through.
    """
    drift = u * delta**2 / 2 * score(state.y)
    return State(state.y + drift + delta * math.sqrt(u) * _noise(state.y, generator), state.v)


STEPS: dict[str, Step] = {"sachs": sachs, "cheng": cheng, "overdamped": overdamped}


def start_velocity(y: Tensor, u: float, generator: torch.Generator | None = None) -> State:
    """A state at y with a velocity drawn from its stationary law N(0, u)."""
    return State(y, math.sqrt(u) * _noise(y, generator))


def collapsed(sigma: float, count: int, u: float = 1.0) -> tuple[float, float]:
    """Level and inverse mass of the walk of one measurement that is the mean of a walk of `count` measurements of level sigma and inverse mass u.

    >>> collapsed(1.0, 64, 1.0)
    (0.125, 0.015625)
    """
    return sigma / math.sqrt(count), u / count


def walk(
    score: Score,
    state: State,
    steps: int,
    delta: float,
    gamma: float = 1.0,
    u: float = 1.0,
    generator: torch.Generator | None = None,
    step: Step = sachs,
) -> State:
    """Take `steps` steps; arguments as for `sachs`. Returns the last state; memory does not grow with steps."""
    for _ in range(steps):
        state = step(score, state, delta, gamma, u, generator)
    return state


def walk_jump(
    score: Score,
    xhat: Callable[[Tensor], Tensor],
    state: State,
    steps: int,
    every: int,
    delta: float,
    gamma: float = 1.0,
    u: float = 1.0,
    generator: torch.Generator | None = None,
    step: Step = sachs,
) -> Iterator[tuple[State, Tensor]]:
    """Walk, and jump every `every` steps; jumps are asynchronous: they do not touch the chain (Remark 5).

    Args:
        score: grad log p(y).
        xhat: The jump, y (B, M, *S) -> (B, *S).
        state: Where the chain starts.
        steps: Steps in all.
        every: Steps between jumps (the paper's Delta k), positive.
        delta, gamma, u, generator, step: as for `sachs`.

    Yields:
        (state, xhat(state.y)) after each `every` steps.
    """
    for _ in range(steps // every):
        state = walk(score, state, every, delta, gamma, u, generator, step)
        yield state, xhat(state.y)
