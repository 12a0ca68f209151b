"""Arrays and observations on the device that works on them, where its memory has room: rows are then picked there, and no step waits for the host
or for a file. On a CPU, and where there is no room, they stay where they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emdiff.data import Data, size
from emdiff.rows import Array, Index, Store, row_spans
from emdiff.written import NewArray

SHARE = 0.25
"""Of a GPU's free memory, what one array may take."""


def room(device: torch.device) -> int:
    """Bytes that an array may take on a device; 0 on a CPU, where everything is near."""
    return int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def near(array: Array, device: torch.device) -> Array:
    """An array (N, ...) on the device if there is room, else as it is.

    >>> x = torch.zeros(3, 2)
    >>> near(x, torch.device("cpu")) is x
    True
    """
    first = array[0:1]
    is_there = isinstance(array, Tensor) and first.device.type == device.type
    if is_there or math.prod(array.shape) * first.element_size() > room(device):
        return array
    there = torch.empty(array.shape, dtype=first.dtype, device=device)
    for part in row_spans(array):
        there[part] = array[part].to(device)
    return there


def beside(index: Tensor, array: Array) -> Tensor:
    """Indices on the device of an array, to which they are copied behind the work in hand: a plain copy would wait for that to end."""
    return index.to(array.device, non_blocking=True)


def near_data(data: Data, device: torch.device) -> Data:
    """Observations (N, *O) and their operators on the device if there is room, else as they are."""
    there = data.rows(slice(0, 1)).obs.device.type == device.type
    return data if there or size(data) > room(device) else data.rows(slice(None)).to(device)


class Mirrored:
    """An array in the making whose rows also lie on a device, from where they are read: what is written for later is at hand now.

    Args:
        file: The array in the making, with what it holds already.
        device: Where else.
    """

    def __init__(self, file: NewArray, device: torch.device) -> None:
        self.file, self.there = file, torch.empty(file.shape, device=device)
        if file.found:
            for part in row_spans(self.there):
                self.there[part] = file[part].to(device)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...)."""
        return self.file.shape

    @property
    def found(self) -> bool:
        """Whether the file held rows before."""
        return self.file.found

    def __setitem__(self, index: Index, values: Tensor) -> None:
        self.there[index] = values
        self.file[index] = values

    def __getitem__(self, index: Index) -> Tensor:
        return self.there[index]

    def sync(self) -> None:
        """Hand what was written to the disk."""
        self.file.sync()

    def commit(self) -> Tensor:
        """Give the file its name; returns the rows on the device."""
        self.file.close()
        return self.there


def mirrored(store: Store, device: torch.device) -> Store:
    """A store of arrays in the making whose arrays are mirrored on the device where there is room."""
    return lambda name, shape: Mirrored(store(name, shape), device) if has_room(shape, device) else store(name, shape)


def held_near(store: Store, device: torch.device) -> Store:
    """A store whose arrays lie on the device alone where there is room, else where `store` makes them."""
    made = lambda shape: torch.empty(shape, device=device)  # noqa: E731
    return lambda name, shape: made(shape) if has_room(shape, device) else store(name, shape)


def has_room(shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether a device has room for float32 of a shape; never a CPU, where everything is near."""
    return 4 * math.prod(shape) <= room(device) and device.type != "cpu"
