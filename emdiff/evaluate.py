r"""`emdiff evaluate`: whether a fit can be believed, without clean data; and how far it is from the best possible, with them.

Without the truth: residuals of posterior samples against the noise, prior samples observed anew against the observations, drift over iterations,
chains and solves (metrics, verdict). With it: errors, intervals, ranks, distances in features (calibration, metrics). With an oracle, a prior
that knows more: each figure over the same figure of a run with that prior.

docs/figures.md says for each figure what it is and what good looks like.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from emdiff import calibration as cal
from emdiff.features import feature_module
from emdiff.figures import is_image
from emdiff.files import write_arrays, write_json
from emdiff.metrics import FeatureDistance, agreement, chi2_spread, residual_chi2, standardised_residual
from emdiff.observations import Observations
from emdiff.posterior import Posterior, sample_posterior
from emdiff.prior import Prior, sample_prior
from emdiff.streams import stream
from emdiff.verdict import best_iteration, drift, judge

SHOWN = 64
"""Data of which arrays.npz keeps images."""

Phase = Callable[[str, int], Callable[[int], None]]


class Task(NamedTuple):
    """What to evaluate.

    Attributes:
        data: Observations in the user's units.
        walk: The posterior's walk (`posterior.run_walk`).
        samples: Posterior samples per observation.
        prior_samples: Prior samples.
        truth: x (N, *S), or None.
        features: Name of the feature module (`features.feature_module`).
        seed: Seed.
        device: "cpu" or "cuda".
        bound: How far samples may lie, standardised (`posterior.run_bound`).
    """

    data: Observations
    walk: Any
    samples: int = 16
    prior_samples: int = 1000
    truth: Tensor | None = None
    features: str = "random-conv-64"
    seed: int = 0
    device: str = "cpu"
    bound: float = math.inf


class Evaluation(NamedTuple):
    """Figures by name, their floors, and arrays for pictures."""

    figures: dict[str, float]
    floors: dict[str, float]
    arrays: dict[str, np.ndarray]


def evaluate(prior: Prior, task: Task, phase: Phase) -> Evaluation:
    """Sample posterior and prior, and compute every figure that these allow."""
    draw = lambda name: stream(task.seed, "evaluate", name, device=task.device)  # noqa: E731
    posterior = sample_posterior(prior, task.data, task.walk, task.samples, draw("posterior"), phase, task.bound)
    x = sample_prior(prior, task.prior_samples, draw("prior"), progress=phase("prior samples", task.prior_samples))
    host = stream(task.seed, "evaluate", "figures")
    figures, floors = without_truth(task.data, posterior, x, host)
    arrays = pictures(task.data, posterior)
    if task.truth is not None:
        y = prior.scale.standardise(task.truth)
        y = y + posterior.tau * torch.randn(y.shape, generator=host)
        more, kept = with_truth(posterior, task.truth, residual_chi2(prior.scale.observations(task.data), y, posterior.tau), host)
        figures, arrays = figures | more, arrays | kept
        if is_image(task.data.shape):
            found, floor = in_features(posterior.x[:, 0], x, task.truth, task.features)
            figures, floors = figures | found, floors | floor
    return Evaluation(figures, floors, arrays)


def without_truth(data: Observations, posterior: Posterior, prior_x: Tensor, generator: torch.Generator) -> tuple[dict[str, float], dict[str, float]]:
    """Figures that need no truth, and the floors of the distances."""
    L, chi2 = posterior.x.shape[1], posterior.chi2.double()
    datum, overall = chi2_spread(data)
    found = agreement(data, prior_x, generator, repeats=4)
    states = cal.projections(posterior.x.flatten(2), 8)
    times = [cal.autocorrelation_time(states[..., j]) for j in range(states.shape[-1])]
    time = float(np.mean(times))
    figures = {
        "chi2": float(chi2.mean()),
        "chi2_spread": overall,
        "chi2_datum_std": float(chi2[:, 0].std()) if len(chi2) > 1 else math.nan,
        "chi2_datum_std_expected": datum,
        **found.distance,
        **{f"{name}_ratio": found.ratio(name) for name in found.distance},
        "autocorrelation_time": time,
        "ess_share": 1 / time,
        "solver_residual": posterior.residual,
        "solver_iterations": posterior.iterations,
        "restarted": float(posterior.restarted),
        "restarted_share": posterior.restarted / (len(data) * L),
    }
    return figures, found.floor


def with_truth(posterior: Posterior, truth: Tensor, chi2: Tensor, generator: torch.Generator) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Figures of posterior samples (N, L, *S) against the truth (N, *S), whose measurements have residual chi2 (N,), and the arrays behind the
    calibration plots."""
    x = posterior.x
    L, mean = x.shape[1], x.mean(1)
    rank = cal.ranks(x, truth, generator)
    u = cal.spread_ranks(rank, L, generator)
    t = cal.tarp(x, truth, generator)
    levels = torch.linspace(0, 1, 41, dtype=torch.float64)
    statistics = lambda a, chi2: torch.cat([cal.projections(a.flatten(1), 8), chi2[:, None]], dim=1)  # noqa: E731
    test = cal.sbc(torch.stack([statistics(x[:, i], posterior.chi2[:, i]) for i in range(L)], dim=1), statistics(truth, chi2), generator)
    figures = {
        "error": float((x[:, 0] - truth).square().mean()),
        "error_mean": float((mean - truth).square().mean()),
        "std_ratio": float(x.std() / truth.std()),
        "sharpness": cal.interval_width(x, 0.8),
        **{f"coverage_{round(100 * c)}": cal.coverage(u, c) for c in cal.LEVELS},
        "coverage_80_weighted": cal.weighted_coverage(x, truth, 0.8, generator),
        "sbc_pvalue": test.pvalue,
        "sbc_deviation": test.deviation,
        "tarp_pvalue": cal.uniformity(t[:, None]).pvalue,
        "tarp": float((cal.expected_coverage(t, levels) - levels).abs().max()),
        "crps": cal.crps(x, truth),
    }
    if is_image(truth.shape[1:]):
        figures |= likeness(x[:, 0], truth, "") | likeness(mean, truth, "_mean")
    arrays = {
        "truth": truth[:SHOWN].numpy(),
        "rank_counts": np.bincount(rank.flatten().numpy(), minlength=L + 1),
        "tarp_levels": levels.numpy(),
        "tarp_coverage": cal.expected_coverage(t, levels).numpy(),
        "coverage_levels": levels.numpy(),
        "coverage": np.array([cal.coverage(u, float(c)) for c in levels]),
    }
    return figures, arrays


def likeness(x: Tensor, truth: Tensor, suffix: str) -> dict[str, float]:
    """PSNR and SSIM of images (N, *S), in the range of the truth, by torchmetrics."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    images = lambda a: a.reshape(len(a), -1, *a.shape[-2:])  # noqa: E731
    low, high = float(truth.min()), float(truth.max())
    span = max(high - low, 1e-12)
    psnr = peak_signal_noise_ratio(images(x), images(truth), data_range=span)
    ssim = structural_similarity_index_measure(images(x), images(truth), data_range=span) if min(truth.shape[-2:]) >= 11 else math.nan
    return {f"psnr{suffix}": float(psnr), f"ssim{suffix}": float(ssim)}


def in_features(x: Tensor, prior_x: Tensor, truth: Tensor, name: str) -> tuple[dict[str, float], dict[str, float]]:
    """Frechet and kernel distances of posterior and prior samples to the truth; floors: between two halves of the truth."""
    images = lambda a: a.reshape(len(a), -1, *a.shape[-2:])  # noqa: E731
    distance = FeatureDistance(feature_module(name, images(truth)), images(truth))
    posterior, prior = distance(images(x)), distance(images(prior_x))
    figures = {"frechet": posterior.frechet, "kernel": posterior.kernel, "frechet_prior": prior.frechet, "kernel_prior": prior.kernel}
    half = len(truth) // 2
    floor = FeatureDistance(distance.features, images(truth[:half]))(images(truth[half:]))
    return figures, {"frechet": floor.frechet, "kernel": floor.kernel}


def pictures(data: Observations, posterior: Posterior) -> dict[str, np.ndarray]:
    """Arrays of the first data, for pictures: mean, std, one sample's standardised residual, obs; and the chi2 of all."""
    few, x = data.rows(slice(0, SHOWN)), posterior.x
    return {
        "mean": x[:SHOWN].mean(1).numpy(),
        "std": x[:SHOWN].std(1).numpy(),
        "sample": x[:SHOWN, 0].numpy(),
        "obs": few.obs.numpy(),
        "residual": standardised_residual(few, x[:SHOWN, 0]).numpy(),
        "chi2": posterior.chi2[:, 0].numpy(),
    }


def drifts(history: list[dict[str, Any]], unit: float) -> dict[str, float]:
    """Drift of the samples' mean and std over the last iterations, in units of the data's std per iteration."""
    return {"mean_drift": drift(history, "sample_mean", unit), "std_drift": drift(history, "sample_std", unit)}


def ratios(figures: dict[str, float], oracle: dict[str, float]) -> dict[str, float]:
    """Each figure over the oracle's, where both are finite and the oracle's is not 0."""
    both = {k: (v, oracle[k]) for k, v in figures.items() if k in oracle}
    return {k: a / b for k, (a, b) in both.items() if math.isfinite(a) and math.isfinite(b) and b != 0}


def write_evaluation(folder: Path, about: dict[str, Any], found: Evaluation, history: list[dict[str, Any]], oracle: dict[str, float] | None) -> Any:
    """Write metrics.json and arrays.npz; returns the verdict."""
    folder.mkdir(parents=True, exist_ok=True)
    verdict = judge(found.figures)
    clean = lambda d: {k: (v if math.isfinite(v) else None) for k, v in d.items()}  # noqa: E731
    write_arrays(folder / "arrays.npz", **found.arrays)
    record = {
        **about,
        "figures": clean(found.figures),
        "floors": clean(found.floors),
        "verdict": verdict._asdict(),
        "best_iteration": best_iteration(history),
        **({"oracle": clean(ratios(found.figures, oracle))} if oracle is not None else {}),
    }
    write_json(folder / "metrics.json", record)
    return verdict
