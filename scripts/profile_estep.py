r"""Where does an evaluation of a denoiser spend its time, and how far is it from what the machine can do? Prints a table; one thread.

    python scripts/profile_estep.py                     the U-Net that `emdiff fit` chooses for 28 x 28 images, batches of 128 and 500
    PYTHONPATH=OTHER/TREE python scripts/profile_estep.py       the same for another version

Processor time per image and kind of operation, each call at its fastest of --repeats runs, of: an unguided step, a fused one (one level; a map of
levels), and one guided by CG with two iterations. Weights are random: time does not depend on them. Ceilings are measured in the same process:
matrix products in float32 and bfloat16, and a copy of 80 MB. Floating-point operations are counted by torch.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from emdiff.guidance import FusedPosterior, PosteriorDenoiser
from emdiff.mdae import MDAE
from emdiff.precision import set_precision
from emdiff.prior import build_network, choose_network
from observers import Identity, Mask

KINDS = {
    "convolutions": ("convolution",),
    "activations": ("silu", "sigmoid"),
    "arithmetic": ("add", "mul", "div", "sum", "mean", "sqrt", "log", "exp", "reciprocal", "where", "pow", "sub", "clamp", "gt", "sin"),
    "moves": ("copy", "cat", "pad", "shuffle", "upsample", "pool", "clone", "fill", "zero", "constant", "contiguous"),
}


def kind_of(name: str) -> str:
    """The kind of an operation's name."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "rest")


def fastest(run: Callable[[], Any], repeats: int) -> tuple[float, dict[str, float]]:
    """Seconds of processor time of the cheapest run, and seconds of each kind of operation, every call at its fastest: other processes on the
    machine lengthen some calls of every run, and hardly one call in all of them."""
    run()
    seconds, calls = math.inf, []
    for _ in range(repeats):
        clock = time.process_time()
        run()
        seconds = min(seconds, time.process_time() - clock)
        with profile(activities=[ProfilerActivity.CPU]) as record:
            run()
        calls.append(sorted(record.events(), key=lambda event: event.time_range.start))
    found = dict.fromkeys([*KINDS, "rest"], 0.0)
    same = [events for events in calls if [e.name for e in events] == [e.name for e in calls[0]]]
    for call in zip(*same):
        found[kind_of(call[0].name)] += min(event.self_cpu_time_total for event in call) / 1e6
    return seconds, found


def ceilings() -> dict[str, float]:
    """GFLOP/s of matrix products and GB/s of a copy, the best of twenty."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(768, 768).to(dtype) for _ in range(2))
        found[f"{str(dtype)[6:]} product, GFLOP/s"] = 2 * 768**3 / shortest(partial(torch.matmul, a, b)) / 1e9
    a, b = torch.randn(20_000_000), torch.empty(20_000_000)
    return found | {"copy, GB/s read and written": 2 * 80e6 / shortest(partial(b.copy_, a)) / 1e9}


def shortest(run: Callable[[], Any], repeats: int = 20) -> float:
    """Seconds of processor time of the cheapest run."""
    seconds = []
    for _ in range(repeats):
        clock = time.process_time()
        run()
        seconds.append(time.process_time() - clock)
    return min(seconds)


def network(maps: bool) -> MDAE:
    """The default U-Net, its last layers not zero."""
    torch.manual_seed(0)
    denoiser = set_precision(build_network((28, 28), **choose_network((28, 28), maps, gain=True)), "cpu").eval().requires_grad_(False)
    for weight in denoiser.parameters():
        weight += 0.02 * torch.randn(weight.shape)
    return denoiser


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 500])
    args = parser.parse_args()
    torch.set_num_threads(1)
    limits = ceilings()
    for name, value in limits.items():
        print(f"ceiling: {name:<34}{value:8.0f}")
    top = limits["bfloat16 product, GFLOP/s"]
    print(f"{'':<26}{'batch':>6}{'us/image':>10}{'GFLOP/s':>9}{'of top':>8}" + "".join(f"{kind:>14}" for kind in [*KINDS, "rest"]))
    for count in args.batches:
        y, sigma = torch.randn(count, 1, 28, 28), torch.tensor([0.5])
        seen = torch.rand(count, 28, 28) < 0.25
        for maps, observer in ((False, Identity((28, 28), torch.tensor(1.6))), (True, Mask((28, 28), torch.tensor(0.3), seen))):
            prior, obs = network(maps), torch.randn(count, 28, 28)
            fused = FusedPosterior(prior, *observer.as_measurement(obs))
            cg = PosteriorDenoiser(prior, observer, obs, "cg", 2, 0.0)
            runs = {"unguided": prior, "fused": fused, "cg, 2 iterations": cg}
            for name, denoiser in runs.items():
                with torch.no_grad():
                    with contextlib.redirect_stdout(None), FlopCounterMode(display=False) as counter:
                        denoiser.xhat(y, sigma)
                    seconds, parts = fastest(partial(denoiser.xhat, y, sigma), args.repeats)
                rate = counter.get_total_flops() / seconds / 1e9
                label = f"{name}, {'maps' if maps else 'one level'}"
                row = "".join(f"{1e6 * parts[kind] / count:14.1f}" for kind in [*KINDS, "rest"])
                print(f"{label:<26}{count:>6}{1e6 * seconds / count:>10.0f}{rate:>9.0f}{rate / top:>8.2f}{row}", flush=True)


if __name__ == "__main__":
    main()
