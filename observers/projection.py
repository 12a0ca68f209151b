r"""Projection: obs = P x + n with a dense matrix P (m, d), compressed sensing. At cov_obs^-1 A is a full d x d matrix of rank at most m."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from observers.base import Observer, expect
from observers.noise import Noise


class Projection(Observer):
    """x, flattened to d entries, is seen through m linear functionals: A = P, O = (m,).

    Args:
        shape: S, the shape of x; d is the product of S.
        noise: As in `Observer`.
        matrix: P, dense rows, shape (N or 1, m, d); a row of zeros is not observed. Integers become float32.

    >>> Projection((2,), torch.tensor(0.5), torch.tensor([[[0.6, 0.8]]])).forward(torch.tensor([[1.0, 2.0]]))
    tensor([[2.2000]])
    """

    name: ClassVar[str] = "projection"
    array_names: ClassVar[tuple[str, ...]] = ("matrix",)

    def __init__(self, shape: tuple[int, ...], noise: Noise | Tensor, matrix: Tensor) -> None:
        expect("matrix", matrix, (None, math.prod(shape)))
        if not matrix.isfinite().all():
            raise ValueError("matrix holds NaN or infinite entries, expected finite ones; for a row that is not observed use zeros")
        self.matrix = matrix if matrix.is_floating_point() else matrix.float()
        super().__init__(shape, noise)

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """O = (m,)."""
        return (self.matrix.shape[1],)

    def forward(self, x: Tensor) -> Tensor:
        """A x = P x, from (B, *S) to (B, m)."""
        return torch.einsum("bmd,bd->bm", self.matrix, x.flatten(1))

    def adjoint(self, w: Tensor) -> Tensor:
        """At w = P^T w, from (B, m) to (B, *S)."""
        return torch.einsum("bmd,bm->bd", self.matrix, w).reshape(-1, *self.shape)

    def observed(self) -> Tensor:
        """The rows that are not zero, bool (N or 1, m)."""
        return (self.matrix != 0).any(-1)

    def without(self, missing: Tensor) -> Observer:
        """One matrix per datum, (N, m, d), with the rows of the missing entries, bool (N, m), set to zero."""
        return Projection(self.shape, self.noise, torch.where(missing[..., None], 0.0, self.matrix))

    @classmethod
    def infer_shape(cls, obs_shape: tuple[int, ...], arrays: dict[str, Tensor]) -> tuple[int, ...]:
        """S = (d,), the length of a row of the matrix."""
        return tuple(arrays["matrix"].shape[2:]) if "matrix" in arrays else obs_shape
