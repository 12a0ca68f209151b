"""Checks of arguments that need nothing but the argument: a `UsageError` names the flag, the value and the remedy."""

from emdiff.errors import UsageError


def positive(name: str, value: float) -> None:
    """Refuse what is not positive and finite."""
    if not 0 < value < float("inf"):
        raise UsageError(f"{name} is {value:g}; it has to be a positive, finite number in the units of the data")


def at_least(name: str, value: int, least: int) -> None:
    """Refuse what is below `least`."""
    if value < least:
        raise UsageError(f"{name} is {value}; give {least} or more")


def suffix(name: str, path: str, known: tuple[str, ...]) -> None:
    """Refuse a path of another type."""
    if not path.endswith(known):
        raise UsageError(f"{name} is {path}; its name has to end with {' or '.join(known)}")
