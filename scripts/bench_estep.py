r"""What do posterior samples cost, at equal quality, beside the peers' samplers? Prints a table and, last, one JSON object.

    python scripts/bench_estep.py --threads 2             MNIST test digits, n = .5 noise, and 75 % mask with n = .1; 5 repeats
    python scripts/bench_estep.py --threads 1 --clock cpu     processor time, for a machine that others use too
    python scripts/bench_estep.py --kinds mask --count 192    one kind, on more digits: errors of 240 differ by 3 % by chance
    python scripts/bench_estep.py --quick                 under a minute: a few digits, a prior trained for moments, short samplers

One process measures both sides: same prior (trained by emdiff on the clean training digits, scripts/clean_prior.py; trained here where --folder
has none), same observations, same batch, same threads, bfloat16 for both where emdiff takes it. Repeat r draws one sample for each of the test
digits r, r + 1, ... of --count, with every method in turn. Quality is over all repeats; a time is the median over repeats.

    theirs    ddpm: ancestral sampling, 64 steps, moment matching with 1, 3, 5 iterations of conjugate gradients (estep_peers.ddpm)
              azula: MMPSDenoiser in azula's DDPMSampler, 64 steps, its default schedule, GMRES with 1 and 3 iterations (estep_peers.mmps)
    ours      the E-step's walk (em.walk_batch) at several budgets of levels, and of iterations with cg; its result is the jump at the last level.
              Some leave out the correction (Walk.corrected), which ddpm does not have either: such samples are narrower

A key X_vs_Y is  median seconds of our cheapest budget that is as good as theirs  /  median seconds of theirs,  for the setting of theirs (number of
iterations) where this ratio is largest; "as good" is error <= theirs and |chi2 - 1| <= |theirs - 1| + s, with s the standard error of their chi2
over data. null where for some setting of theirs no budget is as good. `detail` has every setting.

    fused_step    one fused evaluation / one unguided one at the same level, in one batch
    cg2_step      one guided by CG with 2 iterations (no early exit) / one unguided
    m64_vs_m1     a Langevin walk of 64 measurements, collapsed (langevin.collapsed) / of one

Peak memory of each method is over that of the process before it, where Linux tells it (/proc/self/clear_refs).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clean_prior import KEEP, NOISE, clean_prior, digits
from estep_peers import ddpm, mmps
from torch import Tensor

import emdiff
from emdiff.data import Observations
from emdiff.em import Walk, posterior, walk_batch, walk_levels
from emdiff.guidance import PosteriorDenoiser
from emdiff.langevin import collapsed, start_velocity, walk
from emdiff.metrics import residual_chi2
from emdiff.prior import TAU_FIRST, Prior
from emdiff.streams import stream, stream_seed
from observers import Identity, Mask

DDPM_ENDS = {"noise": {1: (10.0, 0.02)}, "mask": {1: (100.0, 1e-3)}}
"""First and last level of ddpm by iterations; OTHER_ENDS elsewhere. The best for its error on other digits, among five pairs (docs/speed.md)."""

OTHER_ENDS = (20.0, 0.02)

STEP_LEVEL = 0.5
"""Level of single steps, in units of the data's std."""

OTHER_STARTS = ((24, 3, TAU_FIRST), (12, 1, 10.0), (16, 1, 10.0), (18, 1, 100.0), (24, 1, 100.0))
"""More budgets of cg: levels, iterations, first level; ddpm had its pick of first levels too."""

UNCORRECTED_FUSED = (4, 6, 8, 12, 16)
"""Levels of budgets without correction, as ddpm has none."""

UNCORRECTED_CG = (
    *((n, TAU_FIRST, 0.2) for n in (8, 10, 12, 16, 20, 24)), *((n, 50.0, 0.2) for n in (20, 24, 28)), *((n, 50.0, 0.15) for n in (22, 28)),
    (20, 100.0, 0.15), (28, 20.0, 0.1),
)  # fmt: skip
"""Levels, first and last of those with cg, of one iteration each; from 50 on they were chosen behind masks, on other digits (docs/speed.md)."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Sampler = Callable[[Prior, Observations, int], Tensor]


class Tally(NamedTuple):
    """What a method did: seconds per repeat, error and chi2 of every datum, peak memory in GB or None."""

    seconds: list[float]
    error: list[Tensor]
    chi2: list[Tensor]
    peak: list[float]

    def figures(self) -> dict[str, float]:
        """Median seconds, mean error per pixel, mean chi2 and its standard error over data, peak memory."""
        error, chi2 = torch.cat(self.error), torch.cat(self.chi2)
        figures = {"seconds": statistics.median(self.seconds), "error": float(error.mean()), "chi2": float(chi2.mean())}
        figures["chi2_se"] = float(chi2.std()) / math.sqrt(len(chi2))
        return figures | ({"peak_gb": max(self.peak)} if self.peak else {})


def observe(kind: str, x: Tensor, seed: int) -> Observations:
    """Observations of digits (n, 28, 28) through "noise" or "mask"."""
    n = torch.tensor(NOISE[kind])
    seen = torch.rand(x.shape, generator=stream(seed, "bench masks")) < KEEP
    observer = Identity((28, 28), n) if kind == "noise" else Mask((28, 28), n, seen)
    return Observations(observer.simulate(x, stream(seed, "bench noise")), observer)


def ours(
    guidance: str, levels: int, iterations: int = 3, tau_first: float = math.inf, tau_last: float = Walk().tau_last, corrected: bool = True
) -> Sampler:
    """The E-step's walk with its defaults but for the budget; every walk starts anew."""
    walk = Walk(guidance, tau_first, tau_last, levels=levels, iterations=iterations, corrected=corrected)

    def sample(prior: Prior, data: Observations, seed: int) -> Tensor:
        with torch.no_grad():
            taus = walk_levels(data, walk)
            return walk_batch(prior.denoiser, data, torch.zeros_like(data.obs), walk, taus, stream(seed, "ours"), 0.0, complete=False).x

    return sample


def budgets(quick: bool) -> dict[str, dict[str, Sampler]]:
    """Our walks, by kind of guidance and name."""
    fused = (4, 8) if quick else (4, 6, 8, 12, 16, 24, 32)
    cg = ((4, 1, TAU_FIRST),) if quick else tuple((n, 1, TAU_FIRST) for n in (8, 12, 16, 24)) + OTHER_STARTS
    few, fewer = ((), ()) if quick else (UNCORRECTED_FUSED, UNCORRECTED_CG)
    return {
        "fused": {f"fused, {n} levels": ours("fused", n) for n in fused}
        | {f"fused, {n} levels, uncorrected": ours("fused", n, corrected=False) for n in few},
        "cg": {f"cg, {n} levels from {first:g}, at most {k} iterations": ours("cg", n, k, first) for n, k, first in cg}
        | {f"cg, {n} levels from {first:g} to {last:g}, uncorrected": ours("cg", n, 1, first, last, False) for n, first, last in fewer},
    }


def peers(kind: str, quick: bool) -> dict[str, dict[str, Sampler]]:
    """Their samplers, by whose and name."""
    steps = 4 if quick else 64

    def their_ddpm(k: int) -> Sampler:
        first, last = DDPM_ENDS[kind].get(k, OTHER_ENDS)
        return lambda prior, data, seed: ddpm(prior.denoiser, data, k, stream(seed, "ddpm"), first, last, steps)

    def their_mmps(k: int) -> Sampler:
        return lambda prior, data, seed: mmps(prior.denoiser, data, k, stream_seed(seed, "mmps"), steps=steps)

    ddpms, azulas = ((1,), (1,)) if quick else ((1, 3, 5), (1, 3))
    return {
        "ddpm64": {f"ddpm {steps} steps, cg {k}": their_ddpm(k) for k in ddpms},
        "azula": {f"azula {steps} steps, gmres {k}": their_mmps(k) for k in azulas},
    }


def reset_peak() -> float | None:
    """Make the process's peak memory its present one, in GB; None where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return memory("VmRSS")
    except OSError:
        return None


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1e6


def measure(kind: str, prior: Prior, x: Tensor, args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of every method, by side and name, over all repeats; x are the digits (repeats x count, 28, 28)."""
    sides = {**budgets(args.quick), **peers(kind, args.quick)}
    tallies = {side: {name: Tally([], [], [], []) for name in methods} for side, methods in sides.items()}
    for r in range(args.repeats):
        truth = x[r * args.count : (r + 1) * args.count]
        data = observe(kind, truth, stream_seed(args.seed, kind, r))
        standard = prior.scale.observations(data)
        for side, methods in sides.items():
            for name, sampler in methods.items():
                before, clock = reset_peak(), args.now()
                sample = sampler(prior, standard, stream_seed(args.seed, r))
                tally = tallies[side][name]
                tally.seconds.append(args.now() - clock)
                tally.peak.extend([] if before is None else [memory("VmHWM") - before])
                sample = prior.scale.restore(sample)
                tally.error.append((sample - truth).square().flatten(1).mean(1))
                tally.chi2.append(residual_chi2(data, sample))
        print(f"{kind}: repeat {r + 1} of {args.repeats}", file=sys.stderr, flush=True)
    return {side: {name: tally.figures() for name, tally in methods.items()} for side, methods in tallies.items()}


def as_good(mine: dict[str, float], theirs: dict[str, float]) -> bool:
    """Whether error and chi2 are at least theirs (see above)."""
    return mine["error"] <= theirs["error"] and abs(mine["chi2"] - 1) <= abs(theirs["chi2"] - 1) + theirs["chi2_se"]


def ratios(mine: dict[str, dict[str, float]], theirs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """For each setting of theirs: our cheapest budget as good, and its share of their time; None where there is none."""
    found: dict[str, Any] = {}
    for name, their in theirs.items():
        good = [(m["seconds"], budget) for budget, m in mine.items() if as_good(m, their)]
        found[name] = {"budget": min(good)[1], "ratio": min(good)[0] / their["seconds"]} if good else None
    return found


def worst(found: dict[str, Any]) -> float | None:
    """The largest ratio; None where one is missing."""
    return None if None in found.values() else max(entry["ratio"] for entry in found.values())


def median_times(runs: dict[str, Callable[[], Any]], repeats: int, now: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each by the clock `now`, in turn within every repeat, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for r in range(repeats + 1):
        for name, run in runs.items():
            clock = now()
            run()
            seconds[name].extend([now() - clock] if r else [])
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def steps(kind: str, prior: Prior, x: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Single steps in units of an unguided one, and the walk of 64 measurements in units of that of one."""
    data = prior.scale.observations(observe(kind, x, args.seed))
    fused = posterior(prior.denoiser, data, Walk("fused"))
    cg = PosteriorDenoiser(prior.denoiser, data.observer, data.obs, "cg", 2, 0.0)
    y, sigma = (
        prior.scale.standardise(x)[:, None] + STEP_LEVEL * torch.randn(len(x), 1, 28, 28, generator=stream(args.seed, "steps")),
        torch.tensor([0.5]),
    )

    def langevin(count: int) -> Callable[[], Any]:
        tau, u = collapsed(STEP_LEVEL, count)
        score = lambda z: prior.denoiser.score(z, torch.tensor([tau]))
        return lambda: walk(score, start_velocity(y, u, stream(0, "walk")), args.walk_steps, tau, 1.0, u, stream(0, "walk"))

    plain = {
        "unguided": lambda: prior.denoiser.xhat(y, sigma),
        "fused": lambda: fused.xhat(y, sigma),
        "cg2": lambda: cg.xhat(y, sigma),
        "m1": langevin(1),
        "m64": langevin(64),
    }
    s = median_times(plain, 4 * args.repeats, args.now)
    return {
        "unguided_us_per_image": 1e6 * s["unguided"] / len(x),
        "fused_step": s["fused"] / s["unguided"],
        "cg2_step": s["cg2"] / s["unguided"],
        "m64_vs_m1": s["m64"] / s["m1"],
    }


def bench(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one kind of observation."""
    prior = clean_prior(args.data, args.folder, kind == "mask", args.steps)
    x = digits(args.data, "test")[args.first : args.first + args.repeats * args.count]
    single = steps(kind, prior, x[: args.count], args)
    figures = measure(kind, prior, x, args)
    for side, methods in figures.items():
        for name, f in methods.items():
            peak = f"{f['peak_gb']:6.2f} GB" if "peak_gb" in f else ""
            print(f"{kind:<6}{side:<8}{name:<40}{f['seconds']:8.2f} s  error {f['error']:.4f}  chi2 {f['chi2']:.4f} ({f['chi2_se']:.4f}) {peak}")
    compared = {f"{mine}_vs_{whose}": ratios(figures[mine], figures[whose]) for mine in ("fused", "cg") for whose in ("ddpm64", "azula")}
    detail = {"methods": figures, "ratios": compared, "unguided_us_per_image": single.pop("unguided_us_per_image")}
    return {**{key: worst(found) for key, found in compared.items()}, **single, "detail": detail}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--folder", type=Path, default=None, help="where priors are kept; runs/estep, or runs/estep_quick")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--count", type=int, default=96, help="digits per repeat, one batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=4000, help="training steps of the prior")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu, with --threads 1, where other processes keep the machine busy")
    parser.add_argument("--kinds", choices=NOISE, nargs="+", default=list(NOISE))
    parser.add_argument("--first", type=int, default=0, help="test digit from which on they are taken")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.walk_steps, args.now = 10, CLOCKS[args.clock]
    if args.quick:
        args.repeats, args.count, args.steps, args.walk_steps = min(args.repeats, 2), 16, 20, 2
    args.folder = args.folder or Path("runs/estep_quick" if args.quick else "runs/estep")
    torch.set_num_threads(args.threads)
    clock = time.perf_counter()
    kinds = {kind: bench(kind, args) for kind in args.kinds}
    about = f"emdiff {emdiff.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads"
    keys = [key for key in kinds[args.kinds[0]] if key != "detail"]
    result: dict[str, Any] = {key: {kind: found[key] for kind, found in kinds.items()} for key in keys}
    result |= {
        "repeats": args.repeats,
        "count": args.count,
        "first": args.first,
        "threads": args.threads,
        "clock": args.clock,
        "seed": args.seed,
        "seconds": time.perf_counter() - clock,
    }
    result |= {"peak_gb": memory("VmHWM") if Path("/proc/self/status").is_file() else None}
    print(about)
    for key in keys:
        print(f"  {key:<18}" + "".join(f"{kind} {'null' if v is None else format(v, '.3f'):<10}" for kind, v in result[key].items()))
    print(json.dumps(result | {"detail": {kind: found["detail"] for kind, found in kinds.items()}}))


if __name__ == "__main__":
    main()
