"""Incremental EM: in each iteration a share of the observations is walked anew, in turn, and the M-step trains on the pairs of all.

EM ascends the free energy F(q, p) = sum_i E_{q_i}[log p(x_i, obs_i)] + H(q_i) in p and in the laws q_i of x_i | obs_i by turns. Setting some q_i to
p(x_i | obs_i) and leaving the others ascends F as well, so its fixed points are EM's; the prior is renewed after a share of the work of an E-step,
and so 1/share times as often in the same time. The kept pairs are samples of posteriors under priors of some iterations ago.

Source: A view of the EM algorithm that justifies incremental, sparse, and other variants (Neal & Hinton 1998), Sec. 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emdiff.data import Data, View
from emdiff.rows import Array, Index, Rows, chosen_rows
from emdiff.streams import stream


def on_turn(k: int, count: int, turn: int, seed: int) -> Tensor | None:
    """Indices (turn,), int64, of the observations that iteration k walks anew, the next ones in an order drawn once; None for all, as in the first.

    >>> [sorted(on_turn(k, 6, 4, 0).tolist()) == sorted(on_turn(k + 3, 6, 4, 0).tolist()) for k in (2, 3)]
    [True, True]
    """
    if k < 2 or not 0 < turn < count:
        return None
    order = torch.randperm(count, generator=stream(seed, "turns"))
    return order[((k - 2) * turn + torch.arange(turn)) % count]


def those_of(data: Data, rows: Tensor | None) -> Data:
    """The observations of given indices, read when asked for; all for None."""
    return data if rows is None else View(len(rows), data.shape, lambda at: data.rows(rows[at]))


def rows_of(array: Array, rows: Tensor | None) -> Array:
    """The rows of given indices, read when asked for; all for None."""
    return array if rows is None else chosen_rows(array, rows)


def in_place(rows: Tensor, new: Array, good: Tensor, before: Array) -> Rows:
    """An array with the good rows, bool (n,), of `new` (n, *S) at `rows` (n,), and those of `before` (N, *S) elsewhere; read when asked for."""
    place = torch.full((before.shape[0],), -1).index_copy(0, rows[good], torch.arange(len(rows))[good])

    def read(index: Index) -> Tensor:
        at, found = place[index], before[index].clone()
        found[at >= 0] = new[at[at >= 0]].to(found)
        return found

    return Rows(before.shape, read)
