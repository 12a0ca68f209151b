"""What the paper's trainings cost here: a step of each configuration of the paper's size, its memory, and the time that all of its steps would take.

    python scripts/bench_paper.py                                    every configuration, on a GPU where there is one
    python scripts/bench_paper.py --only mnist_1x16 --batches 128 256 512

Images are random ones of the data's shape: what a step costs does not depend on what they show. One training each; the first third of its steps,
where graphs are captured and kernels chosen, is left out. Memory is the most that torch held on the GPU. One JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from emdiff.datasets import Dataset
from emdiff.models import fixed_levels
from emdiff.objectives import OneSet
from emdiff.plan import resolve_device
from emdiff.precision import set_precision
from emdiff.prior import build_network
from emdiff.scale import Scale
from emdiff.settings import ModelSettings, ObjectiveSettings
from emdiff.train import Standardised
from emdiff.train_plan import make_train_plan
from emdiff.training import train

CONFIGS = Path(__file__).parents[1] / "configs"

SHAPES = {"cifar10": (3, 32, 32), "ffhq256": (3, 256, 256)}
"""Of the data, by the first part of a configuration's name; the others are of MNIST."""

COUNT = 1000
"""Images."""


def paper_sized() -> list[str]:
    """Names of the configurations of the paper's size."""
    sized = (path.stem for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.endswith(("_cpu", "_gpu")))
    return [name for name in sized if {"model", "train"} <= set(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))]


def measure_config(name: str, steps: int, batch: int | None, device: str) -> dict[str, Any]:
    """Seconds of a step, memory, and hours of the whole training of a configuration."""
    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    settings = {"model": asdict(ModelSettings(**given["model"])), "train": asdict(ObjectiveSettings(**given["train"]))}
    shape = SHAPES.get(name.split("_")[0], (28, 28))
    x = np.random.default_rng(0).integers(0, 256, (COUNT, *shape), dtype=np.uint8)
    data, scale = Dataset(name, COUNT, shape, x.__getitem__, ""), Scale(0.5, float(x.std()) / 255)
    config = settings | {"flips": given.get("flips", False), "pictures": 0, "seed": 0, "held_out": 0}
    plan = make_train_plan(config, data, scale, device)
    torch.manual_seed(0)
    denoiser = set_precision(build_network(shape, **plan.network), device)
    loss = OneSet(Standardised(data, scale, plan.flips, device), fixed_levels(denoiser), plan.objective)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ticks, batch = list[float](), batch or plan.batch
    train(denoiser, loss, COUNT, steps, batch, device=device, progress=lambda *_: ticks.append(time.perf_counter()), optimiser=plan.optimiser)
    first = len(ticks) // 3  # a tick every 20 steps, and one at the end
    step = (ticks[-2] - ticks[first]) / (20 * (len(ticks) - 2 - first))
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    found = {"parameters": sum(p.numel() for p in denoiser.parameters()), "batch": batch, "seconds": step, "gib": memory}
    return found | {"hours": step * given["train"]["steps"] * given["train"]["batch"] / batch / 3600}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=paper_sized(), default=paper_sized())
    parser.add_argument("--batches", type=int, nargs="+", default=[None], help="in place of the configuration's")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args()
    if args.steps < 80:
        parser.error(f"--steps is {args.steps}; give at least 80")
    device, found = resolve_device(args.device), {}
    for name in args.only:
        for batch in args.batches:
            found[f"{name} {batch or ''}".strip()] = one = measure_config(name, args.steps, batch, device)
            memory = f"{one['gib']:.2f} GiB, " if one["gib"] is not None else ""
            size = f"{one['parameters'] / 1e6:6.1f} million, batch {one['batch']:4d}"
            print(f"{name:<22} {size}: {1e3 * one['seconds']:8.2f} ms a step, {memory}{one['hours']:.1f} hours in all", flush=True)
    print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", **found}))


if __name__ == "__main__":
    main()
