"""The loop in one picture, from a finished run: observations, posterior samples over iterations, prior samples over iterations.

python scripts/picture_loop.py --run runs/NAME --observations noisy_mnist.npz --out docs/loop.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from emdiff.figures import tile, to_uint8, value_range
from emdiff.observations import read_observations
from emdiff.prior import load_prior, sample_prior
from emdiff.streams import stream


def main() -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--observations", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/loop.png"))
    args = parser.parse_args()
    rounds = [int(p.parent.name[6:]) for p in sorted(args.run.glob("round_*/metrics.json"))]
    shown = [1, rounds[len(rounds) // 3], rounds[-1]]
    obs = read_observations(args.observations).obs[:16].numpy()
    figure, axes = plt.subplots(2, 4, figsize=(10, 5.4))
    panels = {(0, 0): ("observations: all that is ever seen", obs)}
    for j, k in enumerate(shown, 1):
        panels[0, j] = (f"E-step {k}: samples x | obs", np.load(args.run / f"round_{k:03d}" / "samples.npy")[:16])
        drawn = sample_prior(load_prior(args.run / f"round_{k:03d}" / "prior.safetensors"), 16, stream(0, "loop"))
        panels[1, j] = (f"M-step {k}: draws from the prior", drawn.numpy())
    for (i, j), (title, x) in panels.items():
        axes[i, j].imshow(to_uint8(tile(x, 4), *value_range(x)), cmap="gray", interpolation="nearest")
        axes[i, j].set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    steps = ["E-step: walk down the noise levels", "under prior k-1 and the observation,", "jump to a sample x | obs", ""]
    steps += ["M-step: retrain the denoiser on", "(measurement, jump) pairs: prior k"]
    text = "for k = 1, 2, ...\n\n" + "\n".join(steps)
    axes[1, 0].text(0.02, 0.5, text, fontsize=8.5, va="center", transform=axes[1, 0].transAxes)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.94, wspace=0.04, hspace=0.12)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
