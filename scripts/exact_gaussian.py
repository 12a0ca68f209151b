r"""Reference 1 of bench_exact: Gaussian x, where the best that anyone can do is known.

obs_i = A_i x_i + n_i, x ~ N(mu, S), n_i ~ N(0, R_i), A_i and R_i of each datum its own. The marginal likelihood

    l(mu, S) = sum_i log N(obs_i; A_i mu, A_i S A_i^T + R_i)

is maximised by a quasi-Newton method, which shares nothing with EM. 2 (l(mle) - l(truth)) is about chi-squared with as many degrees as there are
parameters, so an estimate whose likelihood falls short of the maximum by less than the truth's does is as good as the data allow to tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from exact_tools import row
from timed_command import command
from torch import Tensor

from emdiff.finished import latest_prior
from emdiff.mixture import MixtureDenoiser
from emdiff.observations import Observations, write_observations
from emdiff.prior import load_prior, sample_prior
from emdiff.scale import Scale
from emdiff.streams import stream
from observers import Mask

DIM = 5


class Moments(NamedTuple):
    """A Gaussian: mean (d,), covariance (d, d)."""

    mean: Tensor
    cov: Tensor


def moments(x: Tensor) -> Moments:
    """Mean and covariance of samples (n, d)."""
    x = x.double()
    return Moments(x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)) / len(x))


def total(mixture: MixtureDenoiser, scale: Scale) -> Moments:
    """Mean and covariance of a mixture in the user's units, in closed form."""
    model = mixture.model()
    mean = model.weights @ model.means
    far = model.means - mean
    cov = torch.einsum("j,jde->de", model.weights, model.covs + far[:, :, None] * far[:, None])
    return Moments(scale.restore(mean), scale.std**2 * cov)


def operators(data: Observations) -> tuple[Tensor, Tensor]:
    """A (N, o, d) and the diagonals of R (N, o); 0 and 1 where nothing was observed, which adds a constant to the likelihood."""
    eye = torch.eye(data.shape[0], dtype=data.obs.dtype)
    A = torch.stack([data.observer.forward(e.expand(len(data), -1)) for e in eye], dim=-1)
    seen = data.observer.observed().expand(data.obs.shape)
    return A.double(), torch.where(seen, data.observer.std().expand(data.obs.shape).square(), 1.0).double()


def log_likelihood(data: Observations, model: Moments) -> Tensor:
    """l(mu, S), shape (), up to a constant."""
    A, R = operators(data)
    C = A @ model.cov @ A.mT + torch.diag_embed(R)
    gap = data.obs.double() - A @ model.mean
    root = torch.linalg.cholesky(C)
    white = torch.linalg.solve_triangular(root, gap[..., None], upper=False)
    return -0.5 * white.square().sum() - root.diagonal(dim1=-2, dim2=-1).log().sum()


def maximum_likelihood(data: Observations, iterations: int = 200) -> Moments:
    """argmax l(mu, S) by L-BFGS on mu and a triangular root of S."""
    d = data.shape[0]
    mean = torch.zeros(d, dtype=torch.float64, requires_grad=True)
    root = torch.eye(d, dtype=torch.float64).requires_grad_(True)
    options = {"max_iter": iterations, "tolerance_grad": 1e-7, "tolerance_change": 1e-12, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([mean, root], **options)
    model = lambda: Moments(mean, root.tril() @ root.tril().T)  # noqa: E731

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -log_likelihood(data, model()) / len(data)
        loss.backward()
        return loss

    optimizer.step(closure)
    return Moments(mean.detach(), model().cov.detach())


def problem(count: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Observations, Tensor, Moments]:
    """Observations, x (N, d) and the truth: 30 % of the entries missing, noise from .2 to .6 for every entry of its own."""
    draw = stream(seed, "exact gaussian")
    W = torch.randn(DIM, DIM, generator=draw, dtype=torch.float64)
    truth = Moments(torch.randn(DIM, generator=draw, dtype=torch.float64) / 2, W @ W.T / DIM + 0.05 * torch.eye(DIM, dtype=torch.float64))
    x = truth.mean + torch.randn(count, DIM, generator=draw, dtype=torch.float64) @ torch.linalg.cholesky(truth.cov).T
    noise, seen = 0.2 + 0.4 * torch.rand(count, DIM, generator=draw), torch.rand(count, DIM, generator=draw) < 0.7
    observer = Mask((DIM,), noise.to(dtype), seen)
    return Observations(observer.simulate(x.to(dtype), draw), observer), x.to(dtype), truth


def compare(data: Observations, models: dict[str, Moments], truth: Moments) -> dict[str, float]:
    """Relative errors of the covariances, errors of the means, and how far each likelihood is below the maximum, over the truth's own gap."""
    best = log_likelihood(data, models["mle"])
    gap = best - log_likelihood(data, truth)
    figures = {}
    for name, model in models.items():
        figures[f"{name}_cov"] = float((model.cov - truth.cov).norm() / truth.cov.norm())
        figures[f"{name}_mean"] = float((model.mean - truth.mean).norm() / truth.mean.norm())
        figures[f"{name}_gap"] = float((best - log_likelihood(data, model)) / gap)
    return figures


def fit(folder: Path, seed: int, quick: bool) -> dict[str, Any]:
    """The command on one data set: the moments of its start, of its prior samples, and of the clean data against the MLE's."""
    count, iters = (1000, 1) if quick else (8192, 2)
    data, x, truth = problem(count, seed)
    file, out = folder / f"gaussian-{count}-{seed}.npz", folder / f"gaussian-{count}-{seed}"
    write_observations(file, data, x)
    flags = ["--train.steps", "100", "--train.start_steps", "200"] if quick else []
    cost = command("fit", "--observations", str(file), "--out", str(out), "--iters", str(iters), "--seed", str(seed), "--wandb", "off", *flags)
    prior, start = load_prior(latest_prior(out)), load_prior(out / "start" / "prior.safetensors")
    mle = maximum_likelihood(Observations(data.obs.double(), data.observer.to("cpu", torch.float64)))
    models = {
        "mle": mle,
        "start": total(start.denoiser.base, start.scale),
        "prior": moments(sample_prior(prior, 2000 if quick else 20_000, stream(seed, "exact prior"))),
        "complete": moments(x),
    }
    return row("gaussian", seed, {"count": count, "iters": iters, **compare(data, models, truth), **cost._asdict()})
