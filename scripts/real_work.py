"""emdiff on the kinds of data that instruments give, beside three columns that need no EM. Prints one JSON line per case.

    python scripts/real_work.py                              all cases, 1,000 data each, seed 0: about an hour on one thread
    python scripts/real_work.py --cases galaxies blur        some of them (real_cases.CASES)
    python scripts/real_work.py --cases mask75 --count 4000 --iters 10
    python scripts/real_work.py --quick                      all cases with 100 data and short trainings, about two minutes: figures mean nothing

Cases: digits of MNIST, 24 x 24, through masks (50 %, 75 % missing, n = .1), one blur (9 x 9, sigma 2, n = .02), averages of 4 x 4 pixels (n = .02),
a quarter or an eighth of the columns of their Fourier transform (another choice per datum, n = .05), one of three instruments each; and simulated
galaxies, each with a PSF and noise of its own (real_galaxies).

Columns: gaussian (fitted to the observations by EM, exact samples), naive (the observation, or its scaled adjoint), clean (a network trained on the
clean data themselves, walked like ours: what emdiff could reach) and ours (`emdiff fit`, which never sees a clean datum). Figures, per column:
error of one posterior sample and of the mean of --samples, PSNR of both, residual chi2, std ratio, coverage of 80 % intervals (all pixels alike,
and weighted by posterior variance), for the first --judged observations; and of --prior prior samples the sliced Wasserstein and Frechet distance
(scripts/mnist_features.py) to clean digits, or the Kolmogorov-Smirnov distance of half-light radii and ellipticities to those of clean galaxies.
"floor" are the latter of the clean data behind the observations. Runs are kept in --folder and not repeated; pictures go to --pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_cases import CASES, SHAPE, fresh_data, naive, observed_data
from real_columns import Figures, clean_prior, digit_features, fitted, gaussian_column, learned_column, measured
from real_galaxies import distances

from emdiff.figures import save_rows
from emdiff.finished import latest_prior, round_metrics
from emdiff.observations import Observations, read_observations, read_truth, write_observations
from emdiff.posterior import run_walk
from emdiff.prior import load_prior
from emdiff.streams import stream


def observed(a: argparse.Namespace, name: str) -> Path:
    """The file of observations of a case, with the truth behind them."""
    file, case = a.folder / f"{name}-{a.count}-{a.seed}.npz", CASES[name]
    if not file.is_file():
        draw = torch.Generator().manual_seed(a.seed) if case.data == "galaxies" else stream(a.seed, "real", name)
        x = observed_data(case.data, a.data, a.count, draw)
        observer = case.draw(SHAPE, a.count, draw)
        write_observations(file, Observations(observer.simulate(x, draw), observer), x)
    return file


def run(a: argparse.Namespace, name: str) -> dict[str, Any]:
    """Observe, fit, judge and picture one case; its figures."""
    case, file, out = CASES[name], observed(a, name), a.folder / f"{name}-{a.count}-{a.iters}-{a.seed}"
    short = ["--train.steps", "20", "--walk.levels", "6"] if a.quick else []
    flags = ["--train.start-steps", str(a.start_steps), *([] if case.fused else ["--walk.levels", str(a.levels)]), *short]
    cost = fitted(file, out, a.iters, a.seed, flags)
    data, truth = read_observations(file), read_truth(file)
    fresh = fresh_data(case.data, a.data, a.count, a.prior, a.seed)
    features = digit_features(a.data, a.folder, 2000 if a.quick else 60_000) if case.data == "digits" else None
    judge, walk = Figures(data, truth, fresh, features), run_walk(out, data, "cpu")
    trained, digits = a.folder / f"clean-{case.data}-{a.count}-{a.steps}-{a.seed}.safetensors", case.data == "digits"
    priors = {"clean": clean_prior(trained, truth, (0.5, 0.25) if digits else (), a.steps, a.seed), "ours": load_prior(latest_prior(out))}
    size, bound = (a.judged, a.samples, a.prior, a.seed), round_metrics(out)[0]["bound"]
    columns = {"gaussian": gaussian_column(data, *size)} | {key: learned_column(p, walk, bound, data, *size, key) for key, p in priors.items()}
    figures: dict[str, Any] = {"naive": judge.naive(a.judged), "floor": judge.floor(), **{key: judge.of(c) for key, c in columns.items()}}
    shown = naive(data.observer.rows(slice(0, 12)), data.obs[:12])
    rows = {"truth": truth[:12], "observed": shown} | {f"{key}: sample": columns[key].posterior[:12, 0] for key in columns}
    rows |= {"ours: mean": columns["ours"].posterior[:12].mean(1)} | {f"{key}: prior": columns[key].prior[:12] for key in columns}
    save_rows(a.pictures / f"instruments-{name}.png", rows)
    in_greys(a.pictures / f"instruments-{name}.png")
    if case.data == "galaxies":
        last = torch.from_numpy(np.load(out / f"round_{a.iters:03d}" / "samples.npy"))
        figures["ours"] |= {f"posterior_{key}": value for key, value in distances(last, truth).items()}
        compared = {"truth": truth, "observed": data.obs, "gaussian: prior": columns["gaussian"].prior, "ours: prior": columns["ours"].prior}
        histograms(a.pictures / "instruments-galaxies-shapes.png", measured(compared))
    return {"case": name, "count": a.count, "iters": a.iters, "seed": a.seed, "threads": torch.get_num_threads(), **cost, **figures}


def in_greys(path: Path) -> None:
    """Store a picture in 32 greys, a third of its size."""
    from PIL import Image

    with Image.open(path) as picture:
        smaller = picture.convert("L").quantize(32)
    smaller.save(path, optimize=True)


def histograms(path: Path, values: dict[str, dict[str, np.ndarray]]) -> None:
    """Write a PNG of the laws of radii and ellipticities."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7, 2.4))
    for axis, (key, label, high) in zip(axes, (("radius", "half-light radius, pixels", 6.0), ("ellipticity", "ellipticity", 0.6))):
        for name, found in values.items():
            axis.hist(found[key], bins=np.linspace(0, high, 41), density=True, histtype="step", label=name)
        axis.set_xlabel(label, fontsize=8)
        axis.set_yticks([])
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--folder", type=Path, default=None, help="where runs are kept; runs/real_work, or runs/real_quick")
    parser.add_argument("--pictures", type=Path, default=None, help="--folder by default")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--iters", type=int, default=3)
    parser.add_argument("--levels", type=int, default=16, help="of walks by moment matching")
    parser.add_argument("--start-steps", type=int, default=400, help="of the first training")
    parser.add_argument("--steps", type=int, default=1500, help="of the clean-trained prior")
    parser.add_argument("--judged", type=int, default=64)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--prior", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    if a.quick:
        a.count, a.iters, a.steps, a.start_steps, a.judged, a.prior = 100, 2, 30, 30, 16, 50
    a.folder = a.folder or Path("runs/real_quick" if a.quick else "runs/real_work")
    a.pictures = a.pictures or a.folder
    for folder in (a.folder, a.pictures):
        folder.mkdir(parents=True, exist_ok=True)
    for name in a.cases:
        print(json.dumps(run(a, name)), flush=True)


if __name__ == "__main__":
    main()
