r"""Multicoil: obs_c = m * U (s_c x) + n_c for coils c = 1..C with sensitivities s_c: parallel magnetic resonance imaging, SENSE.

Complex numbers are pairs of real channels, as in `fourier`. At w = sum_c conj(s_c) U* m w_c, its real part where x is real.

Source: SENSE: sensitivity encoding for fast MRI (Pruessmann et al. 1999), eq. 1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from observers.base import Observer, expect
from observers.fourier import as_channels, as_complex, as_image, check_image, check_mask, transform
from observers.noise import Noise


class Multicoil(Observer):
    """x, weighted by each coil's sensitivity, is seen at some of its spatial frequencies. O = (C, 2, H, W).

    Args:
        shape: S: (H, W) or (1, H, W) for real images, (2, H, W) for complex ones.
        noise: As in `Observer`; noise that is correlated between coils is given by `noise_cov` or `noise_factor`.
        mask: 1 for frequencies that are sampled, shape (N or 1, H, W); kept as bool.
        sensitivities: s, real and imaginary part, shape (N or 1, C, 2, H, W); in files also complex, (N or 1, C, H, W).
        centred: As in `Fourier`.

    >>> s = torch.zeros(1, 3, 2, 4, 4)
    >>> Multicoil((2, 4, 4), torch.tensor(0.5), torch.ones(1, 4, 4), s).obs_shape
    (3, 2, 4, 4)
    """

    name: ClassVar[str] = "multicoil"
    array_names: ClassVar[tuple[str, ...]] = ("mask", "sensitivities")
    option_names: ClassVar[tuple[str, ...]] = ("centred",)
    complex_obs: ClassVar[bool] = True

    def __init__(self, shape: tuple[int, ...], noise: Noise | Tensor, mask: Tensor, sensitivities: Tensor, centred: int = 0) -> None:
        check_image(self.name, shape)
        expect("sensitivities", sensitivities, (None, 2, *shape[-2:]))
        if not bool(sensitivities.isfinite().all()):
            raise ValueError("sensitivities hold NaN or infinite entries, expected finite ones, 0 where a coil sees nothing")
        self.mask, self.sensitivities, self.centred = check_mask(mask, shape), sensitivities, int(bool(centred))
        super().__init__(shape, noise)

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """O = (C, 2, H, W)."""
        return (self.sensitivities.shape[1], 2, *self.shape[-2:])

    def forward(self, x: Tensor) -> Tensor:
        """m U (s_c x), from (B, *S) to (B, C, 2, H, W)."""
        return as_channels(transform(self._coils() * as_complex(x, self.shape)[:, None], self.centred)) * self.mask[:, None, None]

    def adjoint(self, w: Tensor) -> Tensor:
        """At w, from (B, C, 2, H, W) to (B, *S)."""
        z = torch.view_as_complex((w * self.mask[:, None, None]).movedim(2, -1).contiguous())
        return as_image((self._coils().conj() * transform(z, self.centred, True)).sum(1), self.shape)

    def observed(self) -> Tensor:
        """The mask, for all coils and both channels, bool (N or 1, 1, 1, H, W)."""
        return self.mask[:, None, None]

    def _coils(self) -> Tensor:
        """The sensitivities as complex numbers, (N or 1, C, H, W)."""
        return torch.view_as_complex(self.sensitivities.movedim(2, -1).contiguous())

    @classmethod
    def infer_shape(cls, obs_shape: tuple[int, ...], parameters: dict) -> tuple[int, ...]:
        """A complex image; real ones have to be declared."""
        return (2, *obs_shape[-2:])
