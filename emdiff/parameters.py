r"""What files of observations hold besides observations: arrays and options of observers, by name.

Which keys these are is asked of the observers, so that a new one needs no word here. A key with a number before a dot belongs to a part of an
observer that is made of others (`0.mask`). Complex arrays become pairs of real channels in the third axis from the end, where `fourier` has them.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emdiff.errors import UsageError
from observers import REGISTRY, Observer


def is_parameter(key: str, kind: type[Observer] | None = None) -> bool:
    """Whether a key of a file is an array of some built-in observer or of `kind`, an option of `kind` (of any observer if None), or of a part."""
    kinds = REGISTRY.values()
    arrays = any(key in one.array_names for one in (*kinds, *([kind] if kind else [])))
    return arrays or any(key in one.option_names for one in ([kind] if kind else kinds)) or bool(re.match(r"\d+\.", key))


def parameter(path: Path, name: str, array: np.ndarray) -> Tensor | str | int | float:
    """A parameter as observers take it: text and numbers without axes are options; bytes and integers stay what they are, so that a mask takes no
    more memory than on disk; the rest is float32.

    Raises:
        UsageError: The array holds neither numbers nor text.
    """
    if array.dtype.kind in "OSU":
        value = next(iter(array.flatten().tolist()), "")
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    if array.ndim == 0 and array.dtype.kind in "fiub":
        return array.item()
    if array.dtype.kind == "c":
        array = real_pairs(array)
    if array.dtype in (np.uint8, np.bool_):
        return torch.from_numpy(np.ascontiguousarray(array))
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    if array.dtype.kind != "f":
        raise UsageError(f"{path}: {name} holds {array.dtype}, expected real numbers; store it as float32")
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))


def real_pairs(array: np.ndarray) -> np.ndarray:
    """Complex (..., H, W) as real (..., 2, H, W); real arrays as they are."""
    if array.dtype.kind != "c" or array.ndim < 2:
        return array
    return np.stack([array.real, array.imag], axis=-3).astype(np.float32)
