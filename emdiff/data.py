r"""The data of a fit: observations in memory, or read when asked for.

Algorithms ask for the number of data, the shape of x, and rows; rows come in memory, with the operators and the noise of those data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emdiff.rows import Index, Rows, evenly, small, spans
from observers import Observer
from observers.noises import NOISE_KEYS, noise_of


@dataclass(frozen=True, eq=False)
class Observations:
    """All that learning may see: observations and the observer that made them, in memory.

    Attributes:
        obs: Observations (N, *O), float32, finite, 0 where nothing was observed.
        observer: A and cov_obs of the N data.

    >>> from observers import Identity
    >>> Observations(torch.zeros(5, 3), Identity((3,), torch.tensor(0.5))).rows(slice(0, 2)).obs.shape
    torch.Size([2, 3])
    """

    obs: Tensor
    observer: Observer

    def __len__(self) -> int:
        return self.obs.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """S, the shape of x."""
        return self.observer.shape

    def rows(self, index: Index) -> Observations:
        """The data at indices (B,), int64, or in a slice."""
        return Observations(self.obs[index], self.observer.rows(index))

    def to(self, device: torch.device | str) -> Observations:
        """A copy on a device."""
        return self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Observations:
        """A copy with every tensor changed."""
        return Observations(change(self.obs), self.observer.mapped(change))


@dataclass(frozen=True, eq=False)
class View:
    """Observations of which rows are made when asked for: read from a file, or changed, or both.

    Attributes:
        count: N.
        shape: S, the shape of x.
        read: From indices or a slice to those data, in memory.
    """

    count: int
    shape: tuple[int, ...]
    read: Callable[[Index], Observations]

    def __len__(self) -> int:
        return self.count

    def rows(self, index: Index) -> Observations:
        """The data at indices (B,), int64, or in a slice."""
        return self.read(index)

    def map(self, change: Callable[[Observations], Observations]) -> View:
        """The data after a change of each."""
        return View(self.count, self.shape, lambda index: change(self.read(index)))


Data = Observations | View
"""What algorithms take: they ask it for its length, the shape of x, and rows."""


def batches(data: Data, most: int = 1024) -> Iterator[tuple[slice, Observations]]:
    """All data in order: where they are, and they."""
    for part in spans(len(data), math.prod(data.shape), most):
        yield part, data.rows(part)


def observer_name(data: Data) -> str:
    """The name of the observer."""
    return data.rows(slice(0, 1)).observer.name


def held(data: Data) -> Data:
    """The data in memory where they are small (`rows.small`), which spares each batch the work of reading and changing its rows; else as they are."""
    return data.rows(slice(None)) if small(size(data)) else data


def size(data: Data) -> int:
    """Bytes of all observations, and of what differs between their operators and noises, as rows are given."""
    two = data.rows(slice(0, 2))
    tensors = [two.obs, *two.observer.noise.tensors().values(), *two.observer.arrays().values()]
    return len(data) * sum(t.numel() * t.element_size() for t in tensors if t.ndim and t.shape[0] == 2) // 2


class Measured(NamedTuple):
    """Levels of observations that are measurements of x.

    Attributes:
        complete: Whether every entry of every x was observed.
        uniform: Whether all levels are equal.
        even: Whether those of one datum are.
        median: Their median, over at most 1024 evenly spaced data.
    """

    complete: bool
    uniform: bool
    even: bool
    median: float


def measured(data: Data) -> Measured | None:
    """Look through all observations as measurements of x; None where they are not."""
    complete = uniform = even = True
    first = None
    for _, part in batches(data):
        direct = part.observer.as_measurement(part.obs)
        if direct is None:
            return None
        first = direct[1].flatten()[0] if first is None else first
        complete, uniform = complete and bool(direct[1].isfinite().all()), uniform and bool((direct[1] == first).all())
        even = even and bool((direct[1].flatten(1) == direct[1].flatten(1)[:, :1]).all())
        if not (complete or uniform or even):
            break
    some = data.rows(evenly(len(data), 1024))
    return Measured(complete, uniform, even, float(some.observer.as_measurement(some.obs)[1].median()))


class Operators:
    """The observer of rows of a file: what is per datum is read by row, what is shared once.

    Args:
        kind: The observer's class.
        shape: S; () where it has to be inferred.
        arrays: Its arrays and those of its noise.
        options: Its options.
        obs_shape: (N, *O).

    Raises:
        ValueError: Observations of obs_shape cannot come from such an observer.
    """

    def __init__(
        self, kind: type[Observer], shape: tuple[int, ...], arrays: dict[str, Rows], options: dict[str, Any], obs_shape: tuple[int, ...]
    ) -> None:
        self.kind, self.arrays, self.options = kind, arrays, options
        for key, rows in arrays.items():
            if rows.shape and rows.shape[0] not in (1, obs_shape[0]):
                raise ValueError(f"{key} has shape {rows.shape}, expected a leading axis of 1 or {obs_shape[0]} as in obs {obs_shape}")
        self.shared = {key: rows.all() for key, rows in arrays.items() if not rows.shape or rows.shape[0] == 1}
        first = {key: self.shared.get(key, rows[slice(0, 1)]) for key, rows in arrays.items()}
        self.shape = tuple(shape or kind.infer_shape(obs_shape[1:], {**first, **options}))
        if not self.shape:
            raise ValueError(f"the file does not say the shape of x, and observer '{kind.name}' cannot infer it; pass --shape")
        try:
            self.one = self._build(first)
        except ValueError as error:
            raise ValueError(_of_all(str(error), first, arrays)) from error
        if obs_shape[1:] != self.one.obs_shape:
            wanted = ", ".join(map(str, self.one.obs_shape))
            raise ValueError(f"obs has shape {obs_shape}, expected (N, {wanted}) from observer '{kind.name}' of x {self.shape}")

    def __call__(self, index: Index) -> Observer:
        """The observer of the data at indices (B,) or in a slice."""
        if len(self.shared) == len(self.arrays):
            return self.one
        return self._build({key: self.shared[key] if key in self.shared else rows[index] for key, rows in self.arrays.items()})

    def _build(self, tensors: dict[str, Tensor]) -> Observer:
        arrays = {key: tensor for key, tensor in tensors.items() if key not in NOISE_KEYS}
        noise = noise_of({key: tensor for key, tensor in tensors.items() if key in NOISE_KEYS})
        return self.kind.assemble(self.shape, noise, {**arrays, **self.options})


def _of_all(message: str, first: dict[str, Tensor], arrays: dict[str, Rows]) -> str:
    """A complaint about the first datum's arrays with the shapes that the file has."""
    for key, rows in arrays.items():
        message = message.replace(f"{key} has shape {tuple(first[key].shape)}", f"{key} has shape {rows.shape}")
    return message
