r"""The arrays of an archive as rows: in memory where they are small, else read from the file when asked for.

| where an array lies | how its rows are read |
|---|---|
| .npy, or a folder of such | at their place in the file |
| .npz, as numpy.savez writes it | at their place inside the zip |
| .h5 | as a dataset, whatever its chunks |
| .npz or .h5, compressed | unpacked once into FILE.unpacked/ next to the file, then from there |

Every complaint is a `UsageError` of one line.
"""

from __future__ import annotations

import math
import shutil
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np

from emdiff.archive import Folder, declared, load_array, npy_header
from emdiff.errors import UsageError
from emdiff.rows import Rows, at_offset, in_memory, of_dataset, of_npy, real_pairs, small, spans
from emdiff.written import NewArray

LOCAL = struct.Struct("<4sHHHHHIIIHH")
"""A member's header inside a zip: PKWARE's APPNOTE.TXT, 4.3.7."""


def open_rows(path: Path, file: Any, name: str, pairs: bool = False) -> Rows:
    """The rows of an array of an archive; nothing is allocated that is not there.

    Args:
        path: The archive.
        file: What `archive.open_archive` gave for it; what is returned outlives it.
        name: The array.
        pairs: Accept complex numbers, as pairs of real channels in the third axis from the end.
    """
    shape, dtype = declared(path, file, name)
    if dtype.kind not in ("fiubc" if pairs else "fiub"):
        raise UsageError(f"{path}: {name} holds {dtype}, expected real numbers; store it as float32")
    rows = _rows(path, file, name, shape, dtype)
    return real_pairs(rows) if dtype.kind == "c" else rows


def _rows(path: Path, file: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Rows:
    """The rows of an array of known shape and type."""
    if isinstance(file, Folder):
        return of_npy(file.paths[name])
    if not shape or small(math.prod(shape) * dtype.itemsize):
        return in_memory(load_array(path, file, name))
    if isinstance(file, h5py.File):
        dataset = h5py.File(path, "r")[name]
        return of_dataset(dataset) if not _packed(dataset) else _unpacked(path, name, shape, dtype, _slices(dataset))
    member = file.zip.getinfo(f"{name}.npy")
    with file.zip.open(member) as content:
        fortran = npy_header(content)[2]
        start = content.tell()
        if member.compress_type != zipfile.ZIP_STORED:
            if fortran:
                return in_memory(load_array(path, file, name))
            return _unpacked(path, name, shape, dtype, _blocks(content, shape, dtype))
        while content.read(2**20):  # to its end, where zipfile compares the checksum
            pass
    return at_offset(path, shape, dtype, _place(path, member) + start, "F" if fortran else "C")


def _place(path: Path, member: zipfile.ZipInfo) -> int:
    """The first byte of a member's content; `zipfile` has checked its header."""
    with path.open("rb") as content:
        content.seek(member.header_offset)
        *_, name, extra = LOCAL.unpack(content.read(LOCAL.size))
    return member.header_offset + LOCAL.size + int(name) + int(extra)


def _packed(dataset: Any) -> bool:
    """Whether rows have to be unpacked from whole chunks."""
    return bool(dataset.id.get_create_plist().get_nfilters())


def _slices(dataset: Any) -> Iterator[np.ndarray]:
    """The rows of a dataset, whole chunks at once where they are small."""
    rows = dataset.chunks[0]
    most = max(rows, 1024 // rows * rows)
    for part in spans(len(dataset), math.prod(dataset.shape[1:]), most):
        yield dataset[part]


def _blocks(content: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """The rows of an .npy stream behind its header."""
    size = math.prod(shape[1:]) * dtype.itemsize
    for part in spans(shape[0], math.prod(shape[1:])):
        rows = part.stop - part.start
        block = content.read(rows * size)
        if len(block) < rows * size:
            raise EOFError("the data end before the last row")
        yield np.frombuffer(block, dtype).reshape(rows, *shape[1:])


def _unpacked(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Iterator[np.ndarray]) -> Rows:
    """Rows of a compressed array, unpacked to a file that is used again as long as the archive is the same."""
    folder, about = path.with_name(f"{path.name}.unpacked"), path.stat()
    cache = folder / f"{name}-{about.st_size:x}-{about.st_mtime_ns:x}.npy"
    if not cache.is_file():
        size = math.prod(shape) * dtype.itemsize
        if size > shutil.disk_usage(path.parent).free:
            raise UsageError(f"{path}: {name} is compressed and takes {size / 1e9:.3g} GB unpacked, more than its disk has left; free some space")
        print(f"note: {path}: {name} is compressed; unpacking {size / 1e9:.3g} GB to {cache}, once", file=sys.stderr, flush=True)
        for stale in folder.glob(f"{name}-*.npy"):
            stale.unlink()
        new, done = NewArray(cache, shape, dtype), 0
        try:
            for block in blocks:
                new.write(done, block)
                done += len(block)
            new.close()
        finally:
            new.discard()
    return of_npy(cache)
