"""What each part of EM's schedule is worth on MNIST: figures and time after each iteration, for every combination. Markdown tables and JSON lines.

    python scripts/ablation.py --count 3000 --variants base turns short anchor        a table for each
    python scripts/ablation.py --observer mask --count 3000 --variants base short
    OMP_NUM_THREADS=1 python scripts/ablation.py --clock cpu                         processor time, where others use the machine
    python scripts/ablation.py --quick                                               every variant on 200 digits, a minute or two

A variant is a line of VARIANTS: what it changes of the first. All share start, observations and judge. The clock runs during start, E-steps and
M-steps only, on the threads that torch has, by the wall or of the processor. The judge walks the first --judged observations, and as many of digits
that EM never saw, twice with the prior of each iteration: error of one sample e, of the mean e - V with V half the mean square between two samples,
chi2, std over the truth's; their ratio (e - V)/V is 1 for a calibrated prior, above 1 for one that is too sure of itself.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from emdiff.denoise import Denoiser
from emdiff.em import Draws, Walk, e_step
from emdiff.first_samples import Deviations, deviations, first_samples
from emdiff.firsts import level_maps
from emdiff.gaussian import condition, fit_gaussian
from emdiff.mdae import MDAE
from emdiff.metrics import residual_chi2
from emdiff.observations import Observations
from emdiff.outline import Plan
from emdiff.pairs import PairLoss, Pairs, drawn
from emdiff.plan import NO_LIMIT, default_train_batch
from emdiff.precision import set_precision
from emdiff.prior import build_network, choose_network
from emdiff.relax import SPREAD, closes, followed, over_relaxed, relaxed_walk
from emdiff.rows import steps
from emdiff.scale import Scale, estimate_scale
from emdiff.start import Choice, antithetic, recorrupt, self_supervised_loss
from emdiff.strata import relaxed_by_strata
from emdiff.streams import stream, stream_seed
from emdiff.training import Optimiser, train
from observers import Identity, Mask

BATCH = default_train_batch("cpu", "unet", 3000)
"""Data per step; the start has half of them with both signs."""

HELD = 50_000
"""First training digit that no fit sees."""


COLUMNS = ("error", "mean", "ratio", "chi2", "std", "held error", "held mean", "held ratio")


class Variant(NamedTuple):
    """One combination.

    Attributes:
        start: "self-supervised" or "gaussian".
        anneal: Let the start's learning rate fall to 0.
        deviate: Behind masks, give first samples their deviation; else they are estimates.
        turn: Share of the observations walked anew per iteration.
        keep: Train on the last pairs of the others too.
        steps: Steps of an M-step.
        taper: Factor by which an M-step is shorter than the one before.
        relax: "auto": as `emdiff fit` does (emdiff.relax), "never", "two": the first two E-steps, or "lambda": samples (1 - l) xhat + l x, xhat the
            jump at tau_relax and x the one at the end of the same walk, and l = 0, 1/4, 1/2, 3/4 in the first four E-steps; exact after them.
        strata: Exact iterations take out what strata of samples have too much of, in place of the rule against following the noise (emdiff.strata).
        anchor: Recorrupted observations per pair in the M-step's batches.
        levels: Of the E-step's walk.
        iters: Iterations.
    """

    start: str = "self-supervised"
    anneal: bool = True
    deviate: bool = True
    turn: float = 1.0
    keep: bool = True
    steps: int = 1600
    taper: float = 1.0
    relax: str = "auto"
    strata: bool = False
    anchor: float = 0.0
    levels: int = 24
    iters: int = 5


VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "constant rate": {"anneal": False},  # in the start
    "estimates": {"deviate": False},
    "gaussian": {"start": "gaussian"},
    "turns": {"turn": 0.25},
    "short": {"turn": 0.25, "steps": 800, "iters": 8},
    "shorter": {"turn": 0.1, "steps": 320, "iters": 16},
    "no memory": {"turn": 0.25, "steps": 800, "iters": 8, "keep": False},
    "anchor": {"turn": 0.25, "steps": 800, "iters": 8, "anchor": 0.5},
    "strata": {"strata": True},
    "exact": {"turn": 0.25, "steps": 800, "iters": 8, "relax": "never"},
    "relax twice": {"turn": 0.25, "steps": 800, "iters": 8, "relax": "two"},
    "lambda": {"turn": 0.25, "steps": 800, "iters": 8, "relax": "lambda"},
    "taper": {"turn": 0.25, "taper": 0.75, "iters": 8},
    "16 levels": {"turn": 0.25, "steps": 800, "iters": 8, "levels": 16},
}
"""By name, what differs from Variant's defaults."""


FIT = Plan(0, Choice("self-supervised", ""), Walk(), {}, relax=NO_LIMIT)
"""What the rules of `emdiff fit` ask of a plan: over-relax in any iteration, at a known noise level."""


class Anchored:
    """The M-step's loss plus, per pair, `share` of the self-supervised one.

    Both weigh a squared error by the inverse variance of its target, 1 + 1/tau^2 for pairs and 1/(sigma_z^2 (1 + 1/a^2) + 1/2) for recorrupted
    observations, so that they add without another weight.
    """

    def __init__(self, pairs: PairLoss, data: Observations, share: float) -> None:
        z, sigma = data.observer.as_measurement(data.obs)
        self.pairs, self.z, self.sigma, self.share, self.read = pairs, z, sigma.expand(z.shape), share, pairs.read

    def __call__(self, denoiser: MDAE, batch: Pairs, generator: torch.Generator) -> Tensor:
        """The loss of a batch, shape ()."""
        i = torch.randint(len(self.z), (int(self.share * len(batch.x)),), generator=generator)
        anchor = self_supervised_loss(denoiser, recorrupt(self.z[i], self.sigma[i], generator))
        return self.pairs(denoiser, batch, generator) + self.share * anchor


class Setting:
    """Observations, their truth, and the judge, shared by all variants."""

    def __init__(self, args: argparse.Namespace) -> None:
        with np.load(args.data) as file:
            digits = torch.from_numpy(file["train_images"]).float() / 255
        self.now = time.process_time if args.clock == "cpu" else time.perf_counter
        self.args, self.truth, self.held_truth = args, digits[: args.count], digits[HELD : HELD + args.judged]
        self.raw, self.held_raw = self.observe(self.truth, "observe"), self.observe(self.held_truth, "held")
        self.scale: Scale = estimate_scale(self.raw, stream(0, "scale"))
        self.data, self.held = self.scale.observations(self.raw), self.scale.observations(self.held_raw)
        self.maps, self.starts = level_maps(self.data), {}

    def observe(self, x: Tensor, name: str) -> Observations:
        """Noise of std .5, or three in four pixels missing and noise of std .1."""
        g = stream(0, name)
        seen = torch.rand(x.shape, generator=g) < 0.25
        observer = Identity((28, 28), torch.tensor(0.5)) if self.args.observer == "identity" else Mask((28, 28), torch.tensor(0.1), seen)
        return Observations(observer.simulate(x, g), observer)

    def network(self) -> MDAE:
        """Untrained, always the same."""
        torch.manual_seed(stream_seed(0, "network"))
        return set_precision(build_network((28, 28), **choose_network((28, 28), self.maps is not None, gain=True)), "cpu")

    def start(self, v: Variant) -> tuple[MDAE, Tensor, float]:
        """Network, first samples (N, 28, 28) and the seconds they took; computed once for each kind."""
        key = (v.start, v.anneal, v.deviate)
        if key not in self.starts:
            clock, g = self.now(), stream(0, "first samples")
            denoiser, parts = self.network(), [self.data.rows(slice(i, i + 500)) for i in range(0, len(self.data), 500)]
            if v.start == "gaussian":
                gaussian = fit_gaussian(self.data, generator=stream(0, "gaussian"))
                x = torch.cat([condition(gaussian, part.observer, part.obs, g).x for part in parts])
            else:
                denoiser = self.self_supervised(denoiser, v.anneal)
                by = deviations(denoiser, last_tenth(self.data), g)
                x = torch.cat([first_samples(denoiser, part, g, by if v.deviate else Deviations()) for part in parts])
            self.starts[key] = denoiser, x, self.now() - clock
        return self.starts[key]

    def self_supervised(self, denoiser: MDAE, anneal: bool) -> MDAE:
        """Train on recorrupted observations, a tenth held out."""
        z, sigma = self.data.observer.as_measurement(self.data.obs)
        sigma = sigma.expand(z.shape)
        loss = lambda d, i, g: self_supervised_loss(d, antithetic(recorrupt(z[i], sigma[i], g), z[i]))  # noqa: E731
        count, seed = len(z), stream_seed(0, "self-supervised")
        how = Optimiser(rate=2e-3, anneal=anneal)
        return train(denoiser, loss, count, self.args.start_steps, BATCH // 2, seed=seed, held_out=count // 10, optimiser=how).denoiser

    def judge_start(self, x: Tensor) -> dict[str, float]:
        """Figures of first samples."""
        n = self.args.judged
        x, truth = self.scale.restore(x[:n]), self.truth[:n]
        error, chi2 = float((x - truth).square().mean()), float(residual_chi2(self.raw.rows(slice(0, n)), x).mean())
        return dict.fromkeys(COLUMNS, math.nan) | {"error": error, "chi2": chi2, "std": float(x.std() / truth.std())}

    def judge(self, denoiser: Denoiser) -> dict[str, float]:
        """Figures of a prior: on observations that EM has, and on others."""
        found = {}
        first = slice(0, self.args.judged)
        for name, data, raw, truth in (
            ("", self.data.rows(first), self.raw.rows(first), self.truth[first]),
            ("held ", self.held, self.held_raw, self.held_truth),
        ):
            x = [self.scale.restore(e_step(denoiser, data, None, Walk(), stream(0, "judge", name, i)).x) for i in range(2)]
            error, V = sum(float((a - truth).square().mean()) for a in x) / 2, float((x[0] - x[1]).square().mean()) / 2
            found |= {f"{name}error": error, f"{name}mean": error - V, f"{name}ratio": (error - V) / V}
            found |= {f"{name}chi2": float(residual_chi2(raw, x[0]).mean()), f"{name}std": float(x[0].std() / truth.std())}
        return found

    def run(self, v: Variant) -> Iterator[dict[str, float]]:
        """A row of figures for the start's samples, and one after every iteration."""
        denoiser, x, clock = self.start(v)
        yield {"iteration": 0, "seconds": clock, "relaxed": False, **self.judge_start(x)}
        usual, count = v.steps if not self.args.quick else 5, len(x)
        first = self.args.start_steps if v.start == "gaussian" or self.maps is not None else usual
        y, tau, order, turn = x.clone(), torch.zeros(count), torch.randperm(count, generator=stream(0, "turns")), max(1, round(v.turn * count))
        last, std = torch.arange(count), float(x.std())
        for k in range(1, v.iters + 1):
            begin, close = self.now(), False
            relax = k > 1 and (v.relax == "two" and k < 4 or v.relax == "auto" and std > SPREAD and self.args.observer == "identity")
            if k > 1:
                rows = order[((k - 2) * turn + torch.arange(turn)) % count]
                some, walk = self.data.rows(rows), Walk(levels=v.levels)
                if v.relax == "lambda" and k < 6:
                    draws = partly_relaxed(denoiser, some, walk, (k - 2) / 4, stream(0, "e-step", k))
                else:
                    ended = e_step(denoiser, some, None, relaxed_walk(some, walk) if relax else walk, stream(0, "e-step", k))
                    chi2, by_strata = followed(some, ended), v.strata and not relax
                    close = v.relax == "auto" and not relax and not by_strata and chi2 is not None and closes(k, FIT, some, chi2)
                    if by_strata:
                        ended, _ = relaxed_by_strata(denoiser, some, ended, stream(0, "strata", k), lambda _, shape: torch.empty(shape), 500)
                    draws = drawn(ended)
                draws = over_relaxed(draws) if relax else draws
                y[rows], x, tau[rows], std = draws.y, x.index_copy(0, rows, draws.x), draws.tau, float(draws.x.std())
                last = torch.arange(count) if v.keep else rows
            lacking = (Walk().tau_last ** 2 - tau.square()).clamp(min=0).sqrt().reshape(-1, 1, 1)
            ends = y + lacking * torch.randn(y.shape, generator=stream(0, "ends", k))
            seen = Draws(ends[last], x[last], Walk().tau_last)
            pairs: Any = PairLoss(over_relaxed(seen) if close else seen, Walk().tau_last, self.maps)
            loss = Anchored(pairs, self.data, v.anchor) if v.anchor else pairs
            length = first if k == 1 else max(1, round(usual * v.taper ** (k - 1)))
            denoiser = train(denoiser, loss, len(last), length, BATCH, 2e-3, stream_seed(0, "m-step", k)).denoiser
            clock += self.now() - begin
            yield {"iteration": k, "seconds": clock, "relaxed": bool(relax or close), **self.judge(denoiser)}


def last_tenth(data: Observations, batch: int = 500) -> list[Observations]:
    """The observations that the start's training is not shown, in batches."""
    return [data.rows(part) for part in steps(len(data) - len(data) // 10, len(data), batch)]


def partly_relaxed(denoiser: MDAE, data: Observations, walk: Walk, share: float, generator: torch.Generator) -> Draws:
    """Complete samples between jumps at tau_relax and those at the end of the same walks: `share` of the way."""
    early = e_step(denoiser, data, None, relaxed_walk(data, walk), generator)
    rest = walk._replace(tau_first=walk.tau_relax, levels=max(2, walk.levels // 4))
    late = e_step(denoiser, data, early.y, rest, generator, tau_chains=walk.tau_relax)
    return over_relaxed(early._replace(x=torch.lerp(early.x, late.x, share)))


def table(name: str, rows: list[dict[str, float]]) -> str:
    """A Markdown table of a variant."""
    lines = [f"**{name}**", "", "| iteration | seconds | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for row in rows:
        relaxed = " (over-relaxed)" if row["relaxed"] else ""
        lines.append(f"| {row['iteration']}{relaxed} | {row['seconds']:.0f} | " + " | ".join(f"{row[c]:.4f}" for c in COLUMNS) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the variants asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--observer", choices=["identity", "mask"], default="identity")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--judged", type=int, default=200)
    parser.add_argument("--start-steps", type=int, default=4000)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.count, args.judged, args.start_steps = 200, 20, 20
    setting = Setting(args)
    print(f"{args.count} digits, {args.observer}, {args.start_steps} steps of the start, {torch.get_num_threads()} threads", flush=True)
    for name in args.variants:
        v = Variant(**VARIANTS[name])
        v = v._replace(iters=2, levels=4) if args.quick else v
        rows = []
        for row in setting.run(v):
            rows.append(row)
            figures = {key: None if value != value else value for key, value in row.items()}
            print(json.dumps({"variant": name, "count": args.count, "observer": args.observer, **figures}), flush=True)
        print(table(name, rows) + "\n", flush=True)


if __name__ == "__main__":
    main()
