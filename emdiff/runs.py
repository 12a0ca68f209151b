r"""The run folder is the state of a fit: running the same command again continues it.

    config.yaml           the resolved configuration, readable by `emdiff fit --config`
    about.json            versions, git hash, device, the fingerprint of the observations
    metrics.jsonl         one line per finished round
    start/                first samples and what made them
    round_003/            prior.safetensors, samples.npy (user's units), chains.npy (latest round only), sha256.txt, metrics.json
    figures/              pictures per round
    best.json             the iteration whose prior later commands take, where it is not the last
    lock                  whose run this is, while a fit works on it (lock)

Arrays are written and read by rows (rows). While a round is made, its folder also holds scratch/: what the E-step ends with, in
standardised units. metrics.json is written last: a round that has none did not finish and is done again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from emdiff.behind import Behind
from emdiff.changes import FREE, Config, differences, refuse, versions
from emdiff.errors import UsageError
from emdiff.files import remove_leftovers, sha256, write_json, write_text
from emdiff.finished import SUMS, check_sum
from emdiff.folder import RunFolder
from emdiff.lock import Lock
from emdiff.reading import read_json
from emdiff.rows import Array, Rows, fill
from emdiff.written import NewArray

STATES = ("walk", "training")
"""States within a round, from which it goes on."""


class Run(RunFolder):
    """One run folder, locked until `close`; a context manager.

    Args:
        path: The folder; made if it does not exist.
        config: The resolved configuration, plain values.
        observations: The observations file, or the fingerprint of what is learned from.
        needed: From the last finished round to the bytes that those to come will take.
        free: Settings that may change when the run is continued.
        given: The configuration before it was resolved, and
        defaults: what it is where the user says nothing: a setting that an older run does not know had its default there.
        say: Told of what is odd and not wrong.
        processes: That work on it together, of which this is the first.
        behind: Write and sum the arrays of a round while this process goes on, for where a GPU works meanwhile.

    Raises:
        UsageError: if the folder holds something else, another process's run, or a run with another configuration, other observations or files
            that were changed, or if its disk has too little space.
    """

    def __init__(
        self, path: Path, config: Config, observations: Path | str, needed: Callable[[int], int] = lambda finished: 0,
        given: Config | None = None, defaults: Config | None = None,
        say: Callable[[str], None] = print, free: tuple[str, ...] = FREE, processes: int = 1, behind: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(path)
        self.later, self.sums = Behind(behind), dict[Path, str]()
        _check_space(path, needed(self.finished()))
        identity = observations if isinstance(observations, str) else sha256(observations)
        about = {**versions(), "threads": torch.get_num_threads(), "processes": processes, "observations_sha256": identity}
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: --out is a file; give a folder")
        continues = (path / "config.yaml").is_file()
        if continues:
            refuse(path, differences(path, config, about, given or config, defaults or config, free))
        elif path.is_dir() and any(p.name not in ("lock", ".lock.guard") for p in path.iterdir()):
            raise UsageError(f"{path}: --out is a folder that is not empty and holds no emdiff run; give a new folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = Lock(path, say)
        except OSError as error:
            raise UsageError(f"{path}: cannot be made ({error.strerror}); choose another --out") from error
        try:
            if continues:
                self._take_up(about, say)
            write_json(path / "about.json", about)
            write_text(path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        except BaseException:
            self.close()
            raise

    def _take_up(self, about: dict[str, Any], say: Callable[[str], None]) -> None:
        """Check what is there, and say what else than the settings has changed."""
        for path in [p for p in [*self.path.iterdir(), *self.path.glob("round_*/*"), *self.path.glob("start/*")] if p.name != "wandb"]:
            if path.is_symlink():
                raise UsageError(f"{path}: is a symbolic link; a run folder holds its own files, put the file itself there")
        before = read_json(self.path / "about.json") if (self.path / "about.json").is_file() else {}
        about |= {k: before[k] for k in ("forked_from", "forked_after", "forked_changes") if k in before}
        for name in ("python", "numpy", "git", "threads", "processes"):
            if before.get(name, about[name]) != about[name]:
                how = "draws" if name == "processes" else "rounding"
                say(f"note: this run was at {name} {before[name]}, now {about[name]}: rounds may differ in {how}")
        if self.finished() >= 0:
            for name in ("prior.safetensors", "memory.safetensors", "samples.npy", "chains.npy"):
                if (self.round_path(self.finished()) / name).is_file():
                    check_sum(self.round_path(self.finished()) / name)
            self._write_table()
        for k in range(self.finished() + 1):
            self._drop(k)
        for folder in [self.path, *self.path.glob("round_*"), self.path / "start", self.path / "figures"]:
            remove_leftovers(folder)

    def close(self) -> None:
        """Let others have the folder."""
        self.later.close()
        self.lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def choose(self, k: int | None) -> None:
        """Take the prior of round k for later commands; None for the last."""
        if k is None:
            (self.path / "best.json").unlink(missing_ok=True)
        else:
            write_json(self.path / "best.json", {"iter": k})

    def begin(self, k: int) -> Path:
        """The folder of round k, empty but for the states that an attempt before this one left."""
        self.round_path(k).mkdir(parents=True, exist_ok=True)
        for path in self.round_path(k).iterdir():
            if path not in [self.round_path(k) / "scratch", *self._states(k)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self.round_path(k)

    def put(self, k: int, name: str, source: Array, change: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        """Write an array of round k: the rows of `source` (N, ...) after a change of each, which is made on the CPU, as float32, and sum its file.
        With `behind`, `array` and `finish` wait for that, and raise what it raises.

        Raises:
            UsageError: The disk is full, or the folder cannot be written.
        """
        path, source = self.round_path(k) / f"{name}.npy", source.cpu() if isinstance(source, Tensor) else source

        def write() -> None:
            fill(NewArray(path, tuple(source.shape)), source, change).close()
            self.sums[path] = sha256(path)

        self.later(write)

    def array(self, k: int, name: str) -> Rows | None:
        """An array of round k, or None where it has none."""
        self.later.settle()
        return super().array(k, name)

    def finish(self, k: int, metrics: dict[str, Any]) -> None:
        """Declare round k complete, and drop its scratch, its states and the chains of the round before it."""
        self.later.settle()
        folder = self.round_path(k)
        states = self._states(k)
        files = [p for p in sorted(folder.glob("[a-z]*")) if p.suffix in (".npy", ".safetensors") and p not in states]
        write_text(folder / SUMS, "".join(f"{self.sums.pop(p, None) or sha256(p)}  {p.name}\n" for p in files))
        write_json(folder / "metrics.json", metrics)
        self._write_table()
        self._drop(k)

    def _states(self, k: int) -> list[Path]:
        """States within round k, of all processes."""
        return [path for name in STATES for path in self.round_path(k).glob(f"{name}*.safetensors")]

    def _drop(self, k: int) -> None:
        """Remove what a complete round k needs no more: states before the arrays that they speak of."""
        for path in self._states(k):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.round_path(k) / "scratch", ignore_errors=True)
        if k:
            (self.round_path(k - 1) / "chains.npy").unlink(missing_ok=True)

    def prune(self, keep: int, best: int | None) -> None:
        """Drop priors, samples and pictures of all rounds but the start, the last `keep`, and the best so far."""
        for k in range(1, self.finished() - keep + 1):
            if k != best:
                for path in [*self.round_path(k).glob("*"), *(self.path / "figures").glob(f"*_{k:03d}.png")]:
                    if path.name != "metrics.json":
                        path.unlink()

    def _write_table(self) -> None:
        """metrics.jsonl, made anew from the rounds: a process killed between the two files leaves no gap and no half line."""
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.history()))


def rounds_held(rounds: int, finished: int, keep: int | None) -> int:
    """Most rounds to come whose files lie on the disk at once: all, or the last `keep`, the best, and the one in the making.

    >>> rounds_held(10, 2, None), rounds_held(10, 2, 3), rounds_held(10, -1, 20)
    (8, 5, 10)
    """
    left = rounds - max(finished, 0)
    return left if keep is None else min(left, keep + 2)


def _check_space(path: Path, needed: int) -> None:
    """Refuse a disk with less space than the run's samples will take."""
    parent = next(p for p in [path, *path.absolute().parents] if p.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UsageError(
            f"{path}: the run needs {needed / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB left; free some space or choose another --out"
        )
