r"""Archives of arrays, .npz, .npy and .h5, opened without trusting them: nothing is unpickled, and nothing is allocated that the file cannot hold.

Every complaint is a `UsageError` of one line.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import h5py  # type: ignore[import-untyped]
import numpy as np

from emdiff.errors import UsageError
from emdiff.files import one_line

SIGNATURES = {".npz": b"PK", ".npy": b"\x93NUMPY", ".h5": b"\x89HDF", ".hdf5": b"\x89HDF"}
ARCHIVES = (".npz", ".h5", ".hdf5")
UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
EXPANSION = 2000  # no stored array is this many times its file: deflate reaches 1032


def check_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a file of another type."""
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{path}: files of type '{path.suffix}' are not supported; use one of {', '.join(suffixes)}")


@contextmanager
def open_archive(path: Path, suffixes: tuple[str, ...]) -> Iterator[Any]:
    """A mapping from names to arrays that are loaded when asked for."""
    check_suffix(path, suffixes)
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; check the path")
    try:
        with _archive(path, path.suffix.lower()) as file:
            yield file
    except UNREADABLE as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)}), it may be cut short; copy or write it again") from error


def _archive(path: Path, suffix: str) -> AbstractContextManager[Any]:
    with path.open("rb") as content:
        if not content.read(8).startswith(SIGNATURES[suffix]):
            raise UsageError(f"{path}: is not an {suffix} file, whatever its name says; write it with numpy or h5py")
    if suffix == ".npy":
        return nullcontext({"arr_0": np.load(path, mmap_mode="r", allow_pickle=False)})
    archive: AbstractContextManager[Any] = np.load(path, allow_pickle=False) if suffix == ".npz" else h5py.File(path, "r")
    return archive


def array_names(file: Any) -> list[str]:
    """The arrays of a file; other members of a zip do not count."""
    members = file.zip.namelist() if hasattr(file, "zip") else [f"{name}.npy" for name in file]
    return [member.removesuffix(".npy") for member in members if member.endswith(".npy")]


def load_array(path: Path, file: Any, name: str) -> np.ndarray:
    """Load one array, after a look at what the file declares it to be."""
    shape, dtype, available = _declared(path, file, name)
    if dtype.hasobject and h5py.check_string_dtype(dtype) is None:
        raise UsageError(f"{path}: {name} holds pickled Python objects, which are not read; store it as an array of numbers")
    size = math.prod(shape) * dtype.itemsize
    if size > available:
        raise UsageError(f"{path}: {name} declares shape {shape}, {size} bytes, more than the file can hold; write it again")
    return np.asarray(file[name][()])


def _declared(path: Path, file: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any], float]:
    """Shape, dtype, and the number of bytes that the file may hold of an array, without loading it."""
    most = EXPANSION * path.stat().st_size
    if hasattr(file, "zip"):
        member = file.zip.getinfo(f"{name}.npy")
        with file.zip.open(member) as content:
            shape, dtype = _npy_header(content)
            return shape, dtype, min(member.file_size - content.tell(), most)
    stored = file[name]
    if not hasattr(stored, "shape"):
        raise UsageError(f"{path}: {name} is a {type(stored).__name__.lower()}, expected an array; store the array at the top level")
    return stored.shape or (), stored.dtype, most


def _npy_header(content: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype that an .npy stream declares; the stream is left at the first byte of the data."""
    first = np.lib.format.read_magic(content) == (1, 0)
    shape, _, dtype = (np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(content)
    return shape, dtype


def save_archive(path: Path, suffix: str, fields: Mapping[str, Any]) -> None:
    """Write arrays and strings in the format of a suffix, .npz or .h5."""
    if suffix.lower() == ".npz":
        with path.open("wb") as content:
            np.savez(content, allow_pickle=False, **fields)
        return
    with h5py.File(path, "w") as file:
        for name, value in fields.items():
            file[name] = np.bytes_(value) if isinstance(value, str) else value  # HDF5 can hang on a damaged heap of free-length strings
