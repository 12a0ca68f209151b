"""How good is `emdiff fit` on MNIST seen only through noise (or through masks and noise)? Prints a table and one JSON line.

    python scripts/bench_noisy_mnist.py                          three seeds, self-supervised start, 10 iterations
    python scripts/bench_noisy_mnist.py --start gaussian         the other start
    python scripts/bench_noisy_mnist.py --observer mask          75 % missing, n = .1
    python scripts/bench_noisy_mnist.py --seeds 0 --iters 30     one seed, continued to 30 iterations
    python scripts/bench_noisy_mnist.py --quick                  under a minute: 500 digits, short trainings

Each fit is the command itself, run in a process of its own, whose wall time and peak memory are reported. Runs are kept in --folder and are not
repeated. Figures: error of one sample and of the mean of 8 (first 500 observations), per pixel in [0, 1]; residual chi2; std of samples over
std of truth; Frechet distances to the 60,000 clean training digits in the features of scripts/mnist_features.py, of the posterior samples (one
per observation) and of 2,000 prior samples; "clipped" after cutting samples to [0, 1], which turns grain about 0 into light specks. The oracle is
a prior of the same size, trained for 2,000 steps on the clean digits behind the observations.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mnist_features import mnist_features
from timed_command import command
from torch import Tensor

import emdiff
from emdiff.em import Draws, Walk, e_step
from emdiff.finished import latest_prior
from emdiff.firsts import level_maps
from emdiff.metrics import FeatureDistance, residual_chi2
from emdiff.observations import Observations, read_observations, read_truth
from emdiff.pairs import PairLoss
from emdiff.posterior import run_walk
from emdiff.precision import set_precision
from emdiff.prior import Prior, build_network, choose_network, load_prior, sample_prior, save_prior
from emdiff.scale import Scale, estimate_scale
from emdiff.streams import stream, stream_seed
from emdiff.training import train

MEAN_OF = 8
MEAN_ON = 500


def fit_run(folder: Path, data: Path, observer: str, count: int, start: str, seed: int, iters: int, quick: bool) -> tuple[Path, Path]:
    """Observe and fit, or continue, or find what is there; returns the run folder, with what it cost in cost.json, and the observations."""
    noise, keep = (0.5, []) if observer == "identity" else (0.1, ["--observer.keep", "0.25"])
    file, out = folder / f"{observer}-{count}-{seed}.npz", folder / f"{observer}-{count}-{start}-{seed}"
    if not file.is_file():
        drawn = ["--observer", observer, *keep, "--noise-std", str(noise), "--count", str(count), "--seed", str(seed)]
        command("observe", "--data", str(data), *drawn, "--out", str(file))
    cost = out / "cost.json"
    spent = json.loads(cost.read_text()) if cost.is_file() else {"seconds": 0.0, "peak_gb": 0.0, "iters": 0}
    if iters > spent["iters"]:
        short = ["--train.steps", "30", "--train.start_steps", "60", "--walk.levels", "8"] if quick else []
        flags = ["--iters", str(iters), "--start", start, "--seed", str(seed), "--wandb", "off", "--out", str(out), *short]
        seconds, peak = command("fit", "--observations", str(file), *flags)
        cost.write_text(json.dumps({"seconds": spent["seconds"] + seconds, "peak_gb": max(peak, spent["peak_gb"]), "iters": iters}))
    return out, file


class Bench:
    """Data, features and settings shared by all runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        with np.load(args.data) as file:
            self.digits = torch.from_numpy(file["train_images"]).float() / 255
            labels = torch.from_numpy(file["train_labels"]).long()
        size = 5000 if args.quick else 60_000
        self.digits = self.digits[:size]
        features = mnist_features(self.digits, labels[:size], args.folder, 1 if args.quick else 3)
        self.frechet = FeatureDistance(features, self.digits[:, None])

    def distance(self, x: Tensor) -> float:
        """Frechet distance of images (n, 28, 28), as they are, to the clean digits."""
        return self.frechet(x[:, None]).frechet

    def fit(self, seed: int) -> dict[str, float]:
        """Observe and fit with one seed; returns its figures."""
        a = self.args
        out, file = fit_run(a.folder, a.data, a.observer, a.count, a.start, seed, a.iters, a.quick)
        figures = self.figures(out, file, seed)
        print(f"seed {seed}: {json.dumps(figures)}", file=sys.stderr, flush=True)
        spent = json.loads((out / "cost.json").read_text())
        return {**figures, "seconds": spent["seconds"], "peak_gb": spent["peak_gb"]}

    def figures(self, out: Path, file: Path, seed: int) -> dict[str, float]:
        """Figures of a finished run."""
        data, truth = read_observations(file), read_truth(file)
        prior, walk = load_prior(latest_prior(out)), run_walk(out, data, "cpu")
        start = torch.from_numpy(np.load(out / "start" / "samples.npy"))
        x = torch.from_numpy(np.load(out / f"round_{self.args.iters:03d}" / "samples.npy"))
        rounds = [json.loads((out / f"round_{k:03d}" / "metrics.json").read_text()) for k in range(1, self.args.iters + 1)]
        return {
            **self.posterior_figures(data, truth, x),
            "error_mean8": self.mean_error(prior, data, truth, walk, seed),
            "frechet": self.prior_distance(prior, seed),
            **{f"frechet_minus{j}": self.prior_distance(self.earlier(out, j), seed) for j in (1, 2) if self.args.iters > 2},
            "start_error": float((start - truth).square().mean()),
            "start_chi2": float(residual_chi2(data, start).mean()),
            "start_frechet_posterior": self.distance(start),
            **self.over_rounds(out, truth, rounds),
            "restarted": float(sum(r["restarted"] for r in rounds)),
        }

    def over_rounds(self, out: Path, truth: Tensor, rounds: list[dict[str, float]]) -> dict[str, float]:
        """Extremes over the iterations from the third on, and the best Frechet distance of posterior samples among them."""
        late = [r for r in rounds if r["iter"] > 2] or rounds
        samples = [torch.from_numpy(np.load(out / f"round_{r['iter']:03d}" / "samples.npy")) for r in late[:: max(1, len(late) // 10)]]
        return {
            "chi2_least": min(r["chi2"] for r in late),
            "chi2_most": max(r["chi2"] for r in late),
            "std_ratio_least": min(r["sample_std"] for r in late) / float(truth.std()),
            "std_ratio_most": max(r["sample_std"] for r in late) / float(truth.std()),
            "frechet_posterior_best": min(self.distance(x) for x in samples),
        }

    def earlier(self, out: Path, j: int) -> Prior:
        """The prior j iterations before the last."""
        return load_prior(out / f"round_{self.args.iters - j:03d}" / "prior.safetensors")

    def posterior_figures(self, data: Observations, truth: Tensor, x: Tensor) -> dict[str, float]:
        """Figures of one posterior sample per observation."""
        return {
            "error": float((x - truth).square().mean()),
            "chi2": float(residual_chi2(data, x).mean()),
            "std_ratio": float(x.std() / truth.std()),
            "frechet_posterior": self.distance(x),
            "frechet_posterior_clipped": self.distance(x.clamp(0, 1)),
        }

    def mean_error(self, prior: Prior, data: Observations, truth: Tensor, walk: Walk, seed: int) -> float:
        """Error of the mean of MEAN_OF posterior samples."""
        some = prior.scale.observations(data).rows(slice(0, MEAN_ON))
        draws = [e_step(prior.denoiser, some, None, walk, stream(seed, "bench mean", i)).x for i in range(MEAN_OF)]
        return float((prior.scale.restore(torch.stack(draws).mean(0)) - truth[:MEAN_ON]).square().mean())

    def prior_distance(self, prior: Prior, seed: int) -> float:
        """Frechet distance of prior samples."""
        return self.distance(sample_prior(prior, 200 if self.args.quick else 2000, stream(seed, "bench prior")))

    def oracle(self, seed: int) -> dict[str, float]:
        """The same figures for a prior trained on the clean digits."""
        a = self.args
        file = a.folder / f"{a.observer}-{a.count}-{seed}.npz"
        data, truth = read_observations(file), read_truth(file)
        scale: Scale = estimate_scale(data, stream(seed, "scale"))
        standard = scale.observations(data)
        path, maps = a.folder / f"oracle-{a.observer}-{a.count}-gain-{seed}.safetensors", level_maps(standard)
        walk = run_walk(a.folder / f"{a.observer}-{a.count}-{a.start}-{seed}", data, "cpu")
        if not path.is_file():
            torch.manual_seed(stream_seed(seed, "oracle"))
            network = choose_network((28, 28), maps is not None, gain=True)
            x = scale.standardise(truth)
            denoiser = set_precision(build_network((28, 28), **network), "cpu")
            steps = 60 if a.quick else 2000
            trained = train(denoiser, PairLoss(Draws(x, x, 0.0), walk.tau_last, maps), len(x), steps, rate=2e-3, seed=seed)
            save_prior(path, Prior(trained.denoiser, scale, (28, 28), walk.tau_last, network))
        prior = load_prior(path)
        x = scale.restore(e_step(prior.denoiser, standard, None, walk, stream(seed, "bench oracle")).x)
        figures = self.posterior_figures(data, truth, x) | {"error_mean8": self.mean_error(prior, data, truth, walk, seed)}
        return {f"oracle_{name}": value for name, value in figures.items()} | {"oracle_frechet": self.prior_distance(prior, seed)}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--folder", type=Path, default=None, help="where runs are kept; runs/bench, or runs/bench_quick")
    parser.add_argument("--start", choices=["self-supervised", "gaussian"], default="self-supervised")
    parser.add_argument("--observer", choices=["identity", "mask"], default="identity")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iters", type=int, default=10)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.iters, args.count = [0], 2, 500
    args.folder = args.folder or Path("runs/bench_quick" if args.quick else "runs/bench")
    args.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    rows = [bench.fit(seed) for seed in args.seeds]
    median: dict[str, Any] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    median |= bench.oracle(args.seeds[0])
    median["frechet_floor"] = bench.distance(bench.digits[: args.count])
    print(f"emdiff {emdiff.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads")
    print(f"{args.count} digits, {args.observer}, {args.start} start, {args.iters} iterations, seeds {args.seeds}; median (min to max)")
    for name in median:
        spread = [row[name] for row in rows if name in row]
        print(f"  {name:<24} {median[name]:10.4f}" + (f"   ({min(spread):.4f} to {max(spread):.4f})" if len(spread) > 1 else ""))
    print(json.dumps(median))


if __name__ == "__main__":
    main()
