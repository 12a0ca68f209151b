#!/usr/bin/env python
r"""Build wheel and sdist, install them into empty environments, and run emdiff there.

    python scripts/install_matrix.py                                     # every Python 3.10-3.13 found x oldest and newest dependencies
    python scripts/install_matrix.py --python 3.11 --deps newest --torch "torch==2.13.0+cpu"      # one, with a torch for CPUs only

Of each environment: pip check, `emdiff --help`, observe, fit, sample, evaluate and report on a tiny set of images, without W&B. "oldest" pins every
dependency to the lower bound that pyproject.toml states. torch from PyPI is some GB; --torch takes another requirement. --no-torchvision removes
torchvision before emdiff is used.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
USE = r"""
import numpy as np, subprocess, sys
y, x = np.mgrid[:9, :8]
at = np.random.default_rng(0).uniform(2, 6, (60, 2))
np.savez("clean.npz", x=np.stack([np.exp(-((y - a) ** 2 + (x - b) ** 2) / 4) for a, b in at]).astype("f4"))
run = lambda *a: subprocess.run([sys.executable, "-m", "emdiff.cli", *a], check=True, stdout=subprocess.DEVNULL)
run("observe", "--data", "clean.npz", "--noise-std", "0.1", "--out", "obs.npz")
small = ["--train.steps", "10", "--train.start-steps", "10", "--walk.levels", "4", "--wandb", "off", "--device", "cpu"]
run("fit", "--observations", "obs.npz", "--iters", "2", "--out", "run", *small)
run("sample", "--run", "run", "--count", "4", "--levels", "4", "--out", "s.npz", "--device", "cpu")
run("evaluate", "--run", "run", "--observations", "obs.npz", "--samples", "4", "--prior-samples", "8", "--device", "cpu", "--wandb", "off")
run("report", "--run", "run")
assert np.isfinite(np.load("s.npz")["x"]).all()
import importlib.util, torch
print("torch", torch.__version__, "| numpy", np.__version__, "| torchvision", "yes" if importlib.util.find_spec("torchvision") else "no")
"""


def find_python(version: str) -> str | None:
    """An interpreter of a version that runs: on the path, or pyenv's."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in [f"python{version}", *map(str, pyenv)]:
        path = shutil.which(candidate)
        if path and subprocess.run([path, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return path
    return None


def oldest() -> str:
    """Constraints that pin every dependency with a lower bound to that bound."""
    listed = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("]\n")[0]
    return "\n".join(f"{name}=={bound}" for name, bound in re.findall(r'"([A-Za-z0-9-]+)(?:\[[a-z]+\])?>=([0-9.]+)"', listed)) + "\n"


def build(folder: Path) -> list[Path]:
    """Wheel and sdist, the wheel made from the sdist."""
    subprocess.run([sys.executable, "-m", "venv", folder / "builder"], check=True)
    python = folder / "builder/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "build"], check=True)
    subprocess.run([python, "-m", "build", "--outdir", folder / "dist", ROOT], check=True, stdout=subprocess.DEVNULL)
    return sorted((folder / "dist").iterdir())


def tried(folder: Path, python: str, package: Path, deps: str, torch: str | None, bare: bool) -> str:
    """Install and run; what happened, in a line."""
    clock, environment, work = time.perf_counter(), folder / "environment", folder / "work"
    for path in (environment, work):
        shutil.rmtree(path, ignore_errors=True)
    work.mkdir()
    constraints = work / "constraints.txt"
    constraints.write_text(oldest() if deps == "oldest" else "")
    inside = str(environment / "bin/python")
    wanted = [torch] if torch else []
    steps = {
        "venv": [python, "-m", "venv", str(environment)],
        "pip install": [inside, "-m", "pip", "install", "-q", "--no-compile", "-c", str(constraints), str(package), *wanted],
        "pip check": [inside, "-m", "pip", "check"],
        **({"pip uninstall": [inside, "-m", "pip", "uninstall", "-q", "-y", "torchvision"]} if bare else {}),
        "emdiff --help": [str(environment / "bin/emdiff"), "--help"],
        "use": [inside, "-c", USE],
    }
    for name, step in steps.items():
        done = subprocess.run(step, cwd=work, capture_output=True, text=True, check=False)
        if done.returncode:
            (folder / f"failed-{Path(python).name}-{deps}.txt").write_text(done.stdout + done.stderr)
            lines = [line for line in (done.stderr or done.stdout).splitlines() if "Error" in line and "CalledProcessError" not in line]
            return f"FAILED at {name}: {' '.join(lines)[-400:]}"
    return f"passed ({done.stdout.strip().splitlines()[-1]}; {time.perf_counter() - clock:.0f} s)"


def main() -> int:
    """The matrix; status 1 if anything failed, Pythons that are not there aside."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", choices=PYTHONS, help="this version only; may be given again")
    parser.add_argument("--deps", action="append", choices=("oldest", "newest"), help="these only; may be given again")
    parser.add_argument("--torch", help="a requirement for torch, such as torch==2.13.0+cpu")
    parser.add_argument("--no-torchvision", action="store_true", help="without torchvision")
    parser.add_argument("--sdist", action="store_true", help="install the sdist instead of the wheel")
    parser.add_argument("--keep", type=Path, help="folder to work in, which is left behind")
    args = parser.parse_args()
    folder, failed = args.keep or Path(tempfile.mkdtemp()), 0
    folder.mkdir(parents=True, exist_ok=True)
    try:
        packages = build(folder)
        print("built:", ", ".join(f"{p.name} ({p.stat().st_size // 1000} kB)" for p in packages), flush=True)
        package = next(p for p in packages if p.name.endswith(".tar.gz" if args.sdist else ".whl"))
        for version in args.python or PYTHONS:
            python = find_python(version)
            for deps in args.deps or ("oldest", "newest"):
                result = tried(folder, python, package, deps, args.torch, args.no_torchvision) if python else "not here"
                failed += result.startswith("FAILED")
                print(f"Python {version}, {deps:<6}: {result}", flush=True)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
