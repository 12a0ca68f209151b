"""States within a round as they are saved: tensors and numbers in one safetensors file, never pickled, there whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emdiff.errors import UsageError, one_line
from emdiff.files import write_atomically


class State(NamedTuple):
    """A state of a computation.

    Attributes:
        of: Names the computation: a state is taken up only by the one that left it.
        numbers: Plain values.
        tensors: By name, on the CPU.
    """

    of: str
    numbers: dict[str, Any]
    tensors: dict[str, Tensor]

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors named NAME:..., by what follows."""
        return {key[len(name) + 1 :]: value for key, value in self.tensors.items() if key.startswith(f"{name}:")}


def grouped(**groups: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of several groups under names GROUP:NAME, as `State.group` takes them apart; on the CPU, where those that lie there are not copied.

    >>> list(grouped(weights={"a": torch.zeros(1)}))
    ['weights:a']
    """
    return {f"{group}:{name}": value.detach().cpu() for group, values in groups.items() for name, value in values.items()}


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write tensors to a safetensors file, that before it is replaced; in memory they are not copied, unless two share it or one is strided.

    Args:
        path: The file.
        tensors: By name.
        about: The file's metadata.

    Raises:
        UsageError: as `files.write_atomically`.
    """
    seen, whole = set[int](), dict[str, Tensor]()
    for name, value in tensors.items():
        where = value.untyped_storage().data_ptr()
        whole[name] = value.clone(memory_format=torch.contiguous_format) if where in seen else value.contiguous()
        seen.add(where)

    def write(temporary: Path) -> None:
        try:
            save_file(whole, temporary, about)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_atomically(path, write)


def save_state(path: Path, state: State) -> None:
    """Write a state; the one before it is replaced."""
    save_tensors(path, state.tensors, {"of": state.of, "numbers": json.dumps(state.numbers)})


def load_state(path: Path | None, of: str) -> State | None:
    """The state that a computation left; None where there is none, or one of another computation.

    Raises:
        UsageError: if the file is damaged.
    """
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about["of"] != of:
                return None
            return State(of, json.loads(about["numbers"]), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, LookupError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)}); remove it, the same command then begins this step anew") from error
