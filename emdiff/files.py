"""Files that are there whole or not at all: written to a temporary name in the same folder, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from emdiff.errors import UsageError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file next to path, then rename it to path.

    Raises:
        UsageError: where the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{path}: cannot be written ({one_line(error)}); check the folder and its free space, or choose another --out") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """What went wrong, on one line: the system's own words where it has some."""
    errno = getattr(error, "errno", None)
    return os.strerror(errno) if errno else " ".join(str(error).split())


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    write_atomically(path, write)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write a .npz file."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)

    write_atomically(path, write)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON object as a line, in one write, and hand it to the disk."""
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())
