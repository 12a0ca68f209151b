"""A prior trained on MNIST's clean training digits by emdiff's own training, kept as a file: what benchmarks of the E-step share.

    python scripts/clean_prior.py --folder runs/estep --maps      with maps of levels in training, as for masked observations

The file is named by kind, steps and seed, and is not trained again where it is there.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emdiff.em import Draws
from emdiff.pairs import PairLoss
from emdiff.precision import set_precision
from emdiff.prior import Prior, build_network, choose_network, load_prior, save_prior
from emdiff.scale import Scale
from emdiff.streams import stream, stream_seed
from emdiff.training import train

TAU_LAST = 0.02
"""Finest level trained, in units of the data's std; finer than emdiff's default, since the samplers of peers end finer."""

NOISE, KEEP = {"noise": 0.5, "mask": 0.1}, 0.25
"""Std of the observations' noise in the digits' units, and the share of entries that a mask keeps."""

MAPS = 8192
"""Masks whose levels are shown in training."""


def digits(path: Path, part: str) -> Tensor:
    """MNIST's "train" or "test" digits in [0, 1], shape (N, 28, 28)."""
    with np.load(path) as file:
        return torch.from_numpy(file[f"{part}_images"]).float() / 255


def clean_prior(
    path: Path, folder: Path, maps: bool, steps: int, seed: int = 0, batch: int = 128, device: str = "cpu", gain: bool = False
) -> Prior:  # fmt: skip
    """Load, or train and keep, a prior of the network that `emdiff fit` would choose, but for gains where these are not asked for.

    Args:
        path: mnist.npz.
        folder: Where it is kept.
        maps: Train with the levels of masked observations (KEEP, NOISE["mask"]) in four of five inputs.
        steps: Training steps at rate 2e-3.
        seed: Seeds weights, masks and training.
        batch: Digits per step.
        device: "cpu" or "cuda", where it is trained.
        gain: Give its U-Net gains, as a fit with fused guidance does; samplers that take products with V were seen to diverge under them.
    """
    file = folder / f"clean-{'maps' if maps else 'levels'}-{'gain-' if gain else ''}{steps}{'' if batch == 128 else f'x{batch}'}-{seed}.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        x = digits(path, "train")
        scale = Scale(float(x.mean()), float(x.std()))
        x = scale.standardise(x)
        torch.manual_seed(stream_seed(seed, "clean prior"))
        network = choose_network((28, 28), maps, gain)
        sigma_z = None
        if maps:
            seen = torch.rand(MAPS, 28, 28, generator=stream(seed, "clean prior maps")) < KEEP
            sigma_z = torch.where(seen, NOISE["mask"] / scale.std, math.inf)
        denoiser, x = set_precision(build_network((28, 28), **network), device), x.to(device)
        loss = PairLoss(Draws(x, x, 0.0), TAU_LAST, None if sigma_z is None else sigma_z.to(device))
        trained = train(denoiser, loss, len(x), steps, batch, 2e-3, seed, device=device)
        print(f"trained {file.name}: loss {trained.loss:.4f}", flush=True)
        save_prior(file, Prior(trained.denoiser, scale, (28, 28), TAU_LAST, network))
    return load_prior(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--folder", type=Path, default=Path("runs/estep"))
    parser.add_argument("--maps", action="store_true")
    parser.add_argument("--gain", action="store_true")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    a = parser.parse_args()
    clean_prior(a.data, a.folder, a.maps, a.steps, a.seed, a.batch, a.device, a.gain)
