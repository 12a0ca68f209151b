"""Observers made of observers: their flat parameters in files, `0.observer`, `0.mask`, `1.observer` and so on, taken apart."""

from __future__ import annotations

from typing import Any

from observers.base import Observer


def read_parts(name: str, parameters: dict[str, Any]) -> list[tuple[type[Observer], dict[str, Any]]]:
    """The class and the parameters of each part, in order.

    Args:
        name: Of the observer they are parts of, for messages.
        parameters: Flat.

    Raises:
        ValueError: A part lacks its name, a number is left out, or a parameter belongs to no part.
    """
    from observers.find import find_installed

    groups: dict[int, dict[str, Any]] = {}
    for key, value in parameters.items():
        number, dot, rest = key.partition(".")
        if not (dot and number.isdecimal()):
            raise ValueError(f"observer '{name}' has no parameter '{key}', it takes those of its parts, such as '0.observer'")
        groups.setdefault(int(number), {})[rest] = value
    if not groups or sorted(groups) != list(range(len(groups))):
        raise ValueError(f"observer '{name}' needs parts 0, 1, ..., found {sorted(groups) or 'none'}: '0.observer' names the first")
    parts = []
    for i in sorted(groups):
        own = dict(groups[i])
        if "observer" not in own:
            raise ValueError(f"observer '{name}' needs the name of part {i}, '{i}.observer'")
        parts.append((find_installed(str(own.pop("observer"))), own))
    return parts
