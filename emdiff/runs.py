r"""The run folder is the state of a fit: running the same command again continues it.

    config.yaml           the resolved configuration, readable by `emdiff fit --config`
    about.json            versions, git hash, device, the fingerprint of the observations
    metrics.jsonl         one line per finished round, appended
    start/                first samples and what made them
    round_003/            prior.safetensors, samples.npy (user's units), chains.npy (latest round only), metrics.json
    figures/              pictures per round
    best.json             the iteration whose prior later commands take, where it is not the last

Arrays are written and read by rows (rows). While a round is made, its folder also holds scratch/: what the E-step ends with, in
standardised units. metrics.json is written last: a round that has none did not finish and is done again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import emdiff
from emdiff.errors import UsageError
from emdiff.files import append_line, write_atomically, write_json
from emdiff.rows import Rows, of_npy
from emdiff.written import NewArray

FREE = ("iters", "stop", "device", "compile", "wandb", "out", "observations")
"""Settings that may change when a run is continued; the observations are compared by their fingerprint."""


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, in hex; of a folder, of its .npy files and their names."""
    digest = hashlib.sha256()
    for part in sorted(path.glob("*.npy")) if path.is_dir() else [path]:
        if part != path:
            digest.update(f"{part.name} {part.stat().st_size} ".encode())
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class Run:
    """One run folder.

    Args:
        path: The folder; made if it does not exist.
        config: The resolved configuration, plain values.
        observations: The observations file, or the fingerprint of what is learned from.
        needed: Bytes that the samples of all rounds will take.
        free: Settings that may change when the run is continued.

    Raises:
        UsageError: if the folder holds something else, or a run with another configuration or other observations, or if its disk has
            too little space.
    """

    def __init__(self, path: Path, config: dict[str, Any], observations: Path | str, needed: int = 0, free: tuple[str, ...] = FREE) -> None:
        self.path, self.free = path, free
        _check_space(path, needed)
        print_ = observations if isinstance(observations, str) else fingerprint(observations)
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: --out is a file; give a folder")
        if (path / "config.yaml").is_file():
            self._compare(config, print_)
        elif path.is_dir() and any(path.iterdir()):
            raise UsageError(f"{path}: --out is a folder that is not empty and holds no emdiff run; give a new folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{path}: cannot be made ({error.strerror}); choose another --out") from error
        write_json(path / "about.json", _about(print_))
        text = yaml.safe_dump(config, sort_keys=False)
        write_atomically(path / "config.yaml", lambda temporary: temporary.write_text(text))

    def _compare(self, config: dict[str, Any], print_: str) -> None:
        before = yaml.safe_load((self.path / "config.yaml").read_text())
        changed = [k for k in config if k not in self.free and config[k] != before.get(k)]
        if changed:
            k = changed[0]
            raise UsageError(
                f"{self.path}: this run was started with {k} = {before.get(k)}, now it is {config[k]}; "
                "continue it with its own configuration, or give another --out"
            )
        about = self.path / "about.json"
        if about.is_file() and json.loads(about.read_text())["observations_sha256"] != print_:
            raise UsageError(f"{self.path}: this run was started on other observations (their SHA-256 differs); give another --out")

    def round_path(self, k: int) -> Path:
        """The folder of iteration k; 0 is the start."""
        return self.path / (f"round_{k:03d}" if k else "start")

    def finished(self) -> int:
        """The last round that is complete, with all before it; 0 if only the start is, -1 if not even that."""
        k = -1
        while (self.round_path(k + 1) / "metrics.json").is_file():
            k += 1
        return k

    def array(self, k: int, name: str) -> Rows | None:
        """An array of round k, or None where it has none."""
        file = self.round_path(k) / f"{name}.npy"
        return of_npy(file) if file.is_file() else None

    def metrics(self, k: int) -> dict[str, Any]:
        """The figures of round k."""
        return json.loads((self.round_path(k) / "metrics.json").read_text())

    def history(self) -> list[dict[str, Any]]:
        """The figures of the start and of all finished rounds, in order."""
        return [self.metrics(k) for k in range(self.finished() + 1)]

    def choose(self, k: int | None) -> None:
        """Take the prior of round k for later commands; None for the last."""
        if k is None:
            (self.path / "best.json").unlink(missing_ok=True)
        else:
            write_json(self.path / "best.json", {"iter": k})

    def begin(self, k: int) -> Path:
        """An empty folder for round k."""
        shutil.rmtree(self.round_path(k), ignore_errors=True)
        self.round_path(k).mkdir(parents=True)
        return self.round_path(k)

    def new_array(self, k: int, name: str, shape: tuple[int, ...]) -> NewArray:
        """An array (N, ...) of round k, to be filled; `commit` gives it its name."""
        return NewArray(self.round_path(k) / f"{name}.npy", shape)

    def scratch(self, k: int, name: str, shape: tuple[int, ...]) -> NewArray:
        """An array (N, ...) that is needed until round k is complete."""
        return NewArray(self.round_path(k) / "scratch" / f"{name}.npy", shape)

    def finish(self, k: int, metrics: dict[str, Any]) -> None:
        """Declare round k complete, and drop its scratch and the chains of the round before it."""
        shutil.rmtree(self.round_path(k) / "scratch", ignore_errors=True)
        write_json(self.round_path(k) / "metrics.json", metrics)
        append_line(self.path / "metrics.jsonl", metrics)
        if k:
            (self.round_path(k - 1) / "chains.npy").unlink(missing_ok=True)


def _check_space(path: Path, needed: int) -> None:
    """Refuse a disk with less space than the run's samples will take."""
    parent = next(p for p in [path, *path.absolute().parents] if p.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UsageError(
            f"{path}: the run needs {needed / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB left; free some space or choose another --out"
        )


def latest_prior(run: Path) -> Path:
    """The prior of a run: of the iteration that best.json names, else of the last finished round.

    Raises:
        UsageError: if the folder is missing or has no finished round.
    """
    if not run.is_dir():
        raise UsageError(f"{run}: there is no such run folder; give the one that `emdiff fit` or `emdiff train` named in its last line")
    done = [p.parent for p in sorted(run.glob("round_*/metrics.json")) if (p.parent / "prior.safetensors").is_file()]
    if not done:
        raise UsageError(f"{run}: this run has no finished round yet; run `emdiff fit` to its first round")
    best = run / "best.json"
    chosen = f"round_{json.loads(best.read_text())['iter']:03d}" if best.is_file() else done[-1].name
    return next((folder for folder in done if folder.name == chosen), done[-1]) / "prior.safetensors"


def round_of(prior: Path) -> int:
    """The iteration that a path given by `latest_prior` belongs to."""
    return int(prior.parent.name.removeprefix("round_"))


def round_metrics(run: Path) -> list[dict[str, Any]]:
    """The figures of the start and of all finished rounds of a run folder, in order.

    Raises:
        UsageError: if the folder is missing, has no finished round, or its figures cannot be read.
    """
    if not run.is_dir():
        raise UsageError(f"{run}: there is no such run folder; give the one that `emdiff fit` or `emdiff train` named in its last line")
    rounds: list[dict[str, Any]] = []
    while (path := run / (f"round_{len(rounds):03d}" if rounds else "start") / "metrics.json").is_file():
        try:
            rounds.append({**json.loads(path.read_text()), "iter": len(rounds)})
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{path}: cannot be read ({error}); remove it and run the same `emdiff fit` again") from error
    if not rounds:
        raise UsageError(f"{run}: this run has no finished round yet; run `emdiff fit` to its first round")
    return rounds


def versions() -> dict[str, str | None]:
    """Versions of what computes, and the git hash of a source checkout."""
    return {
        "emdiff": emdiff.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "git": _git_hash(),
    }


def _about(print_: str) -> dict[str, Any]:
    return {**versions(), "threads": torch.get_num_threads(), "observations_sha256": print_}


def _git_hash() -> str | None:
    """The commit of a source checkout, None elsewhere."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
