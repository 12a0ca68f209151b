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

from emdiff.data import Observations
from emdiff.em import Walk
from emdiff.posterior import sample_posterior
from emdiff.prior import load_prior
from emdiff.streams import stream
from observers import Mask

EDGES = (-9.0, -0.1, 0.1, 0.3, 0.6, 0.9, 1.1, 9.0)
"""Of the bins of observed values."""


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
    mine, truth = (((part - obs[:, None]) / args.noise).square().mean(1)[seen] for part in (samples, x[:, None]))
    error, spread, value = (samples.mean(1) - x)[seen].square(), samples.var(1)[seen], obs[seen]
    rows = []
    for low, high in zip(EDGES, EDGES[1:]):
        bin_ = (value >= low) & (value < high)
        share = float(bin_.float().mean())
        row = {"share": share, "samples": float(mine[bin_].mean()), "truth": float(truth[bin_].mean()),
               "error_of_mean": float(error[bin_].mean()), "variance": float(spread[bin_].mean())}  # fmt: skip
        rows.append(row | {"from": low, "to": high, "excess": share * (row["samples"] - row["truth"])})
        print(f"obs from {low:5.1f} to {high:5.1f}: " + ", ".join(f"{name} {v:.4f}" for name, v in rows[-1].items() if name not in ("from", "to")))
    print(json.dumps({"prior": str(args.prior), "seed": args.seed, "samples": float(mine.mean()), "truth": float(truth.mean()), "bins": rows}))


if __name__ == "__main__":
    main()
