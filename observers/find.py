"""Where an observer's class is: built in, declared by an installed package, in a module, or in a file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import observers
from observers.base import Observer

GROUP = "emdiff.observers"
"""Entry points of this group name observers of installed packages."""


def find(name: str) -> type[Observer]:
    """The class of an observer.

    Args:
        name: A built-in name, the name of an entry point, `module:Class`, or `path/file.py:Class`; `:Class` may be left out where a file or module
            defines one observer only. Modules are also looked for in the working directory. Nothing but a name with ':' or '.py' runs code that
            is not installed, and names in files of observations never do (`find_installed`).

    Raises:
        ValueError: There is no such observer, or its module fails.
    """
    if ":" not in name and not name.endswith(".py"):
        return find_installed(name)
    where, _, cls = name.rpartition(":") if ":" in name else (name, "", "")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    except Exception as error:
        raise ValueError(f"{where}: cannot be imported ({type(error).__name__}: {error}); give module:Class or path/file.py:Class") from error
    made = {
        key: value for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Observer) and not inspect.isabstract(value)
    }
    if not cls:
        made = {key: value for key, value in made.items() if value.__module__ == module.__name__}
        if len(made) != 1:
            raise ValueError(f"{where}: defines {', '.join(made) or 'no observers'}; name one as {where}:Class")
        return _named(next(iter(made.values())))
    if cls not in made:
        raise ValueError(f"{where}: has no observer '{cls}', it has {', '.join(made) or 'none'}; an observer derives from observers.Observer")
    return _named(made[cls])


def find_installed(name: str) -> type[Observer]:
    """A built-in observer, or one that an installed package declares.

    Raises:
        ValueError: There is no such observer.
    """
    if name in observers.REGISTRY:
        return observers.REGISTRY[name]
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name in found:
        return _named(found[name].load())
    known = ", ".join(sorted({*observers.REGISTRY, *found}))
    raise ValueError(f"unknown observer '{name}', expected one of: {known}; one of your own is module:Class or path/file.py:Class")


def _named(cls: type[Observer]) -> type[Observer]:
    """The class, named after itself where it says no name."""
    if not isinstance(getattr(cls, "name", None), str):
        cls.name = cls.__name__.lower()
    return cls


def _load_module(name: str) -> ModuleType:
    """Import a module, also from the working directory."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _load_file(path: Path) -> ModuleType:
    """Run a file as a module of its own."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"observer_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
