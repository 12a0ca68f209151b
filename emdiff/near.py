"""Arrays and observations on the device that works on them, where its memory has room: rows are then picked there, and no step waits for the host
or for a file. On a CPU, and where there is no room, they stay where they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emdiff.data import Data, size
from emdiff.rows import Array, row_spans

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
    if first.device == device or math.prod(array.shape) * first.element_size() > room(device):
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
    return data.rows(slice(None)).to(device) if size(data) <= room(device) else data
