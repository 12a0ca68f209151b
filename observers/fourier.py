r"""Fourier: obs = m * U x + n with the unitary two-dimensional discrete Fourier transform U, single-coil magnetic resonance imaging.

Complex numbers are pairs of real channels, in the third axis from the end: k-space is (2, H, W), and so is an image with phase. An image of shape
(H, W) or (1, H, W) is real. The noise is that of each real channel. Over the reals At = Re(U* m w), or both channels of U* m w.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from observers.base import Observer, expect
from observers.noise import Noise


class Fourier(Observer):
    """x is seen at some of its spatial frequencies. O = (2, H, W).

    Args:
        shape: S: (H, W) or (1, H, W) for real images, (2, H, W) for complex ones.
        noise: As in `Observer`, of the real and the imaginary part each.
        mask: 1 for frequencies that are sampled, shape (N or 1, H, W); kept as bool.
        centred: 0 for the order of `torch.fft` (frequency zero first, image with its origin in the corner); 1 for frequency zero and the image's
            origin in the middle, as scanners and fastMRI store them.

    >>> A = Fourier((1, 2, 2), torch.tensor(0.5), torch.ones(1, 2, 2))
    >>> A.forward(torch.ones(1, 1, 2, 2))[0, 0]
    tensor([[2., 0.],
            [0., 0.]])
    """

    name: ClassVar[str] = "fourier"
    array_names: ClassVar[tuple[str, ...]] = ("mask",)
    option_names: ClassVar[tuple[str, ...]] = ("centred",)
    complex_obs: ClassVar[bool] = True

    def __init__(self, shape: tuple[int, ...], noise: Noise | Tensor, mask: Tensor, centred: int = 0) -> None:
        check_image(self.name, shape)
        self.mask, self.centred = check_mask(mask, shape), int(bool(centred))
        super().__init__(shape, noise)

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """O = (2, H, W)."""
        return (2, *self.shape[-2:])

    def forward(self, x: Tensor) -> Tensor:
        """m U x, from (B, *S) to (B, 2, H, W)."""
        return as_channels(transform(as_complex(x, self.shape), self.centred)) * self.mask[:, None]

    def adjoint(self, w: Tensor) -> Tensor:
        """At w, from (B, 2, H, W) to (B, *S)."""
        return as_image(transform(torch.view_as_complex((w * self.mask[:, None]).movedim(1, -1).contiguous()), self.centred, True), self.shape)

    def observed(self) -> Tensor:
        """The mask, for both channels, bool (N or 1, 1, H, W)."""
        return self.mask[:, None]

    @classmethod
    def infer_shape(cls, obs_shape: tuple[int, ...], parameters: dict) -> tuple[int, ...]:
        """A complex image; real ones have to be declared."""
        return (2, *obs_shape[-2:])


def check_image(name: str, shape: tuple[int, ...]) -> None:
    """Refuse an x that is no image of one or two real channels."""
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in (1, 2)):
        raise ValueError(f"observer '{name}' takes x of shape (H, W) or (1, H, W), real, or (2, H, W), complex, not {tuple(shape)}; give --shape")


def check_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask of frequencies as bool; refuse another shape, and values other than 0 and 1."""
    expect("mask", mask, tuple(shape[-2:]))
    other = mask[(mask != 0) & (mask != 1)]
    if other.numel():
        raise ValueError(f"mask holds {other[0].item():g}, expected only 0 (not sampled) and 1 (sampled)")
    return mask.bool()


def transform(z: Tensor, centred: int, inverse: bool = False) -> Tensor:
    """U z, or U* z, over the last two axes."""
    change = torch.fft.ifft2 if inverse else torch.fft.fft2
    if not centred:
        return change(z, norm="ortho")
    return torch.fft.fftshift(change(torch.fft.ifftshift(z, dim=(-2, -1)), norm="ortho"), dim=(-2, -1))


def as_complex(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Images (B, *S) as (B, H, W): complex where S has two channels."""
    if len(shape) == 3 and shape[0] == 2:
        return torch.view_as_complex(x.movedim(1, -1).contiguous())
    return x.reshape(len(x), *shape[-2:])


def as_image(z: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The adjoint of `as_complex`: both channels of z (B, H, W), or its real part."""
    if len(shape) == 3 and shape[0] == 2:
        return torch.view_as_real(z).movedim(-1, 1)
    return z.real.reshape(len(z), *shape)


def as_channels(z: Tensor) -> Tensor:
    """Complex (..., H, W) as real (..., 2, H, W)."""
    z = z if z.is_complex() else z.to(torch.complex64 if z.dtype == torch.float32 else torch.complex128)
    return torch.view_as_real(z).movedim(-1, -3)
