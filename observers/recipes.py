r"""Recipes: how the operators of a data set are drawn, A_i ~ p(A) for i = 1..N.

The class names are what a user types: `--observer mask --observer.keep 0.25`. Nothing here imports torch before `draw` is called.

Source: uniform random orthonormal rows as the QR factor of a Gaussian matrix with the signs of R, How to generate random matrices from the
classical compact groups (Mezzadri 2007), Sec. 5.
"""

# Annotations are evaluated here, not postponed: a command line that has to evaluate postponed ones imports torch for them.
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from observers.base import Observer


class Recipe(ABC):
    """How to draw the operators of N data."""

    @abstractmethod
    def draw(self, shape: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Observer":
        """Draw an observer.

        Args:
            shape: S, the shape of x.
            count: N, the number of data.
            noise_std: Standard deviation of n, one for all, in the units of obs.
            generator: Source of randomness, on the CPU.

        Returns:
            An observer of N data, on the CPU, in float32.
        """


@dataclass(frozen=True)
class identity(Recipe):
    """Every entry is observed, with noise.

    >>> identity().draw((2,), 5, 0.5, None).name
    'identity'
    """

    def draw(self, shape: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Observer":
        """A = I."""
        import torch

        from observers.identity import Identity

        return Identity(shape, torch.tensor(float(noise_std)))


@dataclass(frozen=True)
class mask(Recipe):
    """Each entry is kept or hidden at random, with noise.

    Attributes:
        keep: Fraction of the entries kept, in (0, 1]: the probability of each, independently.
        shared: One mask for all data instead of a new one per datum.

    >>> mask(keep=0.25).draw((3, 4), 5, 0.5, None).mask.shape
    torch.Size([5, 3, 4])
    """

    keep: float = 0.5
    shared: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"mask: keep is {self.keep}, expected a fraction above 0 and at most 1")

    def draw(self, shape: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Observer":
        """A = diag(m), m_j ~ Bernoulli(keep)."""
        import torch

        from observers.mask import Mask

        seen = torch.rand(1 if self.shared else count, *shape, generator=generator) < self.keep
        return Mask(shape, torch.tensor(float(noise_std)), seen)


@dataclass(frozen=True)
class projection(Recipe):
    """x is seen through a few random orthonormal directions, with noise.

    Attributes:
        rows: Number of directions m, at least 1 and at most the number of entries of x.
        shared: One matrix for all data instead of a new one per datum.

    >>> projection(rows=2).draw((3,), 5, 0.5, None).matrix.shape
    torch.Size([5, 2, 3])
    """

    rows: int = 2
    shared: bool = False

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"projection: rows is {self.rows}, expected at least 1")

    def draw(self, shape: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Observer":
        """A = P, P P^T = I, uniform over the orthonormal rows."""
        import torch

        from observers.projection import Projection

        d = math.prod(shape)
        if self.rows > d:
            raise ValueError(f"projection: rows is {self.rows}, expected at most {d}, the number of entries of x {tuple(shape)}")
        Q, R = torch.linalg.qr(torch.randn(1 if self.shared else count, d, self.rows, generator=generator))
        signs = R.diagonal(dim1=-2, dim2=-1).sign()
        return Projection(shape, torch.tensor(float(noise_std)), (Q * signs[:, None, :]).mT.contiguous())
