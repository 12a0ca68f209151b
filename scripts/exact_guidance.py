r"""Reference 4 of bench_exact: how right is moment-matched guidance where the prior is not Gaussian and its denoiser is exact?

x is uniform on POINTS points of the curve of exact_manifold, so that E[x | y], V[x | y] and p(x | obs) are sums:

    r_j prop. to exp(-|y - x_j|^2 / 2 tau^2),   xhat = sum_j r_j x_j,   V = sum_j r_j (x_j - xhat)(x_j - xhat)^T

One E-step's chains x | obs are walked in three ways: re-entering at .8 data std from the truth itself, five times; from tau = 20, where nothing is
known (with more levels too); and from a pool (emdiff/pool.py). Figures: mean squared error per entry of the samples, against that of exact samples;
the share of chains that their observation rules out, chi2 above 9 per entry, which has probability exp(-9) under the posterior.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from exact_manifold import curve, observe
from exact_tools import row
from torch import Tensor

from emdiff.denoise import Denoiser, Moments
from emdiff.em import Walk, e_step
from emdiff.measurement import pool as pooled
from emdiff.metrics import residual_chi2
from emdiff.observations import Observations
from emdiff.pool import choose, distances
from emdiff.scale import Scale, estimate_scale
from emdiff.streams import stream

POINTS, TAU_LAST = 2000, 0.0036


class Curve(Denoiser):
    """The exact denoiser of x uniform on points (J, d)."""

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self.points = points

    def weights(self, y: Tensor, sigma: Tensor) -> Tensor:
        """r (B, J)."""
        ybar, precision = pooled(y, sigma)
        return (-torch.cdist(ybar.double(), self.points.double()).square() * precision.double().flatten()[0] / 2).softmax(1).float()

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        """E[x | y], shape (B, d)."""
        return self.weights(y, sigma) @ self.points

    def moments(self, y: Tensor, sigma: Tensor) -> Moments:
        """E[x | y] and V."""
        r = self.weights(y, sigma)
        xhat = r @ self.points
        V = torch.einsum("bj,jd,je->bde", r, self.points, self.points) - xhat[:, :, None] * xhat[:, None]
        return Moments(xhat, lambda u: torch.einsum("bde,be->bd", V, u))


def figures(x: Tensor, truth: Tensor, data: Observations, scale: Scale) -> dict[str, float]:
    """Error in the user's units, and share of chains ruled out."""
    return {"error": scale.std**2 * float((x - truth).square().mean()), "ruled_out": float((residual_chi2(data, x) > 9).float().mean())}


def run(seed: int, quick: bool) -> dict[str, Any]:
    """All walks on one curve."""
    count, passes = (128, 1) if quick else (512, 5)
    observed, x = observe(count, seed)
    scale = estimate_scale(observe(4096, seed)[0], stream(seed, "scale"))
    data, truth = scale.observations(observed), scale.standardise(x)
    points = scale.standardise(torch.from_numpy(curve((np.arange(POINTS) + 0.5) / POINTS, seed)).float())
    prior, draw = Curve(points), stream(seed, "exact guidance")
    found: dict[str, Any] = {"count": count, "exact_error": exact_error(points, data, truth, scale)}

    def walked(name: str, start: Tensor, tau_first: float, levels: int, times: int = 1) -> None:
        chains = start
        for i in range(times):
            walk = Walk("cg", tau_first, TAU_LAST, levels=levels, iterations=2, batch=count)
            end = e_step(prior, data, chains, walk, draw, tau_chains=walk.tau_last if i else 0.0)
            chains = end.y
        found.update({f"{name}_{key}": value for key, value in figures(end.x, truth, data, scale).items()})

    walked("persistent", truth, 0.8, 32, passes)
    walked("anew_32", torch.randn(truth.shape, generator=draw), 20.0, 32)
    walked("anew_128", torch.randn(truth.shape, generator=draw), 20.0, 16 if quick else 128)
    start = choose(points[torch.randint(POINTS, (8192,), generator=draw)], data, draw).x
    walked("pool", start, 0.3, 16)
    return row("guidance", seed, found)


def exact_error(points: Tensor, data: Observations, truth: Tensor, scale: Scale) -> float:
    """E |x - truth|^2 / d for x from the exact posterior on the points, in the user's units."""
    r = (-distances(points, data).double() / 2).softmax(1).float()
    return scale.std**2 * float((r * torch.cdist(truth, points).square()).sum(1).mean()) / truth.shape[1]
