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
FOLDER = "a folder of .npy files"
UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
EXPANSION = 2000  # no stored array is this many times its file: deflate reaches 1032


def check_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a file of another type; any folder will do."""
    if path.suffix.lower() not in suffixes and not path.is_dir():
        raise UsageError(f"{path}: files of type '{path.suffix}' are not supported; use one of {', '.join(suffixes)}, or {FOLDER}")


@contextmanager
def open_archive(path: Path, suffixes: tuple[str, ...]) -> Iterator[Any]:
    """A mapping from names to arrays that are loaded when asked for."""
    check_suffix(path, suffixes)
    if not path.exists():
        raise UsageError(f"{path}: there is no such file; check the path")
    try:
        with _archive(path, path.suffix.lower()) as file:
            yield file
    except UNREADABLE as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)}), it may be cut short; copy or write it again") from error


def _archive(path: Path, suffix: str) -> AbstractContextManager[Any]:
    if path.is_dir():
        return nullcontext(Folder(path))
    with path.open("rb") as content:
        if not content.read(8).startswith(SIGNATURES[suffix]):
            raise UsageError(f"{path}: is not an {suffix} file, whatever its name says; write it with numpy or h5py")
    if suffix == ".npy":
        return nullcontext(Folder(path))
    archive: AbstractContextManager[Any] = np.load(path, allow_pickle=False) if suffix == ".npz" else h5py.File(path, "r")
    return archive


class Folder(Mapping[str, np.ndarray]):
    """The .npy files of a folder by name, or one .npy file as `arr_0`, mapped when asked for."""

    def __init__(self, path: Path) -> None:
        self.paths = {file.stem: file for file in sorted(path.glob("*.npy"))} if path.is_dir() else {"arr_0": path}

    def __getitem__(self, name: str) -> np.ndarray:
        return np.load(self.paths[name], mmap_mode="r", allow_pickle=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def array_names(file: Any) -> list[str]:
    """The arrays of a file; other members of a zip do not count."""
    members = file.zip.namelist() if hasattr(file, "zip") else [f"{name}.npy" for name in file]
    return [member.removesuffix(".npy") for member in members if member.endswith(".npy")]


def load_array(path: Path, file: Any, name: str) -> np.ndarray:
    """Load one array, after a look at what the file declares it to be (`declared`)."""
    declared(path, file, name)
    return np.asarray(file[name][()])


def declared(path: Path, file: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array, not loaded.

    Raises:
        UsageError: It would have to be unpickled, or is larger than the file can hold.
    """
    shape, dtype, available = _declared(path, file, name)
    if dtype.hasobject and h5py.check_string_dtype(dtype) is None:
        raise UsageError(f"{path}: {name} holds pickled Python objects, which are not read; store it as an array of numbers")
    size = math.prod(shape) * dtype.itemsize
    if size > available:
        raise UsageError(f"{path}: {name} declares shape {shape}, {size} bytes, more than the file can hold; write it again")
    return shape, dtype


def _declared(path: Path, file: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any], float]:
    """Shape, dtype, and the number of bytes that the file may hold of an array, without loading it."""
    most = EXPANSION * path.stat().st_size
    if hasattr(file, "zip"):
        member = file.zip.getinfo(f"{name}.npy")
        with file.zip.open(member) as content:
            shape, dtype = npy_header(content)[:2]
            return shape, dtype, min(member.file_size - content.tell(), most)
    if isinstance(file, Folder):
        with file.paths[name].open("rb") as content:
            return *npy_header(content)[:2], math.inf  # to be mapped, which takes no memory, and fails where the file is shorter
    stored = file[name]
    if not hasattr(stored, "shape"):
        raise UsageError(f"{path}: {name} is a {type(stored).__name__.lower()}, expected an array; store the array at the top level")
    return stored.shape or (), stored.dtype, most


def npy_header(content: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Shape, dtype and whether it lies in Fortran's order, as an .npy stream declares; the stream is left at the first byte of the data."""
    first = np.lib.format.read_magic(content) == (1, 0)
    shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(content)
    return shape, dtype, fortran
