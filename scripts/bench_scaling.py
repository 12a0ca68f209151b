"""Cost and memory of an EM iteration as the data grow in number and in pixels. One JSON line at the end.

    python scripts/bench_scaling.py            1k to 60k images of 28 x 28, and 4k of 14 x 14 to 56 x 56: about ten minutes on one core
    python scripts/bench_scaling.py --quick    half a minute

For each size: noisy smooth images (std of noise .5) are written in parts to a folder of .npy files as float16, opened, and taken through one
E-step (fused, `--levels` levels, chains in .npy files) and one M-step of fixed length on its pairs, by the default U-Net, untrained, with patches
of 2 x 2 at every size (by default 14 x 14 would have none, and cost as much as 28 x 28). Costs are processor seconds of one thread, so that other
work on the machine counts little. Slopes are those of straight lines through log cost over log N, log pixels: 1 is linear. Peak memory is that of
the whole process, reset before each size (Linux); the allocator is told to hand back what is freed, and arrays above `--small` bytes stay in their
files, by default 4 MB (emdiff itself holds arrays of up to 64 MB in memory).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from emdiff import rows
from emdiff.data import Data
from emdiff.em import Walk, e_step
from emdiff.metrics import sample_figures
from emdiff.observations import open_observations
from emdiff.pairs import PairLoss
from emdiff.precision import set_precision
from emdiff.prior import build_network
from emdiff.rows import fill, spans
from emdiff.scale import Scale, estimate_scale
from emdiff.streams import stream
from emdiff.training import train
from emdiff.written import NewArchive, NewArray

NETWORK = {"kind": "unet", "widths": [32, 64, 128], "patch": 2}


class Cost(NamedTuple):
    """What one size took.

    Attributes:
        count: N.
        side: Pixels along a side.
        e_step: Processor seconds of the E-step.
        figures: Of reading all data for the scale, and of writing samples and their figures.
        m_step: Of the M-step.
        peak_mb: Peak resident memory of the process.
        files_mb: Size of the observations and of the arrays that were made.
    """

    count: int
    side: int
    e_step: float
    figures: float
    m_step: float
    peak_mb: float
    files_mb: float


def hand_back() -> None:
    """Let glibc give freed blocks of 128 kB and more back at once."""
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**17)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**17)  # M_TRIM_THRESHOLD


def reset_peak() -> None:
    """Start the peak of resident memory anew (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Peak resident memory since `reset_peak`, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def write_images(path: Path, count: int, side: int) -> None:
    """Noisy images whose spectrum falls as a power law, in [0, 1] or so, in parts."""
    draw = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    falls = 1 / (frequency + 1 / side) ** 2
    falls /= np.sqrt((falls**2).mean())
    with NewArchive(path) as new:
        obs = new.array("obs", (count, side, side), np.float16)
        for span in spans(count, side * side):
            white = draw.normal(size=(span.stop - span.start, side, side))
            x = 0.5 + 0.25 * np.fft.irfft2(np.fft.rfft2(white) * falls, s=(side, side))
            obs[span] = torch.from_numpy(x + 0.5 * draw.normal(size=x.shape))
        new.put("noise_std", np.float32(0.5))
        new.put("observer", "identity")


def timed(work: Any) -> tuple[Any, float]:
    """The result of a function and the processor seconds it took."""
    start = time.process_time()
    return work(), time.process_time() - start


def iteration(data: Data, folder: Path, levels: int, steps: int) -> tuple[float, float, float]:
    """One E-step, figures and M-step; their costs."""
    shape, made = (len(data), *data.shape), lambda name, shape: NewArray(folder / f"{name}.npy", shape)
    torch.manual_seed(0)
    denoiser = set_precision(build_network(data.shape, **NETWORK), "cpu").eval().requires_grad_(False)
    scale, first = timed(lambda: estimate_scale(data, stream(0, "scale")))
    standard = Scale(*scale).view(data)
    walk = Walk(tau_last=0.1, levels=levels, batch=250)
    draws, e = timed(lambda: e_step(denoiser, standard, None, walk, stream(0, "e-step"), store=made))
    draws = draws._replace(y=draws.y.commit(), x=draws.x.commit())
    _, second = timed(lambda: sample_figures(data, fill(made("samples", shape), draws.x, scale.restore).commit()))
    _, m = timed(lambda: train(denoiser, PairLoss(draws, 0.1), len(data), steps, 128, 2e-3))
    return e, first + second, m


def measure(count: int, side: int, levels: int, steps: int) -> Cost:
    """The cost of one size, in a folder that is removed."""
    folder = Path(tempfile.mkdtemp(prefix="scaling-"))
    try:
        write_images(folder / "obs", count, side)
        reset_peak()
        e, figures, m = iteration(open_observations(folder / "obs"), folder, levels, steps)
        size = sum(file.stat().st_size for file in folder.glob("**/*.npy")) / 2**20
        return Cost(count, side, e, figures, m, peak_mb(), size)
    finally:
        shutil.rmtree(folder)


def slope(size: list[float], cost: list[float]) -> float:
    """Of the least-squares line through log cost over log size."""
    return float(np.polyfit(np.log(size), np.log(cost), 1)[0])


def plot(path: Path, by_count: list[Cost], by_side: list[Cost], slopes: tuple[float, float]) -> None:
    """Cost over N, cost over pixels, memory over N, each with its line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3))
    for axis, costs, size, label, found in (
        (left, by_count, [c.count for c in by_count], "observations", slopes[0]),
        (middle, by_side, [c.side**2 for c in by_side], "pixels", slopes[1]),
    ):
        axis.loglog(size, [c.e_step + c.figures for c in costs], "o-", label="E-step and figures")
        axis.loglog(size, [c.m_step for c in costs], "s:", color="0.5", label="M-step, fixed length")
        axis.set(xlabel=label, ylabel="processor seconds", title=f"slope {found:.3f}")
        axis.set_xticks(size, [str(n) for n in size])
        axis.set_xticks([], minor=True)
        axis.legend(fontsize=7)
    counts = [c.count for c in by_count]
    right.loglog(counts, [c.files_mb for c in by_count], "s:", color="0.5", label="files")
    right.loglog(counts, [c.peak_mb for c in by_count], "o-", label="peak memory of the process")
    right.set(xlabel="observations", ylabel="MB", title=f"{by_count[0].side} x {by_count[0].side} pixels")
    right.set_xticks(counts, [str(n) for n in counts])
    right.set_xticks([], minor=True)
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Measure, print the table, draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 4000, 16000, 60000])
    parser.add_argument("--sides", type=int, nargs="+", default=[14, 28, 56])
    parser.add_argument("--side", type=int, default=28, help="pixels along a side as N grows")
    parser.add_argument("--count", type=int, default=4000, help="N as pixels grow")
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="training steps of the M-step")
    parser.add_argument("--small", type=int, default=2**22, help="bytes up to which an array is held in memory")
    parser.add_argument("--png", type=Path, default=Path("scaling.png"))
    parser.add_argument("--quick", action="store_true", help="small sizes, for a test")
    args = parser.parse_args()
    if args.quick:
        args.counts, args.sides, args.side, args.count, args.steps = [250, 1000], [8, 16], 16, 250, 4
    torch.set_num_threads(1)
    hand_back()
    rows.SMALL = args.small
    measure(250, args.side, args.levels, 4)  # what only the first iteration does: imports, kernels
    sizes = dict.fromkeys([*((count, args.side) for count in args.counts), *((args.count, side) for side in args.sides)])
    print(f"{'N':>7}{'side':>6}{'E-step s':>10}{'figures s':>11}{'M-step s':>10}{'peak MB':>9}{'files MB':>10}")
    for count, side in sizes:
        sizes[count, side] = c = measure(count, side, args.levels, args.steps)
        print(f"{c.count:7d}{c.side:6d}{c.e_step:10.2f}{c.figures:11.2f}{c.m_step:10.2f}{c.peak_mb:9.0f}{c.files_mb:10.1f}", flush=True)
    by_count, by_side = [sizes[count, args.side] for count in args.counts], [sizes[args.count, side] for side in args.sides]
    total = lambda costs: [c.e_step + c.figures for c in costs]
    slopes = slope(args.counts, total(by_count)), slope([side**2 for side in args.sides], total(by_side))
    plot(args.png, by_count, by_side, slopes)
    print(f"plot: {args.png}")
    memory = {str(c.count): round(c.peak_mb, 1) for c in by_count}
    print(json.dumps({"slope_n": round(slopes[0], 4), "slope_pixels": round(slopes[1], 4), "memory_mb": memory}))


if __name__ == "__main__":
    main()
