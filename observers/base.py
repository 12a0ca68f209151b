r"""Linear Gaussian observers: obs = A x + n, n ~ N(0, cov_obs).

A and cov_obs may differ from datum to datum. All that an algorithm asks of an observer is A, its adjoint At with <A x, w> = <x, At w>, and
cov_obs (noise). Where At cov_obs^-1 A is diagonal, the observation is one more measurement of x,

    z = (At cov_obs^-1 A)^-1 At cov_obs^-1 obs,    z | x ~ N(x, sigma^2),    sigma^2 = diag(At cov_obs^-1 A)^-1,

with sigma infinite where an entry of x was not observed; `as_measurement` returns the pair.

Parameters of A are arrays, which may differ from datum to datum, and options, which may not. An array with a leading axis of N holds one operator
per datum, with a leading axis of 1 one for all. A batch of B data is served by the observer of those data, `observer.rows(index)`, or by one
that is shared.

Source: the generalised least-squares estimate z is Aitken (1935), On least squares and linear combination of observations.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from observers.noise import Diagonal, Noise

Index = Tensor | slice
Option = str | int | float


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
    """A linear operator A and the noise it is observed with.

    A subclass names its arrays and options, and defines `forward` and `adjoint`. One that checks or converts its arrays has a constructor of its
    own, which sets them and then calls this one.

    Args:
        shape: S, the shape of x.
        noise: The noise, or the standard deviation of n in the units of obs, as in `noise.Diagonal`.
        parameters: Arrays and options by name; options that are left out keep the value of the class.

    Attributes:
        name: What files and the command line call this observer.
        array_names: The arrays that define A, each of them with a leading axis of N (per datum) or 1 (shared).
        option_names: Plain values that define A, the same for all data: strings and numbers.
        parts: Observers that this one is made of; their arrays and options are named `0.mask` and so on.
        complex_obs: Whether complex observations in files are taken as pairs of real channels, in the third axis from the end.
    """

    name: ClassVar[str]
    array_names: ClassVar[tuple[str, ...]] = ()
    option_names: ClassVar[tuple[str, ...]] = ()
    complex_obs: ClassVar[bool] = False
    parts: tuple[Observer, ...] = ()

    def __init__(self, shape: tuple[int, ...], noise: Noise | Tensor, **parameters: Any) -> None:
        for key, value in parameters.items():
            if key not in (*self.array_names, *self.option_names):
                raise ValueError(f"observer '{self.name}' has no parameter '{key}', it takes {[*self.array_names, *self.option_names] or 'none'}")
            setattr(self, key, value)
        self.shape = tuple(int(length) for length in shape)
        self.noise = noise if isinstance(noise, Noise) else Diagonal(noise)
        self.noise.check(self.obs_shape)
        if self.noise.complete and not bool(self.observed().all()):
            raise ValueError("noise_spectrum is for observations of which every entry is observed; give noise_cov where some are hidden or NaN")
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
    def noise_std(self) -> Tensor:
        """Standard deviations as they were given, (), (N,) or (N or 1, *O), where the noise is independent; else the marginal ones."""
        return self.noise.noise_std if type(self.noise) is Diagonal else self.std()

    @property
    def count(self) -> int | None:
        """Number of data N where an array or the noise is per datum, else None. One datum counts as shared."""
        lengths = {array.shape[0] for array in self._tensors().values() if array.ndim} - {1}
        return max(lengths, default=None)

    def arrays(self) -> dict[str, Tensor]:
        """The arrays that define A, each (N or 1, ...), by name; those of parts as `0.mask`."""
        own = {name: getattr(self, name) for name in self.array_names}
        return own | {f"{i}.{name}": array for i, part in enumerate(self.parts) for name, array in part.arrays().items()}

    def options(self) -> dict[str, Option]:
        """The plain values that define A, by name; those of parts as `0.boundary`, and their names as `0.observer`."""
        own = {name: getattr(self, name) for name in self.option_names}
        named = lambda part: {"observer": part.name, **part.options()}
        return own | {f"{i}.{name}": value for i, part in enumerate(self.parts) for name, value in named(part).items()}

    def rows(self, index: Index) -> Observer:
        """The observer of some of the data.

        Args:
            index: Indices (B,), int64, or a slice.

        Returns:
            A shallow copy; what is per datum is restricted, what is shared stays.
        """
        return self.mapped(lambda array: array[index] if array.ndim and array.shape[0] != 1 else array)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Observer:
        """A copy on a device and, where dtype is given, with its floating-point tensors in that dtype."""
        return self.mapped(lambda array: array.to(device, dtype if array.is_floating_point() else None))

    def with_noise(self, noise: Noise | Tensor) -> Observer:
        """A copy with another noise, or noise_std of a shape that the constructor takes; not checked again."""
        changed = copy.copy(self)
        changed.noise = noise if isinstance(noise, Noise) else Diagonal(noise)
        return changed

    def std(self) -> Tensor:
        """Marginal standard deviations of the noise with the axes of obs, shape (N or 1, ...), broadcastable against (B, *O)."""
        return self.noise.std(self.obs_shape)

    def cov(self, w: Tensor) -> Tensor:
        """cov_obs w, shape (B, *O)."""
        return self.noise.product(w, self.observed())

    def whiten(self, r: Tensor) -> Tensor:
        """R^-1 r with R R^T = cov_obs, 0 where nothing is observed, shape (B, *O): white noise of unit variance for r = obs - A x."""
        return self.noise.whiten(r, self.observed())

    def simulate(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw obs = A x + n.

        Args:
            x: Clean data (B, *S).
            generator: Source of randomness.

        Returns:
            Observations (B, *O), 0 where nothing is observed.
        """
        return self.noise.draw(self.forward(x), self.observed(), generator)

    def observed(self) -> Tensor:
        """Which entries of obs carry information: bool, (N or 1, ...), broadcastable against (B, *O); all by default. Entries that A makes 0 may be
        counted among them: they carry noise alone, which harms nothing."""
        return torch.ones([1] * (1 + len(self.obs_shape)), dtype=torch.bool, device=self._device())

    def without(self, missing: Tensor) -> Observer:
        """The observer that does not see some entries of obs: a mask after this one, unless a subclass has a better way.

        Args:
            missing: Entries to drop, bool, (N, *O).
        """
        from observers.compose import Compose
        from observers.mask import Mask

        return Compose(self.shape, self.noise, (self, Mask(self.obs_shape, torch.ones(()), ~missing)))

    def diagonal(self) -> Tensor | None:
        """The diagonal of A, (N or 1, *S or ones), where A is diagonal and O = S; else None."""
        return None

    def as_measurement(self, obs: Tensor) -> tuple[Tensor, Tensor] | None:
        """The observation as one more measurement of x, where At cov_obs^-1 A is diagonal.

        Args:
            obs: Observations (B, *O).

        Returns:
            z (B, *S), 0 where nothing is observed, and sigma (B or 1, *S), infinite there; None where the matrix is not diagonal.
        """
        a = self.diagonal()
        if a is None or not self.noise.diagonal:
            return None
        seen = a != 0
        divisor = torch.where(seen, a, torch.ones_like(a)).to(obs.dtype)
        sigma = torch.where(seen, self.std() / divisor.abs(), torch.inf)
        return torch.where(seen, obs / divisor, 0.0), sigma.expand(-1, *self.shape)

    @classmethod
    def assemble(cls, shape: tuple[int, ...], noise: Noise | Tensor, parameters: dict[str, Any]) -> Observer:
        """The observer of flat parameters, as a file holds them.

        Raises:
            ValueError: A parameter that is missing or unknown.
        """
        for array in cls.array_names:
            if array not in parameters:
                raise ValueError(f"observer '{cls.name}' needs an array '{array}', found {sorted(parameters) or 'none'}")
        for key in parameters:
            if key not in (*cls.array_names, *cls.option_names):
                raise ValueError(f"observer '{cls.name}' has no array '{key}', it takes {[*cls.array_names, *cls.option_names] or 'none'}")
        return cls(shape, noise, **parameters)

    @classmethod
    def example(cls, shape: tuple[int, ...], count: int, generator: torch.Generator) -> Observer:
        """An observer of `count` data to check the class with (contract); a class with arrays overrides it.

        Raises:
            ValueError: The class has arrays, and nobody says which.
        """
        if cls.array_names:
            raise ValueError(
                f"observer '{cls.name}' has arrays {', '.join(cls.array_names)}: define the class method example(shape, count, generator), "
                "or give --observations, a file that holds them"
            )
        return cls(shape, torch.tensor(0.5))

    @classmethod
    def infer_shape(cls, obs_shape: tuple[int, ...], parameters: dict[str, Any]) -> tuple[int, ...]:
        """S, where a file does not say it: that of one observation, O, unless a subclass says otherwise; () where nobody can know."""
        return obs_shape

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Observer:
        """A copy with changed tensors, those of noise and parts included; nothing is checked again."""
        changed = copy.copy(self)
        changed.__dict__.update({name: change(getattr(self, name)) for name in self.array_names})
        changed.noise = self.noise.mapped(change)
        changed.parts = tuple(part.mapped(change) for part in self.parts)
        return changed

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.arrays(), **self.noise.tensors()}

    def _device(self) -> torch.device:
        return next(iter(self.noise.tensors().values())).device

    def _check_counts(self) -> None:
        shapes = {name: tuple(array.shape) for name, array in self._tensors().items() if array.ndim and array.shape[0] != 1}
        if len({shape[0] for shape in shapes.values()}) > 1:
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(f"the leading axes disagree on the number of data: {listed}")
