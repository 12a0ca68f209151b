r"""Observers: what turns a clean datum into an observation, obs = A x + n.

An observer is a class with `forward` (A) and `adjoint` (At); `REGISTRY` finds it by the name that files and the command line use. To add one to
emdiff, write the class and add it to `_BUILT_IN`; a class of your own is found as `module:Class`, `file.py:Class`, or by its name where an installed
package declares it as an entry point of the group `emdiff.observers` (`observers.find`). This package imports only torch and the standard
library, and torch not before an observer is asked for, so that a command line can list `observers.recipes` at once.
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
    from observers.noise import Noise
    from observers.projection import Projection

    REGISTRY: dict[str, type[Observer]]

__all__ = ["REGISTRY", "Identity", "Mask", "Observer", "Projection", "build"]

_BUILT_IN = {
    "identity": "Identity",
    "mask": "Mask",
    "projection": "Projection",
    "blur": "Blur",
    "downsample": "Downsample",
    "fourier": "Fourier",
    "multicoil": "Multicoil",
    "radon": "Radon",
    "compressed": "Compressed",
    "compose": "Compose",
    "stack": "Stack",
}
"""Names, which are those of the modules, and classes."""

_MODULES = {"Observer": "base"} | {cls: name for name, cls in _BUILT_IN.items()}


@cache
def _registry() -> dict[str, type[Observer]]:
    return {name: getattr(import_module(f"observers.{name}"), cls) for name, cls in _BUILT_IN.items()}


def build(name: str, shape: tuple[int, ...], parameters: dict[str, Any], noise: Noise | Tensor) -> Observer:
    """The observer of a name and its parameters, as a file holds them.

    Args:
        name: A key of `REGISTRY`, or whatever `find.find` knows.
        shape: S, the shape of x.
        parameters: The arrays the observer asks for, each (N or 1, ...), its options, and no others.
        noise: The noise, or standard deviations of n, shape (), (N,) or (N or 1, *O).

    Returns:
        The observer.

    Raises:
        ValueError: An unknown name; a parameter that is missing, unknown or of the wrong shape, with both shapes.
    """
    from observers.find import find

    return find(name).assemble(shape, noise, parameters)


def __getattr__(name: str) -> Any:
    """Import torch only when a class is asked for."""
    if name == "REGISTRY":
        return _registry()
    if name in _MODULES:
        return getattr(import_module(f"observers.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'observers' has no attribute '{name}'")
