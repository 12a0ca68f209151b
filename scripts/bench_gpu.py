"""`emdiff fit` on a GPU: how long, how good, how busy; and what a step costs. One JSON line at the end.

    python scripts/bench_gpu.py steps                            training steps and walks: images per second, by batch, with graphs and without, of
                                                                 pairs on the GPU and of pairs in a file
    python scripts/bench_gpu.py fit --observations noisy.npz     the command, as a user gives it; further arguments go to it
    python scripts/bench_gpu.py figures --out RUN --observations noisy.npz --clean PRIOR     Frechet distances of a run of digits; needs no GPU

"Busy" is the share of time in which a kernel ran, as nvidia-smi reports it (utilization.gpu), the mean of samples a fifth of a second apart from the
command's first sign of the GPU to its end; by round, and by its E-step, M-step and figures, from the run's own times. Frechet distances are those of
bench_noisy_mnist: to the 60,000 clean training digits, in the features of mnist_features, of 3,000 posterior samples (of the first observations) and
2,000 prior samples.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from emdiff.data import Observations
from emdiff.em import Draws, Walk, e_step
from emdiff.mdae import MDAE
from emdiff.pairs import PairLoss
from emdiff.precision import set_precision
from emdiff.prior import build_network, choose_network
from emdiff.rows import SMALL, Rows, of_npy
from emdiff.streams import stream
from emdiff.training import train
from observers import Identity, Mask

SHAPE = (28, 28)

COUNT = 10_000
"""Pairs in files, or on the GPU, in measurements of steps."""


def network(maps: bool, shape: tuple[int, ...] = SHAPE) -> MDAE:
    """The U-Net that `emdiff fit` chooses for images of a shape, untrained."""
    torch.manual_seed(0)
    return set_precision(build_network(shape, **choose_network(shape, maps, gain=True)), "cuda")


HOW = ("plain", "graphs", "ahead", "by row")
"""Kernel by kernel, or replayed, on pairs that lie on the GPU; replayed on pairs in files, read ahead of their use or when they are needed."""


def training_rate(batch: int, steps: int, maps: bool, how: str, shape: tuple[int, ...] = SHAPE, device: str = "cuda") -> float:
    """Training images per second on random pairs, after the first quarter; `how` is one of HOW."""
    ticks, g = list[float](), torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, *shape, generator=g)
    levels = torch.where(torch.rand(x.shape, generator=g) < 0.25, 0.3, math.inf) if maps else None
    with tempfile.TemporaryDirectory() as folder, ExitStack() as changed:
        filed = how in HOW[2:]
        x, levels = (
            (stored(a, Path(folder) / name) if filed else a.to(device)) if a is not None else a for name, a in (("x", x), ("levels", levels))
        )
        if how == "plain":
            changed.enter_context(patch("emdiff.learner.replayed", lambda denoiser: denoiser))
        if how == "by row":
            changed.enter_context(patch("emdiff.ahead.goes_on", lambda device: False))
        loss, tick = PairLoss(Draws(x, x, 0.0), 0.1, levels, carried=filed), lambda *_: ticks.append(time.perf_counter())
        train(network(maps, shape), loss, len(x), steps, batch, device=device, progress=tick)
    first = len(ticks) // 4  # a tick every 20 steps, and one at the end
    return batch * 20 * (len(ticks) - 2 - first) / (ticks[-2] - ticks[first])


def stored(array: Tensor, path: Path) -> Rows:
    """An array in a file, to be read by row."""
    np.save(path.with_suffix(".npy"), array.numpy())
    return of_npy(path.with_suffix(".npy"), SMALL + 1)


def walking_rate(batch: int, maps: bool, repeats: int = 3) -> float:
    """Images per second of a fused walk of 24 levels; the median of a few."""
    denoiser, count = network(maps).to("cuda").eval().requires_grad_(False), 2 * batch
    seen = torch.rand(count, *SHAPE) < 0.25
    observer = Mask(SHAPE, torch.tensor(0.3), seen) if maps else Identity(SHAPE, torch.tensor(1.6))
    data = Observations(observer.simulate(torch.randn(count, *SHAPE)), observer)
    walk, seconds = Walk(batch=batch), []
    for i in range(repeats + 1):
        torch.cuda.synchronize()
        clock = time.perf_counter()
        e_step(denoiser, data, None, walk, stream(0, "bench", i, device="cuda"))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - clock)
    return count / statistics.median(seconds[1:])


def measure_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Both kinds of rates, with and without maps of levels."""
    found: dict[str, Any] = {}
    for maps in (False, True):
        kind = "maps" if maps else "levels"
        for batch in args.batches:
            for how in HOW:
                rate = training_rate(batch, args.steps, maps, how, (args.side, args.side))
                found[f"train {kind} {batch} {how}"] = rate
                print(f"training, {kind:<7} batch {batch:5d} {how:<7} {rate:10.0f} images/s, {1e3 * batch / rate:.2f} ms", flush=True)
        for batch in (1024, 4096, 16384) if args.side == SHAPE[0] else ():
            rate = walking_rate(batch, maps)
            found[f"walk {kind} {batch}"] = rate
            print(f"walking,  {kind:<7} batch {batch:5d}         {rate:10.0f} images/s", flush=True)
    return found


class Meter(threading.Thread):
    """Samples of a GPU's utilisation, %, and memory, MB, a fifth of a second apart: (time, utilisation, memory)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        query = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "200"]
        self.process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
        self.samples: list[tuple[float, float, float]] = []
        self.start()

    def run(self) -> None:
        """Read until the program ends."""
        for line in self.process.stdout:
            parts = line.split(",")
            if len(parts) == 2:
                self.samples.append((time.time(), float(parts[0]), float(parts[1])))

    def between(self, first: float, last: float) -> tuple[float, float]:
        """Mean utilisation and largest memory in a stretch of time."""
        some = [(use, memory) for at, use, memory in self.samples if first <= at <= last]
        return (statistics.mean(use for use, _ in some), max(memory for _, memory in some)) if some else (math.nan, math.nan)


def measure_fit(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Run the command, watch the GPU, read the run's figures."""
    meter, begun = Meter(), time.time()
    command = [sys.executable, "-m", "emdiff.cli", "fit", "--observations", args.observations, "--out", args.out, "--wandb", "off", *rest]
    code = subprocess.run(command, stderr=subprocess.DEVNULL if args.quiet else None).returncode
    ended = time.time()
    meter.process.terminate()
    if code:
        raise SystemExit(f"emdiff fit ended with status {code}")
    run = Path(args.out)
    folders = [run / "start", *sorted(run.glob("round_*"))]
    rows, edges = [], [begun, *((folder / "metrics.json").stat().st_mtime for folder in folders)]
    for folder, first, last in zip(folders, edges, edges[1:]):
        metrics = json.loads((folder / "metrics.json").read_text())
        keys = ("iter", "chi2", "std_ratio", "error", "observation_agreement", "prior_std", "restarted", "seconds", "seconds_e", "seconds_m")
        rows.append({key: metrics[key] for key in keys if key in metrics} | {"busy": meter.between(first, last)[0] / 100})
        if "seconds_m" in metrics:
            begun_m = last - metrics["seconds"] + metrics["seconds_e"]
            ended_m = begun_m + metrics["seconds_m"]
            parts = {"busy_e": (last - metrics["seconds"], begun_m), "busy_m": (begun_m, ended_m), "busy_figures": (ended_m, last)}
            rows[-1] |= {name: meter.between(*ends)[0] / 100 for name, ends in parts.items()}
            rows[-1]["seconds_between"] = last - first - metrics["seconds"]
        print({key: round(value, 4) for key, value in rows[-1].items()}, flush=True)
    used = next((at for at, use, _ in meter.samples if use > 0), begun)
    busy, memory = meter.between(used, ended)
    figures = {"device": torch.cuda.get_device_name(), "seconds": ended - begun, "busy": busy / 100}
    figures |= {"seconds_before_gpu": used - begun, "memory_mb": memory}
    return figures | {"rounds": rows}


def measure_figures(args: argparse.Namespace) -> dict[str, Any]:
    """Frechet distances of a run's last prior and of one trained on clean digits, walked alike."""
    from mnist_features import mnist_features

    from emdiff.finished import latest_prior
    from emdiff.metrics import FeatureDistance
    from emdiff.observations import read_observations
    from emdiff.posterior import run_walk, sample_posterior
    from emdiff.prior import load_prior, sample_prior

    with np.load(args.data) as file:
        digits, labels = torch.from_numpy(file["train_images"]).float() / 255, torch.from_numpy(file["train_labels"]).long()
    frechet = FeatureDistance(mnist_features(digits, labels), digits[:, None])
    data = read_observations(Path(args.observations)).rows(slice(0, 3000))
    walk, found = run_walk(Path(args.out), data, "cpu"), {"digits": frechet(digits[:3000, None]).frechet}
    for name, file in (("fit", latest_prior(Path(args.out))), ("clean", Path(args.clean))):
        prior = load_prior(file)
        found[f"{name} posterior"] = frechet(sample_posterior(prior, data, walk, 1, stream(0, "frechet")).x).frechet
        found[f"{name} prior"] = frechet(sample_prior(prior, 2000, stream(0, "frechet prior"))[:, None]).frechet
        print(name, {key: round(value, 2) for key, value in found.items()}, flush=True)
    return found


def main() -> None:
    """Measure one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("steps", "fit", "figures"))
    parser.add_argument("--observations")
    parser.add_argument("--out", default="runs/bench_gpu")
    parser.add_argument("--clean", help="a prior of scripts/clean_prior.py")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--side", type=int, default=28, help="of the images in training steps")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args, rest = parser.parse_known_args()
    if args.part == "figures":
        return print(json.dumps({"torch": torch.__version__} | measure_figures(args)))
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu needs a GPU, and torch sees none here")
    found = measure_steps(args) if args.part == "steps" else measure_fit(args, rest)
    print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name()} | found))


if __name__ == "__main__":
    main()
