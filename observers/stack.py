r"""Stack: several observations of one x, obs = (A_1 x, ..., A_k x) + n, such as different instruments or exposures.

The observations of all parts are stored in one flat vector, part after part, each in row-major order; O = (o_1 + ... + o_k,). So noise of every
kind, correlated between instruments if need be, is given for the whole vector, and a part that did not see a datum is NaN there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from observers.base import Observer
from observers.noise import Noise
from observers.parts import read_parts


class Stack(Observer):
    """Several observers of the same x.

    Args:
        shape: S, the shape of x.
        noise: The noise of the flat vector; standard deviations of each part are joined by `join`.
        parts: Observers of x; their own noise has no effect.

    >>> from observers.identity import Identity
    >>> one = torch.ones(())
    >>> A = Stack((2,), torch.tensor([[1.0, 1.0, 2.0, 2.0]]), (Identity((2,), one), Identity((2,), one)))
    >>> A.forward(torch.tensor([[1.0, 5.0]]))
    tensor([[1., 5., 1., 5.]])
    """

    name: ClassVar[str] = "stack"

    def __init__(self, shape: tuple[int, ...], noise: Noise | Tensor, parts: Sequence[Observer]) -> None:
        self.parts = tuple(parts)
        if not self.parts:
            raise ValueError("observer 'stack' needs at least one part")
        for i, part in enumerate(self.parts):
            if part.shape != tuple(shape):
                raise ValueError(f"part {i} of 'stack' takes x of shape {part.shape}, expected {tuple(shape)} as all parts do")
        super().__init__(shape, noise)

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """O = (o_1 + ... + o_k,)."""
        return (sum(math.prod(part.obs_shape) for part in self.parts),)

    def forward(self, x: Tensor) -> Tensor:
        """A x, from (B, *S) to (B, o)."""
        return torch.cat([part.forward(x).flatten(1) for part in self.parts], dim=1)

    def adjoint(self, w: Tensor) -> Tensor:
        """The sum of the parts' adjoints, from (B, o) to (B, *S)."""
        return sum(part.adjoint(piece) for part, piece in zip(self.parts, self.split(w)))

    def split(self, w: Tensor) -> list[Tensor]:
        """A flat vector (B, o) as the observations of the parts, (B, *O_i)."""
        pieces = w.split([math.prod(part.obs_shape) for part in self.parts], dim=1)
        return [piece.reshape(len(w), *part.obs_shape) for part, piece in zip(self.parts, pieces)]

    def observed(self) -> Tensor:
        """What each part observes, bool (N or 1, o)."""
        return join([part.observed() for part in self.parts], self.parts)

    def as_measurement(self, obs: Tensor) -> tuple[Tensor, Tensor] | None:
        """The parts' measurements fused by their precisions, where each part is one."""
        if not self.noise.diagonal:
            return None
        std = self.std()
        stds = self.split(std.expand(len(std), *self.obs_shape))
        found = [part.with_noise(s).as_measurement(piece) for part, s, piece in zip(self.parts, stds, self.split(obs))]
        if any(one is None for one in found):
            return None
        precision = sum(sigma**-2 for _, sigma in found)
        weighted = sum(torch.where(sigma.isfinite(), z / sigma**2, 0.0) for z, sigma in found)
        return weighted / torch.where(precision > 0, precision, 1.0), precision.rsqrt()

    @classmethod
    def assemble(cls, shape: tuple[int, ...], noise: Noise | Tensor, parameters: dict[str, Any]) -> Observer:
        """From the flat parameters of a file, `0.observer`, `0.mask`, `1.observer` and so on."""
        return cls(shape, noise, [part.assemble(shape, torch.ones(()), own) for part, own in read_parts(cls.name, parameters)])

    @classmethod
    def infer_shape(cls, obs_shape: tuple[int, ...], parameters: dict[str, Any]) -> tuple[int, ...]:
        """Not known from O alone."""
        return ()


def join(tensors: Sequence[Tensor], parts: Sequence[Observer]) -> Tensor:
    """One tensor per part, (N or 1, *O_i or ones), as one for the flat vector, (N or 1, o)."""
    full = [tensor.expand(len(tensor), *part.obs_shape).flatten(1) for tensor, part in zip(tensors, parts)]
    count = max(len(tensor) for tensor in full)
    return torch.cat([tensor.expand(count, -1) for tensor in full], dim=1)
