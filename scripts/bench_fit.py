"""How long until EM is nearly as good as training on clean digits? `emdiff fit` against the EM of diffusion-priors. One JSON line at the end.

    python scripts/bench_fit.py                   10,000 noisy digits, n = .5: up to 8 times as long for the peer as for emdiff
    python scripts/bench_fit.py --cap 2           the peer gets twice emdiff's time; with 0 it has no part
    python scripts/bench_fit.py --quick           300 digits, short trainings: under a minute
    OMP_NUM_THREADS=1 python scripts/bench_fit.py --clock cpu      processor time of one thread each, for a machine that is not free

Both sides see the same observations, use the same network, batch and learning rate on the same number of threads, and are judged by the same figures
of the same walk: error of one posterior sample per pixel, residual chi2 and std ratio on the first 1,000 observations (means over four samples),
computed off the clock.

emdiff      the command with its defaults, in a process of its own; its clock runs from the command to a round's last file.
peer        Learning Diffusion Priors from Observations by EM (Rozet et al. 2024): Gaussian start; E-step, DDPM of 64 steps with moment matching
            and one CG iteration for every observation (peer_ddpm); M-step, the network of the iteration before trained on those samples re-noised.
            It has --peer-first steps for its first M-step and --peer-steps for each one after it.
target      the error of a prior of the same network, trained for 4,000 steps on the clean digits behind the observations, times 1.15. emdiff also has
            to have chi2 in .97-1.02 and std ratio in .97-1.03 there, since a collapsed prior has a low error too; the peer only needs the error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peer_ddpm import ddpm_sample
from timed_command import command
from torch import Tensor

import emdiff
from emdiff.denoise import Denoiser
from emdiff.em import Draws, Walk, e_step
from emdiff.gaussian import fit_gaussian
from emdiff.metrics import residual_chi2
from emdiff.observations import Observations, read_observations, read_truth
from emdiff.pairs import PairLoss
from emdiff.plan import default_train_batch
from emdiff.posterior import run_walk
from emdiff.precision import set_precision
from emdiff.prior import Prior, build_network, choose_network, load_prior, save_prior
from emdiff.scale import Scale, estimate_scale
from emdiff.streams import stream, stream_seed
from emdiff.training import train

WITHIN, CHI2, STD = 1.15, (0.97, 1.02), (0.97, 1.03)
"""Target: error over the clean-trained prior's; for emdiff also residual chi2 and std of samples over std of truth."""

WALKS = 4
"""Posterior samples of each observation that a prior is judged by; one gives errors that scatter by half a per cent."""

PEER_LAST = 0.02
"""Finest level of the peer's sampler and training, in units of the data's std."""


class Row(NamedTuple):
    """Figures at some time of a fit: seconds on its clock, iteration, error of one sample, chi2, std ratio."""

    seconds: float
    iteration: int
    error: float
    chi2: float
    std_ratio: float

    def reaches(self, target: float, calibrated: bool) -> bool:
        """Whether the target error is met, and if `calibrated`, chi2 and std ratio with it."""
        return self.error <= target and (not calibrated or (CHI2[0] <= self.chi2 <= CHI2[1] and STD[0] <= self.std_ratio <= STD[1]))


class Judge:
    """Figures of a prior on the first observations, by the walk of `emdiff fit`."""

    def __init__(self, data: Observations, truth: Tensor, scale: Scale, count: int) -> None:
        self.data, self.truth, self.scale = data.rows(slice(0, count)), truth[:count], scale
        self.walk = Walk()

    def __call__(self, denoiser: Denoiser, seconds: float, iteration: int) -> Row:
        given = self.scale.observations(self.data)
        rows = [self.of(self.scale.restore(e_step(denoiser, given, None, self.walk, stream(0, "judge", i)).x), 0.0, 0) for i in range(WALKS)]
        return Row(seconds, iteration, *(sum(values) / WALKS for values in zip(*(row[2:] for row in rows))))

    def of(self, x: Tensor, seconds: float, iteration: int) -> Row:
        """The row of samples x (n, *S) in the user's units."""
        error, chi2 = float((x - self.truth).square().mean()), float(residual_chi2(self.data, x).mean())
        return Row(seconds, iteration, error, chi2, float(x.std() / self.truth.std()))


def show(side: str, row: Row) -> None:
    """One line of progress."""
    print(
        f"{side:<8}iteration {row.iteration:3d} {row.seconds:8.0f} s   error {row.error:.4f}   chi2 {row.chi2:.3f}   std ratio {row.std_ratio:.3f}",
        flush=True,
    )


def clean_trained(folder: Path, truth: Tensor, scale: Scale, tau_last: float, steps: int) -> Prior:
    """The prior of the target, trained once and kept."""
    file = folder / f"clean-{len(truth)}-gain-{steps}.safetensors"
    if not file.is_file():
        torch.manual_seed(stream_seed(0, "network"))
        network = choose_network((28, 28), gain=True)
        x = scale.standardise(truth)
        denoiser = set_precision(build_network((28, 28), **network), "cpu")
        trained = train(denoiser, PairLoss(Draws(x, x, 0.0), tau_last), len(x), steps, rate=2e-3)
        save_prior(file, Prior(trained.denoiser, scale, (28, 28), tau_last, network))
    return load_prior(file)


def processor_seconds(pid: int) -> float:
    """Processor time that a running process has taken, all its threads together (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fit(file: Path, out: Path, quick: bool, iters: int, cpu: bool) -> tuple[float, dict[int, float]]:
    """Run `emdiff fit`; returns its seconds in all, and at the end of each round, by the clock or of the processor."""
    short = ["--iters", "2", "--train.steps", "20", "--train.start_steps", "40", "--walk.levels", "6"] if quick else ["--iters", str(iters)]
    begun, ends = time.perf_counter(), dict[int, float]()
    process = subprocess.Popen(
        [sys.executable, "-m", "emdiff.cli", "fit", "--observations", str(file), "--out", str(out), "--wandb", "off", *short], stdout=sys.stderr
    )
    spent = 0.0
    while process.poll() is None:
        time.sleep(0.2)
        spent = processor_seconds(process.pid) if cpu else time.perf_counter() - begun
        for metrics in out.glob("*/metrics.json"):
            k = 0 if metrics.parent.name == "start" else int(metrics.parent.name.removeprefix("round_"))
            ends.setdefault(k, spent)
    if process.returncode:
        raise SystemExit("emdiff fit failed")
    return spent, ends


def peer(
    data: Observations, limit: float, first: int, steps: int, now: Callable[[], float], batch: int = 500
) -> Iterator[tuple[int, float, Denoiser]]:  # fmt: skip
    """EM as diffusion-priors does it, on standardised observations: iteration, seconds, prior, until `limit` seconds have passed, as `now` tells."""
    clock, off = now(), 0.0
    torch.manual_seed(stream_seed(0, "peer"))
    prior: Denoiser = fit_gaussian(data, generator=stream(0, "peer gaussian"))
    network = set_precision(build_network(data.shape, **choose_network(data.shape)), "cpu")
    k = 0
    while True:
        k, x = k + 1, []
        for i in range(0, len(data), batch):
            x.append(ddpm_sample(prior, data.rows(slice(i, i + batch)), 64, 1, stream(0, "peer", k, i), PEER_LAST))
            if now() - clock - off > limit:
                return
        samples = torch.cat(x)
        loss = PairLoss(Draws(samples, samples, 0.0), PEER_LAST)
        seed, length = stream_seed(0, "peer m-step", k), first if k == 1 else steps
        network = train(network, loss, len(data), length, default_train_batch("cpu", "unet", len(data)), 2e-3, seed).denoiser
        prior = network
        paused = now()
        yield k, paused - clock - off, prior
        off += now() - paused


def minutes(rows: list[Row]) -> list[dict[str, Any]]:
    """What was there after each whole minute: the last row before it."""
    last = math.ceil(max(row.seconds for row in rows) / 60)
    found = [(m, [row for row in rows if row.seconds <= 60 * m]) for m in range(1, last + 1)]
    return [{"minute": m, **done[-1]._asdict()} for m, done in found if done]


def reached(rows: list[Row], target: float, calibrated: bool) -> Row | None:
    """The first row of a prior that meets the target; the start has samples, but no prior yet."""
    return next((row for row in rows if row.iteration and row.reaches(target, calibrated)), None)


def main() -> None:
    """Observe, fit, judge, let the peer try, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--folder", type=Path, default=None, help="runs/bench_fit, or runs/bench_fit_quick; a finished fit there is not timed again")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--iters", type=int, default=4, help="of emdiff's fit")
    parser.add_argument("--cap", type=float, default=8.0, help="the peer's time, in times of emdiff's")
    parser.add_argument("--peer-first", type=int, default=4800)
    parser.add_argument("--peer-steps", type=int, default=1600)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="seconds by the clock, or of the processor")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.count, args.peer_first, args.peer_steps, args.cap = 300, 30, 15, 3.0
    folder = args.folder or Path("runs/bench_fit_quick" if args.quick else "runs/bench_fit")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"emdiff {emdiff.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.count} digits, noise .5", flush=True)
    file, out, times = (
        folder / f"{name}-{args.count}{end}" for name, end in (("noisy", ".npz"), ("fit", f"-{args.clock}"), ("times", f"-{args.clock}.json"))
    )
    if not file.is_file():
        command("observe", "--data", str(args.data), "--observer", "identity", "--noise-std", "0.5", "--count", str(args.count), "--out", str(file))
    if not times.is_file():
        total, ends = fit(file, out, args.quick, args.iters, args.clock == "cpu")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.write_text(json.dumps({"total": total, "ends": ends, "cpu": used.ru_utime + used.ru_stime, "load": os.getloadavg()}))
    spent = json.loads(times.read_text())
    data, truth = read_observations(file), read_truth(file)
    scale = estimate_scale(data, stream(0, "scale"))
    judge = Judge(data, truth, scale, min(1000, args.count // 3))
    judge.walk = run_walk(out, data, "cpu")
    clean = judge(clean_trained(folder, truth, scale, judge.walk.tau_last, 60 if args.quick else 4000).denoiser, 0.0, 0)
    target = WITHIN * clean.error
    show("clean", clean)
    start = judge.of(torch.from_numpy(np.load(out / "start" / "samples.npy"))[: len(judge.truth)], spent["ends"]["0"], 0)
    show("emdiff", start)
    ours, theirs = [start], []
    for k in sorted(int(k) for k in spent["ends"] if k != "0"):
        ours.append(judge(load_prior(out / f"round_{k:03d}" / "prior.safetensors").denoiser, spent["ends"][str(k)], k))
        show("emdiff", ours[-1])
    ours_at = reached(ours, target, True)
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    limit = args.cap * (ours_at.seconds if ours_at else spent["total"])
    for k, seconds, prior in () if args.cap == 0 else peer(scale.observations(data), limit, args.peer_first, args.peer_steps, now):
        theirs.append(judge(prior, seconds, k))
        show("peer", theirs[-1])
        if theirs[-1].reaches(target, False):
            break
    theirs_at = reached(theirs, target, False)
    print(f"emdiff: {spent['cpu']:.0f} s of processor time; load {', '.join(f'{x:.1f}' for x in spent['load'])} at its end")
    report(args, spent["total"], clean, target, ours, theirs, ours_at, theirs_at, limit)


def report(
    args: argparse.Namespace, total: float, clean: Row, target: float, ours: list[Row], theirs: list[Row],
    ours_at: Row | None, theirs_at: Row | None, limit: float,
) -> None:  # fmt: skip
    """Print the summary, each minute, and the JSON line."""
    print(f"target: error {target:.4f}, {WITHIN} times the clean-trained prior's {clean.error:.4f}")
    print(f"emdiff: {'not reached' if ours_at is None else f'reached after {ours_at.seconds:.0f} s'}; the whole command {total:.0f} s")
    best = min((row.error for row in theirs), default=None)
    print(f"peer:   {f'reached after {theirs_at.seconds:.0f} s' if theirs_at else f'not reached in {limit:.0f} s; least error {best}'}")
    by_minute = {"emdiff": minutes(ours), "peer": minutes(theirs) if theirs else []}
    for side, rows in by_minute.items():
        for row in rows:
            print(f"{side:<8}minute {row['minute']:3d}: iteration {row['iteration']:3d}, error {row['error']:.4f}, chi2 {row['chi2']:.3f}")
    ratio = None if ours_at is None or not theirs else ours_at.seconds / (theirs_at.seconds if theirs_at else limit)
    figures = {
        "count": args.count, "clock": args.clock, "threads": torch.get_num_threads(),
        "clean_error": clean.error, "target_error": target, "seconds_total": total,
        "seconds_to_target": ours_at.seconds if ours_at else None, "error_at_target": ours_at.error if ours_at else None,
        "last_error": ours[-1].error, "last_chi2": ours[-1].chi2, "last_std_ratio": ours[-1].std_ratio,
        "peer_seconds_to_target": theirs_at.seconds if theirs_at else None, "peer_seconds_given": limit, "peer_iterations": len(theirs),
        "peer_least_error": best, "ratio": ratio, "ratio_is_a_bound": theirs_at is None,
    }  # fmt: skip
    print(json.dumps(figures | {"emdiff": [row._asdict() for row in ours], "peer": [row._asdict() for row in theirs]}))


if __name__ == "__main__":
    main()
