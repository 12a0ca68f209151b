"""Batches that are read before they are needed: while a GPU works on one, a thread reads the next ones from their file into pinned memory, from which
they are copied behind the work in hand, and the host waits for neither. On a CPU, which has nothing else to read with, and for batches that are on
the GPU (near), each is read when it is needed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

DEPTH = 2
"""Batches read beyond the one in use."""

PINNING = threading.Lock()
"""Held while a thread pins memory, and while a graph is captured (graphs): CUDA refuses the one during the other."""

Key = TypeVar("Key")


def ahead(read: Callable[[Key], Any], keys: Iterable[Key], device: torch.device) -> Iterator[Any]:
    """What `read` gives for each key, in order, on a device.

    Args:
        read: From a key to a tensor, a named tuple of what is allowed here, an object with a method `mapped` (observations), or something without
            tensors. Called in a thread while batches that were given are in use, so it may draw nothing at random.
        keys: Any number of them; at most DEPTH are taken beyond the one in use.
        device: Where the batches are needed.

    Raises:
        Exception: What `read` raises, when its batch is due.

    >>> list(ahead(lambda i: torch.tensor(i), range(2), torch.device("cpu")))
    [tensor(0), tensor(1)]
    """
    keys = iter(keys)
    if goes_on(device):
        for key in keys:
            first = read(key)
            yield moved(first, device)
            if is_far(first, device):
                yield from _threaded(read, keys, device)
                return
    for key in keys:
        yield moved(read(key), device)


def goes_on(device: torch.device) -> bool:
    """Whether a device works while the host reads."""
    return device.type == "cuda"


def _threaded(read: Callable[[Key], Any], keys: Iterator[Key], device: torch.device) -> Iterator[Any]:
    """Batches read by a thread."""

    def pinned(key: Key) -> Any:
        batch = read(key)
        with PINNING:
            return mapped(batch, lambda tensor: pin(tensor) if device.type == "cuda" and tensor.device.type == "cpu" else tensor)

    here = {} if device.type != "cuda" else {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)}
    reader = ThreadPoolExecutor(1, "ahead", **here)
    try:
        due = deque(reader.submit(pinned, key) for key in islice(keys, DEPTH))
        while due:
            batch = due.popleft().result()
            due.extend(reader.submit(pinned, key) for key in islice(keys, 1))
            yield moved(batch, device)
            del batch
    finally:
        reader.shutdown(cancel_futures=True)


def pin(tensor: Tensor) -> Tensor:
    """A copy in pinned memory."""
    return tensor.pin_memory()


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device; what is pinned is copied behind the work in hand."""
    return mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def is_far(batch: Any, device: torch.device) -> bool:
    """Whether some tensor of a batch is not on a device."""
    found: list[bool] = []
    mapped(batch, lambda tensor: (found.append(tensor.device.type != device.type), tensor)[1])
    return any(found)


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch after a change of each of its tensors.

    >>> mapped((torch.ones(1), None), lambda t: 2 * t)
    (tensor([2.]), None)
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, tuple):
        parts = [mapped(part, change) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return batch.mapped(change) if hasattr(batch, "mapped") else batch
