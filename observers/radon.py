r"""Radon: parallel-beam tomography, the integrals of an image along lines.

Pixel (i, j), a square of side 1, is seen by a detector on a line through the image's centre at angle theta about

    s = (j - (W - 1)/2) cos theta + ((H - 1)/2 - i) sin theta,      row i, column j,

as a trapezoid, the convolution of boxes of width |cos theta| and |sin theta|. Each bin, of width 1, gets the part of the trapezoid that it covers,
the area of the pixel that lies in the bin's strip, over three bins at most. The adjoint gathers with the same weights, so it is exact, and every
projection that the detector covers sums to the sum of the image.

Source: the strip-area model, Kak & Slaney (1988), Principles of computerized tomographic imaging, Sec. 7.1.
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
            row = flat.new_zeros(*flat.shape[:-1], self.detectors + 1)
            for place, share in self._footprint(t, x):
                row = row.scatter_add(-1, place.expand(flat.shape), flat * share)
            out.append(row[..., : self.detectors])
        return torch.stack(out, dim=-2)

    def adjoint(self, w: Tensor) -> Tensor:
        """At w, from (B, *O) to (B, *S)."""
        total = w.new_zeros(len(w), *self.shape[:-2], math.prod(self.shape[-2:]))
        for t in range(self.angles.shape[1]):
            for place, share in self._footprint(t, w):
                total = total + w[..., t, :].gather(-1, place.clamp(max=self.detectors - 1).expand(total.shape)) * share
        return total.reshape(len(w), *self.shape)

    def _footprint(self, t: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For angle t the three bins that each pixel may reach, int64, and their shares of it, (N or 1, ..., H W). Bins beside the detector
        become one beyond its end, with no share."""
        H, W = self.shape[-2:]
        i = torch.arange(H, dtype=torch.float64, device=like.device)[:, None].expand(H, W).flatten()
        j = torch.arange(W, dtype=torch.float64, device=like.device)[None].expand(H, W).flatten()
        theta = self.angles[:, t, None].double()
        cos, sin = theta.cos(), theta.sin()
        s = (j - (W - 1) / 2) * cos + ((H - 1) / 2 - i) * sin + (self.detectors - 1) / 2
        nearest = s.round()
        edges = [_below(nearest + k - 0.5 - s, cos.abs(), sin.abs()) for k in (-1, 0, 1, 2)]
        found = []
        for k, (low, high) in enumerate(zip(edges, edges[1:])):
            place = nearest.long() + k - 1
            inside = (place >= 0) & (place < self.detectors)
            both = torch.where(inside, place, self.detectors), torch.where(inside, high - low, 0.0).to(like.dtype)
            found.append(tuple(a.reshape(len(s), *[1] * (len(self.shape) - 2), H * W) for a in both))
        return found

    @classmethod
    def infer_shape(cls, obs_shape: tuple[int, ...], parameters: dict) -> tuple[int, ...]:
        """Not known from O."""
        return ()


def _below(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The share below t of the convolution of two centred boxes of widths a and b, one of them at least .7."""
    wide, narrow = torch.maximum(a, b), torch.minimum(a, b).clamp(min=1e-6)
    ramp = lambda u: u.clamp(min=0).square() / 2
    up, down = (wide + narrow) / 2, (wide - narrow) / 2
    trapezoid = (ramp(t + up) - ramp(t + down) - ramp(t - down) + ramp(t - up)) / (wide * narrow)
    return torch.where(narrow > 1e-6, trapezoid, t / wide + 0.5).clamp(0, 1)
