r"""Reference 2 of bench_exact: points in the plane seen with a full noise covariance of their own, next to extreme deconvolution.

obs_i = x_i + n_i, n_i ~ N(0, R_i), R_i known, full, and different for every datum: what Extreme deconvolution (Bovy, Hogg & Roweis 2011) was made
for. emdiff's observers have diagonal noise; a full one is whitened: R_i^(-1/2) obs_i = R_i^(-1/2) x_i + N(0, I) is the observer `projection` with
matrix R_i^(-1/2) and noise_std 1. Extreme deconvolution is astroML's XDGMM; the number of components is chosen from COMPONENTS by the likelihood of
the last quarter of the observations, and the fit repeated on all of them.

Figures: mean log-likelihood of held-out observations under N(obs; x, R), averaged over x of the prior (the same samples-based estimate for both, and
for true points, which no prior can beat but by chance); Sinkhorn divergence S (exact_tools, regularisation .05, squared, 500 points) and exact
transport cost W2^2 (1,000 points) to true points; the row of true points says what their scatter alone gives.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exact_tools import row, sinkhorn_divergence, transport
from timed_command import command
from torch import Tensor

from emdiff.observations import Observations, write_observations
from emdiff.prior import load_prior, sample_prior
from emdiff.runs import latest_prior
from emdiff.streams import stream
from observers import Projection

COMPONENTS = (2, 4, 8, 16)
TRUTHS = ("mixture", "moons", "ring")


def points(name: str, count: int, seed: int) -> np.ndarray:
    """True points (count, 2), of about unit size."""
    if name == "moons":
        from sklearn.datasets import make_moons

        return make_moons(count, noise=0.05, random_state=seed)[0] - [0.5, 0.25]
    rng = np.random.default_rng([seed, len(name)])
    if name == "ring":
        from sklearn.datasets import make_circles

        x, outer = make_circles(2 * count, noise=0.03, factor=0.5, random_state=seed)
        return x[outer == 0]
    means = np.array([[-1.0, -0.5], [0.8, -0.8], [0.0, 0.9], [0.9, 0.4]])
    roots = np.array([[[0.3, 0.0], [0.1, 0.1]], [[0.1, 0.0], [0.0, 0.3]], [[0.4, 0.0], [0.0, 0.05]], [[0.1, 0.0], [-0.1, 0.15]]])
    j = rng.choice(4, count, p=[0.3, 0.2, 0.35, 0.15])
    return means[j] + np.einsum("nde,ne->nd", roots[j], rng.normal(size=(count, 2)))


def noise(count: int, seed: int) -> np.ndarray:
    """Covariances R (count, 2, 2): axes of std from .1 to .5, in any direction."""
    rng = np.random.default_rng([seed, 77])
    angle, std = rng.uniform(0, math.pi, count), np.exp(rng.uniform(math.log(0.1), math.log(0.5), (count, 2)))
    U = np.stack([np.stack([np.cos(angle), -np.sin(angle)], -1), np.stack([np.sin(angle), np.cos(angle)], -1)], -2)
    return np.einsum("nij,nj,nkj->nik", U, std**2, U)


def whitening(R: np.ndarray) -> np.ndarray:
    """R^(-1/2), symmetric, (n, 2, 2)."""
    s, U = np.linalg.eigh(R)
    return np.einsum("nij,nj,nkj->nik", U, s**-0.5, U)


def as_projection(obs: np.ndarray, R: np.ndarray) -> Observations:
    """obs (n, d) with noise covariances R (n, d, d) as whitened observations: matrix R^(-1/2), unit noise."""
    W = whitening(R)
    white = torch.from_numpy(np.einsum("nij,nj->ni", W, obs)).float()
    return Observations(white, Projection(obs.shape[1:], torch.tensor(1.0), torch.from_numpy(W).float()))


def held_out(x: Tensor, obs: np.ndarray, R: np.ndarray) -> float:
    """Mean over obs (n, 2) of log (1/J) sum_j N(obs; x_j, R), for samples x (J, 2)."""
    W = torch.from_numpy(whitening(R))
    gap = torch.from_numpy(obs)[:, None] - x.double()
    white = torch.einsum("nij,nkj->nki", W, gap).square().sum(-1)
    log_det = torch.linalg.slogdet(W)[1]
    return float((torch.logsumexp(-white / 2, 1) - math.log(len(x)) + log_det - math.log(2 * math.pi)).mean())


def extreme_deconvolution(obs: np.ndarray, R: np.ndarray, count: int, seed: int, components: tuple[int, ...]) -> tuple[Tensor, int]:
    """Samples (count, 2) of the XD model, and its number of components."""
    from astroML.density_estimation import XDGMM

    cut = 3 * len(obs) // 4
    fit = lambda k, part: XDGMM(k, max_iter=200, random_state=seed).fit(obs[part], R[part])  # noqa: E731
    scores = {k: fit(k, slice(0, cut)).logL(obs[cut:], R[cut:]) for k in components}
    best = max(scores, key=scores.get)
    model = fit(best, slice(None))
    rng = np.random.default_rng(seed)
    j = rng.choice(best, count, p=model.alpha / model.alpha.sum())
    roots = np.linalg.cholesky(model.V + 1e-9 * np.eye(2))
    return torch.from_numpy(model.mu[j] + np.einsum("nde,ne->nd", roots[j], rng.normal(size=(count, 2)))), best


def cached(file: Path, obs: np.ndarray, R: np.ndarray, count: int, seed: int, components: tuple[int, ...]) -> tuple[Tensor, int]:
    """`extreme_deconvolution`, which takes minutes, from a file if it was run before."""
    if not file.exists():
        x, best = extreme_deconvolution(obs, R, count, seed, components)
        np.savez(file, x=x.numpy(), best=best)
    with np.load(file) as found:
        return torch.from_numpy(found["x"]), int(found["best"])


def compare(name: str, folder: Path, seed: int, quick: bool, components: tuple[int, ...]) -> dict[str, Any]:
    """emdiff by its command, XD with the number of components chosen from `components`, and true points on one data set."""
    count, iters, draws = (500, 1, 1000) if quick else (4096, 2, 8192)
    x, R = points(name, 2 * count, seed), noise(2 * count, seed)
    obs = x + np.einsum("nij,nj->ni", np.linalg.cholesky(R), np.random.default_rng([seed, 99]).normal(size=x.shape))
    file, out = folder / f"{name}-{count}-{seed}.npz", folder / f"{name}-{count}-{seed}"
    write_observations(file, as_projection(obs[:count], R[:count]), torch.from_numpy(x[:count]).float())
    flags = ["--train.steps", "100", "--train.start-steps", "200", "--walk.levels", "12"] if quick else ["--walk.levels", "16"]
    cost = command("fit", "--observations", str(file), "--out", str(out), "--iters", str(iters), "--seed", str(seed), "--wandb", "off", *flags)
    components = (4,) if quick else components
    fitted = folder / f"xd-{name}-{count}-{seed}-{'-'.join(map(str, components))}.npz"
    xd, best = cached(fitted, obs[:count], R[:count], draws, seed, components)
    models = {
        "emdiff": sample_prior(load_prior(latest_prior(out)), draws, stream(seed, "exact prior")),
        "xd": xd,
        "truth": torch.from_numpy(points(name, draws, seed + 1000)),
    }
    figures: dict[str, Any] = {"truth": name, "count": count, "iters": iters, "xd_components": best}
    real, few = torch.from_numpy(points(name, draws, seed + 2000)), 500 if quick else 1000
    for model, sample in models.items():
        figures[f"{model}_held_out"] = held_out(sample, obs[count:], R[count:])
        figures[f"{model}_sinkhorn"] = sinkhorn_divergence(sample[: few // 2].double(), real[: few // 2])
        figures[f"{model}_w2sq"] = transport(sample[:few], real[:few])
    return row("mixtures", seed, {**figures, **cost._asdict()})
