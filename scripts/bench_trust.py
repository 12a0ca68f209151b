"""Can a fit be trusted by the figures that need no truth? On MNIST seen through noise, and through masks and noise. One JSON line at the end.

    python scripts/bench_trust.py            one seed, 10 iterations of each; uses the runs of bench_noisy_mnist.py where they are
    python scripts/bench_trust.py --quick    under a minute: 300 digits, short trainings

For each observer: the iteration that `--stop auto` would keep, its error and CRPS by truth over the best iteration's; coverage of the 80 % intervals
per pixel of the last prior, on the first 500 observations with 16 samples each; SBC, TARP, CRPS there; and the verdict.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_noisy_mnist import fit_run

from emdiff.evaluate import Task, evaluate
from emdiff.observations import read_observations, read_truth
from emdiff.posterior import run_walk
from emdiff.prior import load_prior
from emdiff.runs import latest_prior, round_metrics
from emdiff.verdict import best_iteration, judge

WITHOUT_TRUTH = ("chi2", "sliced_wasserstein_ratio", "energy_ratio")
WITH_TRUTH = ("coverage_50", "coverage_80", "coverage_95", "coverage_80_weighted", "sbc_deviation", "tarp", "crps", "error_mean")


def chosen(run: Path) -> dict[str, float]:
    """The prior kept without truth, and the error of its samples, those of the round after it, over the least of any prior."""
    history = round_metrics(run)
    k = best_iteration(history)
    errors = {row["iter"] - 1: row["error"] for row in history if row["iter"] > 1}
    best = min(errors, key=errors.__getitem__)
    return {"picked": float(k), "best_by_error": float(best), "error_over_best": errors[k] / errors[best]}


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
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.folder = args.folder or Path("runs/bench_quick" if args.quick else "runs/bench")
    args.folder.mkdir(parents=True, exist_ok=True)
    count, args.iters = (300, 2) if args.quick else (3000, args.iters)
    figures: dict[str, Any] = {}
    for name, observer in (("noise", "identity"), ("mask", "mask")):
        out, file = fit_run(args.folder, args.data, observer, count, "self-supervised", args.seed, args.iters, args.quick)
        found, reasons = judged(out, file, 30 if args.quick else 500, 8 if args.quick else 16)
        found |= chosen(out)
        print(f"{name}: {count} digits, {args.iters} iterations, seed {args.seed}, {torch.get_num_threads()} threads")
        for key, value in found.items():
            print(f"  {key:<26}{value:10.4f}")
        print("".join(f"  - {reason}\n" for reason in reasons), end="", flush=True)
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
