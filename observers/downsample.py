r"""Downsample: obs is x on a coarser grid, f entries per axis made one: super-resolution. After a PSF, it is the second part of a `compose`.

average    (A x)_i = mean of x over block i, the last block being what is left of the axis
sample     (A x)_i = x_{i f}: what a detector with small pixels sees of an image that a PSF has blurred
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from observers.base import Observer
from observers.noise import Noise

WAYS = ("average", "sample")


class Downsample(Observer):
    """x on a grid that is coarser by a factor along its last axes; O has ceil(length / factor) entries there.

    Args:
        shape: S, the shape of x.
        noise: As in `Observer`.
        factor: f, at least 2.
        axes: How many of the last axes are made coarser, at least 1; 0 stands for all but the first of three or more, which is channels.
        way: `average` or `sample`.

    >>> Downsample((5,), torch.tensor(0.5), factor=2).forward(torch.tensor([[1.0, 3.0, 5.0, 5.0, 9.0]]))
    tensor([[2., 5., 9.]])
    """

    name: ClassVar[str] = "downsample"
    option_names: ClassVar[tuple[str, ...]] = ("factor", "axes", "way")

    def __init__(self, shape: tuple[int, ...], noise: Noise | Tensor, factor: int = 2, axes: int = 0, way: str = "average") -> None:
        axes = int(axes) or (len(shape) - 1 if len(shape) > 2 else len(shape))
        if int(factor) < 2 or not 1 <= axes <= len(shape):
            raise ValueError(f"factor is {factor} and axes {axes}, expected a factor of 2 or more and 1 to {len(shape)} axes of x {tuple(shape)}")
        if way not in WAYS:
            raise ValueError(f"way is '{way}', expected one of: {', '.join(WAYS)}")
        self.factor, self.axes, self.way = int(factor), axes, way
        self._lengths = tuple(shape)[-axes:]
        self._kept = tuple(shape)[:-axes]
        super().__init__(shape, noise)

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """O."""
        return (*self._kept, *(-(-length // self.factor) for length in self._lengths))

    def forward(self, x: Tensor) -> Tensor:
        """A x, axis by axis."""
        for i, length in enumerate(self._lengths):
            x = (x.movedim(i - self.axes, -1) @ self._matrix(length, x).T).movedim(-1, i - self.axes)
        return x

    def adjoint(self, w: Tensor) -> Tensor:
        """At w, axis by axis."""
        for i, length in enumerate(self._lengths):
            w = (w.movedim(i - self.axes, -1) @ self._matrix(length, w)).movedim(-1, i - self.axes)
        return w

    def as_measurement(self, obs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Where entries are sampled and not averaged, each is a measurement of its entry of x."""
        if self.way == "average" or not self.noise.diagonal:
            return None
        std = self.std()
        seen = self.adjoint(torch.ones_like(obs[:1])) > 0
        return self.adjoint(obs), torch.where(seen, self.adjoint(std.expand(len(std), *self.obs_shape)), torch.inf)

    def _matrix(self, length: int, like: Tensor) -> Tensor:
        """The operator along one axis, (ceil(length / factor), length)."""
        i = torch.arange(length, device=like.device)
        block = (i // self.factor)[None] == torch.arange(-(-length // self.factor), device=like.device)[:, None]
        rows = (block if self.way == "average" else block & (i % self.factor == 0)).to(like.dtype)
        return rows / rows.sum(1, keepdim=True)

    @classmethod
    def infer_shape(cls, obs_shape: tuple[int, ...], parameters: dict) -> tuple[int, ...]:
        """Not known from O alone, where an axis may have been longer than a multiple of the factor."""
        return ()
