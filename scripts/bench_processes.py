#!/usr/bin/env python
"""How much faster are an E-step and an M-step of several processes than of one, with one thread each? One JSON line at the end.

    python scripts/bench_processes.py                 2 processes, about two minutes on two free cores
    python scripts/bench_processes.py --quick         a few seconds

Noisy smooth 28 x 28 images (std of noise .5), the untrained default U-Net, fused walks. In each repetition the first process does all of the
work alone while the others sleep, then all do it together: the same observations, the same global batch. Together the E-step ends when every
process can read the draws of all; the M-step ends with equal weights, checked. What is given is the median over repetitions of the ratio of wall
times, and its range; and the same of processor times, one process's over the largest of several, which counts where others use the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from emdiff.data import Observations
from emdiff.em import Draws, Walk, e_step
from emdiff.folder import RunFolder
from emdiff.pairs import PairLoss
from emdiff.precision import set_precision
from emdiff.prior import build_network, choose_network
from emdiff.processes import ALONE, Team, joined
from emdiff.rounds import of_all
from emdiff.streams import stream
from emdiff.training import train
from emdiff.turns import those_of
from observers import Identity

SHAPE = (28, 28)


def observations(count: int) -> Observations:
    """Standardised images of a falling spectrum, with noise."""
    draw = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(28)[:, None], np.fft.rfftfreq(28)[None])
    falls = 1 / (frequency + 1 / 28) ** 2
    x = np.fft.irfft2(np.fft.rfft2(draw.normal(size=(count, *SHAPE))) * falls, s=SHAPE)
    obs = x / x.std() + 0.5 * draw.normal(size=x.shape)
    return Observations(torch.from_numpy(obs.astype(np.float32)), Identity(SHAPE, torch.tensor(0.5)))


def walked(prior: torch.nn.Module, data: Observations, levels: int, folder: Path, team: Team) -> Draws:
    """An E-step of all observations, each process its part, as in `rounds.walk_all`."""
    run, own = RunFolder(folder), those_of(data, team.rows(len(data)))
    draws = e_step(prior, own, None, Walk(levels=levels, batch=128), stream(team.seed(0), "e-step"),
                   store=lambda name, shape: run.scratch(1, team.mark(name), shape))  # fmt: skip
    return of_all(1, draws, run, team)


def seconds(work: Callable[[], object], team: Team, alone: bool) -> tuple[float, float]:
    """Wall time of some work by the first process, or by all, until all are back, and the most processor time that one of them took."""
    team.wait()
    begun, used = time.perf_counter(), time.process_time()
    if team.first or not alone:
        work()
    used = time.process_time() - used
    team.wait()
    return time.perf_counter() - begun, max(team.gather(used))


def measure(args: argparse.Namespace, team: Team) -> dict[str, object]:
    """Ratios of one process over all of them."""
    data = observations(args.count)
    torch.manual_seed(0)
    network = choose_network(SHAPE, gain=True)
    prior = set_precision(build_network(SHAPE, **network), "cpu").eval().requires_grad_(False)
    folder = Path(team.lead(tempfile.mkdtemp))
    draws = walked(prior, data.rows(slice(0, 64)), 2, folder / f"first{team.rank}", ALONE)
    loss = PairLoss(draws, 0.1)
    found: dict[str, object] = {"processes": team.size, "threads": torch.get_num_threads(), "parameters": sum(p.numel() for p in prior.parameters())}
    work = {
        "e_step": lambda who: walked(prior, data, args.levels, folder / f"{who.size}", who),
        "m_step": lambda who: train(prior, loss, 64, args.steps, 128, 1e-3, team=who),
    }
    for name, step in work.items():
        pairs = []
        for _ in range(args.repeats + 1):  # the first warms up
            one = seconds(lambda step=step: step(ALONE), team, True)
            pairs.append((one, seconds(lambda step=step: step(team), team, False)))
        for clock, which in enumerate(("wall", "processor")):
            ones, alls = ([pair[who][clock] for pair in pairs[1:]] for who in (0, 1))
            ratios = [one / many for one, many in zip(ones, alls)]
            found[f"{name}_{which}"] = {"one_s": round(median(ones), 3), "all_s": round(median(alls), 3), "ratio": round(median(ratios), 3),
                                        "range": [round(min(ratios), 3), round(max(ratios), 3)]}  # fmt: skip
            team.once(print, name, which, found[f"{name}_{which}"])
    clock = time.perf_counter()
    for _ in range(200):
        team.largest(0)
    return found | {"agreement_us": round((time.perf_counter() - clock) / 200 * 1e6, 1)}


def main() -> int:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--count", type=int, default=1536, help="observations")
    parser.add_argument("--levels", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="of the M-step, 128 data each")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.count, args.levels, args.steps, args.repeats = 64, 2, 2, 1
    if not args.inside:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.processes)]
        return subprocess.run([sys.executable, *torchrun, __file__, *sys.argv[1:], "--inside"], check=False).returncode
    with joined("cpu") as team:
        found = measure(args, team)
        team.once(print, json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
