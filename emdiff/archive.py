r"""Archives of arrays, .npz, .npy and .h5, opened without trusting them.

Nothing is unpickled, nothing is read from another file that one of them names (external and virtual HDF5 data), and nothing is allocated that the
file cannot hold or this machine has no memory for. Every complaint is a `UsageError` of one line.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import h5py  # type: ignore[import-untyped]
import numpy as np

from emdiff.errors import UsageError, one_line

SIGNATURES = {".npz": b"PK", ".npy": b"\x93NUMPY", ".h5": b"\x89HDF", ".hdf5": b"\x89HDF"}
ARCHIVES = (".npz", ".h5", ".hdf5")
FOLDER = "a folder of .npy files"
EXPANSION = 2000  # no stored array is this many times its file: deflate reaches 1032
MEMBERS = 1000  # arrays that are looked at
PLAIN_FILTERS = {"gzip", "lzf", "szip", None}


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
    except UsageError:
        raise
    except Exception as error:  # whatever numpy, zipfile and HDF5 stumble over in bytes that anyone may have written
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
    return [member.removesuffix(".npy") for member in members if member.endswith(".npy")][:MEMBERS]


def load_array(path: Path, file: Any, name: str) -> np.ndarray:
    """Load one array, after a look at what the file declares it to be (`declared`)."""
    shape, dtype = declared(path, file, name)
    size = math.prod(shape) * dtype.itemsize
    if size > free_memory():
        raise UsageError(f"{path}: {name} takes {size / 1e9:.3g} GB of memory and {free_memory() / 1e9:.3g} GB are free here; store fewer data")
    return np.asarray(file[name][()])


def free_memory() -> float:
    """Bytes that this machine can still give to arrays; infinite where it does not say."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return math.inf


def declared(path: Path, file: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array, not loaded.

    Raises:
        UsageError: It would have to be unpickled, or is larger than the file can hold.
    """
    shape, dtype, available = _declared(path, file, name)
    if any(n < 0 for n in shape):
        raise UsageError(f"{path}: {name} declares shape {shape}; write it again")
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
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UsageError(f"{path}: {name} is compressed in a way that numpy does not write; write it with np.savez or np.savez_compressed")
        with file.zip.open(member) as content:
            shape, dtype = npy_header(content)[:2]
            return shape, dtype, min(member.file_size - content.tell(), most)
    if isinstance(file, Folder):
        with file.paths[name].open("rb") as content:
            return *npy_header(content)[:2], file.paths[name].stat().st_size
    return _declared_h5(path, file, name, most)


def _declared_h5(path: Path, file: h5py.File, name: str, most: float) -> tuple[tuple[int, ...], np.dtype[Any], float]:
    """The same of an HDF5 file, which could also send its reader to other files, or to chunks larger than the array."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise UsageError(f"{path}: {name} is a link to another place; store the array itself")
    stored = file[name]
    if not hasattr(stored, "shape"):
        raise UsageError(f"{path}: {name} is a {type(stored).__name__.lower()}, expected an array; store the array at the top level")
    if stored.external or stored.is_virtual:
        raise UsageError(f"{path}: {name} is stored in another file; store the array in this one")
    if stored.compression not in PLAIN_FILTERS or math.prod(stored.chunks or ()) * stored.dtype.itemsize > most:
        raise UsageError(f"{path}: {name} is packed in a way that h5py does not write by itself; write it with gzip or without compression")
    return stored.shape or (), stored.dtype, most


def npy_header(content: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Shape, dtype and whether it lies in Fortran's order, as an .npy stream declares; the stream is left at the first byte of the data."""
    first = np.lib.format.read_magic(content) == (1, 0)
    shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(content)
    return shape, dtype, fortran
