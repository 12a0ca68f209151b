"""`emdiff check-observer`: the contract suite on one observer, for its author."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from emdiff.errors import UsageError
from emdiff.observations import read_observations
from emdiff.plan import resolve_device
from emdiff.streams import stream
from observers import REGISTRY, Observer, instruments
from observers.contract import check
from observers.find import find

SHAPE = (16, 16)
"""Shape of x where nobody says it."""


def observer_to_check(name: str, observations: str | None, shape: tuple[int, ...] | None, count: int, seed: int) -> Observer:
    """The observer of a name, with the arrays of a file, or random ones.

    Raises:
        UsageError: There is no such observer, or nobody knows its arrays.
    """
    if observations is not None:
        data = read_observations(Path(observations), name, None, shape)
        return data.rows(slice(0, count)).observer
    try:
        cls, generator = find(name), stream(seed, "check")
        if name in REGISTRY:
            return getattr(instruments, name)().draw(shape or SHAPE, count, 0.5, generator)
        return cls.example(shape or SHAPE, count, generator)
    except UsageError:
        raise
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UsageError(f"check-observer {name}: {error}") from error


def check_command(name: str, observations: str | None, shape: tuple[int, ...] | None, count: int, seed: int, device: str) -> int:
    """Print what the check finds; returns the exit status, 0 or 1."""
    device = resolve_device(device)
    observer = observer_to_check(name, observations, shape, count, seed)
    count = min(count, observer.count or count)
    found = check(observer, count, seed, device)
    print(f"observer      {observer.name}, x {observer.shape} -> obs {observer.obs_shape}, a batch of {count}, {found.dtype} on {device}")
    for failure in found.failures:
        print(f"broken        {failure}")
    if found.ok:
        print("passed        exact adjoint, linear, each datum alone")
    measured = {key: value if not isinstance(value, float) or math.isfinite(value) else None for key, value in found._asdict().items()}
    about = {"observer": observer.name, "shape": list(observer.shape), "obs_shape": list(observer.obs_shape), "count": count, "device": device}
    print(json.dumps({**about, **measured, "ok": found.ok, "torch": torch.__version__}))
    return 0 if found.ok else 1
