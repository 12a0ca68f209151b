r"""How much of a learned departure is kept: least squares on data that its training has not seen.

With residuals e = x - D0(y) of the base on held-out pairs and delta the departure as the network has it, a delta' = a delta is best, among all a, at

    a = sum w e delta / sum w delta^2,       w = (1 + 1/tau^2) b_k(tau)

near knot k of `MDAE.keep`, b_k its hat function. Pairs of one datum are one draw of (u_i, v_i) = (sum w e delta, sum w delta^2), so a = sum u / sum v
has standard error s = (sum (u - a v)^2)^(1/2) / sum v. What is kept is a (1 - (3 s / a)^2), within [0, 1], and nothing for a below three standard
errors: the positive-part rule of James & Stein with a threshold that a network which has learned nothing passes at one of its 13 knots in about one
round of fifty. As p(x, y | obs) is the current prior's, the regression on held-out observations is that of the population, and a tends to 1 where the
network is the exact EM update.

Source: Estimation with quadratic loss (James & Stein 1961).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emdiff.mdae import KNOTS, MDAE, TOP
from emdiff.measurement import pool

REPEATS = 32
"""Levels drawn for each held-out pair."""

ERRORS = 3.0
"""Standard errors that a share has to exceed."""

Inputs = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor, Tensor]]


def shares(p: Tensor) -> Tensor:
    """The hat functions of all knots at precisions p of any shape, (*p.shape, KNOTS)."""
    at = (torch.log1p(p) / 2 * ((KNOTS - 1) / TOP)).clamp(max=KNOTS - 1)
    return (1 - (at[..., None] - torch.arange(KNOTS, device=p.device)).abs()).clamp(min=0)


@torch.no_grad()
def keep(denoiser: MDAE, inputs: Inputs, index: Tensor, generator: torch.Generator) -> Tensor:
    """`MDAE.keep` for a trained departure.

    Args:
        denoiser: With a base.
        inputs: (index, generator) -> target x (B, *S), measurement y (B, *S) and its level, broadcastable, of the pairs at index.
        index: Held-out pairs (H,).
        generator: Source of randomness, on the device of the denoiser.

    Returns:
        Shares in [0, 1], shape (KNOTS,); a knot near which no level was drawn takes that of the next finer one that has some, else the coarser one's.
    """
    parts = []
    for some in index.split(1024):
        u = v = 0.0
        for _ in range(REPEATS):
            x, y, tau = inputs(some, generator)
            ybar, p = pool(y[:, None], tau[:, None])
            error, delta = x - denoiser.base.xhat(y[:, None], tau[:, None]), denoiser.untempered(ybar, p)
            w = shares(p.expand(x.shape)) * (1 + p).expand(x.shape)[..., None]
            entries = tuple(range(1, x.ndim))
            u = u + (w * (error * delta)[..., None]).sum(entries)
            v = v + (w * delta.square()[..., None]).sum(entries)
        parts.append((u.double(), v.double()))
    u, v = (torch.cat(part) for part in zip(*parts))
    total = v.sum(0)
    known = total > 1e-6 * total.max().clamp(min=1e-30)
    a = u.sum(0) / total.clamp(min=1e-30)
    s = (u - a * v).square().sum(0).sqrt() / total.clamp(min=1e-30)
    kept = torch.where(a > ERRORS * s, a * (1 - (ERRORS * s / a).square()), 0.0).clamp(0, 1)
    return spread(kept, known).float()


def spread(values: Tensor, known: Tensor) -> Tensor:
    """Fill unknown places of values (K,) from the nearest known place above, else below; 0 where none is known."""
    places = known.nonzero()[:, 0].tolist()
    take = [next((k for k in places if k >= i), places[-1] if places else 0) for i in range(len(values))]
    return values[take] * (len(places) > 0)
