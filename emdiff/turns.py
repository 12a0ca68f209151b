"""Incremental EM: in each iteration a share of the observations is walked anew, in turn, and the M-step trains on the pairs of all.

EM ascends the free energy F(q, p) = sum_i E_{q_i}[log p(x_i, obs_i)] + H(q_i) in p and in the laws q_i of x_i | obs_i by turns. Setting some q_i to
p(x_i | obs_i) and leaving the others ascends F as well, so its fixed points are EM's; the prior is renewed after a share of the work of an E-step,
and so 1/share times as often in the same time. The kept pairs are samples of posteriors under priors of some iterations ago.

Source: A view of the EM algorithm that justifies incremental, sparse, and other variants (Neal & Hinton 1998), Sec. 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emdiff.streams import stream

Rows = Tensor | slice
"""Indices (n,), int64, or a slice: some of the observations."""


def on_turn(k: int, count: int, turn: int, seed: int) -> Rows:
    """The observations that iteration k walks anew: all, or from the second on the next `turn` of them in an order drawn once.

    >>> [sorted(on_turn(k, 6, 4, 0).tolist()) == sorted(on_turn(k + 3, 6, 4, 0).tolist()) for k in (2, 3)]
    [True, True]
    """
    if k < 2 or not 0 < turn < count:
        return slice(0, count)
    order = torch.randperm(count, generator=stream(seed, "turns"))
    return order[((k - 2) * turn + torch.arange(turn)) % count]


def in_place(rows: Tensor, new: tuple[Tensor, ...], good: Tensor, before: tuple[Tensor, ...]) -> list[Tensor]:
    """Each of `before` (N, *S) with the good ones, bool (n,), of the matching `new` (n, *S) at rows (number of good ones,)."""
    return [b.index_copy(0, rows, a[good]) for a, b in zip(new, before)]
