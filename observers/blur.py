r"""Blur: obs = h * x + n, convolution with a point spread function h, over the last axes of x.

    (A x)_i = sum_j h_j x_{i + c - j},     c = k // 2 the centre of a PSF of k entries per axis,

where x beyond the edge is set by the boundary. A = crop . convolve . extend: x is extended by the boundary, a gather of its own entries, then
convolved by FFT on the extended domain, of which the entries that no wrapping has reached are kept. The adjoint is the transpose of each of the
three, in the opposite order, so it is exact for every boundary.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from observers.base import Observer
from observers.noise import Noise

BOUNDARIES = ("circular", "zero", "reflect", "replicate")


class Blur(Observer):
    """x is convolved with a PSF, shared or per datum; axes before those of the PSF, such as channels, are blurred alike. O = S.

    Args:
        shape: S, the shape of x.
        noise: As in `Observer`.
        psf: h, shape (N or 1, *K) with one, two or three axes, as many as are blurred; not normalised here: one that sums to 1 keeps fluxes.
        boundary: What is beyond the edge: `circular` (the other side), `zero`, `reflect` (the mirror image about the edge entry) or `replicate`
            (the edge entry).

    >>> Blur((4,), torch.tensor(0.5), torch.tensor([[0.25, 0.5, 0.25]]), "zero").forward(torch.tensor([[0.0, 4.0, 0.0, 0.0]])).abs().round(decimals=3)
    tensor([[1., 2., 1., 0.]])
    """

    name: ClassVar[str] = "blur"
    array_names: ClassVar[tuple[str, ...]] = ("psf",)
    option_names: ClassVar[tuple[str, ...]] = ("boundary",)

    def __init__(self, shape: tuple[int, ...], noise: Noise | Tensor, psf: Tensor, boundary: str = "circular") -> None:
        D = psf.ndim - 1
        if not 1 <= D <= min(3, len(shape)):
            raise ValueError(
                f"psf has shape {tuple(psf.shape)}, expected (N or 1, *K) with 1 to {min(3, len(shape))} axes to blur of x {tuple(shape)}"
            )
        if not bool(psf.isfinite().all()):
            raise ValueError("psf holds NaN or infinite entries, expected finite ones")
        if boundary not in BOUNDARIES:
            raise ValueError(f"boundary is '{boundary}', expected one of: {', '.join(BOUNDARIES)}")
        for length, size in zip(shape[-D:], psf.shape[1:]):
            if boundary in ("circular", "reflect") and size // 2 > length - (boundary == "reflect"):
                raise ValueError(f"psf has {size} entries where x has {length}; with boundary {boundary} give at most {2 * length - 1}")
        self.psf, self.boundary = psf if psf.is_floating_point() else psf.float(), boundary
        super().__init__(shape, noise)

    def forward(self, x: Tensor) -> Tensor:
        """h * x, (B, *S)."""
        axes, spectrum, size = self._plan(x)
        for axis, length, k in zip(axes, self.shape[-len(axes) :], self.psf.shape[1:]):
            x = self._extend(x, axis, length, k)
        y = torch.fft.irfftn(torch.fft.rfftn(x, dim=axes) * spectrum, s=size, dim=axes)
        for axis, length, k in zip(axes, self.shape[-len(axes) :], self.psf.shape[1:]):
            y = y.narrow(axis, k - 1, length)
        return y

    def adjoint(self, w: Tensor) -> Tensor:
        """The transpose, (B, *S)."""
        axes, spectrum, size = self._plan(w)
        pads = [(k - 1, 0) for k in reversed(self.psf.shape[1:])]
        w = F.pad(w, [side for pad in pads for side in pad])
        y = torch.fft.irfftn(torch.fft.rfftn(w, dim=axes) * spectrum.conj(), s=size, dim=axes)
        for axis, length, k in zip(axes, self.shape[-len(axes) :], self.psf.shape[1:]):
            y = self._gather_back(y, axis, length, k)
        return y

    def _plan(self, x: Tensor) -> tuple[tuple[int, ...], Tensor, list[int]]:
        """Axes to transform, the spectrum of h on the extended domain, and the domain's size."""
        D = self.psf.ndim - 1
        axes = tuple(range(x.ndim - D, x.ndim))
        size = [length + k - 1 for length, k in zip(self.shape[-D:], self.psf.shape[1:])]
        spectrum = torch.fft.rfftn(self.psf.to(x.dtype), s=size, dim=tuple(range(1, 1 + D)))
        return axes, spectrum.reshape(len(spectrum), *[1] * (x.ndim - 1 - D), *spectrum.shape[1:]), size

    def _indices(self, length: int, k: int, device: torch.device) -> Tensor:
        """Which entry stands at each place of the extended axis; only for boundaries made of entries."""
        i = torch.arange(length + k - 1, device=device) - (k - 1 - k // 2)
        if self.boundary == "circular":
            return i % length
        if self.boundary == "replicate":
            return i.clamp(0, length - 1)
        period = max(2 * (length - 1), 1)
        i = i % period
        return torch.where(i < length, i, period - i)

    def _extend(self, x: Tensor, axis: int, length: int, k: int) -> Tensor:
        if self.boundary == "zero":
            left = k - 1 - k // 2
            return F.pad(x, [0, 0] * (x.ndim - 1 - axis) + [left, k // 2])
        return x.index_select(axis, self._indices(length, k, x.device))

    def _gather_back(self, y: Tensor, axis: int, length: int, k: int) -> Tensor:
        if self.boundary == "zero":
            return y.narrow(axis, k - 1 - k // 2, length)
        shape = list(y.shape)
        shape[axis] = length
        return y.new_zeros(shape).index_add(axis, self._indices(length, k, y.device), y)
