r"""Linear Gaussian observers: obs = A x + n, n ~ N(0, cov_obs).

A and the diagonal cov_obs = diag(noise_std^2) may differ from datum to datum. All that an algorithm asks of an observer is A, its
adjoint At with <A x, w> = <x, At w>, and cov_obs. Where At cov_obs^-1 A is diagonal, the observation is one more measurement of x,

    z = (At cov_obs^-1 A)^-1 At cov_obs^-1 obs,    z | x ~ N(x, sigma^2),    sigma^2 = diag(At cov_obs^-1 A)^-1,

with sigma infinite where an entry of x was not observed; `as_measurement` returns the pair.

An array with a leading axis of N holds one operator per datum, with a leading axis of 1 one for all. A batch of B data is served by the
observer of those data, `observer.rows(index)`, or by one that is shared.

Source: the generalised least-squares estimate z is Aitken (1935), On least squares and linear combination of observations.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

Index = Tensor | slice


def expect(name: str, array: Tensor, trailing: tuple[int | None, ...]) -> None:
    """Refuse an array whose shape is not (N or 1, *trailing).

    Args:
        name: What the message calls the array.
        array: The array.
        trailing: Lengths after the leading axis; None stands for any.

    Raises:
        ValueError: The message holds both shapes.
    """
    lengths = tuple(array.shape[1:])
    fits = array.ndim == 1 + len(trailing) and all(want in (None, got) for want, got in zip(trailing, lengths))
    if not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in trailing)
        raise ValueError(f"{name} has shape {tuple(array.shape)}, expected (N or 1, {wanted})")


class Observer(ABC):
    """A linear operator A and the standard deviation of the noise it is observed with.

    A subclass sets its arrays, then calls this constructor, which checks what all observers have in common.

    Args:
        shape: S, the shape of x.
        noise_std: Standard deviation of n in the units of obs, positive and finite: shape () for one, (N,) for one per datum, (N or 1, *O)
            for one per entry. It broadcasts on the left against (B, *O); missing trailing axes are padded on the right.

    Attributes:
        name: What files and the command line call this observer.
        array_names: The arrays that define A, each of them with a leading axis of N (per datum) or 1 (shared).
    """

    name: ClassVar[str]
    array_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: tuple[int, ...], noise_std: Tensor) -> None:
        self.shape = tuple(int(length) for length in shape)
        self.noise_std = noise_std
        self._check_noise()
        self._check_counts()

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """A x, from (B, *S) to (B, *O)."""

    @abstractmethod
    def adjoint(self, w: Tensor) -> Tensor:
        """At w, from (B, *O) to (B, *S)."""

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """O, the shape of one observation; S unless a subclass says otherwise."""
        return self.shape

    @property
    def count(self) -> int | None:
        """Number of data N where an array or the noise is per datum, else None. One datum counts as shared."""
        lengths = {array.shape[0] for array in self._tensors().values() if array.ndim} - {1}
        return max(lengths, default=None)

    def arrays(self) -> dict[str, Tensor]:
        """The arrays that define A, each (N or 1, ...), by name."""
        return {name: getattr(self, name) for name in self.array_names}

    def rows(self, index: Index) -> Observer:
        """The observer of some of the data.

        Args:
            index: Indices (B,), int64, or a slice.

        Returns:
            A shallow copy; what is per datum is restricted, what is shared stays.
        """
        return self._mapped(lambda array: array[index] if array.ndim and array.shape[0] != 1 else array)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Observer:
        """A copy on a device and, where dtype is given, with its floating-point tensors in that dtype."""
        return self._mapped(lambda array: array.to(device, dtype if array.is_floating_point() else None))

    def with_noise(self, noise_std: Tensor) -> Observer:
        """A copy with another noise_std, of a shape that the constructor takes; not checked again."""
        changed = copy.copy(self)
        changed.noise_std = noise_std
        return changed

    def std(self) -> Tensor:
        """Noise standard deviation with the axes of obs, shape (N or 1, ...), broadcastable against (B, *O)."""
        missing = 1 + len(self.obs_shape) - self.noise_std.ndim
        return self.noise_std.reshape(*self.noise_std.shape, *[1] * missing)

    def cov(self, w: Tensor) -> Tensor:
        """cov_obs w, shape (B, *O)."""
        return self.std().square() * w

    def simulate(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw obs = A x + n.

        Args:
            x: Clean data (B, *S).
            generator: Source of randomness.

        Returns:
            Observations (B, *O), 0 where nothing is observed.
        """
        mean = self.forward(x)
        eps = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return torch.where(self.observed(), mean + self.std() * eps, 0.0)

    def observed(self) -> Tensor:
        """Which entries of obs carry information: bool, (N or 1, ...), broadcastable against (B, *O); all by default."""
        return torch.ones([1] * (1 + len(self.obs_shape)), dtype=torch.bool, device=self.noise_std.device)

    def without(self, missing: Tensor) -> Observer:
        """The observer that does not see some entries of obs.

        Args:
            missing: Entries to drop, bool, (N, *O).

        Raises:
            ValueError: Unless a subclass says how.
        """
        raise ValueError(f"observer {self.name} cannot do without single entries of obs")

    def as_measurement(self, obs: Tensor) -> tuple[Tensor, Tensor] | None:
        """The observation as one more measurement of x, where At cov_obs^-1 A is diagonal.

        Args:
            obs: Observations (B, *O).

        Returns:
            z (B, *S), 0 where nothing is observed, and sigma (B or 1, *S), infinite there; None where the matrix is not diagonal.
        """
        return None

    @classmethod
    def infer_shape(cls, obs_shape: tuple[int, ...], arrays: dict[str, Tensor]) -> tuple[int, ...]:
        """S, where a file does not say it: that of one observation, O, unless a subclass says otherwise."""
        return obs_shape

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.arrays(), "noise_std": self.noise_std}

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Observer:
        changed = copy.copy(self)
        changed.__dict__.update({name: change(array) for name, array in self._tensors().items()})
        return changed

    def _check_noise(self) -> None:
        got, O = tuple(self.noise_std.shape), self.obs_shape
        if len(got) > 1 + len(O) or any(a not in (1, b) for a, b in zip(got[1:], O)):
            wanted = ", ".join(["N or 1", *map(str, O)])
            raise ValueError(f"noise_std has shape {got}, expected (), (N,) or ({wanted})")
        bad = self.noise_std[~((self.noise_std > 0) & self.noise_std.isfinite())]
        if bad.numel():
            raise ValueError(f"noise_std holds {bad.flatten()[0].item():g}, expected positive and finite standard deviations")

    def _check_counts(self) -> None:
        shapes = {name: tuple(array.shape) for name, array in self._tensors().items() if array.ndim and array.shape[0] != 1}
        if len({shape[0] for shape in shapes.values()}) > 1:
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(f"the leading axes disagree on the number of data: {listed}")
