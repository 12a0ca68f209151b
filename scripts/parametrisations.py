"""MDAE, MEM2 and MUVB, pooled, on a mixture of two Gaussians in the plane: what equal training leaves over the exact denoiser's risk.

    python scripts/parametrisations.py --steps 100 500 --seeds 0 1 2

Printed: |xhat - E[x | y]|^2 over the least risk E |x - E[x | y]|^2 at levels TAUS (in units of the data's std), 20,000 fresh data; the std of 2,000
samples by accumulating measurements (the data's is 1); processor seconds of training. All networks are multilayer perceptrons of width 128, MUVB with
64 latent variables; batches of 128, Adam at rate 2e-3 that falls to 0.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from emdiff.measurement import measure
from emdiff.memory import Optimiser
from emdiff.mixture import MixtureDenoiser
from emdiff.models import build_model
from emdiff.objectives import ManyLevels
from emdiff.prior import Prior, sample_prior
from emdiff.scale import Scale
from emdiff.streams import stream
from emdiff.training import train

TAUS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 8.0)
KINDS = {"mdae": {"blocks": 3}, "mem": {"blocks": 3}, "muvb": {"latent": 64}}


class Points:
    """Data in memory (`objectives.Batches`)."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def read(self, index: Tensor) -> Tensor:
        """Data (B, 2)."""
        return self.x[index]

    def batch(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        """They are standardised."""
        return stored


def mixture() -> MixtureDenoiser:
    """Of mean 0 and variance 1 on average over both entries."""
    weights = torch.tensor([0.4, 0.6])
    means = torch.tensor([[-0.9, 0.4], [0.6, -0.4 * 2 / 3]])
    covs = torch.tensor([[[0.15, 0.05], [0.05, 0.3]], [[0.5, -0.2], [-0.2, 0.25]]])
    total = (weights[:, None] * (means.square() + covs.diagonal(dim1=1, dim2=2))).sum(0).mean()
    return MixtureDenoiser(weights, means / total.sqrt(), covs / total)


@torch.no_grad()
def main() -> None:
    """Parse, train, print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args, exact = parser.parse_args(), mixture()
    print("kind steps seed", *(f"tau={tau}" for tau in TAUS), "std seconds")
    for steps, seed, kind in ((n, s, k) for n in args.steps for s in args.seeds for k in KINDS):
        draws = stream(seed, "parametrisations")
        x, fresh = (exact.draw(torch.zeros(20_000, 1, 2), torch.tensor([torch.inf]), draws) for _ in range(2))
        torch.manual_seed(seed)
        model, clock = build_model((2,), kind, {"kind": "mlp", "width": 128, **KINDS[kind]}), time.process_time()
        with torch.enable_grad():
            learned = train(model, ManyLevels(Points(x), 0.05, 20.0), len(x), steps, 128, seed=seed, optimiser=Optimiser(rate=2e-3)).denoiser
        clock, row = time.process_time() - clock, []
        for sigma in torch.tensor(TAUS)[:, None]:
            y = measure(fresh, sigma, draws)
            best = exact.xhat(y, sigma)
            row.append(float((learned.xhat(y, sigma) - best).square().sum() / (best - fresh).square().sum()))
        samples = sample_prior(Prior(learned, Scale(0.0, 1.0), (2,), 0.05, {}), 2000, draws)
        print(kind, steps, seed, *(f"{r:.4f}" for r in row), f"{float(samples.std()):.3f} {clock:.1f}", flush=True)


if __name__ == "__main__":
    main()
