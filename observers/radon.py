r"""Radon: parallel-beam tomography, the integrals of an image along lines.

Each pixel is projected on the detector, a line through the image's centre at angle theta, at

    s = (j - (W - 1)/2) cos theta + ((H - 1)/2 - i) sin theta,      row i, column j, pixels of side 1,

and is shared between the two nearest detector bins by linear interpolation (pixel-driven projection). The adjoint gathers with the same weights,
so it is exact, and every projection sums to the sum of the image.

Source: Pixel-driven projection, Peters (1981), Algorithms for fast back- and re-projection in computed tomography.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from observers.base import Observer, expect
from observers.noise import Noise


class Radon(Observer):
    """Projections of an image at T angles, which may differ from datum to datum. O = (T, D), or (C, T, D) for C channels.

    Args:
        shape: S: (H, W) or (C, H, W).
        noise: As in `Observer`.
        angles: theta in radians, shape (N or 1, T).
        detectors: Number of bins D, of the width of a pixel, centred on the image; 0 stands for as many as see the whole image at every angle.

    >>> A = Radon((2, 2), torch.tensor(0.5), torch.tensor([[0.0]]), detectors=4)
    >>> A.forward(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    tensor([[[0., 4., 6., 0.]]])
    """

    name: ClassVar[str] = "radon"
    array_names: ClassVar[tuple[str, ...]] = ("angles",)
    option_names: ClassVar[tuple[str, ...]] = ("detectors",)

    def __init__(self, shape: tuple[int, ...], noise: Noise | Tensor, angles: Tensor, detectors: int = 0) -> None:
        if len(shape) not in (2, 3):
            raise ValueError(f"observer 'radon' takes x of shape (H, W) or (C, H, W), not {tuple(shape)}; give --shape")
        expect("angles", angles, (None,))
        if not bool(angles.isfinite().all()):
            raise ValueError("angles hold NaN or infinite entries, expected radians")
        self.angles = angles if angles.is_floating_point() else angles.float()
        self.detectors = int(detectors) or math.ceil(math.hypot(shape[-2] - 1, shape[-1] - 1)) + 3
        super().__init__(shape, noise)

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """O."""
        return (*self.shape[:-2], self.angles.shape[1], self.detectors)

    def forward(self, x: Tensor) -> Tensor:
        """A x, from (B, *S) to (B, *O)."""
        flat, out = x.flatten(-2), []
        for t in range(self.angles.shape[1]):
            bins, weight = self._footprint(t, x)
            row = flat.new_zeros(*flat.shape[:-1], self.detectors + 1)
            for step, share in ((0, 1 - weight), (1, weight)):
                place, share = self._clipped(bins + step, share)
                row = row.scatter_add(-1, place.expand(flat.shape), flat * share)
            out.append(row[..., : self.detectors])
        return torch.stack(out, dim=-2)

    def adjoint(self, w: Tensor) -> Tensor:
        """At w, from (B, *O) to (B, *S)."""
        total = w.new_zeros(len(w), *self.shape[:-2], math.prod(self.shape[-2:]))
        for t in range(self.angles.shape[1]):
            bins, weight = self._footprint(t, w)
            for step, share in ((0, 1 - weight), (1, weight)):
                place, share = self._clipped(bins + step, share)
                total = total + w[..., t, :].gather(-1, place.clamp(max=self.detectors - 1).expand(total.shape)) * share
        return total.reshape(len(w), *self.shape)

    def _footprint(self, t: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """For angle t the first of each pixel's two bins, int64, and the share of the second, (N or 1, ..., H W)."""
        H, W = self.shape[-2:]
        i = torch.arange(H, dtype=like.dtype, device=like.device)[:, None].expand(H, W).flatten()
        j = torch.arange(W, dtype=like.dtype, device=like.device)[None].expand(H, W).flatten()
        theta = self.angles[:, t, None].to(like.dtype)
        s = (j - (W - 1) / 2) * theta.cos() + ((H - 1) / 2 - i) * theta.sin() + (self.detectors - 1) / 2
        s = torch.where((s - s.round()).abs() < 1e-4, s.round(), s)
        s = s.reshape(len(s), *[1] * (len(self.shape) - 2), H * W)
        return s.floor().long(), s - s.floor()

    def _clipped(self, bins: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Bins outside the detector go to a place beyond its end, with no share."""
        inside = (bins >= 0) & (bins < self.detectors)
        return torch.where(inside, bins, self.detectors), torch.where(inside, share, 0.0)

    @classmethod
    def infer_shape(cls, obs_shape: tuple[int, ...], parameters: dict) -> tuple[int, ...]:
        """Not known from O."""
        return ()
