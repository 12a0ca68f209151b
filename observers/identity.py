r"""Identity: obs = x + n, denoising. At cov_obs^-1 A = cov_obs^-1 is diagonal, so z = obs and sigma = noise_std."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from observers.base import Observer
from observers.mask import Mask


class Identity(Observer):
    """Every entry of x is observed: A = I, O = S.

    >>> import torch
    >>> Identity((2,), torch.tensor(0.5)).as_measurement(torch.tensor([[1.0, 2.0]]))
    (tensor([[1., 2.]]), tensor([[0.5000, 0.5000]]))
    """

    name: ClassVar[str] = "identity"

    def forward(self, x: Tensor) -> Tensor:
        """A x = x, (B, *S)."""
        return x

    def adjoint(self, w: Tensor) -> Tensor:
        """At w = w, (B, *S)."""
        return w

    def diagonal(self) -> Tensor:
        """Ones."""
        return torch.ones([1] * (1 + len(self.shape)), device=self._device())

    def without(self, missing: Tensor) -> Observer:
        """A mask that hides the missing entries, bool (N, *S)."""
        return Mask(self.shape, self.noise, ~missing)
