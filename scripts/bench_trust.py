"""Can a fit be trusted by the figures that need no truth? On MNIST seen through noise, and through masks and noise. One JSON line at the end.

    python scripts/bench_trust.py            one seed, 10 iterations of each; uses the runs of bench_noisy_mnist.py where they are
    python scripts/bench_trust.py --quick    under a minute: 300 digits, short trainings

For each observer: the iteration that `--stop auto` would keep, and its figures by truth over the best iteration's; coverage of the 80 % intervals
per pixel of the last prior, on the first 500 observations with 16 samples each; SBC, TARP, CRPS there; and the verdict.

"Best by truth" needs a score that the true posterior minimises. The error of one sample X is none: E|X - x|^2 = tr V + E|m - x|^2 with m, V the mean
and covariance of the samples, so that of two laws with the right mean the one without spread wins, by a factor of 2 against the true posterior.
Proper scores:

    CRPS, per entry     E|X - x| - E|X - X'|/2                  least for the true posterior only (Gneiting & Raftery 2007, Sec. 4.2)
    error of the mean   E|X - x|^2 - E|X - X'|^2/2 = |m - x|^2  least for every law with the right mean

X' a second draw; both unbiased for any number of draws. The ratio of the CRPS decides; the others are printed beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_noisy_mnist import fit_run
from torch import Tensor

from emdiff.evaluate import Task, evaluate
from emdiff.finished import latest_prior, round_metrics
from emdiff.observations import read_observations, read_truth
from emdiff.posterior import run_walk, sample_posterior
from emdiff.prior import load_prior
from emdiff.streams import stream
from emdiff.verdict import best_iteration, judge

DRAWS, SCORED = 4, 300
"""Draws per observation, and observations, by which priors are scored."""

WITHOUT_TRUTH = ("chi2", "sliced_wasserstein_ratio", "energy_ratio")
WITH_TRUTH = ("coverage_50", "coverage_80", "coverage_95", "coverage_80_weighted", "sbc_deviation", "tarp", "crps", "error_mean")


def chosen(run: Path, file: Path, count: int) -> dict[str, float]:
    """The prior kept without truth, and its figures by truth on the first observations, over the least of any prior."""
    k = best_iteration(round_metrics(run))
    data, truth = read_observations(file), read_truth(file)[:count]
    walk, first = run_walk(run, data, "cpu"), data.rows(slice(0, count))
    found = {}
    for folder in sorted(run.glob("round_*")):
        prior = load_prior(folder / "prior.safetensors")
        found[int(folder.name.removeprefix("round_"))] = scores(sample_posterior(prior, first, walk, DRAWS, stream(0, "score")).x, truth)
    best = {name: min(found, key=lambda j: found[j][name]) for name in found[k]}
    ratios = {f"{name}_over_best": found[k][name] / found[best[name]][name] for name in best}
    return {"picked": float(k), **{f"best_by_{name}": float(j) for name, j in best.items()}, **ratios}


def scores(x: Tensor, truth: Tensor) -> dict[str, float]:
    """CRPS, error of the mean, and error of one sample, per entry, unbiased: samples x (N, L, *S), truth (N, *S)."""
    L = x.shape[1]
    apart = [(x[:, i] - x[:, j]).abs() for i in range(L) for j in range(i)]
    near, error = (x - truth[:, None]).abs(), float((x - truth[:, None]).square().mean())
    return {
        "crps": float(near.mean() - torch.stack([a.mean() for a in apart]).mean() / 2),
        "error_mean": error - float(torch.stack([a.square().mean() for a in apart]).mean()) / 2,
        "error": error,
    }


def judged(run: Path, file: Path, count: int, samples: int) -> tuple[dict[str, float], list[str]]:
    """Figures of the last prior on the first observations, and the verdict's reasons."""
    data, truth = read_observations(file), read_truth(file)
    data, truth = data.rows(slice(0, count)), truth[:count]
    walk = run_walk(run, data, "cpu")
    found = evaluate(load_prior(latest_prior(run)), Task(data, walk, samples, count, truth), lambda name, total: lambda done: None)
    grain = dark(found.arrays)
    return {name: found.figures[name] for name in WITHOUT_TRUTH + WITH_TRUTH} | {"std_where_dark": grain}, judge(found.figures).reasons


def dark(arrays: dict[str, np.ndarray]) -> float:
    """Mean posterior std of the pixels that are 0 in truth: grain, if it is not 0."""
    return float(arrays["std"][arrays["truth"] == 0].mean())


def main() -> None:
    """Fit, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iters", type=int, default=10)
    parser.add_argument("--only", choices=("noise", "mask"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.folder = args.folder or Path("runs/bench_quick" if args.quick else "runs/bench")
    args.folder.mkdir(parents=True, exist_ok=True)
    count, args.iters = (300, 2) if args.quick else (3000, args.iters)
    figures: dict[str, Any] = {}
    for name, observer in (("noise", "identity"), ("mask", "mask")):
        if args.only not in (None, name):
            continue
        out, file = fit_run(args.folder, args.data, observer, count, "self-supervised", args.seed, args.iters, args.quick)
        found, reasons = judged(out, file, 30 if args.quick else 500, 8 if args.quick else 16)
        found |= chosen(out, file, 30 if args.quick else SCORED)
        print(f"{name}: {count} digits, {args.iters} iterations, seed {args.seed}, {torch.get_num_threads()} threads")
        for key, value in found.items():
            print(f"  {key:<26}{value:10.4f}")
        print("".join(f"  - {reason}\n" for reason in reasons), end="", flush=True)
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
