r"""Observers: what turns a clean datum into an observation, obs = A x + n.

An observer is a class with `forward` (A) and `adjoint` (At); `REGISTRY` finds it by the name that files and the command line use. To add
one, write the class and add it to `_registry`. This package imports only torch and the standard library, and torch not before an observer
is asked for, so that a command line can list `observers.recipes` at once.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from observers.base import Observer
    from observers.identity import Identity
    from observers.mask import Mask
    from observers.projection import Projection

    REGISTRY: dict[str, type[Observer]]

__all__ = ["REGISTRY", "Identity", "Mask", "Observer", "Projection", "build"]

_MODULES = {"Observer": "base", "Identity": "identity", "Mask": "mask", "Projection": "projection"}


@cache
def _registry() -> dict[str, type[Observer]]:
    from observers.identity import Identity
    from observers.mask import Mask
    from observers.projection import Projection

    return {observer.name: observer for observer in (Identity, Mask, Projection)}


def build(name: str, shape: tuple[int, ...], arrays: dict[str, Tensor], noise_std: Tensor) -> Observer:
    """The observer of a name and its arrays, as a file holds them.

    Args:
        name: A key of `REGISTRY`.
        shape: S, the shape of x.
        arrays: The arrays the observer asks for, each (N or 1, ...), and no others.
        noise_std: Standard deviation of n, shape (), (N,) or (N or 1, *O).

    Returns:
        The observer.

    Raises:
        ValueError: An unknown name; an array that is missing, unknown or of the wrong shape, with both shapes.
    """
    known = _registry()
    if name not in known:
        raise ValueError(f"unknown observer '{name}', expected one of: {', '.join(sorted(known))}")
    wanted = known[name].array_names
    for array in wanted:
        if array not in arrays:
            raise ValueError(f"observer '{name}' needs an array '{array}', found {sorted(arrays) or 'none'}")
    for array in arrays:
        if array not in wanted:
            raise ValueError(f"observer '{name}' has no array '{array}', it takes {list(wanted) or 'none'}")
    return known[name](shape, noise_std, **arrays)


def __getattr__(name: str) -> Any:
    """Import torch only when a class is asked for."""
    if name == "REGISTRY":
        return _registry()
    if name in _MODULES:
        return getattr(import_module(f"observers.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'observers' has no attribute '{name}'")
