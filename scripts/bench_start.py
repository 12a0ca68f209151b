"""What the self-supervised start learns from a number of noisy data, by batch, rate, signs and range of its recorruption. One table, one JSON line.

    python scripts/bench_start.py --observations noisy.npz                     all variants, about 3.5 minutes of one core each
    python scripts/bench_start.py --observations noisy.npz --variants base taken
    python scripts/bench_start.py --quick                                      300 digits that it observes itself, seconds

The file holds observations that are measurements of x with one noise level, and the truth (emdiff observe). All variants are shown the same number
of data; a recorruption with both signs counts as two. Figure: mean squared error of E[x | obs] on the first observations, in the user's units, after
each quarter of the training, whose rate falls to 0 at its end.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timed_command import command
from torch import Tensor

from emdiff.mdae import MDAE
from emdiff.memory import Optimiser
from emdiff.observations import read_observations, read_truth
from emdiff.precision import set_precision
from emdiff.prior import build_network, choose_network
from emdiff.scale import estimate_scale
from emdiff.start import antithetic, recorrupt, self_supervised_loss
from emdiff.streams import stream, stream_seed
from emdiff.training import train


class Variant(NamedTuple):
    """One way to train: data per step, largest rate, both signs of w or one, range of the factor a."""

    batch: int = 128
    rate: float = 2e-3
    signs: int = 1
    a_range: tuple[float, float] = (0.15, 6.0)


VARIANTS = {
    "base": Variant(),
    "batch 32, rate .001": Variant(32, 1e-3),
    "batch 32": Variant(32),
    "both signs, rate .001": Variant(32, 1e-3, 2),
    "both signs": Variant(32, 2e-3, 2),
    "taken": Variant(32, 2e-3, 2, (0.05, 2.0)),
}


def errors(z: Tensor, sigma: Tensor, truth: Tensor, restore: Any, how: Variant, shown: int, judged: int) -> list[float]:
    """Error after each quarter: measurements z (N, *S) with levels sigma (N, *S), standardised; truth (N, *S) in the user's units."""

    def loss(denoiser: MDAE, index: Tensor, draws: torch.Generator) -> Tensor:
        batch = recorrupt(z[index], sigma[index], draws, how.a_range)
        return self_supervised_loss(denoiser, antithetic(batch, z[index]) if how.signs == 2 else batch)

    torch.manual_seed(stream_seed(0, "network"))
    denoiser, memory, found = set_precision(build_network(z.shape[1:], **choose_network(tuple(z.shape[1:]), gain=True)), "cpu"), None, []
    steps = shown // how.batch // 4
    for part in range(4):
        trained = train(
            denoiser, loss, len(z), steps, how.batch // how.signs, seed=stream_seed(0, "start", part), optimiser=Optimiser(rate=how.rate),
            memory=memory, total=4 * steps,
        )  # fmt: skip
        memory = trained.memory
        with torch.no_grad():
            x = torch.cat([trained.denoiser.xhat(z[i : i + 250, None], sigma[i : i + 250, None]) for i in range(0, judged, 250)])
        found.append(float((restore(x[:judged]) - truth[:judged]).square().mean()))
    return found


def main() -> None:
    """Train every variant, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"), help="for --quick")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--shown", type=int, default=153_600)
    parser.add_argument("--judged", type=int, default=1000)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.shown, args.judged, args.observations = 2560, 250, Path("runs/bench_start_quick.npz")
        args.observations.parent.mkdir(parents=True, exist_ok=True)
        flags = ["--observer", "identity", "--noise-std", "0.5", "--count", "300", "--out", str(args.observations)]
        command("observe", "--data", str(args.data), *flags)
    if args.observations is None:
        parser.error("--observations: a file of emdiff observe, or --quick")
    data, truth = read_observations(args.observations), read_truth(args.observations)
    scale = estimate_scale(data, stream(0, "scale"))
    standard = scale.observations(data)
    z, sigma = standard.observer.as_measurement(standard.obs)
    rows = {}
    for name in args.variants:
        clock = time.process_time()
        found = errors(z, sigma.expand(z.shape), truth, scale.restore, VARIANTS[name], args.shown, args.judged)
        rows[name] = {"errors": found, "seconds": time.process_time() - clock}
        print(f"{name:<24}" + "".join(f"{e:10.5f}" for e in found) + f"{rows[name]['seconds']:8.0f} s of processor time", flush=True)
    print(json.dumps({"rows": rows, "shown": args.shown, "seed": 0, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
