#!/usr/bin/env python
r"""Kill a fit again and again, and see whether it ends where an undisturbed one does.

    python scripts/torture.py --deaths 20 --seed 0               # vectors; --images for a U-Net

Each life of the process ends after a random time, by one of

    KILL      kill -9: no chance to do anything
    TERM INT  a signal: it has to save and to exit with 143 or 130 within 10 seconds
    DISK      every further write beyond a few bytes fails, as on a full disk
    MEMORY    every further allocation of address space fails

and the same command starts again. At the end the SHA-256 of every prior and of all samples is compared with that of an undisturbed run. States are
saved every --every seconds within rounds, so that short lives get somewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

KINDS = ("KILL", "TERM", "INT", "DISK", "MEMORY")
PROMISED = {"KILL": {-9}, "TERM": {143}, "INT": {130}, "DISK": {2}, "MEMORY": {1, 2, -6, -9, -11}}
"""Exit statuses that each death may end with, if it came before the end of the fit."""


def command(folder: Path, out: str, images: bool, iters: int) -> list[str]:
    """The fit, of some seconds per round."""
    steps = ["--train.steps", "150", "--train.start-steps", "200"] if images else ["--train.steps", "600", "--train.start-steps", "500"]
    fit = ["fit", "--observations", str(folder / "obs.npz"), "--out", str(folder / out), "--iters", str(iters), *steps]
    walk = ["--walk.levels", "16", "--walk.batch", "100"]
    return [sys.executable, "-m", "emdiff.cli", *fit, *walk, "--wandb", "off", "--device", "cpu"]


def observations(path: Path, images: bool, seed: int) -> None:
    """Noisy vectors, or blurs at random places with missing pixels."""
    draw = np.random.default_rng(seed)
    if not images:
        x = draw.multivariate_normal(np.zeros(3), [[1, 0.6, 0], [0.6, 1, 0.3], [0, 0.3, 0.5]], 1000).astype("f4")
        np.savez(path, obs=x + 0.4 * draw.standard_normal(x.shape).astype("f4"), observer="identity", noise_std=0.4)
        return
    y, x = np.mgrid[:10, :10]
    clean = np.stack([np.exp(-((y - a) ** 2 + (x - b) ** 2) / 4) for a, b in draw.uniform(2, 8, (400, 2))])
    mask = draw.random(clean.shape) < 0.7
    np.savez(path, obs=(mask * (clean + 0.1 * draw.standard_normal(clean.shape))).astype("f4"), observer="mask", mask=mask, noise_std=0.1)


def sums(run: Path) -> dict[str, str]:
    """SHA-256 of every prior and of all samples."""
    files = sorted([*run.glob("*/prior.safetensors"), *run.glob("*/samples.npy"), *run.glob("*/chains.npy")])
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def strike(process: subprocess.Popen, kind: str) -> float:
    """End a process in one way; returns the seconds it took, at most 60."""
    clock = time.perf_counter()
    if kind == "DISK":
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, 100))
    elif kind == "MEMORY":
        used = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(process.pid, resource.RLIMIT_AS, (used, used))
    else:
        process.send_signal(getattr(signal, f"SIG{kind}"))
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return time.perf_counter() - clock


def main() -> int:
    """Undisturbed run, deaths, comparison; status 0 if nothing differs and all promises were kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deaths", type=int, default=20)
    parser.add_argument("--iters", type=int, default=3)
    parser.add_argument("--images", action="store_true", help="masked images and a U-Net instead of vectors and an MLP")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=0.5, help="seconds between saved states")
    args = parser.parse_args()
    draw, deaths, broken, slowest, taken_over, lives = random.Random(args.seed), Counter[str](), [], 0.0, 0, 0
    environment = {**os.environ, "EMDIFF_CHECKPOINT_SECONDS": str(args.every), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        observations(folder / "obs.npz", args.images, args.seed)
        clock = time.perf_counter()
        subprocess.run(command(folder, "whole", args.images, args.iters), env=environment, check=True, capture_output=True)
        whole = time.perf_counter() - clock
        print(f"undisturbed: {whole:.1f} s, {len(sums(folder / 'whole'))} files", flush=True)
        while True:
            lives += 1
            with (folder / "out.txt").open("w") as log:
                process = subprocess.Popen(command(folder, "run", args.images, args.iters), env=environment, stdout=log, stderr=log)
            kind = draw.choice(KINDS) if sum(deaths.values()) < args.deaths else None
            if kind:
                while process.poll() is None and "run folder" not in (folder / "out.txt").read_text():
                    time.sleep(0.02)
                time.sleep(draw.uniform(0, 2.5 * whole / args.deaths))
            if kind and process.poll() is None:
                took = strike(process, kind)
                finished = process.returncode == 0
                deaths[kind + (" (too late)" if finished else "")] += 1
                slowest = max(slowest, took if kind in ("TERM", "INT") and not finished else 0.0)
                if not finished and process.returncode not in PROMISED[kind]:
                    broken.append(f"{kind} ended with status {process.returncode}: {(folder / 'out.txt').read_text()[-300:]}")
            elif process.wait() != 0:
                broken.append(f"status {process.returncode} without a reason: {(folder / 'out.txt').read_text()[-300:]}")
                break
            taken_over += "taken over" in (folder / "out.txt").read_text()
            if process.returncode == 0 and sum(deaths.values()) >= args.deaths:
                break
            if process.returncode == 0:  # done before all deaths were had: begin the next round of it
                args.iters += 1
                subprocess.run(command(folder, "whole", args.images, args.iters), env=environment, check=True, capture_output=True)
        before, after = sums(folder / "whole"), sums(folder / "run")
        leftovers = [str(p) for p in (folder / "run").rglob("*.tmp")] + [
            str(p) for name in ("training", "walk") for p in (folder / "run").rglob(f"{name}.safetensors")
        ]
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    print(
        f"deaths: {dict(deaths)}; {lives} lives, {args.iters} iterations; locks taken over: {taken_over}; slowest exit on a signal: {slowest:.1f} s"
    )
    print(f"files: {len(before)}, differing: {differing or 0}; leftovers: {leftovers or 0}; broken promises: {len(broken)}")
    for line in broken:
        print(f"  {line}")
    return int(bool(differing or leftovers or broken or slowest > 10))


if __name__ == "__main__":
    sys.exit(main())
