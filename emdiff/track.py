"""Weights & Biases: figures and pictures of each round, evaluations, the report, the configuration. The one file that imports wandb.

It never prompts and never waits for a network it cannot reach: online needs a key, and a short time-out ends in offline mode.

    em/NAME             figures of a round, against em/iter; em/score what --stop auto minimises (verdict)
    samples/NAME        its pictures
    eval/NAME           figures of an evaluation, against em/iter; eval/floor/NAME what they are at best, eval/oracle/NAME ratios to the truth's
    calibration/NAME    tables of an evaluation: coverage, ranks, tarp

A run folder is one W&B run: RUN/wandb_id holds its id, RUN/wandb_iter the last round logged to it. Rounds that are on disk but were not logged,
because W&B was off or the process was killed, are logged when the next tracker starts. Every session says resume="allow", offline too: `wandb sync`
then numbers the steps of a later session's rows after those of the earlier ones, where it would otherwise overwrite them.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from emdiff.figures import is_image, tile, to_uint8, value_range
from emdiff.verdict import score

TIMEOUT = 15
"""Seconds to wait for W&B's servers before a run goes on offline."""

PROJECT = "emdiff"
"""The W&B project, unless WANDB_PROJECT names another."""

CURVES = {"coverage": ("coverage_levels", "coverage"), "tarp": ("tarp_levels", "tarp_coverage")}
"""Tables of an evaluation, and its arrays with their columns: nominal levels (k,) and the coverage (k,) found."""


class Tracker:
    """One W&B run, or none.

    Args:
        mode: "auto" (WANDB_MODE if set; online where a key is at hand; else offline), "online", "offline" or "off".
        folder: The run folder; W&B's files go to its wandb/ and a continued fit continues the same W&B run.
        config: The resolved configuration; an evaluation, which continues the fit's W&B run, needs none.
        warn: Told in one line what could not be done.

    >>> Tracker("off", Path("runs/mine"), {}).log({"iter": 1, "chi2": 1.01}, {})
    """

    def __init__(self, mode: str, folder: Path, config: dict[str, Any], warn: Callable[[str], None] = print) -> None:
        self.run, self.mode, self.folder = None, resolve_mode(mode), folder
        if self.mode == "off":
            return
        self.run = _start(self.mode, folder, config, warn)
        self.run.define_metric("em/iter")
        for group in ("em", "samples", "eval", "calibration"):
            self.run.define_metric(f"{group}/*", step_metric="em/iter")
        for metrics in _missed(folder, self.run.id):
            self.log(metrics, _drawn(folder, metrics["iter"]))

    def log(self, metrics: dict[str, Any], pictures: Mapping[str, Tensor | Path]) -> None:
        """Log a round: its figures as em/NAME and pictures, samples (n, *S) drawn as a grid or PNG files, as samples/NAME."""
        if self.run is None:
            return
        images = {f"samples/{name}": _image(x) for name, x in pictures.items() if isinstance(x, Path) or is_image(x.shape[1:])}
        value = score(metrics)
        self.run.log(numbers("em", {**metrics, "score": value if math.isfinite(value) else None}) | images)
        (self.folder / "wandb_iter").write_text(f"{self.run.id} {metrics['iter']}\n")

    def evaluation(self, result: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Log an evaluation against the iteration that it is of.

        Args:
            result: What RUN/evaluation/metrics.json holds: iter, figures, floors, oracle, best_iteration, verdict.
            arrays: What RUN/evaluation/arrays.npz holds: coverage_levels, coverage, tarp_levels, tarp_coverage (k,), rank_counts (samples + 1,)
                where the truth is known.
        """
        if self.run is None:
            return
        row = numbers("eval", {**result["figures"], "best_iteration": result.get("best_iteration")})
        row |= numbers("eval/floor", result.get("floors") or {}) | numbers("eval/oracle", result.get("oracle") or {})
        self.run.log({"em/iter": result["iter"], **row, **_tables(arrays)})
        if "verdict" in result:
            self.run.summary["verdict"] = f"{result['verdict']['level']}: {result['verdict']['text']}"

    def artifact(self, path: Path) -> None:
        """Store a file such as the report with the run, as an artifact named after the file and the run; nothing where there is no file yet."""
        if self.run is None or not path.is_file():
            return
        import wandb

        artifact = wandb.Artifact(f"{path.stem}-{self.run.id}", type=path.stem)
        artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self) -> None:
        """Finish the run."""
        if self.run is not None:
            self.run.finish()


def numbers(group: str, values: Mapping[str, Any]) -> dict[str, float | int]:
    """The numbers among values, as GROUP/NAME; a truth value is 0 or 1.

    >>> numbers("em", {"iter": 2, "over_relaxed": True, "start": "gaussian"})
    {'em/iter': 2, 'em/over_relaxed': 1}
    """
    return {f"{group}/{k}": int(v) if isinstance(v, bool) else v for k, v in values.items() if isinstance(v, (int, float))}


def resolve_mode(mode: str) -> str:
    """The mode that "auto" stands for here; other modes stay as they are."""
    if mode != "auto":
        return mode
    asked = os.environ.get("WANDB_MODE")
    if asked in ("online", "offline"):
        return asked
    if asked in ("disabled", "dryrun"):
        return "off" if asked == "disabled" else "offline"
    return "online" if logged_in() else "offline"


def logged_in() -> bool:
    """Whether a key is at hand; asks nobody, neither the user nor W&B."""
    import wandb

    return wandb.login(prompt=False, verify=False)


def _image(x: Tensor | Path) -> Any:
    """A picture of images (n, *S) in rows of 8 on a stated scale, or of a PNG file."""
    import wandb

    if isinstance(x, Path):
        return wandb.Image(str(x))
    low, high = value_range(x.numpy())
    return wandb.Image(to_uint8(tile(x.numpy(), 8), low, high), caption=f"scale [{low:.3g}, {high:.3g}]")


def _tables(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Those of the tables calibration/coverage, tarp and ranks whose arrays are there."""
    import wandb

    columns = {name: {"nominal": arrays[a], "actual": arrays[b]} for name, (a, b) in CURVES.items() if a in arrays and b in arrays}
    if "rank_counts" in arrays:
        columns["ranks"] = {"rank": np.arange(len(arrays["rank_counts"])), "count": arrays["rank_counts"]}
    rows = {name: np.stack(list(table.values()), axis=1).tolist() for name, table in columns.items()}
    return {f"calibration/{name}": wandb.Table(columns=list(table), data=rows[name]) for name, table in columns.items()}


def _missed(folder: Path, identity: str) -> list[dict[str, Any]]:
    """Figures of the rounds on disk that W&B run `identity` has not seen."""
    if not (folder / "metrics.jsonl").is_file():
        return []
    seen = (folder / "wandb_iter").read_text().split() if (folder / "wandb_iter").is_file() else ["", "-1"]
    last = int(seen[1]) if seen[0] == identity else -1
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["iter"] > last]


def _drawn(folder: Path, k: int) -> dict[str, Path]:
    """The pictures of round k that are on disk."""
    files = {name: folder / "figures" / f"{name}_{k:03d}.png" for name in ("samples", "prior", "rows")}
    return {name: file for name, file in files.items() if file.is_file()}


def _start(mode: str, folder: Path, config: dict[str, Any], warn: Callable[[str], None]) -> Any:
    """Start or continue the folder's run, online or offline; online falls back to offline, saying so. A sweep's agent chooses the id itself."""
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(silent=True, init_timeout=TIMEOUT, disable_git=True, x_disable_meta=False)
    identity = folder / "wandb_id"
    chosen = identity.read_text().strip() if identity.is_file() else secrets.token_hex(4)
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    shared = {"project": project, "dir": str(folder.resolve()), "name": folder.name, "id": chosen, "config": config}
    shared |= {"resume": "allow", "settings": settings}
    try:
        run = wandb.init(mode=mode, **shared)
    except (wandb.errors.Error, TimeoutError, OSError) as error:
        if mode == "offline":
            raise
        warn(f"W&B cannot be reached ({str(error).splitlines()[0]}); this run is logged offline, `wandb sync` uploads it later")
        wandb.teardown()  # its background process still holds the id for the online run that did not start
        run = wandb.init(mode="offline", **shared)
    identity.write_text(run.id)
    return run
