r"""Correlated noise: a full covariance, low rank plus diagonal, and stationary noise, which is independent in Fourier space."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from observers.noise import Noise, check_std, padded


class Full(Noise):
    """Any covariance.

    Args:
        noise_cov: C, positive definite, shape (N or 1, o, o), o the number of entries of an observation.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("noise_cov",)

    def __init__(self, noise_cov: Tensor) -> None:
        self.noise_cov = noise_cov

    def check(self, O: tuple[int, ...]) -> None:
        """Shape, symmetry and definiteness."""
        o = math.prod(O)
        if self.noise_cov.ndim != 3 or tuple(self.noise_cov.shape[1:]) != (o, o):
            raise ValueError(f"noise_cov has shape {tuple(self.noise_cov.shape)}, expected (N or 1, {o}, {o}) for observations of shape {tuple(O)}")
        asymmetry = (self.noise_cov - self.noise_cov.mT).abs().amax() / self.noise_cov.abs().amax().clamp(min=1e-300)
        if not asymmetry < 1e-4 or bool((torch.linalg.cholesky_ex(self.noise_cov).info != 0).any()):
            raise ValueError(
                "noise_cov is not symmetric and positive definite; check it, or give noise_factor and noise_std for low rank plus diagonal"
            )

    def std(self, O: tuple[int, ...]) -> Tensor:
        """Roots of the diagonal."""
        return self.noise_cov.diagonal(dim1=1, dim2=2).sqrt().reshape(-1, *O)

    def product(self, w: Tensor, seen: Tensor) -> Tensor:
        """C w."""
        kept = torch.where(seen, w, 0.0).flatten(1)
        return torch.where(seen, torch.einsum("bij,bj->bi", self.noise_cov.expand(len(w), -1, -1), kept).reshape(w.shape), w)

    def colour(self, eps: Tensor, seen: Tensor) -> Tensor:
        """L eps with the Cholesky factor L of what was seen."""
        return torch.where(seen, (self._root(eps, seen) @ eps.flatten(1)[..., None]).reshape(eps.shape), 0.0)

    def whiten(self, r: Tensor, seen: Tensor) -> Tensor:
        """L^-1 r."""
        kept = torch.where(seen, r, 0.0).flatten(1)[..., None]
        solved = torch.linalg.solve_triangular(self._root(r, seen), kept, upper=False)
        return torch.where(seen, solved.reshape(r.shape), 0.0)

    def scaled(self, factor: float, O: tuple[int, ...]) -> Noise:
        """factor^2 C."""
        return Full(self.noise_cov * factor**2)

    def _root(self, like: Tensor, seen: Tensor) -> Tensor:
        """The Cholesky factor, hidden entries apart from the others."""
        rows = max(len(self.noise_cov), len(seen))
        flat = seen.expand(len(seen), *like.shape[1:]).flatten(1).expand(rows, -1)
        both = flat[:, :, None] & flat[:, None, :]
        return torch.linalg.cholesky(torch.where(both, self.noise_cov, 0.0) + torch.diag_embed((~flat).to(self.noise_cov)))


class LowRank(Noise):
    """Low rank plus diagonal, C = diag(std^2) + F F^T.

    Args:
        noise_std: As in `Diagonal`.
        noise_factor: F, shape (N or 1, o, r), o the number of entries of an observation.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("noise_std", "noise_factor")

    def __init__(self, noise_std: Tensor, noise_factor: Tensor) -> None:
        self.noise_std, self.noise_factor = noise_std, noise_factor

    def check(self, O: tuple[int, ...]) -> None:
        """Shapes and signs."""
        check_std(self.noise_std, O)
        o = math.prod(O)
        if self.noise_factor.ndim != 3 or self.noise_factor.shape[1] != o or not bool(self.noise_factor.isfinite().all()):
            raise ValueError(f"noise_factor has shape {tuple(self.noise_factor.shape)}, expected finite entries of shape (N or 1, {o}, any)")

    def std(self, O: tuple[int, ...]) -> Tensor:
        """(std^2 + the squared lengths of the rows of F)^(1/2)."""
        return torch.sqrt(padded(self.noise_std, O).square() + self.noise_factor.square().sum(2).reshape(-1, *O))

    def product(self, w: Tensor, seen: Tensor) -> Tensor:
        """C w."""
        flat, F = torch.where(seen, w, 0.0).flatten(1), self.noise_factor
        along = torch.einsum("bor,br->bo", F.expand(len(w), -1, -1), torch.einsum("bor,bo->br", F.expand(len(w), -1, -1), flat))
        return torch.where(seen, padded(self.noise_std, w.shape[1:]).square() * w + along.reshape(w.shape), w)

    def colour(self, eps: Tensor, seen: Tensor) -> Tensor:
        """std (I + G G^T)^(1/2) eps with G = F / std."""
        return torch.where(seen, padded(self.noise_std, eps.shape[1:]) * self._power(eps, seen, 0.5), 0.0)

    def whiten(self, r: Tensor, seen: Tensor) -> Tensor:
        """(I + G G^T)^(-1/2) r / std."""
        return torch.where(seen, self._power(torch.where(seen, r, 0.0) / padded(self.noise_std, r.shape[1:]), seen, -0.5), 0.0)

    def scaled(self, factor: float, O: tuple[int, ...]) -> Noise:
        """factor std and factor F."""
        return LowRank(self.noise_std * factor, self.noise_factor * factor)

    def _power(self, w: Tensor, seen: Tensor, power: float) -> Tensor:
        """(I + G G^T)^power w = w + G Q diag(((1 + s)^power - 1) / s) Q^T G^T w, with G^T G = Q diag(s) Q^T."""
        O = tuple(w.shape[1:])
        shown = seen.expand(len(seen), *O).flatten(1)[..., None]
        std = padded(self.noise_std, O)
        G = self.noise_factor * shown / std.expand(len(std), *O).flatten(1)[..., None]
        s, Q = torch.linalg.eigh(G.mT @ G)
        s = s.clamp(min=torch.finfo(s.dtype).eps)
        share = torch.expm1(power * torch.log1p(s)) / s
        GQ = (G @ Q).expand(len(w), -1, -1)
        inner = share * torch.einsum("bor,bo->br", GQ, w.flatten(1))
        return w + torch.einsum("bor,br->bo", GQ, inner).reshape(w.shape)


class Fourier(Noise):
    """Stationary noise: independent in the discrete Fourier transform over the axes of O, but for the first of three or more, which is channels.

    Args:
        noise_spectrum: Power at each frequency, positive, as `torch.fft.fftn` orders them, shape (N or 1, *O), equal at opposite frequencies.
            The variance of an entry is its mean.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("noise_spectrum",)
    complete: ClassVar[bool] = True

    def __init__(self, noise_spectrum: Tensor) -> None:
        self.noise_spectrum = noise_spectrum

    def check(self, O: tuple[int, ...]) -> None:
        """Shape, sign and symmetry."""
        S = self.noise_spectrum
        if S.ndim != 1 + len(O) or tuple(S.shape[1:]) != tuple(O):
            raise ValueError(f"noise_spectrum has shape {tuple(S.shape)}, expected (N or 1, {', '.join(map(str, O))})")
        if not bool(((S > 0) & S.isfinite()).all()):
            raise ValueError(f"noise_spectrum holds {float(S.min()):g}, expected positive and finite powers")
        axes = self._axes(S)
        opposite = S.flip(axes).roll([1] * len(axes), axes)
        if not bool(torch.isclose(S, opposite, rtol=1e-3, atol=0.0).all()):
            raise ValueError("noise_spectrum differs between opposite frequencies, and no real noise does that; average S(k) and S(-k)")

    def std(self, O: tuple[int, ...]) -> Tensor:
        """The root of the mean power, (N or 1, ...)."""
        return self.noise_spectrum.mean(self._axes(self.noise_spectrum), keepdim=True).sqrt()

    def product(self, w: Tensor, seen: Tensor) -> Tensor:
        """C w."""
        return self._filtered(w, self.noise_spectrum)

    def colour(self, eps: Tensor, seen: Tensor) -> Tensor:
        """C^(1/2) eps."""
        return self._filtered(eps, self.noise_spectrum.sqrt())

    def whiten(self, r: Tensor, seen: Tensor) -> Tensor:
        """C^(-1/2) r."""
        return self._filtered(r, self.noise_spectrum.rsqrt())

    def scaled(self, factor: float, O: tuple[int, ...]) -> Noise:
        """factor^2 spectrum."""
        return Fourier(self.noise_spectrum * factor**2)

    @staticmethod
    def _axes(w: Tensor) -> tuple[int, ...]:
        return tuple(range(2 if w.ndim > 3 else 1, w.ndim))

    def _filtered(self, w: Tensor, gains: Tensor) -> Tensor:
        axes = self._axes(w)
        return torch.fft.ifftn(gains * torch.fft.fftn(w, dim=axes), dim=axes).real
