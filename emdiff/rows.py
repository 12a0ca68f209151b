r"""Arrays of N rows that may live in a file: rows are read when they are asked for.

`Rows` and torch tensors are used alike: both have a shape and a length, and are indexed by a slice or by indices (B,), int64, which gives a tensor
(B, ...) with memory of its own. Stored float16 and float64 become float32 row by row, integers int64; bytes stay bytes, so that a mask takes no more
than on disk.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emdiff.errors import UsageError

Index = Tensor | slice

SMALL = 2**26
"""Bytes up to which an array of a file is held in memory: reading it once costs less than asking the file for every batch."""

ENTRIES = 2**22
"""Entries at once in passes over all rows."""

BLOCK = 2**26
"""Entries at once where more of them make fewer passes, or another random order."""


class Rows:
    """N rows that are read when asked for.

    Args:
        shape: (N, ...).
        read: From a slice, or indices (B,), to a tensor (B, ...).
        dtype: As stored.

    >>> Rows((3, 2), torch.arange(6.0).reshape(3, 2).__getitem__).map(lambda a: a + 1)[1:]
    tensor([[3., 4.],
            [5., 6.]])
    """

    device = torch.device("cpu")

    def __init__(self, shape: tuple[int, ...], read: Callable[[Index], Tensor], dtype: Any = np.float32) -> None:
        self.shape, self.read, self.dtype = tuple(shape), read, np.dtype(dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index) -> Tensor:
        return self.read(index)

    def all(self) -> Tensor:
        """All rows, or the number where there are none: shape ()."""
        return self.read(slice(None))

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """The rows after a change of each, which leaves their shape."""
        return Rows(self.shape, lambda index: change(self.read(index)), self.dtype)

    def first(self, count: int) -> Rows:
        """The first `count` rows."""
        return self if count == len(self) else Rows((count, *self.shape[1:]), lambda index: self.read(_bounded(index, count)), self.dtype)


def _bounded(index: Index, count: int) -> Index:
    """A slice that ends where an array of `count` rows does; indices as they are."""
    return slice(*index.indices(count)) if isinstance(index, slice) else index


Array = Tensor | Rows

Store = Callable[[str, tuple[int, ...]], Any]
"""From a name and a shape (N, ...) to an array whose rows are set by slices and read back: a tensor, or a file in the making (written)."""


def small(size: int) -> bool:
    """Whether an array of so many bytes is held in memory."""
    return size <= SMALL


def steps(first: int, count: int, step: int) -> list[slice]:
    """Slices of `step` rows, the last of what is left, that cover rows `first` to `count`.

    >>> steps(1, 6, 2)
    [slice(1, 3, None), slice(3, 5, None), slice(5, 6, None)]
    """
    return [slice(i, min(i + step, count)) for i in range(first, count, step)]


def spans(count: int, entries: int, most: int = 1024, at_once: int | None = None) -> list[slice]:
    """Slices that cover `count` rows of `entries` entries: at least two rows, at most `most`, and about `at_once` or ENTRIES entries.

    >>> spans(2500, 28 * 28)
    [slice(0, 1024, None), slice(1024, 2048, None), slice(2048, 2500, None)]
    """
    return steps(0, count, max(2, min(most, (at_once or ENTRIES) // max(1, entries))))


def row_spans(array: Array, most: int = 1024) -> list[slice]:
    """Slices that cover the rows of an array (`spans`); one for a number."""
    if not array.shape:
        return [slice(0, 1)]
    return spans(array.shape[0], math.prod(array.shape[1:]), most)


def chosen_rows(array: Array, index: Tensor) -> Rows:
    """The rows at indices (n,), int64, of an array, as an array."""
    return Rows((len(index), *array.shape[1:]), lambda at: array[index[at]])


def fill(target: Any, source: Array, change: Callable[[Tensor], Tensor]) -> Any:
    """Set the rows of an array to those of another after a change, in parts and in order; returns it."""
    for part in row_spans(source):
        target[part] = change(source[part])
    return target


def evenly(count: int, most: int) -> Tensor:
    """Indices of at most `most` evenly spaced rows of `count`, int64; all where there are no more."""
    return torch.arange(min(count, most)) * count // min(count, most)


def own(array: np.ndarray) -> Tensor:
    """A tensor with memory of its own: bytes as they are, other integers as int64, complex numbers as complex64, the rest as float32."""
    kept = array.dtype in (np.uint8, np.bool_)
    wanted = array.dtype if kept else {"i": np.int64, "u": np.int64, "c": np.complex64}.get(array.dtype.kind, np.float32)
    shared = None if array.flags.owndata and array.flags.writeable else True
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.array(array, wanted, order="C", copy=shared))


def in_memory(array: np.ndarray) -> Rows:
    """Rows of an array, or a number, that is held in memory."""
    held = own(array)
    return Rows(array.shape, held.__getitem__ if held.ndim else lambda index: held, array.dtype)


def real_pairs(rows: Rows) -> Rows:
    """Complex rows (N, ..., H, W) as real ones, (N, ..., 2, H, W)."""
    shape = (*rows.shape[:-2], 2, *rows.shape[-2:])
    return Rows(shape, lambda index: torch.view_as_real(rows[index]).movedim(-1, -3), np.float32)


def at_offset(path: Path, shape: tuple[int, ...], dtype: Any, offset: int = 0, order: Any = "C") -> Rows:
    """Rows of an array that lies uncompressed in a file from byte `offset` on; the file stays open, so a new one of that name changes nothing.

    Rows are read and not mapped: a map brings the pages around each row into the process, and kills it where the file was cut short meanwhile. Only
    arrays in Fortran's order, whose rows are scattered, are mapped for the length of a read.
    """
    file, dtype = path.open("rb"), np.dtype(dtype)
    size = math.prod(shape[1:]) * dtype.itemsize

    def read(index: Index) -> Tensor:
        if order == "F":
            return own(np.memmap(file, dtype, "r", offset, shape, order)[index if isinstance(index, slice) else index.numpy()])
        if not isinstance(index, slice) and len(index) and not -shape[0] <= int(index.min()) <= int(index.max()) < shape[0]:
            raise IndexError(f"rows {int(index.min())} to {int(index.max())} of {shape[0]}")
        first, last, _ = index.indices(shape[0]) if isinstance(index, slice) else (0, len(index), 1)
        found = np.empty((max(0, last - first), *shape[1:]), dtype)
        runs = [(first, found)] if isinstance(index, slice) else zip((index % shape[0]).tolist(), found.reshape(len(found), -1))
        for start, part in runs:
            if not read_at(file.fileno(), offset + start * size, part):
                raise UsageError(f"{path}: ends before row {start} of {shape[0]}, it was cut short while in use; copy or write it again")
        return own(found)

    weakref.finalize(read, file.close)
    return Rows(shape, read, dtype)


def read_at(descriptor: int, offset: int, into: np.ndarray) -> bool:
    """Fill an array, contiguous in memory, with a file's bytes from an offset on; returns whether there were enough."""
    bytes_ = memoryview(into.reshape(-1).view(np.uint8))
    while len(bytes_):
        done = os.preadv(descriptor, [bytes_], offset)
        if not done:
            return False
        offset, bytes_ = offset + done, bytes_[done:]
    return True


def of_dataset(dataset: Any) -> Rows:
    """Rows of an HDF5 dataset, whose file is left open."""

    def read(index: Index) -> Tensor:
        if isinstance(index, slice):
            return own(dataset[index])
        wanted, back = index.unique(return_inverse=True)
        return own(dataset[wanted.numpy()])[back]

    return Rows(dataset.shape, read, dataset.dtype)


def of_npy(path: Path, size: int | None = None) -> Rows:
    """Rows of an .npy file, in memory where it is small; where it is a part of something of more bytes, where that is (`size`).

    Raises:
        OSError, ValueError: It cannot be read, or is shorter than it says; nothing is unpickled.
    """
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    if not stored.ndim or small(stored.nbytes if size is None else size):
        return in_memory(stored)
    return at_offset(path, stored.shape, stored.dtype, stored.offset, "C" if stored.flags.c_contiguous else "F")


class Tally:
    """How many entries of an array are marked, and where the first one is; the array comes in parts.

    >>> marked = Tally((4, 3))
    >>> marked.add(torch.tensor([[False, False, True]]), 2)
    >>> str(marked)
    '1 of 12 places, the first at (2, 2)'
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.count, self.first, self.value = shape, 0, (), math.nan

    def add(self, marked: Tensor, start: int, values: Tensor | None = None) -> None:
        """Count a part that begins at row `start`; of its values, keep the first marked one."""
        if not self.count and marked.any():
            first = tuple(marked.nonzero()[0].tolist())
            self.first = (first[0] + start, *first[1:]) if first else ()
            self.value = math.nan if values is None else float(values[first])
        self.count += int(marked.sum())

    def __str__(self) -> str:
        return f"{self.count} of {math.prod(self.shape)} places" + (f", the first at {self.first}" if self.first else "")
