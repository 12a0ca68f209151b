r"""Is a learned denoiser as sure as it should be? Its error beside the posterior variance that its Jacobian claims; prints a table.

    python scripts/sureness.py --folder runs/estep                  a prior for masks, trained on clean MNIST by scripts/clean_prior.py where missing
    python scripts/sureness.py --folder runs/estep --gain           the same network with gains (emdiff.nn.UNet), as `emdiff fit` takes it
    python scripts/sureness.py --folder runs/estep --noise          one for noise
    python scripts/sureness.py --prior FILE                         any prior of 28 x 28 digits

Of E[x | y, obs] the mean of |x - xhat|^2 over an entry's data equals the mean of V, and by Stein's lemma, for any differentiable xhat,

    E (xhat - x)(w - x) = level^2 E d xhat / d w = E V as the network has it,       w the fused measurement of the entry, of that level.

So where the network is exact both columns agree; V above the error: it passes noise that it should hold back, and samples get grain; below: it hears
too little of its measurements, and samples are too sure. Digits of the test part that are seen through 75 % masks, n = .1 (or noise, n = .5), beside
a measurement y of level tau; in units of the data's variance; "dark" are seen pixels whose truth is 0, for which the two need not agree.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from clean_prior import KEEP, NOISE, clean_prior, digits
from torch import Tensor

from emdiff.denoise import Denoiser
from emdiff.prior import load_prior

TAUS = (5.0, 2.0, 1.0, 0.5, 0.2)


@torch.no_grad()
def error_and_variance(denoiser: Denoiser, x: Tensor, level: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """|xhat - x|^2 and (xhat - x)(w - x) of every entry of x (B, *S), measured as w with levels (B, *S), of which none is infinite."""
    noise = level * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    e = denoiser.xhat((x + noise)[:, None], level[:, None]) - x
    return e.square(), e * noise


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--folder", type=Path, default=Path("runs/estep"))
    parser.add_argument("--prior", type=Path, default=None)
    parser.add_argument("--noise", action="store_true")
    parser.add_argument("--gain", action="store_true")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    a = parser.parse_args()
    prior = load_prior(a.prior) if a.prior else clean_prior(a.data, a.folder, not a.noise, a.steps, a.seed, gain=a.gain)
    generator = torch.Generator().manual_seed(a.seed)
    x = prior.scale.standardise(digits(a.data, "test")[: a.count])
    seen = torch.rand(x.shape, generator=generator) < (1 if a.noise else KEEP)
    n = NOISE["noise" if a.noise else "mask"] / prior.scale.std
    parts = {"seen": seen, "dark": seen & (x == x.min())} | ({} if a.noise else {"missing": ~seen})
    print(f"{'tau':>6}" + "".join(f"{name + ': error, V':>22}" for name in parts))
    for tau in TAUS:
        error, V = error_and_variance(prior.denoiser, x, (tau**-2 + torch.where(seen, n, math.inf) ** -2).rsqrt(), generator)
        print(f"{tau:>6g}" + "".join(f"{float(error[part].mean()):>14.4f}{float(V[part].mean()):>8.4f}" for part in parts.values()), flush=True)


if __name__ == "__main__":
    main()
