#!/usr/bin/env python
r"""Fit for a while at small size and watch the process: resident memory, open files, threads, and what the run folder holds.

    python scripts/soak.py --minutes 60 --out soak          # soak/soak.json, soak/soak.png

Once a second the process is looked at in /proc, and between two rounds of the fit the folder is measured. The second half of the time has to be
flat: a least-squares line through it may rise by at most MEMORY bytes and FILES handles over that half.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

MEMORY, FILES = 24e6, 1.0
"""Most that the second half may add, by its straight line: bytes, handles."""


def look(pid: int) -> tuple[float, int, int] | None:
    """Resident bytes, open files and threads of a process; None if it is gone."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return 1024.0 * int(status["VmRSS"].split()[0]), len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])
    except (OSError, KeyError):
        return None


def folder_bytes(run: Path) -> dict[str, int]:
    """Bytes of the rounds, of the pictures, and of the rest."""
    found = {"rounds": 0, "figures": 0, "rest": 0}
    for path in run.rglob("*"):
        if path.is_file():
            part = path.relative_to(run).parts[0]
            found["rounds" if part.startswith(("round_", "start")) else "figures" if part == "figures" else "rest"] += path.stat().st_size
    return found


def rise(seconds: np.ndarray, values: np.ndarray) -> float:
    """What a straight line through the second half of the time adds over that half."""
    late = seconds > seconds[-1] / 2
    return float(np.polyfit(seconds[late], values[late], 1)[0] * (seconds[-1] - seconds[late][0]))


def draw(path: Path, rows: np.ndarray, rounds: list[dict[str, float]]) -> None:
    """Three charts over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2))
    minutes = rows[:, 0] / 60
    axes[0].plot(minutes, rows[:, 1] / 1e6)
    axes[0].set_title("resident memory, MB")
    axes[1].plot(minutes, rows[:, 2], label="open files")
    axes[1].plot(minutes, rows[:, 3], label="threads")
    axes[1].legend()
    for name in ("rounds", "figures", "rest"):
        axes[2].plot([row["seconds"] / 60 for row in rounds], [row[name] / 1e6 for row in rounds], label=name)
    axes[2].set_title("run folder, MB")
    axes[2].legend()
    for axis in axes:
        axis.set_xlabel("minutes")
        axis.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Fit, watch, draw; status 1 if the second half is not flat."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("soak"))
    parser.add_argument("--keep", type=int, help="as in emdiff fit")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    at = np.random.default_rng(0).uniform(2, 8, (200, 2))
    y, x = np.mgrid[:10, :10]
    clean = np.stack([np.exp(-((y - a) ** 2 + (x - b) ** 2) / 4) for a, b in at])
    noisy = (clean + 0.1 * np.random.default_rng(1).standard_normal(clean.shape)).astype("f4")
    np.savez(args.out / "obs.npz", obs=noisy, observer="identity", noise_std=0.1)
    run, most = args.out / "run", int(400 * args.minutes) + 1  # more rounds than there is time for, no more than the disk has room for
    command = [sys.executable, "-m", "emdiff.cli", "fit", "--observations", str(args.out / "obs.npz"), "--out", str(run), "--iters", str(most)]
    command += ["--train.steps", "20", "--train.start-steps", "40", "--walk.levels", "8", "--wandb", "off", "--device", "cpu"]
    command += ["--keep", str(args.keep)] if args.keep else []
    rows, rounds, clock = [], [], time.monotonic()
    with (args.out / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.DEVNULL)
        while time.monotonic() - clock < 60 * args.minutes and process.poll() is None:
            time.sleep(1)
            seen = look(process.pid)
            if seen:
                rows.append((time.monotonic() - clock, *seen))
            done = sum(1 for _ in run.glob("round_*/metrics.json"))
            if not rounds or done != rounds[-1]["done"]:
                rounds.append({"seconds": time.monotonic() - clock, "done": done, **folder_bytes(run)})
        process.send_signal(signal.SIGTERM)
        status = process.wait(300)  # seconds count where nothing else runs; here a busy machine may take longer
    table = np.array(rows)
    grown = {"memory": rise(table[:, 0], table[:, 1]), "files": rise(table[:, 0], table[:, 2])}
    (args.out / "soak.json").write_text(json.dumps({"rows": rows, "rounds": rounds, "grown": grown}))
    draw(args.out / "soak.png", table, rounds)
    k = rounds[-1]["done"]
    print(f"{table[-1, 0] / 60:.1f} min, {k} rounds, status {status}; memory {table[len(table) // 2, 1] / 1e6:.0f} -> {table[-1, 1] / 1e6:.0f} MB")
    print(f"second half by its line: memory {grown['memory'] / 1e6:+.1f} MB, open files {grown['files']:+.2f}; threads {int(table[-1, 3])}")
    print(
        f"run folder: {sum(rounds[-1][n] for n in ('rounds', 'figures', 'rest')) / 1e6:.1f} MB, of it pictures {rounds[-1]['figures'] / 1e6:.1f} MB"
    )
    return int(status != 143 or grown["memory"] > MEMORY or grown["files"] > FILES)


if __name__ == "__main__":
    sys.exit(main())
