r"""What has changed since a run was started, and how to go on all the same: a fork.

A run continues only where a continued and an uninterrupted run are the same: same settings (but for FREE), same observations, same programs. A
fork copies the finished rounds into a new folder and goes on from there under other settings; its about.json says where it comes from and what
changed.
"""

from __future__ import annotations

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
from emdiff.archive import open_archive
from emdiff.errors import UsageError, one_line
from emdiff.files import remove_leftovers, sha256
from emdiff.reading import read_json, read_yaml

FREE = ("iters", "stop", "device", "compile", "wandb", "out", "observations", "keep", "devices")
"""Settings that may change when a run is continued; the observations are compared by their fingerprint."""

VERSIONS = ("emdiff", "torch")
"""Programs whose version decides what a round computes; of the others a change is only said."""

COPIED = ("start", "round_*", "figures", "metrics.jsonl", "best.json")
"""What a fork takes along; W&B's files, evaluation and report belong to the run they are of."""

Config = dict[str, Any]


def differences(
    path: Path, config: Config, about: dict[str, Any], given: Config, defaults: Config, free: tuple[str, ...] = FREE
) -> dict[str, tuple[Any, Any]]:  # fmt: skip
    """What keeps a run from being continued: by name, what it was started with and what it would be now; `free` settings do not."""
    before, then = read_yaml(path / "config.yaml"), read_json(path / "about.json") if (path / "about.json").is_file() else {}
    now, user, default = (_flat(c) for c in (config, given, defaults))
    old = _flat(before)
    found = {}
    for name, value in now.items():
        if name.split(".")[0] in free:
            continue
        if name in old and old[name] != value:
            found[name] = (old[name], value)
        elif name not in old and user.get(name) != default.get(name):
            found[name] = (f"{default.get(name)} (it is older than this setting)", value)
    found |= {f"{name} version": (then[name], about[name]) for name in VERSIONS if then.get(name, about[name]) != about[name]}
    sums = then.get("observations_sha256", about["observations_sha256"]), about["observations_sha256"]
    return found | ({"other observations, SHA-256": (str(sums[0])[:12], sums[1][:12])} if sums[0] != sums[1] else {})


def _flat(config: Config) -> Config:
    """Nested settings under dotted names."""
    flat: Config = {}
    for name, value in config.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def refuse(path: Path, found: dict[str, tuple[Any, Any]]) -> None:
    """Say what changed and what can be done.

    Raises:
        UsageError: if anything did.
    """
    if found:
        changes = "; ".join(f"{name} = {old}, now it is {new}" for name, (old, new) in found.items())
        raise UsageError(
            f"{path}: this run was started with {changes}. Continue it with its own settings; or give the same command --fork NEWDIR, which copies "
            "its rounds and goes on under the new ones; or start anew with another --out"
        )


def fork(source: Path, target: Path, config: Config, observations: Path, shape: tuple[int, ...], given: Config, defaults: Config) -> None:
    """Copy the finished rounds of a run into a new run with other settings; nothing if that was done before.

    Args:
        source: The run.
        target: The new folder; there whole or not at all.
        config: The new run's resolved configuration.
        observations: Its observations file.
        shape: (N, *S) of its samples.
        given, defaults: As in `runs.Run`.

    Raises:
        UsageError: if there is nothing to copy, or the folder or the observations do not allow it.
    """
    if not (source / "start" / "metrics.json").is_file():
        raise UsageError(f"{source}: --fork needs --out to name a run with a finished round")
    if (target / "about.json").is_file() and read_json(target / "about.json").get("forked_from") == str(source.resolve()):
        return
    if target.exists():
        raise UsageError(f"{target}: --fork is there already and is no fork of {source}; give a new folder")
    with open_archive(source / "start" / "samples.npy", (".npy",)) as file:
        stored = file["arr_0"].shape
    if stored != shape:
        raise UsageError(f"{source}: its samples have shape {stored}, these observations ask for {shape}; a fork keeps their number and shape")
    about = {**versions(), "observations_sha256": sha256(observations)}
    found = differences(source, config, about, given, defaults)
    rounds = len(list(source.glob("round_*/metrics.json")))
    temporary = target.with_name(f".{target.name}.forking")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for path in (p for name in COPIED for p in source.glob(name) if p.is_file() or name == "figures" or (p / "metrics.json").is_file()):
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, temporary / path.name)
        remove_leftovers(temporary)
        changed = {name: [str(old), str(new)] for name, (old, new) in found.items()}
        about |= {"forked_from": str(source.resolve()), "forked_after": rounds, "forked_changes": changed}
        (temporary / "about.json").write_text(json.dumps(about, indent=2) + "\n")
        (temporary / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UsageError(f"{target}: cannot be made ({one_line(error)}); check its folder and free space, or choose another --fork") from error


def versions() -> dict[str, str | None]:
    """Versions of what computes, and the git hash of a source checkout."""
    return {
        "emdiff": emdiff.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "git": _git_hash(),
    }


def _git_hash() -> str | None:
    """The commit of a source checkout, None elsewhere."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
