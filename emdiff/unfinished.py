"""An E-step that is not finished: the batches that are done, and a state of it on disk from which it goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emdiff.checkpoint import State, load_state, save_state
from emdiff.interrupt import Clock, asked, check


class Batches:
    """The batches of an E-step that are done: their figures, and now and then a state on disk; their arrays are where `e_step` puts them.

    Args:
        path: Where the state is saved; None for nowhere.
        of: Names the E-step: what another one left is not taken up.
        generator: Set to where it was after the last saved batch.
    """

    def __init__(self, path: Path | None, of: str, generator: torch.Generator) -> None:
        self.path, self.of, self.clock, self.cost = path, of, Clock(), 0.0
        self.parts: list[tuple[float, int, float, float]] = []
        self.kept: list[Tensor] = []
        state = load_state(path, of)
        if state is not None:
            generator.set_state(state.tensors["generator"])
            self.parts = [(tau, restarted, residual, iterations) for tau, restarted, residual, iterations in state.numbers["parts"]]
            self.kept = [state.tensors["kept"]]

    def forget(self, generator: torch.Generator) -> None:
        """Begin anew."""
        self.parts, self.kept = [], []
        generator.manual_seed(generator.initial_seed())

    def count(self) -> int:
        """Observations done."""
        return sum(map(len, self.kept))

    def add(self, kept: Tensor, part: tuple[float, int, float, float]) -> None:
        """One more batch: its kept data, bool (B,), and tau, restarted, residual, iterations, as in `em.Draws`."""
        self.kept.append(kept.cpu())
        self.parts.append(part)

    def between(self, arrays: dict[str, Any], generator: torch.Generator) -> None:
        """Before a batch: save if it is time, but spend no more than a tenth of the time on it; end if that was asked for."""
        if self.parts and (asked() or self.clock.due(10 * self.cost)):
            self.save(arrays, generator)
        check()

    def save(self, arrays: dict[str, Any], generator: torch.Generator) -> None:
        """Hand the arrays to the disk, then say how far they are filled."""
        if self.path is None:
            return
        begun = time.monotonic()
        for array in arrays.values():
            array.sync()
        tensors = {"kept": torch.cat(self.kept), "generator": generator.get_state()}
        save_state(self.path, State(self.of, {"parts": self.parts}, tensors))
        self.cost = time.monotonic() - begun
