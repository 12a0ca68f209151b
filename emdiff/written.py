r"""Files of arrays that are written by rows: under a temporary name until the last row is there, then renamed, so never half-written.

Every complaint is a `UsageError` of one line.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
from torch import Tensor

from emdiff.errors import UsageError, one_line
from emdiff.rows import Index, Rows, at_offset, of_npy


def temporary_name(path: Path) -> Path:
    """A hidden name next to path that nobody can foresee."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def said(path: Path, remedy: str = "choose another --out") -> Iterator[None]:
    """Turn the system's refusals into a `UsageError` that names the path."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{path}: cannot be written ({one_line(error)}); check the folder and its free space, or {remedy}") from error


class NewArray:
    """An .npy file in the making.

    Rows are set by a slice or by indices (B,), int64, and can be read back at once. Nothing has the file's name before `commit`.

    Args:
        path: The file.
        shape: (N, ...).
        dtype: What values are stored as.
        part_of: The file to name in complaints, if another.
        lasting: Go on with what a process before this one wrote, of this shape and dtype, if it is there (`found`); for a folder that one process
            has to itself.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: Any = np.float32, part_of: Path | None = None, lasting: bool = False
    ) -> None:  # fmt: skip
        self.path, self.shape, self.dtype = path, tuple(shape), np.dtype(dtype)
        self.temporary = path.with_name(f".{path.name}.unfinished") if lasting else temporary_name(path)
        self.named = part_of or path
        with said(self.named):
            path.parent.mkdir(parents=True, exist_ok=True)
            header = io.BytesIO()
            about = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(header, about)
            self.offset, self.bytes = header.tell(), math.prod(self.shape[1:]) * self.dtype.itemsize
            if lasting and path.is_file():
                os.replace(path, self.temporary)
            anew = 0 if lasting else os.O_EXCL  # nobody's link is followed
            self.file = os.fdopen(os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | anew, 0o666), "r+b")
            self.found = self.file.read(self.offset) == header.getvalue()
            if not self.found:
                self.file.truncate(0)
                self.file.seek(0)
                self.file.write(header.getvalue())
            self.file.truncate(self.offset + self.shape[0] * self.bytes)
        self.rows = at_offset(self.temporary, self.shape, self.dtype, self.offset)

    def __setitem__(self, index: Index, values: Tensor) -> None:
        array = values.detach().cpu().numpy()
        wanted = range(*index.indices(self.shape[0])) if isinstance(index, slice) else index
        if array.shape != (len(wanted), *self.shape[1:]):
            raise ValueError(f"rows of shape {array.shape} for {len(wanted)} rows of {self.path.name} {self.shape}")
        if isinstance(index, slice):
            self.write(wanted.start, array)
        else:
            for i, row in zip(index.tolist(), array):
                self.write(i, row)
        with said(self.named):
            self.file.flush()

    def write(self, start: int, rows: np.ndarray) -> None:
        """Write whole rows from row `start` on."""
        with said(self.named):
            self.file.seek(self.offset + start * self.bytes)
            self.file.write(np.ascontiguousarray(rows, self.dtype).data)

    def __getitem__(self, index: Index) -> Tensor:
        return self.rows[index]

    def commit(self) -> Rows:
        """Give the file its name; returns its rows."""
        self.close()
        return of_npy(self.path)

    def sync(self) -> None:
        """Hand what was written to the disk."""
        with said(self.named):
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Hand the file to the disk and give it its name."""
        self.sync()
        with said(self.named):
            self.file.close()
            os.replace(self.temporary, self.path)

    def discard(self) -> None:
        """Remove what was written."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


class NewArchive:
    """An .npz or .h5 file, or a folder of .npy files (any other name), in the making; used in a with block, at whose end it gets its name.

    >>> import tempfile, torch
    >>> path = Path(tempfile.mkdtemp(), "a.npz")
    >>> with NewArchive(path) as new:
    ...     new.array("x", (3,), np.float32)[1:3] = torch.ones(2)
    >>> np.load(path)["x"]
    array([0., 1., 1.], dtype=float32)
    """

    def __init__(self, path: Path) -> None:
        self.path, self.temporary, self.members = path, temporary_name(path), dict[str, Any]()
        self.kind = path.suffix.lower() if path.suffix.lower() in (".npz", ".h5", ".hdf5") else ""
        if not self.kind and path.is_dir() and any(p.suffix != ".npy" for p in path.iterdir()):
            raise UsageError(f"{path}: is a folder that holds other things than .npy files; choose another --out")

    def __enter__(self) -> NewArchive:
        with said(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._clear()
            self.file = h5py.File(self.temporary, "x") if self.kind in (".h5", ".hdf5") else None
        return self

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """A new array whose rows are set by slices."""
        with said(self.path):
            if self.file is not None:
                self.members[name] = _Dataset(self.path, self.file.create_dataset(name, shape, dtype))
            else:
                self.members[name] = NewArray(self._folder() / f"{name}.npy", shape, dtype, self.path)
        return self.members[name]

    def put(self, name: str, value: Any) -> None:
        """A small array, a number or a string."""
        with said(self.path):
            if self.file is None:
                self._folder().mkdir(parents=True, exist_ok=True)
                np.save(self._folder() / f"{name}.npy", value, allow_pickle=False)
            else:
                self.file[name] = np.bytes_(value) if isinstance(value, str) else value  # HDF5 can hang on a damaged heap of free-length strings

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                with said(self.path):
                    self._finish()
            elif isinstance(error, OSError):
                with said(self.path):
                    raise error
        finally:
            with contextlib.suppress(OSError, RuntimeError):
                for member in self.members.values():
                    member.discard()
                if self.file is not None:
                    self.file.close()
            self._clear()

    def _folder(self) -> Path:
        """Where the .npy files are made."""
        return self.temporary if not self.kind else self.temporary.with_suffix(".parts")

    def _finish(self) -> None:
        if self.file is not None:
            self.file.close()
            os.replace(self.temporary, self.path)
            return
        for member in self.members.values():
            member.close()
        if self.kind == ".npz":
            with zipfile.ZipFile(self.temporary, "w") as archive:
                for file in sorted(self._folder().glob("*.npy")):  # no times: the same data are the same bytes, by whose sum a run knows them
                    with file.open("rb") as source, archive.open(zipfile.ZipInfo(file.name), "w", force_zip64=True) as member:
                        shutil.copyfileobj(source, member, 2**20)
        elif self.path.is_dir():
            shutil.rmtree(self.path)
        os.replace(self.temporary, self.path)

    def _clear(self) -> None:
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)
        shutil.rmtree(self.temporary, ignore_errors=True)
        shutil.rmtree(self.temporary.with_suffix(".parts"), ignore_errors=True)


class _Dataset:
    """A dataset of an HDF5 file in the making, used as `NewArray`."""

    def __init__(self, path: Path, dataset: Any) -> None:
        self.path, self.dataset = path, dataset

    def __setitem__(self, index: slice, values: Tensor) -> None:
        with said(self.path):
            self.dataset[index] = np.asarray(values.detach().cpu().numpy(), self.dataset.dtype)

    def discard(self) -> None:
        """Nothing to do: the file is removed as a whole."""
