"""What the references of bench_exact share: distances between samples by POT, and rows of the table."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def row(part: str, seed: int, figures: dict[str, Any]) -> dict[str, Any]:
    """One line of the table, echoed to stderr at once."""
    line = {"part": part, "seed": seed, **figures}
    print(line, file=sys.stderr, flush=True)
    return line


def transport(a: Tensor, b: Tensor) -> float:
    """The exact optimal transport cost W_2^2 between samples (n, d) and (m, d): least mean squared displacement. POT's emd2."""
    import ot  # here, so that the tests that share these files need no POT

    return float(ot.emd2([], [], ot.dist(a.double().numpy(), b.double().numpy()), numItermax=10**8))


def entropic(a: Tensor, b: Tensor, reg: float, iterations: int) -> float:
    """<P, |a - b|^2> of the entropic plan P, as POT's sinkhorn2 returns it, in the log domain."""
    import ot

    cost = torch.cdist(a.double(), b.double()).square().float()
    return float(ot.sinkhorn2([], [], cost, reg, method="sinkhorn_log", numItermax=iterations, stopThr=1e-3 / len(a), warn=False))


def sinkhorn_divergence(a: Tensor, b: Tensor, reg: float = 0.05, iterations: int = 300) -> float:
    """S = T(a, b) - T(a, a)/2 - T(b, b)/2, T as in `entropic`; squared, not rooted."""
    T = lambda a, b: entropic(a, b, reg, iterations)  # noqa: E731
    return T(a, b) - T(a, a) / 2 - T(b, b) / 2
