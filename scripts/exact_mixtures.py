r"""Reference 2 of bench_exact: points in the plane seen with a full noise covariance of their own, next to extreme deconvolution.

obs_i = x_i + n_i, n_i ~ N(0, R_i), R_i known, full, and different for every datum: what Extreme deconvolution (Bovy, Hogg & Roweis 2011) was made
for. The observer is `projection` with matrix R_i^(-1/2) and noise_std 1: R_i^(-1/2) obs_i = R_i^(-1/2) x_i + N(0, I).

Extreme deconvolution is astroML's XDGMM: its start (a few steps of scikit-learn's GaussianMixture) and ITERATIONS of its updates. astroML inverts
every 2 x 2 matrix by itself and takes seconds per iteration, so the updates are done by emdiff.deconvolution here, all data at once; each comparison
begins by checking that three of them leave the mixture that astroML's own three leave. The number of components is chosen from COMPONENTS by the
likelihood of the last quarter of the observations, and the fit repeated on all of them; "bic" instead chooses it as scikit-learn's and astroML's
examples do, by the Bayesian information criterion on all observations.

Figures: mean log-likelihood of 32,768 held-out observations, in closed form for both (where emdiff's network departs from its mixture, over samples
of the prior), and the paired difference with its standard error; Sinkhorn divergence S (exact_tools, regularisation .05, squared, 500 points) and
exact transport cost W2^2 (1,000 points) to true points, means over PAIRS pairs of sets; the row of true points says what their scatter alone gives.
"population": the same S between the laws themselves, which have densities, without scatter, and its dual form (exact_sinkhorn).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exact_sinkhorn import MEANS, ROOTS, SHARES, to_truth
from exact_tools import row, sinkhorn_divergence, transport
from timed_command import command
from torch import Tensor

from emdiff.deconvolution import Mixture, Whitened, expect, maximise, whitened
from emdiff.finished import latest_prior
from emdiff.mixture import MixtureDenoiser
from emdiff.observations import Observations, write_observations
from emdiff.prior import Prior, load_prior, sample_prior
from emdiff.streams import stream
from observers import Projection

COMPONENTS = (2, 4, 8, 16, 32)
ITERATIONS = 200
PAIRS = 10
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
    j = rng.choice(4, count, p=SHARES)
    return MEANS[j] + np.einsum("nde,ne->nd", ROOTS[j], rng.normal(size=(count, 2)))


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


def observed(obs: np.ndarray, R: np.ndarray) -> Whitened:
    """Observations (n, 2) in the terms of emdiff.deconvolution; log-likelihoods are those of obs, not of its whitened form."""
    data = whitened(as_projection(obs, R))
    return data._replace(constant=data.constant + torch.linalg.slogdet(torch.from_numpy(whitening(R)))[1])


def by_samples(x: Tensor, data: Whitened) -> Tensor:
    """log (1/J) sum_j N(obs; x_j, R) of each observation, for samples x (J, 2)."""
    gap = data.obs[:, None] - torch.einsum("nij,kj->nki", data.A, x.double())
    return torch.logsumexp(-gap.square().sum(-1) / 2, 1) - math.log(len(x)) + data.constant


def extreme_deconvolution(obs: np.ndarray, R: np.ndarray, components: int, seed: int, iterations: int = ITERATIONS) -> Mixture:
    """astroML's XDGMM(components, max_iter=iterations, random_state=seed).fit(obs, R)."""
    from sklearn.mixture import GaussianMixture

    first = GaussianMixture(components, max_iter=10, covariance_type="full", random_state=seed).fit(obs)
    model, data = Mixture(*map(torch.from_numpy, (first.weights_, first.means_, first.covariances_))), observed(obs, R)
    found = expect(model, data)
    for _ in range(iterations):
        model, before = maximise(model, found, 0.0), found
        found = expect(model, data)
        if found.log_likelihood.sum() < before.log_likelihood.sum() + 1e-5:
            break
    return model


def check_against_astroml(obs: np.ndarray, R: np.ndarray, seed: int) -> None:
    """Stop unless three iterations with 8 components are astroML's."""
    from astroML.density_estimation import XDGMM

    theirs, ours = XDGMM(8, max_iter=3, random_state=seed).fit(obs, R), extreme_deconvolution(obs, R, 8, seed, 3)
    gap = max(float(np.abs(a - b.numpy()).max()) for a, b in zip((theirs.alpha, theirs.mu, theirs.V), ours))
    if gap > 1e-6:
        raise SystemExit(f"three iterations of extreme deconvolution differ from astroML's by {gap:.2g}")


def best_extreme_deconvolution(obs: np.ndarray, R: np.ndarray, seed: int, components: tuple[int, ...]) -> Mixture:
    """The fit with the number of components that predicts the last quarter best."""
    cut = 3 * len(obs) // 4
    rest = observed(obs[cut:], R[cut:])
    fit = lambda J: float(expect(extreme_deconvolution(obs[:cut], R[:cut], J, seed), rest).log_likelihood.mean())  # noqa: E731
    return extreme_deconvolution(obs, R, max(components, key=fit), seed)


def bic_extreme_deconvolution(obs: np.ndarray, R: np.ndarray, seed: int, components: tuple[int, ...]) -> Mixture:
    """The fit with the least -2 log L + k log N, k = 6 J - 1 parameters in the plane."""
    data = observed(obs, R)
    fits = [extreme_deconvolution(obs, R, J, seed) for J in components]
    return min(fits, key=lambda m: (6 * len(m.weights) - 1) * math.log(len(obs)) - 2 * float(expect(m, data).log_likelihood.sum()))


def draws(model: Mixture, count: int, generator: torch.Generator) -> Tensor:
    """Samples (count, 2) of a mixture."""
    nothing = torch.zeros(count, 1, 2, dtype=torch.float64), torch.tensor([math.inf], dtype=torch.float64)
    return MixtureDenoiser(*model).draw(*nothing, generator)


def in_users_units(prior: Prior) -> Mixture | None:
    """The mixture that a prior is, or None where its network departs from it."""
    if prior.denoiser.base is None or prior.denoiser.departs():
        return None
    model, scale = prior.denoiser.base.model(), prior.scale
    return Mixture(model.weights, scale.restore(model.means), model.covs * scale.std**2)


def compare(name: str, folder: Path, seed: int, quick: bool, components: tuple[int, ...]) -> dict[str, Any]:
    """emdiff by its command, XD with the number of components chosen from `components`, and true points on one data set."""
    count, unseen, iters = (500, 500, 1) if quick else (4096, 32768, 2)
    x, R = points(name, count + unseen, seed), noise(count + unseen, seed)
    obs = x + np.einsum("nij,nj->ni", np.linalg.cholesky(R), np.random.default_rng([seed, 99]).normal(size=x.shape))
    file, out = folder / f"{name}-{count}-{seed}.npz", folder / f"{name}-{count}-{seed}"
    write_observations(file, as_projection(obs[:count], R[:count]), torch.from_numpy(x[:count]).float())
    flags = ["--train.steps", "100", "--train.start-steps", "200", "--walk.levels", "12"] if quick else ["--walk.levels", "16"]
    cost = command("fit", "--observations", str(file), "--out", str(out), "--iters", str(iters), "--seed", str(seed), "--wandb", "off", *flags)
    check_against_astroml(obs[:count], R[:count], seed)
    xd = best_extreme_deconvolution(obs[:count], R[:count], seed, (4,) if quick else components)
    bic = bic_extreme_deconvolution(obs[:count], R[:count], seed, (2, 4) if quick else components)
    prior, held = load_prior(latest_prior(out)), observed(obs[count:], R[count:])
    ours, generator = in_users_units(prior), stream(seed, "exact prior")
    pairs, many, few = (2, 200, 100) if quick else (PAIRS, 1000, 500)
    taken = sample_prior(prior, pairs * many, generator).double() if ours is None else draws(ours, pairs * many, generator)
    real = torch.from_numpy(points(name, pairs * many, seed + 2000))
    sets = {"emdiff": taken, "xd": draws(xd, pairs * many, generator), "truth": torch.from_numpy(points(name, pairs * many, seed + 1000))}
    log_p = {"emdiff": by_samples(taken, held) if ours is None else expect(ours, held).log_likelihood, "xd": expect(xd, held).log_likelihood}
    gain, over_bic = log_p["emdiff"] - log_p["xd"], log_p["emdiff"] - expect(bic, held).log_likelihood
    figures: dict[str, Any] = {"truth": name, "count": count, "iters": iters, "xd_components": len(xd.weights), "emdiff_departs": int(ours is None)}
    figures["emdiff_members"] = json.loads((out / "start" / "metrics.json").read_text())["members"]
    figures |= {f"{who}_held_out": float(value.mean()) for who, value in log_p.items()}
    figures |= {"gain": float(gain.mean()), "gain_error": float(gain.std() / len(gain) ** 0.5), "bic_components": len(bic.weights)}
    figures |= {"gain_bic": float(over_bic.mean()), "gain_bic_error": float(over_bic.std() / len(over_bic) ** 0.5)}
    for who, law in {"emdiff": ours, "xd": xd, "bic": bic}.items():
        if law is not None:
            S = to_truth(name, law)
            figures |= {f"{who}_population_sinkhorn": S.sharp, f"{who}_population_dual": S.dual}
    for who, sample in sets.items():
        halves = list(zip(sample.split(many), real.split(many)))
        figures[f"{who}_sinkhorn"] = float(np.mean([sinkhorn_divergence(a[:few], b[:few]) for a, b in halves]))
        figures[f"{who}_w2sq"] = float(np.mean([transport(a, b) for a, b in halves]))
    return row("mixtures", seed, {**figures, **cost._asdict()})
