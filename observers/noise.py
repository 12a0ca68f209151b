r"""Noise: n ~ N(0, C), C of each datum its own where wanted, and counts through a Gaussian approximation.

    Diagonal    C = diag(std^2)                                                  noise_std
    Full        C, any positive definite matrix                                  noise_cov
    LowRank     C = diag(std^2) + F F^T                                          noise_std and noise_factor
    Fourier     C = U* diag(spectrum) U with the unitary DFT U: stationary       noise_spectrum
    Poisson     obs = g k + std e, k ~ Poisson(A x / g): C = diag(g A x + std^2)   noise_gain, and noise_std for the read-out

All that an algorithm asks of C is C w, a root R with R R^T = C and its inverse, and the marginal standard deviations. Entries of obs that are not
observed take no part: on them C w = w, and the noise is 0. The keys are those of files.

Poisson's variance depends on the unknown A x; it is taken from an estimate, half a count at least, and is good where there are many counts
(docs/observers.md has the error against the exact posterior).

Source: (I + G G^T)^(1/2) through the eigenvectors of G^T G, Higham, Functions of Matrices (2008), Theorem 1.35.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor


class Noise(ABC):
    """The covariance C of the noise of a batch of observations.

    Attributes:
        tensor_names: Its tensors, which are also its keys in files; each has a leading axis of N or 1, or none where it is a scalar.
        diagonal: Whether C is diagonal.
        complete: Whether every entry of obs has to be observed.
    """

    tensor_names: ClassVar[tuple[str, ...]]
    diagonal: ClassVar[bool] = False
    complete: ClassVar[bool] = False

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {name: getattr(self, name) for name in self.tensor_names}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Noise:
        """A copy with changed tensors; nothing is checked again."""
        changed = copy.copy(self)
        changed.__dict__.update({name: change(tensor) for name, tensor in vars(self).items() if isinstance(tensor, Tensor)})
        return changed

    @abstractmethod
    def check(self, O: tuple[int, ...]) -> None:
        """Refuse tensors that do not fit observations of shape O, or are not a covariance, by a ValueError with value and remedy."""

    @abstractmethod
    def std(self, O: tuple[int, ...]) -> Tensor:
        """Marginal standard deviations, (N or 1, ...), broadcastable against (B, *O)."""

    @abstractmethod
    def product(self, w: Tensor, seen: Tensor) -> Tensor:
        """C w on the entries seen, and w on the others; w (B, *O), seen bool (N or 1, *O or ones)."""

    @abstractmethod
    def colour(self, eps: Tensor, seen: Tensor) -> Tensor:
        """R eps, 0 where not seen, (B, *O): N(0, C) of standard normal eps."""

    @abstractmethod
    def whiten(self, r: Tensor, seen: Tensor) -> Tensor:
        """R^-1 r, 0 where not seen, (B, *O): its squared length is r^T C^-1 r over what was seen."""

    @abstractmethod
    def scaled(self, factor: float, O: tuple[int, ...]) -> Noise:
        """The Gaussian noise of factor n, for observations of shape O."""

    def draw(self, mean: Tensor, seen: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """An observation of mean A x, (B, *O), 0 where not seen."""
        eps = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return torch.where(seen, mean + self.colour(eps, seen), 0.0)


class Diagonal(Noise):
    """Independent noise.

    Args:
        noise_std: Standard deviations, positive and finite, in the units of obs: shape () for one, (N,) for one per datum, (N or 1, *O) for one per
            entry. It broadcasts on the left against (B, *O); missing trailing axes are padded on the right.

    >>> Diagonal(torch.tensor([0.5, 2.0])).product(torch.ones(2, 3), torch.ones(1, 1, dtype=torch.bool))[:, 0]
    tensor([0.2500, 4.0000])
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("noise_std",)
    diagonal: ClassVar[bool] = True

    def __init__(self, noise_std: Tensor) -> None:
        self.noise_std = noise_std

    def check(self, O: tuple[int, ...]) -> None:
        """Shapes and signs."""
        check_std(self.noise_std, O)

    def std(self, O: tuple[int, ...]) -> Tensor:
        """noise_std with the axes of obs."""
        return padded(self.noise_std, O)

    def product(self, w: Tensor, seen: Tensor) -> Tensor:
        """std^2 w, hidden entries included: they are apart from the others either way."""
        return self.std(w.shape[1:]).square() * w

    def colour(self, eps: Tensor, seen: Tensor) -> Tensor:
        """std eps; the caller sets hidden entries to 0."""
        return self.std(eps.shape[1:]) * eps

    def whiten(self, r: Tensor, seen: Tensor) -> Tensor:
        """r / std where seen."""
        return r / self.std(r.shape[1:]) * seen

    def scaled(self, factor: float, O: tuple[int, ...]) -> Noise:
        """The same with factor std."""
        return Diagonal(self.noise_std * factor)


class Poisson(Diagonal):
    """Counts, with read-out noise: obs = g k + std e. Its covariance is that of an estimate of A x; half a count at least.

    Args:
        noise_gain: g, obs per count, positive: shape () or (N,) or (N or 1, *O).
        noise_std: Standard deviation of the read-out noise, not negative, shapes likewise; 0 for none.
        mean: The estimate of A x (N, *O); None before there is one.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("noise_gain", "noise_std")

    def __init__(self, noise_gain: Tensor, noise_std: Tensor, mean: Tensor | None = None) -> None:
        self.noise_gain, self.noise_std, self.mean = noise_gain, noise_std, mean

    def check(self, O: tuple[int, ...]) -> None:
        """Shapes and signs."""
        check_std(self.noise_gain, O, "noise_gain")
        check_std(self.noise_std.abs() + 1, O)
        if (self.noise_std < 0).any():
            raise ValueError(f"noise_std holds {float(self.noise_std.min()):g}, expected standard deviations of read-out noise, 0 or more")

    def at(self, mean: Tensor) -> Poisson:
        """The noise with its variance taken from an estimate of A x, (N, *O)."""
        return Poisson(self.noise_gain, self.noise_std, mean)

    def std(self, O: tuple[int, ...]) -> Tensor:
        """(g max(A x, g / 2) + std^2)^(1/2); where there is no estimate, that of one count."""
        g, read = padded(self.noise_gain, O), padded(self.noise_std, O)
        mean = g if self.mean is None else torch.maximum(self.mean, g / 2)
        return torch.sqrt(g * mean + read.square())

    def scaled(self, factor: float, O: tuple[int, ...]) -> Noise:
        """The Gaussian that stands for it, scaled: counts have no other units."""
        return Diagonal(self.std(O) * factor)

    def draw(self, mean: Tensor, seen: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Counts of max(A x, 0) / g, times g, and read-out noise."""
        O = tuple(mean.shape[1:])
        g = padded(self.noise_gain, O)
        counts = torch.poisson((mean / g).clamp(min=0), generator)
        eps = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return torch.where(seen, g * counts + padded(self.noise_std, O) * eps, 0.0)


def padded(tensor: Tensor, O: tuple[int, ...]) -> Tensor:
    """A tensor of shape (), (N,) or (N or 1, ...) with trailing axes of 1 until it has those of obs, (N or 1, ...)."""
    return tensor.reshape(*tensor.shape, *[1] * (1 + len(O) - tensor.ndim))


def check_std(std: Tensor, O: tuple[int, ...], name: str = "noise_std") -> None:
    """Refuse standard deviations of another shape, or that are not positive and finite."""
    got = tuple(std.shape)
    if len(got) > 1 + len(O) or any(a not in (1, b) for a, b in zip(got[1:], O)):
        wanted = ", ".join(["N or 1", *map(str, O)])
        raise ValueError(f"{name} has shape {got}, expected (), (N,) or ({wanted})")
    bad = std[~((std > 0) & std.isfinite())]
    if bad.numel():
        raise ValueError(f"{name} holds {bad.flatten()[0].item():g}, expected positive and finite standard deviations")
