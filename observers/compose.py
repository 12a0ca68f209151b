r"""Compose: one observer after the other, A = A_k ... A_2 A_1, such as a blur, then missing pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from observers.base import Observer
from observers.noise import Noise
from observers.parts import read_parts


class Compose(Observer):
    """A after A: the first part sees x of shape S, each further one what the one before makes of it; O is that of the last.

    Args:
        shape: S, the shape of x.
        noise: The noise, added after the last part.
        parts: Observers, the first applied first; their own noise has no effect.

    >>> from observers.mask import Mask
    >>> from observers.projection import Projection
    >>> one = torch.ones(())
    >>> A = Compose((2,), one, (Mask((2,), one, torch.tensor([[1, 0]])), Projection((2,), one, torch.tensor([[[3.0, 4.0]]]))))
    >>> A.forward(torch.tensor([[1.0, 1.0]]))
    tensor([[3.]])
    """

    name: ClassVar[str] = "compose"

    def __init__(self, shape: tuple[int, ...], noise: Noise | Tensor, parts: Sequence[Observer]) -> None:
        self.parts = tuple(parts)
        if not self.parts:
            raise ValueError("observer 'compose' needs at least one part")
        for i, (got, want) in enumerate(zip([p.shape for p in self.parts], [tuple(shape), *(p.obs_shape for p in self.parts)])):
            if got != want:
                raise ValueError(f"part {i} of 'compose' takes x of shape {got}, and is given {want}")
        super().__init__(shape, noise)

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """O of the last part."""
        return self.parts[-1].obs_shape

    def forward(self, x: Tensor) -> Tensor:
        """A x, the parts from first to last."""
        for part in self.parts:
            x = part.forward(x)
        return x

    def adjoint(self, w: Tensor) -> Tensor:
        """At w, the adjoints from last to first."""
        for part in reversed(self.parts):
            w = part.adjoint(w)
        return w

    def observed(self) -> Tensor:
        """What the last part observes, and where A is diagonal what all do."""
        a = self.diagonal()
        return self.parts[-1].observed() if a is None else a != 0

    def diagonal(self) -> Tensor | None:
        """The product of the diagonals, where all parts have one."""
        total = None
        for part in self.parts:
            a = part.diagonal()
            if a is None:
                return None
            total = a if total is None else total * a
        return total

    @classmethod
    def assemble(cls, shape: tuple[int, ...], noise: Noise | Tensor, parameters: dict[str, Any]) -> Observer:
        """From the flat parameters of a file, `0.observer`, `0.mask`, `1.observer` and so on."""
        parts: list[Observer] = []
        for part, own in read_parts(cls.name, parameters):
            parts.append(part.assemble(parts[-1].obs_shape if parts else tuple(shape), torch.ones(()), own))
        return cls(shape, noise, parts)

    @classmethod
    def infer_shape(cls, obs_shape: tuple[int, ...], parameters: dict[str, Any]) -> tuple[int, ...]:
        """Not known from O alone."""
        return ()
