r"""What is finished in a run folder: its prior, the figures of its rounds, the sums of its files. The folder itself is in `runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emdiff.errors import UsageError
from emdiff.files import sha256
from emdiff.reading import number, read_json, read_text

SUMS = "sha256.txt"
"""SHA-256 of the files of a round, as `sha256sum --check` reads them."""


def check_sum(path: Path) -> None:
    """Refuse a file of a round that is not the one that was written; a round of an older emdiff has no sums to check.

    Raises:
        UsageError: naming the file and both sums.
    """
    sums = path.parent / SUMS
    if not sums.is_file():
        return
    wanted = {name: digest for digest, _, name in (line.partition("  ") for line in read_text(sums).splitlines())}.get(path.name)
    if wanted is not None and wanted != sha256(path):
        raise UsageError(
            f"{path}: its SHA-256 is {sha256(path)[:12]}..., when it was written it was {wanted[:12]}...: the file was changed or is damaged; "
            "restore it from a copy, or fit again with another --out"
        )


def latest_prior(run: Path) -> Path:
    """The prior of a run: of the iteration that best.json names, else of the last finished round; checked against its sum.

    Raises:
        UsageError: if the folder is missing, has no finished round, or the file is not the one that was written.
    """
    _check_folder(run)
    done = [p.parent for p in sorted(run.glob("round_*/metrics.json")) if (p.parent / "prior.safetensors").is_file()]
    if not done:
        raise _unfinished(run)
    best = run / "best.json"
    chosen = f"round_{int(number(read_json(best), 'iter', best)):03d}" if best.is_file() else done[-1].name
    prior = next((folder for folder in done if folder.name == chosen), done[-1]) / "prior.safetensors"
    check_sum(prior)
    return prior


def prior_file(place: Path) -> Path:
    """The prior of a run, or the file itself where a file is named.

    Raises:
        UsageError: as `latest_prior`, for a run.
    """
    if not place.is_file():
        return latest_prior(place)
    check_sum(place)
    return place


def round_of(prior: Path) -> int:
    """The iteration that a path given by `latest_prior` belongs to."""
    return int(prior.parent.name.removeprefix("round_"))


def round_metrics(run: Path) -> list[dict[str, Any]]:
    """The figures of the start and of all finished rounds of a run folder, in order.

    Raises:
        UsageError: if the folder is missing, has no finished round, or its figures cannot be read.
    """
    _check_folder(run)
    rounds: list[dict[str, Any]] = []
    while (path := run / (f"round_{len(rounds):03d}" if rounds else "start") / "metrics.json").is_file():
        rounds.append({**read_json(path), "iter": len(rounds)})
    if not rounds:
        raise _unfinished(run)
    return rounds


def _check_folder(run: Path) -> None:
    if not run.is_dir():
        what = "is a file, and what is asked needs the run" if run.is_file() else "there is no such run"
        raise UsageError(f"{run}: {what} folder; give the one that `emdiff fit` or `emdiff train` named in its last line")


def _unfinished(run: Path) -> UsageError:
    return UsageError(f"{run}: this run has no finished round yet; run `emdiff fit` to its first round")
