"""Files that are there whole or not at all: written to a temporary name in the same folder, handed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from emdiff.errors import UsageError, one_line


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file next to path, hand it to the disk, then rename it to path.

    The temporary name is made anew and held by this process before anything is written, so that nobody's link is followed.

    Raises:
        UsageError: where the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        write(temporary)
        to_disk(temporary)
        os.replace(temporary, path)
        to_disk(path.parent)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{path}: cannot be written ({one_line(error)}); check the folder and its free space, or choose another --out") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a killed process left in a folder; only for whoever owns it."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; of a folder, of its .npy files and their names."""
    digest = hashlib.sha256()
    for part in sorted(path.glob("*.npy")) if path.is_dir() else [path]:
        if part != path:
            digest.update(f"{part.name} {part.stat().st_size} ".encode())
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented."""
    write_text(path, json.dumps(value, indent=2) + "\n")


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
