"""Where residual chi2 comes from: residuals of posterior samples of masked digits over those of the truth, by what was observed.

    python scripts/residuals.py --prior PRIOR.safetensors

Any weight that depends on the observation alone leaves E |obs - sample|^2 = E |obs - truth|^2 under the true prior, since sample and truth are then
exchangeable given the observation; a weight that depends on the truth does not. Per bin: its share of seen pixels, mean squared residuals in units of
the noise, what it adds to chi2 beyond the truth's, error of the samples' mean, and variance of samples (the same where samples are right, but for the
finite number of them). MNIST test digits, a mask each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emdiff.data import Observations
from emdiff.em import Walk
from emdiff.posterior import sample_posterior
from emdiff.prior import load_prior
from emdiff.streams import stream
from observers import Mask

EDGES = (-9.0, -0.1, 0.1, 0.3, 0.6, 0.9, 1.1, 9.0)
"""Of the bins of observed values."""


def by_value(obs: Tensor, truth: Tensor, samples: Tensor, noise: float) -> list[dict[str, float]]:
    """The figures of each bin that has any; obs and truth (n,), samples (n, L)."""
    mine, due = ((samples - obs[:, None]) / noise).square().mean(1), ((truth - obs) / noise).square()
    error, variance, rows = (samples.mean(1) - truth).square(), samples.var(1), []
    for low, high in zip(EDGES, EDGES[1:]):
        at = (obs >= low) & (obs < high)
        if at.any():
            share, names = float(at.float().mean()), {"samples": mine, "truth": due, "error_of_mean": error, "variance": variance}
            row = {"from": low, "to": high, "share": share} | {name: float(part[at].mean()) for name, part in names.items()}
            rows.append(row | {"excess": share * (row["samples"] - row["truth"])})
    return rows


def main() -> None:
    """Measure one prior."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--levels", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with np.load(args.data) as file:
        x = torch.from_numpy(file["test_images"][: args.count]).float() / 255
    generator, prior = stream(args.seed, "residuals"), load_prior(args.prior)
    seen = torch.rand(x.shape, generator=generator) < args.keep
    obs = torch.where(seen, x + args.noise * torch.randn(x.shape, generator=generator), 0.0)
    data = Observations(obs, Mask(tuple(x.shape[1:]), torch.tensor(args.noise), seen))
    samples = sample_posterior(prior, data, Walk(levels=args.levels, batch=200), args.samples, stream(args.seed, "residuals of samples")).x
    rows = by_value(obs[seen], x[seen], samples.movedim(1, -1)[seen], args.noise)
    for row in rows:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if name not in ("from", "to"))
        print(f"obs from {row['from']:5.1f} to {row['to']:5.1f}: {figures}")
    print(json.dumps({"prior": str(args.prior), "seed": args.seed, "excess": sum(row["excess"] for row in rows), "bins": rows}))


if __name__ == "__main__":
    main()
