r"""What the observations cannot tell: entries of x that no datum sees, and directions, for operators that mix entries.

All that N data say of second moments of x goes through G = sum_i A_i^T A_i. Entry j is seen by some datum if and only if G_jj > 0, and
G_jj = sum_i E (A_i^T s)_j^2 over random signs s: one adjoint per datum. The share of directions of which G is next to nothing is read off its
spectral measure, which a few Lanczos steps from a random vector give (stochastic Lanczos quadrature): the weights of the Ritz values are shares of
the directions. What is seen by no datum, no amount of data and no iteration of EM tells: it stays what the start guessed (docs/observers.md).

Source: Golub & Meurant, Matrices, moments and quadrature (1994); Ubaru, Chen & Saad (2017), Sec. 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emdiff.data import Data, Observations
from emdiff.rows import evenly, spans

STEPS = 40
"""Lanczos steps."""

LITTLE = 1e-3
"""Directions of which the observations tell less than this share of what they tell of the best-seen one count as unseen."""

NOTICED = 0.01
"""Share of unseen directions from which it is worth a word."""


def blind_spots(data: Data, generator: torch.Generator) -> list[str]:
    """Warnings for the user, in words; none where every entry and direction is seen.

    Args:
        data: Observations in any units.
        generator: Source of randomness, on the CPU.
    """
    power = seen_power(data, generator)
    unseen = int((power <= 1e-9 * power.max()).sum())
    if unseen:
        return [
            f"{unseen} of {power.numel()} entries of x are seen by no datum: nothing tells of them, and the prior there is the start's guess; "
            "samples of these entries mean nothing, unless other observations are added that see them"
        ]
    share = unseen_directions(data, generator)
    if share < NOTICED:
        return []
    return [
        f"the observations tell next to nothing of {100 * share:.0f} % of the directions of x (less than {LITTLE:g} of what they tell of the "
        "best-seen one), in no datum: there the prior is the start's guess; observations with other operators would tell"
    ]


def seen_power(data: Data, generator: torch.Generator) -> Tensor:
    """An unbiased estimate of the diagonal of G, 0 where and only where no datum sees an entry, shape (*S,), float64."""
    total = torch.zeros(data.shape, dtype=torch.float64)
    for span in spans(len(data), math.prod(data.shape)):
        part = data.rows(span)
        signs = torch.randint(0, 2, part.obs.shape, generator=generator).to(part.obs) * 2 - 1
        total += part.observer.adjoint(signs * part.observer.observed()).double().square().sum(0)
    return total


def unseen_directions(data: Data, generator: torch.Generator) -> float:
    """The share of directions v with v^T G v below LITTLE of the largest, from as many data as could see all; 0 where entries are not mixed."""
    one = data.rows(slice(0, 1))
    if one.observer.as_measurement(one.obs) is not None:
        return 0.0
    d = math.prod(data.shape)
    wanted = max(64, math.ceil(4 * d / one.obs.numel()))
    some = data.rows(evenly(len(data), wanted))
    steps = min(STEPS, d)
    basis, alpha, beta = torch.zeros(steps, d, dtype=torch.float64), [], []
    v = torch.randn(d, generator=generator, dtype=torch.float64)
    v = v / v.norm()
    for j in range(steps):
        basis[j] = v
        w = _product(some, v)
        alpha.append(float(v @ w))
        for _ in range(2):
            w = w - basis[: j + 1].T @ (basis[: j + 1] @ w)
        beta.append(float(w.norm()))
        if beta[-1] <= 1e-9 * max(alpha):
            break
        v = w / w.norm()
    k = len(alpha)
    T = torch.diag(torch.tensor(alpha)) + torch.diag(torch.tensor(beta[: k - 1]), 1) + torch.diag(torch.tensor(beta[: k - 1]), -1)
    values, vectors = torch.linalg.eigh(T.double())
    return float(vectors[0].square()[values < LITTLE * values.max()].sum())


def _product(data: Observations, v: Tensor) -> Tensor:
    """G v for v (d,), float64."""
    total = torch.zeros_like(v)
    for span in spans(len(data), len(v), 256):
        part = data.rows(span)
        x = v.to(part.obs).reshape(1, *data.shape).expand(len(part), *data.shape)
        seen = part.observer.forward(x) * part.observer.observed()
        total += part.observer.adjoint(seen).double().sum(0).flatten()
    return total
