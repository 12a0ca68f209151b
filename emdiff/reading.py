"""Small text files read without trusting them: JSON and YAML of bounded size and depth, plain values only.

Nothing here constructs objects, follows an alias (a few lines of which can stand for gigabytes) or imports what a file names.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emdiff.errors import UsageError, one_line

MOST = 1 << 24
"""Bytes of the largest text file that is read."""

MOST_YAML = 1 << 18
"""Bytes of the largest YAML file, which is slow to read."""

DEPTH = 20
"""Lists and mappings within one another, at most."""


def read_text(path: Path, most: int = MOST) -> str:
    """The text of a file.

    Raises:
        UsageError: if it is missing, not a plain file, too large, unreadable or not UTF-8.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"{path}: is not a plain file; give one")
            content = file.read(most + 1)
        if len(content) > most:
            raise UsageError(f"{path}: is longer than {most} bytes, more than a file of its kind can be; check what wrote it")
        return content.decode()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)}); check the path, or restore the file") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UsageError: if it cannot be read, or holds something else.
    """
    return _mapping(path, json.loads, MOST)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file of plain values.

    Raises:
        UsageError: if it cannot be read, or holds something else.
    """
    return _mapping(path, parse_yaml, MOST_YAML)


def _mapping(path: Path, parse: Callable[[str], Any], most: int) -> dict[str, Any]:
    text = read_text(path, most)
    try:
        value = parse(text)
    except (ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)}); restore or remove the file") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: holds a {type(value).__name__}, expected names with values; restore the file")
    return value


def parse_yaml(text: str) -> Any:
    """Plain values from YAML.

    Raises:
        ValueError: for what `check_yaml` refuses, and for values that are none.
    """
    import yaml

    check_yaml(text)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(one_line(error)) from error


def check_yaml(text: str) -> None:
    """Refuse aliases, tags, depth, and classes from elsewhere than observers, before any value is made.

    Raises:
        ValueError: saying what was found.
    """
    import yaml

    depth, key = 0, False
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:
                raise ValueError(f"values within one another more than {DEPTH} deep")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ValueError("it uses anchors or aliases; write the values out")
            tag = getattr(event, "tag", None)
            if tag and tag != "!":
                raise ValueError(f"it uses the tag {tag}; give plain values")
            scalar = isinstance(event, yaml.ScalarEvent)
            if key and not (scalar and _known_class(event.value)):
                raise ValueError(f"class_path is {getattr(event, 'value', 'no name')}; give the name of a recipe of observers or noise")
            key = scalar and event.value == "class_path"
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error


def _known_class(name: str) -> bool:
    """Whether a class named in a configuration is one of emdiff's own."""
    return re.sub(r"^observers\.(recipes|instruments|noise_recipes)\.", "", name).isidentifier()


def guarded(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """A loader of YAML that loads only what `check_yaml` lets through; complains with a YAMLError, as such loaders do."""
    import yaml

    def checked(text: str) -> Any:
        try:
            check_yaml(text)
        except ValueError as error:
            raise yaml.YAMLError(str(error)) from error
        return load(text)

    return checked


def check_configs(arguments: list[str]) -> None:
    """Refuse configuration files on a command line that are no small, plain YAML, before anything reads them.

    Raises:
        UsageError: naming the file.
    """
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, given, value = argument.partition("=")
        if name == "--config":
            read_yaml(Path(value if given else following))


def number(values: dict[str, Any], name: str, path: Path) -> float:
    """A finite number of a file that was read.

    Raises:
        UsageError: if it is missing or something else.
    """
    value = values.get(name)
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300  # NaN is not below
    if not plain:
        raise UsageError(f"{path}: {name} is {value!r}, expected a finite number; restore the file")
    return float(value)
