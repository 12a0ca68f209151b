"""What a training hands from one part of it to the next, and how weights are moved; on disk in one safetensors file, never pickled."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from emdiff.checkpoint import State, grouped, load_state, save_state
from emdiff.errors import UsageError

KIND = "memory"
"""What a memory's file says it is of."""


class Optimiser(NamedTuple):
    """How weights are moved.

    Attributes:
        name: "adam" or "sgd".
        rate: Learning rate.
        momentum: Of sgd.
        anneal: Let the rate fall linearly to 0.
        clip: Largest norm of the gradient.
    """

    name: str = "adam"
    rate: float = 1e-3
    momentum: float = 0.9
    anneal: bool = True
    clip: float = 1.0


class Memory(NamedTuple):
    """The state of a training between two parts of it.

    Attributes:
        step: Steps taken.
        weights: Of the denoiser in training; keys as in its state_dict.
        average: Of the moving average, likewise.
        slots: The optimiser's tensors, as PARAMETER/NAME.
        retreats: Times the loss diverged and the rate was lowered.
        risen: Step from which the rate last rose.
    """

    step: int
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    slots: dict[str, Tensor]
    retreats: int = 0
    risen: int = 0


def save_memory(path: Path, memory: Memory) -> None:
    """Write a training's memory."""
    tensors = grouped(weights=memory.weights, average=memory.average, slots=memory.slots)
    save_state(path, State(KIND, {"step": memory.step, "retreats": memory.retreats, "risen": memory.risen}, tensors))


def load_memory(path: Path, like: dict[str, Tensor]) -> Memory:
    """Read what `save_memory` wrote.

    Args:
        path: The file.
        like: The state_dict of the denoiser that it has to be of.

    Raises:
        UsageError: if it is missing, damaged, or of another network.
    """
    state = load_state(path, KIND)
    wanted = {name: value.shape for name, value in like.items()}
    if state is not None:
        parts = [{name: value.shape for name, value in state.group(group).items()} for group in ("weights", "average")]
        numbers = [state.numbers.get(name) for name in ("step", "retreats", "risen")]
        if parts == [wanted, wanted] and all(type(n) is int and n >= 0 for n in numbers):
            return Memory(numbers[0], state.group("weights"), state.group("average"), state.group("slots"), *numbers[1:])
    raise UsageError(f"{path}: is not the state of this training; restore it from a copy, or train again with another --out")
