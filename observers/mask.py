r"""Mask: obs = m * (x + n) with m in {0, 1}, inpainting. At cov_obs^-1 A = diag(m / noise_std^2), so sigma is infinite where m = 0."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from observers.base import Observer, expect
from observers.noise import Noise


class Mask(Observer):
    """Some entries of x are observed: A = diag(mask), O = S; obs is 0 elsewhere.

    Args:
        shape: S, the shape of x.
        noise: As in `Observer`; its value where mask is 0 has no effect.
        mask: 1 (seen) or 0 (hidden), shape (N or 1, *S); kept as bool.

    >>> import torch
    >>> Mask((2,), torch.tensor(0.5), torch.tensor([[1, 0]])).as_measurement(torch.tensor([[3.0, 0.0]]))
    (tensor([[3., 0.]]), tensor([[0.5000,    inf]]))
    """

    name: ClassVar[str] = "mask"
    array_names: ClassVar[tuple[str, ...]] = ("mask",)

    def __init__(self, shape: tuple[int, ...], noise: Noise | Tensor, mask: Tensor) -> None:
        expect("mask", mask, tuple(shape))
        other = mask[(mask != 0) & (mask != 1)]
        if other.numel():
            raise ValueError(f"mask holds {other[0].item():g}, expected only 0 (hidden) and 1 (seen)")
        self.mask = mask.bool()
        super().__init__(shape, noise)

    def forward(self, x: Tensor) -> Tensor:
        """A x = mask * x, (B, *S)."""
        return self.mask * x

    def adjoint(self, w: Tensor) -> Tensor:
        """At w = mask * w, (B, *S)."""
        return self.mask * w

    def observed(self) -> Tensor:
        """The mask, bool (N or 1, *S)."""
        return self.mask

    def diagonal(self) -> Tensor:
        """The mask, bool (N or 1, *S)."""
        return self.mask

    def without(self, missing: Tensor) -> Observer:
        """A mask that also hides the missing entries, bool (N, *S)."""
        return Mask(self.shape, self.noise, self.mask & ~missing)
