"""A run folder as whoever reads it sees it: rounds, their figures and arrays; and where each process of a fit leaves its part of an array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from emdiff.archive import open_archive
from emdiff.errors import UsageError
from emdiff.processes import ALONE, Team
from emdiff.reading import number, read_json
from emdiff.rows import Array, Index, Rows, of_npy
from emdiff.stored import open_rows
from emdiff.written import NewArray


class RunFolder:
    """One run folder, read; only what lies in scratch/ of a round and belongs to one process is written.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def round_path(self, k: int) -> Path:
        """The folder of iteration k; 0 is the start."""
        return self.path / (f"round_{k:03d}" if k else "start")

    def finished(self) -> int:
        """The last round that is complete, with all before it; 0 if only the start is, -1 if not even that."""
        k = -1
        while (self.round_path(k + 1) / "metrics.json").is_file():
            k += 1
        return k

    def array(self, k: int, name: str) -> Rows | None:
        """An array of round k, or None where it has none."""
        file = self.round_path(k) / f"{name}.npy"
        if not file.is_file():
            return None
        with open_archive(file, (".npy",)) as stored:
            return open_rows(file, stored, "arr_0")

    def metrics(self, k: int) -> dict[str, Any]:
        """The figures of round k."""
        return read_json(self.round_path(k) / "metrics.json")

    def figure(self, k: int, name: str) -> float:
        """One figure of round k, a finite number."""
        return number(self.metrics(k), name, self.round_path(k) / "metrics.json")

    def history(self) -> list[dict[str, Any]]:
        """The figures of the start and of all finished rounds, in order."""
        return [self.metrics(k) for k in range(self.finished() + 1)]

    def checkpoint(self, k: int, name: str = "training") -> Path:
        """Where the training of round k, or its walk, keeps its state until the round is complete."""
        return self.round_path(k) / f"{name}.safetensors"

    def scratch(self, k: int, name: str, shape: tuple[int, ...]) -> NewArray:
        """An array (N, ...) that is needed until round k is complete, with what an attempt before this one wrote to it."""
        return NewArray(self.round_path(k) / "scratch" / f"{name}.npy", shape, lasting=True)

    def whole(self, k: int, name: str, part: Any, team: Team = ALONE) -> Array:
        """An array of all processes' parts in scratch/, of which this one has filled its own, in the order of the processes. What this process alone
        has, it may hold elsewhere (near).

        Raises:
            UsageError: The folder is not the same for all.
        """
        mine = part if isinstance(part, torch.Tensor) else part.commit()
        if team.alone:
            return mine
        team.wait()
        files = [self.round_path(k) / "scratch" / f"{team.mark(name, rank)}.npy" for rank in range(team.size)]
        for file in files:
            if not file.is_file():
                raise UsageError(f"{file}: written by another process and not to be seen here; give an --out that all machines share")
        return one_after_another([of_npy(file, team.size * part.shape[0] * part.bytes) for file in files])


def one_after_another(parts: list[Rows]) -> Rows:
    """Arrays (N_j, ...) as one, (N_1 + N_2 + ..., ...).

    >>> two = [Rows((2,), torch.tensor([1.0, 2.0]).__getitem__), Rows((3,), torch.tensor([3.0, 4.0, 5.0]).__getitem__)]
    >>> one_after_another(two)[1:4], one_after_another(two)[torch.tensor([4, 0, 4])]
    (tensor([2., 3., 4.]), tensor([5., 1., 5.]))
    """
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)
    count = int(ends[-1])

    def read(index: Index) -> torch.Tensor:
        if isinstance(index, slice):
            first, last, _ = index.indices(count)
            begins = [int(end) - len(part) for end, part in zip(ends, parts)]
            some = [(max(first - b, 0), min(last - b, len(part)), part) for b, part in zip(begins, parts)]
            pieces = [part[i:j] for i, j, part in some if i < j]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else parts[0][0:0]
        which = torch.searchsorted(ends, index % count, right=True)
        found = parts[0][index.new_zeros(len(index))]
        for j, part in enumerate(parts):
            at = (which == j).nonzero()[:, 0]
            if len(at):
                found[at] = part[index[at] % count - (int(ends[j]) - len(part))]
        return found

    return Rows((count, *parts[0].shape[1:]), read, parts[0].dtype)
