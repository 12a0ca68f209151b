r"""Scaled: A diag(factor), another observer of x in other units."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from observers.base import Observer
from observers.noise import Noise


class Scaled(Observer):
    """An observer of factor x, where factor may differ between entries: what standardised data with several channels are seen through.

    Args:
        inner: The observer of x in its old units; its noise is kept.
        factor: Positive, shape (1, *S or ones).

    >>> import torch
    >>> from observers.identity import Identity
    >>> Scaled(Identity((2,), torch.tensor(1.0)), torch.tensor([[1.0, 10.0]])).as_measurement(torch.tensor([[3.0, 20.0]]))
    (tensor([[3., 2.]]), tensor([[1.0000, 0.1000]]))
    """

    name: ClassVar[str] = "scaled"
    array_names: ClassVar[tuple[str, ...]] = ("factor",)

    def __init__(self, inner: Observer, factor: Tensor) -> None:
        self.parts, self.factor = (inner,), factor
        super().__init__(inner.shape, inner.noise)

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """O of the inner observer."""
        return self.parts[0].obs_shape

    def forward(self, x: Tensor) -> Tensor:
        """A (factor x)."""
        return self.parts[0].forward(self.factor * x)

    def adjoint(self, w: Tensor) -> Tensor:
        """factor At w."""
        return self.factor * self.parts[0].adjoint(w)

    def observed(self) -> Tensor:
        """As the inner observer."""
        return self.parts[0].observed()

    def with_noise(self, noise: Noise | Tensor) -> Observer:
        """A copy with another noise, that of the inner observer included."""
        changed = super().with_noise(noise)
        changed.parts = (self.parts[0].with_noise(noise),)
        return changed

    def as_measurement(self, obs: Tensor) -> tuple[Tensor, Tensor] | None:
        """The inner observer's measurement in the new units."""
        direct = self.parts[0].as_measurement(obs)
        return None if direct is None else (direct[0] / self.factor, direct[1] / self.factor)
