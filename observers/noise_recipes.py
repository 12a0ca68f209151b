r"""Recipes of noise: how the noise of N observations is drawn, about a standard deviation that the user gives.

The class names are what a user types: `--noise per_datum --noise.spread 3`. Nothing here imports torch before `draw` is called.
"""

# Annotations are evaluated here, not postponed: a command line that has to evaluate postponed ones imports torch for them.
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from observers.noise import Noise

__all__ = ["NoiseRecipe", "counts", "level", "low_rank", "per_datum", "per_entry", "stationary"]


class NoiseRecipe(ABC):
    """How to draw the noise of N observations.

    Attributes:
        without_readout: Whether the standard deviation may be 0.
    """

    without_readout: ClassVar[bool] = False

    @abstractmethod
    def draw(self, O: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Noise":
        """Draw the noise's law, not the noise.

        Args:
            O: Shape of one observation.
            count: N, the number of data.
            noise_std: Typical standard deviation, in the units of obs.
            generator: Source of randomness, on the CPU.

        Returns:
            The noise, on the CPU, in float32.
        """


def _spread(recipe: str, spread: float) -> None:
    if not 1 < spread <= 1e6:
        raise ValueError(f"{recipe}: spread is {spread:g}, expected a factor above 1 and at most 1e6")


def _between(shape: tuple[int, ...], noise_std: float, spread: float, generator: "torch.Generator") -> "torch.Tensor":
    """Log-uniform from noise_std / spread to noise_std * spread."""
    import torch

    return noise_std * spread ** (2 * torch.rand(shape, generator=generator) - 1)


@dataclass(frozen=True)
class level(NoiseRecipe):
    """White noise of one level for all.

    >>> level().draw((3,), 5, 0.5, None).noise_std
    tensor(0.5000)
    """

    def draw(self, O: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Noise":
        """C = std^2 I."""
        import torch

        from observers.noise import Diagonal

        return Diagonal(torch.tensor(float(noise_std)))


@dataclass(frozen=True)
class per_datum(NoiseRecipe):
    """White noise with a level for each datum.

    Attributes:
        spread: Levels are log-uniform from noise_std / spread to noise_std * spread, above 1.

    >>> per_datum(spread=3.0).draw((3,), 5, 0.5, None).noise_std.shape
    torch.Size([5])
    """

    spread: float = 2.0

    def __post_init__(self) -> None:
        _spread("per_datum", self.spread)

    def draw(self, O: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Noise":
        """C_i = s_i^2 I."""
        from observers.noise import Diagonal

        return Diagonal(_between((count,), noise_std, self.spread, generator))


@dataclass(frozen=True)
class per_entry(NoiseRecipe):
    """Independent noise with a level for each entry.

    Attributes:
        spread: Levels are log-uniform from noise_std / spread to noise_std * spread, above 1.
        shared: The same levels for all data instead of new ones per datum.

    >>> per_entry().draw((3, 4), 5, 0.5, None).noise_std.shape
    torch.Size([5, 3, 4])
    """

    spread: float = 2.0
    shared: bool = False

    def __post_init__(self) -> None:
        _spread("per_entry", self.spread)

    def draw(self, O: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Noise":
        """C_i = diag(s_i^2)."""
        from observers.noise import Diagonal

        return Diagonal(_between((1 if self.shared else count, *O), noise_std, self.spread, generator))


@dataclass(frozen=True)
class low_rank(NoiseRecipe):
    """White noise and a few random patterns of random strength: drifts, stripes, calibration errors.

    Attributes:
        rank: Number of patterns, at least 1.
        strength: Standard deviation of the patterns' sum in an entry, in units of noise_std, that of the white part.
        shared: The same patterns for all data instead of new ones per datum.

    >>> low_rank(rank=2).draw((3, 4), 5, 0.5, None).noise_factor.shape
    torch.Size([1, 12, 2])
    """

    rank: int = 3
    strength: float = 2.0
    shared: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"low_rank: rank is {self.rank}, expected at least 1")
        if not 0 < self.strength <= 1e6:
            raise ValueError(f"low_rank: strength is {self.strength:g}, expected a factor above 0 and at most 1e6")

    def draw(self, O: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Noise":
        """C = std^2 I + F F^T, F_jr ~ N(0, (strength std)^2 / rank)."""
        import torch

        from observers.correlated import LowRank

        F = torch.randn(1 if self.shared else count, math.prod(O), self.rank, generator=generator)
        return LowRank(torch.tensor(float(noise_std)), F * (noise_std * self.strength / math.sqrt(self.rank)))


@dataclass(frozen=True)
class stationary(NoiseRecipe):
    """Noise that is correlated between neighbours, alike everywhere, of standard deviation noise_std: for observers that see every entry of obs.

    Attributes:
        length: Correlation length in entries, above 0.

    >>> stationary(length=2.0).draw((8, 8), 5, 0.5, None).std((8, 8)).squeeze()
    tensor(0.5000)
    """

    length: float = 1.5

    def __post_init__(self) -> None:
        if not 0 < self.length <= 1e6:
            raise ValueError(f"stationary: length is {self.length:g}, expected a number of entries above 0 and at most 1e6")

    def draw(self, O: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Noise":
        """Power proportional to (1 + |2 pi f length|^2)^(-(D + 1) / 2) over the D axes of space, f in cycles per entry."""
        import torch

        from observers.correlated import Fourier

        axes = O[1:] if len(O) > 2 else O
        grids = torch.meshgrid(*[torch.fft.fftfreq(n) for n in axes], indexing="ij")
        k = 2 * math.pi * self.length * sum(f**2 for f in grids).sqrt()
        power = (1 + k**2) ** (-(len(axes) + 1) / 2)
        return Fourier((noise_std**2 * power / power.mean()).expand(1, *O).contiguous())


@dataclass(frozen=True)
class counts(NoiseRecipe):
    """Counts, such as photons, and white read-out noise of noise_std, which may be 0; A x must not be negative.

    Attributes:
        gain: Units of obs per count, above 0: the variance of counts is gain times A x.

    >>> type(counts(gain=0.1).draw((3,), 5, 0.0, None)).__name__
    'Poisson'
    """

    without_readout: ClassVar[bool] = True
    gain: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.gain < math.inf:
            raise ValueError(f"counts: gain is {self.gain:g}, expected units of obs per count, above 0")

    def draw(self, O: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Noise":
        """obs = g Poisson(A x / g) + std e."""
        import torch

        from observers.noise import Poisson

        return Poisson(torch.tensor(float(self.gain)), torch.tensor(float(noise_std)))
