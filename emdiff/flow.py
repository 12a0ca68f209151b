r"""The deterministic flow of neural empirical Bayes (Saremi & Hyvarinen 2019, Sec. 6): an associative memory.

    dy/dt = tau^2 grad log p(y) = xhat(y) - y,      in steps of `rate`:  y <- y + rate (xhat(y) - y)

At rate 1 each step is a jump. What it converges to are the modes of the M-density, y = xhat(y): the memories. For N(mu, s) the one mode is mu, and
the distance to it
falls by the factor 1 - rate tau^2/(s + tau^2) per step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Attractor(NamedTuple):
    """Where a flow ended.

    Attributes:
        y: (B, *S).
        steps: Steps until y moved less than the tolerance, (B,); the most allowed where it did not.
        converged: Whether it did, bool (B,).
    """

    y: Tensor
    steps: Tensor
    converged: Tensor


def flow(xhat: Callable[[Tensor], Tensor], y: Tensor, rate: float = 1.0, steps: int = 1000, tolerance: float = 1e-4) -> Attractor:
    """Follow the flow from y to its attractor.

    Args:
        xhat: The denoiser at a fixed level, (B, *S) -> (B, *S).
        y: Where to start (B, *S).
        rate: Step, in (0, 1].
        steps: Most steps.
        tolerance: A datum has arrived when the root mean square of xhat(y) - y falls below it.

    Returns:
        Attractor; data that have arrived stay where they are.
    """
    taken = torch.zeros(len(y), dtype=torch.long, device=y.device)
    moving = torch.ones(len(y), dtype=torch.bool, device=y.device)
    for _ in range(steps):
        pull = xhat(y) - y
        moving = moving & ~(pull.flatten(1).square().mean(1).sqrt() < tolerance)
        if not bool(moving.any()):
            break
        y = torch.where(moving.reshape(-1, *[1] * (y.ndim - 1)), y + rate * pull, y)
        taken = taken + moving
    return Attractor(y, taken, ~moving)
