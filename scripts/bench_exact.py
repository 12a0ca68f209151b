"""How near does `emdiff fit` come to references that are exact, or that others have published? Prints a table and one JSON line.

    python scripts/bench_exact.py                              all parts
    python scripts/bench_exact.py --quick                      all parts in about a minute, sizes too small for the figures to mean much
    python scripts/bench_exact.py --only manifold --seeds 0    one part of the four below

gaussian    Gaussian x behind masks and noise, against the maximum-likelihood estimate (exact_gaussian.py)
mixtures    points in the plane with full noise covariances, against extreme deconvolution (exact_mixtures.py)
guidance    moment matching on a curve with an exact denoiser, against the exact posterior (exact_guidance.py)
manifold    the curve learned from random projections, by Sinkhorn divergence and exact transport (exact_manifold.py)

Every fit is the command itself, in a process of its own; finished runs in --folder are continued, not repeated, and `seconds` then are those of the
last process alone. Needs the extra `bench`: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import exact_gaussian
import exact_guidance
import exact_manifold
import exact_mixtures
import torch

import emdiff

PARTS = ("gaussian", "mixtures", "guidance", "manifold")


def run(part: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one part and seed."""
    if part == "gaussian":
        return [exact_gaussian.fit(args.folder, seed, args.quick)]
    if part == "mixtures":
        truths = args.truths[: 1 if args.quick else None]
        return [exact_mixtures.compare(name, args.folder, seed, args.quick, tuple(args.components)) for name in truths]
    if part == "guidance":
        return [exact_guidance.run(seed, args.quick)]
    return [exact_manifold.fit(args.folder, seed, args.quick, args.count, args.iters)]


def show(rows: list[dict[str, Any]]) -> None:
    """One block per row, one figure per line; the iterations of the manifold below it."""
    for line in rows:
        print(f"\n{line['part']}, seed {line['seed']}")
        for name, value in line.items():
            if name not in ("part", "seed", "history"):
                print(f"    {name:<28}{value if isinstance(value, (str, dict)) else format(value, '.4g')}")
        for h in line.get("history", []):
            figures = "  ".join(f"{who} {name} {v:.4f}" for who in ("posterior", "prior") if who in h for name, v in h[who].items())
            print(f"    iteration {h['k']:3d}  {h['seconds']:6.0f} s  {figures}")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--truths", nargs="+", choices=exact_mixtures.TRUTHS, default=list(exact_mixtures.TRUTHS), help="of the mixtures part")
    parser.add_argument("--components", type=int, nargs="+", default=list(exact_mixtures.COMPONENTS), help="that XD may choose from")
    parser.add_argument("--count", type=int, default=65_536, help="observations of the manifold")
    parser.add_argument("--iters", type=int, default=2, help="EM iterations of the manifold")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_exact"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    args.folder = args.folder / ("quick" if args.quick else "full")
    args.folder.mkdir(parents=True, exist_ok=True)
    parts = [args.only] if args.only else PARTS
    rows = [line for part in parts for seed in args.seeds for line in run(part, seed, args)]
    about = {name: version(name) for name in ("torch", "numpy", "pot", "astroML")}
    about |= {"emdiff": emdiff.__version__, "python": platform.python_version()}
    show(rows)
    print("\nversions: " + ", ".join(f"{k} {v}" for k, v in about.items()) + f"; {torch.get_num_threads()} threads; seeds {args.seeds}")
    print(json.dumps({"rows": rows, "versions": about, "seeds": args.seeds, "quick": args.quick}))


if __name__ == "__main__":
    main()
