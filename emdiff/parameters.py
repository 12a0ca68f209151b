r"""What files of observations hold besides observations: arrays and options of observers, by name.

Which keys these are is asked of the observers, so that a new one needs no word here. A key with a number before a dot belongs to a part of an
observer that is made of others (`0.mask`).
"""

from __future__ import annotations

import re

import numpy as np

from observers import REGISTRY, Observer


def is_parameter(key: str, kind: type[Observer] | None = None) -> bool:
    """Whether a key of a file is an array of some built-in observer or of `kind`, an option of `kind` (of any observer if None), or of a part."""
    kinds = REGISTRY.values()
    arrays = any(key in one.array_names for one in (*kinds, *([kind] if kind else [])))
    return arrays or any(key in one.option_names for one in ([kind] if kind else kinds)) or bool(re.match(r"\d+\.", key))


def option(array: np.ndarray) -> str | int | float | None:
    """An option, text or one number without axes, as observers take it; None for an array."""
    if array.dtype.kind in "OSU":
        value = next(iter(array.flatten().tolist()), "")
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return array.item() if array.ndim == 0 and array.dtype.kind in "fiub" else None
