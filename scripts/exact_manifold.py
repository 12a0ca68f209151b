r"""Reference 3 of bench_exact: a random smooth curve in five dimensions, each point seen through two random projections.

The data are those of Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al. 2024, experiment "manifold"), made anew:

    x_c(z) = sum_{k=1..10} a_ck / k^3 sin(2 pi (k b_ck z + c_ck)),     z, a, b, c uniform on [0, 1],     each coordinate mapped to [-2, 2],
    obs = A x + n,   A 2 x 5 for every datum, rows normal and scaled to length 1,   n of std .01,   65,536 data.

Figures, for posterior samples (one for each of the first observations) and for prior samples, less what independent true points score against the
same points, since that is not 0 for finite samples:
    w2sq       exact optimal transport cost W2^2 of `points` samples to points at even z, by POT's emd2: mean squared displacement. The mean over
               BLOCKS sets of samples, since one set scatters by its own size. For every iteration.
    sinkhorn   the published definition, T(x1, p) - T(x1, x2): T = <P, squared distance> by POT's log-domain sinkhorn2 with regularisation 1e-3 and at
               most 1,024 iterations, x1 and x2 two sets of true points; squared, not rooted; not below 1e-6. After 1,024 iterations at this
               regularisation the marginals are not yet met, which makes it milder than w2sq. The publication compares 16,384 points
               of the posterior samples; here half of `points`, and the prior samples too. For the last iteration.
    off_curve  mean squared distance to the nearest point of the curve.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exact_tools import entropic, row, transport
from timed_command import command
from torch import Tensor

from emdiff.observations import Observations, write_observations
from emdiff.prior import load_prior, sample_prior
from emdiff.streams import stream
from observers import Projection

TERMS, DIM, ROWS, NOISE = 10, 5, 2, 0.01

BLOCKS = 4
"""Sets of samples that a distance is averaged over."""


def curve(z: np.ndarray, seed: int) -> np.ndarray:
    """Points (n, 5) of the seed's curve at z in [0, 1], each coordinate within [-2, 2]."""
    a, b, c = np.random.default_rng(seed).uniform(size=(3, DIM, TERMS))
    k = np.arange(TERMS) + 1
    raw = lambda z: (a / k**3 * np.sin(2 * np.pi * (k * b * z[:, None, None] + c))).sum(-1)  # noqa: E731
    fine = raw(np.linspace(0, 1, 20_001))
    low, high = fine.min(0), fine.max(0)
    return 4 * (raw(z) - low) / (high - low) - 2


def observe(count: int, seed: int) -> tuple[Observations, Tensor]:
    """Observations and the truth (N, 5)."""
    rng = np.random.default_rng([seed, 1])
    x = curve(rng.uniform(size=count), seed)
    A = rng.normal(size=(count, ROWS, DIM))
    A = A / np.linalg.norm(A, axis=-1, keepdims=True)
    obs = np.einsum("nmd,nd->nm", A, x) + NOISE * rng.normal(size=(count, ROWS))
    observer = Projection((DIM,), torch.tensor(NOISE), torch.from_numpy(A).float())
    return Observations(torch.from_numpy(obs).float(), observer), torch.from_numpy(x).float()


class Judge:
    """Distances to the truth of one curve, over `points` samples."""

    def __init__(self, seed: int, points: int) -> None:
        even = lambda n: torch.from_numpy(curve((np.arange(n) + 0.5) / n, seed))  # noqa: E731
        drawn = lambda i: torch.from_numpy(curve(np.random.default_rng([seed, 2, i]).uniform(size=points), seed))  # noqa: E731
        self.points, self.even, self.fine = points, even(points), even(4000)
        self.first, second = drawn(0)[: points // 2], drawn(1)[: points // 2]
        self.floor = float(np.mean([transport(self.even, drawn(i)) for i in range(8)]))
        self.sinkhorn_floor = entropic(self.first, second, 1e-3, 1024)

    def quick(self, x: Tensor) -> dict[str, float]:
        """w2sq and off_curve of samples (n, 5)."""
        blocks = [block.double() for block in x[: BLOCKS * self.points].split(self.points)]
        far = torch.cat([torch.cdist(block, self.fine).amin(1) for block in blocks])
        return {"w2sq": float(np.mean([transport(self.even, b) for b in blocks])) - self.floor, "off_curve": float(far.square().mean())}

    def full(self, x: Tensor) -> dict[str, float]:
        """The same, and sinkhorn."""
        published = entropic(self.first, x[: self.points // 2].double(), 1e-3, 1024) - self.sinkhorn_floor
        return {**self.quick(x), "sinkhorn": max(published, 1e-6)}


def judged(out: Path, judge: Judge, seed: int, iters: int) -> list[dict[str, Any]]:
    """Figures of every iteration of a run folder, of posterior and prior samples, the last with sinkhorn."""
    history, seconds = [], 0.0
    for k in range(iters + 1):
        folder = out / ("start" if k == 0 else f"round_{k:03d}")
        seconds += json.loads((folder / "metrics.json").read_text())["seconds"]
        look = judge.full if k == iters else judge.quick
        line = {"k": k, "seconds": seconds, "posterior": look(torch.from_numpy(np.load(folder / "samples.npy")))}
        if k:
            drawn = stream(seed, "exact prior", k)
            line["prior"] = look(sample_prior(load_prior(folder / "prior.safetensors"), BLOCKS * judge.points, drawn, batch=2048))
        history.append(line)
    return history


def fit(folder: Path, seed: int, quick: bool, count: int, iters: int) -> dict[str, Any]:
    """The command on one curve."""
    count, iters, points = (2048, 2, 256) if quick else (count, iters, 2048)
    data, x = observe(count, seed)
    file, out = folder / f"manifold-{count}-{seed}.npz", folder / f"manifold-{count}-{seed}"
    write_observations(file, data, x)
    steps = ["100", "200"] if quick else ["1000", "1500"]
    flags = ["--walk.levels", "16", "--train.batch", "512", "--train.steps", steps[0], "--train.start-steps", steps[1]]
    cost = command("fit", "--observations", str(file), "--out", str(out), "--iters", str(iters), "--seed", str(seed), "--wandb", "off", *flags)
    judge = Judge(seed, points)
    history = judged(out, judge, seed, iters)
    below = [h["seconds"] for h in history if h["k"] and h["prior"]["w2sq"] < 0.1]
    last = {f"{who}_{name}": value for who in ("posterior", "prior") for name, value in history[-1][who].items()}
    reached = {"seconds_to_prior_below_.1": below[0] if below else math.nan}
    return row("manifold", seed, {"count": count, "iters": iters, "points": points, **last, **reached, **cost._asdict(), "history": history})
