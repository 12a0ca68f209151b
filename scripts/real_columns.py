"""The columns of real_work.py, and their figures: a Gaussian prior, the observation itself, a prior trained on clean data, and `emdiff fit`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mnist_features import mnist_features
from real_cases import MARGIN, SHAPE, naive
from real_galaxies import distances, ellipticity, half_light
from timed_command import command
from torch import Tensor

from emdiff.data import Observations
from emdiff.em import Draws, Walk
from emdiff.evaluate import likeness, with_truth
from emdiff.gaussian import fit_gaussian, pathwise
from emdiff.metrics import FeatureDistance, residual_chi2, sliced_wasserstein
from emdiff.pairs import PairLoss
from emdiff.posterior import Posterior, sample_posterior
from emdiff.precision import set_precision
from emdiff.prior import Prior, build_network, choose_network, load_prior, sample_prior, save_prior
from emdiff.scale import Scale, estimate_scale
from emdiff.streams import stream, stream_seed
from emdiff.training import train

CLEAN_LAST = 0.02
"""Finest level of the clean-trained priors, in units of the data's std."""


class Column(NamedTuple):
    """Posterior samples of the first observations, and prior samples (P, *S), in the units of the data."""

    drawn: Posterior
    prior: Tensor

    @property
    def posterior(self) -> Tensor:
        """Shape (n, L, *S)."""
        return self.drawn.x


def gaussian_column(data: Observations, n: int, L: int, P: int, seed: int) -> Column:
    """N(mean, S) fitted to all observations by ten iterations of EM, and exact samples."""
    scale = estimate_scale(data, stream(seed, "scale"))
    standard, draw = scale.observations(data), stream(seed, "real gaussian")
    fitted, some = fit_gaussian(standard, 10, generator=draw), standard.rows(slice(0, n))
    x = torch.stack([pathwise(fitted, some.observer, some.obs, draw) for _ in range(L)], dim=1)
    chi2 = torch.stack([residual_chi2(some, x[:, i]) for i in range(L)], dim=1)
    return Column(Posterior(scale.restore(x), 0, 0.0, 0.0, chi2), scale.restore(fitted.sample(P, draw)))


def clean_prior(file: Path, x: Tensor, masks: tuple[float, ...], steps: int, seed: int) -> Prior:
    """A prior of the network that `emdiff fit` would choose, trained on clean data x (N, *S) and kept in a file; where shares of entries that masks
    keep are given, with the levels of such observations (noise .1) in four of five inputs, so that it serves masks as well as other instruments."""
    if not file.is_file():
        scale, draw = Scale(float(x.mean()), float(x.std())), stream(seed, "real clean masks")
        seen = [torch.rand(len(x), *SHAPE, generator=draw) < keep for keep in masks]
        maps = torch.where(torch.cat(seen), 0.1 / scale.std, math.inf) if masks else None
        torch.manual_seed(stream_seed(seed, "real clean"))
        network, x = choose_network(SHAPE, maps is not None), scale.standardise(x)
        denoiser = set_precision(build_network(SHAPE, **network), "cpu")
        trained = train(denoiser, PairLoss(Draws(x, x, 0.0), CLEAN_LAST, maps), len(x), steps, rate=2e-3, seed=seed)
        save_prior(file, Prior(trained.denoiser, scale, SHAPE, CLEAN_LAST, network))
    return load_prior(file)


def learned_column(prior: Prior, walk: Walk, bound: float, data: Observations, n: int, L: int, P: int, seed: int, name: str) -> Column:
    """Samples under a learned prior, walked as in the E-steps of a fit: chains beyond the bound, in units of the data's std, are walked again. A
    prior trained down to a coarser level than the walk's last ends there."""
    walk = walk._replace(tau_last=max(walk.tau_last, prior.tau_last))
    drawn = sample_posterior(prior, data.rows(slice(0, n)), walk, L, stream(seed, "real posterior", name), bound=bound)
    return Column(drawn, sample_prior(prior, P, stream(seed, "real prior", name), 32))


def fitted(file: Path, out: Path, iters: int, seed: int, more: list[str]) -> dict[str, float]:
    """Run `emdiff fit`, or find that it has run; what it cost."""
    cost = out / "cost.json"
    if not cost.is_file():
        flags = ["--iters", str(iters), "--seed", str(seed), "--wandb", "off", *more]
        seconds, peak = command("fit", "--observations", str(file), "--out", str(out), *flags)
        cost.write_text(json.dumps({"seconds": round(seconds), "peak_gb": peak}))
    return json.loads(cost.read_text())


class Figures:
    """Figures of columns against the truth, and of prior samples against clean data that were not observed.

    Args:
        data: Observations, in the user's units.
        truth: Clean data behind them (N, *S).
        fresh: Other clean data (P, *S).
        features: For Frechet distances of digits; None for galaxies, whose radii and ellipticities are compared.
    """

    def __init__(self, data: Observations, truth: Tensor, fresh: Tensor, features: FeatureDistance | None) -> None:
        self.data, self.truth, self.fresh, self.features = data, truth, fresh, features

    def of(self, column: Column) -> dict[str, float]:
        """Errors, PSNR, chi2, coverage of 80 % intervals, and distances of prior samples."""
        n = len(column.posterior)
        data, truth = self.data.rows(slice(0, n)), self.truth[:n]
        found, _ = with_truth(column.drawn, truth, residual_chi2(data, truth), stream(0, "real figures"))
        names = ("error", "error_mean", "psnr", "psnr_mean", "std_ratio", "coverage_80", "coverage_80_weighted")
        chi2 = float(column.drawn.chi2.mean())
        return {name: found[name] for name in names} | {"chi2": chi2, "restarted": column.drawn.restarted} | self.prior(column.prior)

    def naive(self, n: int) -> dict[str, float]:
        """Those of the observation itself."""
        x = naive(self.data.observer, self.data.obs)
        found = {"error": float((x[:n] - self.truth[:n]).square().mean()), "psnr": likeness(x[:n], self.truth[:n], "")["psnr"]}
        return found | self.prior(x[: len(self.fresh)])

    def prior(self, x: Tensor) -> dict[str, float]:
        """Distances of samples (P, *S) to clean data."""
        found = {"sliced_wasserstein": sliced_wasserstein(x, self.fresh[: len(x)], generator=stream(0, "real directions"))}
        return found | (distances(x, self.fresh) if self.features is None else {"frechet": self.features(padded(x)).frechet})

    def floor(self) -> dict[str, float]:
        """Those of the clean data behind the observations."""
        return self.prior(self.truth[: len(self.fresh)])


def padded(x: Tensor) -> Tensor:
    """Digits (n, 24, 24) as images (n, 1, 28, 28)."""
    return torch.nn.functional.pad(x, [MARGIN] * 4)[:, None]


def digit_features(path: Path, folder: Path, count: int = 60_000) -> FeatureDistance:
    """Frechet distances to the clean training digits, with their margins empty, as those of samples are."""
    import numpy as np

    with np.load(path) as file:
        x, labels = torch.from_numpy(file["train_images"][:count]).float() / 255, torch.from_numpy(file["train_labels"][:count]).long()
    return FeatureDistance(mnist_features(x, labels, folder), padded(x[:, MARGIN:-MARGIN, MARGIN:-MARGIN]))


def measured(columns: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Half-light radii and ellipticities of galaxies (n, *S) by column, for the histograms."""
    return {name: {"radius": half_light(x).numpy(), "ellipticity": ellipticity(x).numpy()} for name, x in columns.items()}
