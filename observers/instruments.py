r"""Recipes of instruments: how the operators of blurs, coarser grids, scanners, tomographs and sensing matrices are drawn for N data.

The class names are what a user types: `--observer blur --observer.sigma 2`. Nothing here imports torch before `draw` is called.
"""

# Annotations are evaluated here, not postponed: a command line that has to evaluate postponed ones imports torch for them.
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from observers.recipes import Recipe, identity, mask, projection

if TYPE_CHECKING:
    import torch

    from observers.base import Observer

__all__ = [
    "Recipe",
    "blur",
    "compose",
    "compressed",
    "downsample",
    "fourier",
    "identity",
    "mask",
    "mixed",
    "multicoil",
    "projection",
    "radon",
    "stack",
]


def _demand(recipe: str, name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{recipe}: {name} is {value:g}, expected {low:g} to {high:g}")


def _image_axes(shape: tuple[int, ...]) -> int:
    """How many of the last axes are space: all but the first of three or more."""
    return len(shape) - 1 if len(shape) > 2 else len(shape)


@dataclass(frozen=True)
class blur(Recipe):
    """x is convolved with a Gaussian PSF of sum 1, with noise.

    Attributes:
        sigma: Standard deviation of the PSF in pixels, .2 to 100.
        vary: Each datum has a PSF of its own, with sigma (1 + vary u), u uniform in [-1, 1]; 0 (one PSF for all) to .9.
        size: Pixels of the PSF per axis, odd; 0 stands for as many as reach 3 sigma.
        boundary: What is beyond the edge: circular, zero, reflect or replicate.

    >>> blur(sigma=1.0).draw((8, 8), 5, 0.5, None).psf.shape
    torch.Size([1, 7, 7])
    """

    sigma: float = 1.5
    vary: float = 0.0
    size: int = 0
    boundary: Literal["circular", "zero", "reflect", "replicate"] = "circular"

    def __post_init__(self) -> None:
        _demand("blur", "sigma", self.sigma, 0.2, 100)
        _demand("blur", "vary", self.vary, 0, 0.9)
        if self.size and (self.size < 1 or self.size % 2 == 0):
            raise ValueError(f"blur: size is {self.size}, expected an odd number, or 0")

    def draw(self, shape: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Observer":
        """h(j) proportional to exp(-|j|^2 / 2 sigma^2)."""
        import torch

        from observers.blur import Blur

        sigma = torch.tensor([self.sigma])
        if self.vary:
            sigma = self.sigma * (1 + self.vary * (2 * torch.rand(count, generator=generator) - 1))
        axes = _image_axes(shape)
        reach = self.size // 2 if self.size else math.ceil(3 * self.sigma * (1 + self.vary))
        reach = min(reach, min(shape[-axes:]) - 1)
        one = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma[:, None] ** 2))
        psf = one
        for _ in range(axes - 1):
            psf = psf[..., None] * one.reshape(len(one), *[1] * (psf.ndim - 1), -1)
        psf = psf / psf.flatten(1).sum(1).reshape(-1, *[1] * axes)
        return Blur(shape, torch.tensor(float(noise_std)), psf, self.boundary)


@dataclass(frozen=True)
class downsample(Recipe):
    """x on a coarser grid, with noise: block averages, or pixels of a blurred image.

    Attributes:
        factor: Entries per axis that become one, at least 2.
        sigma: Standard deviation of a Gaussian PSF in pixels of x, applied first; 0 for block averages.

    >>> downsample(factor=4).draw((8, 8), 5, 0.5, None).obs_shape
    (2, 2)
    """

    factor: int = 2
    sigma: float = 0.0

    def __post_init__(self) -> None:
        _demand("downsample", "factor", self.factor, 2, 1000)

    def draw(self, shape: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Observer":
        """Averages, or a blur and then every factor-th pixel."""
        import torch

        from observers.compose import Compose
        from observers.downsample import Downsample

        noise, axes = torch.tensor(float(noise_std)), _image_axes(shape)
        if not self.sigma:
            return Downsample(shape, noise, self.factor, axes)
        first = blur(self.sigma, boundary="reflect").draw(shape, count, noise_std, generator)
        return Compose(shape, noise, (first, Downsample(shape, noise, self.factor, axes, "sample")))


def _columns(shape: tuple[int, ...], count: int, acceleration: float, centre: float, generator: "torch.Generator") -> "torch.Tensor":
    """Cartesian masks (count, H, W): the columns of low frequency, and random ones until W / acceleration are sampled; frequency 0 in the middle."""
    import torch

    H, W = shape[-2:]
    wanted = max(1, round(W / acceleration))
    low = min(max(1, round(centre * W)), wanted)
    order = torch.rand(count, W, generator=generator)
    order[:, W // 2 - low // 2 : W // 2 - low // 2 + low] = 2.0
    chosen = order.argsort(1, descending=True)[:, :wanted]
    columns = torch.zeros(count, W, dtype=torch.bool).scatter(1, chosen, torch.ones(count, wanted, dtype=torch.bool))
    return columns[:, None].expand(-1, H, -1).contiguous()


@dataclass(frozen=True)
class fourier(Recipe):
    """Columns of k-space are sampled at random, low frequencies always, with noise: single-coil MRI.

    Attributes:
        acceleration: Columns over columns sampled, 1 to 100.
        centre: Share of the columns, those of lowest frequency, that are always sampled, 0 to 1.
        shared: One mask for all data instead of a new one per datum.

    >>> fourier(acceleration=2).draw((1, 8, 8), 5, 0.5, None).mask.float().mean().item()
    0.5
    """

    acceleration: float = 4.0
    centre: float = 0.08
    shared: bool = False

    def __post_init__(self) -> None:
        _demand("fourier", "acceleration", self.acceleration, 1, 100)
        _demand("fourier", "centre", self.centre, 0, 1)

    def draw(self, shape: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Observer":
        """A = m U."""
        import torch

        from observers.fourier import Fourier, check_image

        check_image("fourier", shape)
        seen = _columns(shape, 1 if self.shared else count, self.acceleration, self.centre, generator)
        return Fourier(shape, torch.tensor(float(noise_std)), seen, centred=1)


@dataclass(frozen=True)
class multicoil(Recipe):
    """Columns of k-space seen by coils around the image, with noise: parallel MRI.

    Attributes:
        coils: Number of coils, at least 1.
        acceleration: Columns over columns sampled, 1 to 100.
        centre: Share of the columns, those of lowest frequency, that are always sampled, 0 to 1.
        shared: One mask for all data instead of a new one per datum; the coils are the same for all.

    >>> multicoil(coils=3).draw((8, 8), 5, 0.5, None).obs_shape
    (3, 2, 8, 8)
    """

    coils: int = 4
    acceleration: float = 4.0
    centre: float = 0.08
    shared: bool = False

    def __post_init__(self) -> None:
        _demand("multicoil", "coils", self.coils, 1, 1000)
        _demand("multicoil", "acceleration", self.acceleration, 1, 100)

    def draw(self, shape: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Observer":
        """Gaussian sensitivities on a circle around the image, each with a phase, of sum of squares 1 at every pixel."""
        import torch

        from observers.fourier import check_image
        from observers.multicoil import Multicoil

        check_image("multicoil", shape)
        H, W = shape[-2:]
        i, j = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")
        angle = 2 * math.pi * torch.arange(self.coils)[:, None, None] / self.coils
        size = torch.exp(-((i - angle.sin()) ** 2 + (j - angle.cos()) ** 2) / 1.5)
        phase = angle + math.pi / 4 * (i * angle.cos() + j * angle.sin())
        s = torch.stack([size * phase.cos(), size * phase.sin()], dim=1)
        s = s / s.square().sum((0, 1)).sqrt()
        seen = _columns(shape, 1 if self.shared else count, self.acceleration, self.centre, generator)
        return Multicoil(shape, torch.tensor(float(noise_std)), seen, s[None], centred=1)


@dataclass(frozen=True)
class radon(Recipe):
    """Parallel projections at equally spaced angles, with noise: tomography.

    Attributes:
        angles: Number of projections, at least 1.
        shared: The same angles for all data instead of angles turned at random for each.

    >>> radon(angles=6).draw((8, 8), 5, 0.5, None).angles.shape
    torch.Size([5, 6])
    """

    angles: int = 30
    shared: bool = False

    def __post_init__(self) -> None:
        _demand("radon", "angles", self.angles, 1, 100_000)

    def draw(self, shape: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Observer":
        """theta_t = pi (t + u) / T."""
        import torch

        from observers.radon import Radon

        turn = torch.zeros(1, 1) if self.shared else torch.rand(count, 1, generator=generator)
        return Radon(shape, torch.tensor(float(noise_std)), math.pi * (torch.arange(self.angles) + turn) / self.angles)


@dataclass(frozen=True)
class compressed(Recipe):
    """x is seen through random functionals, with noise: compressed sensing.

    Attributes:
        ratio: Functionals over entries of x, above 0 and at most 1.
        kind: hadamard (a fast transform with random signs and rows), gaussian or signs.
        shared: One matrix for all data instead of a new one per datum.

    >>> compressed(ratio=0.25).draw((4, 4), 5, 0.5, None).obs_shape
    (4,)
    """

    ratio: float = 0.25
    kind: Literal["hadamard", "gaussian", "signs"] = "hadamard"
    shared: bool = False

    def __post_init__(self) -> None:
        _demand("compressed", "ratio", self.ratio, 1e-6, 1)

    def draw(self, shape: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Observer":
        """A matrix per seed."""
        import torch

        from observers.compressed import Compressed

        seeds = torch.randint(2**62, (1 if self.shared else count,), generator=generator)
        rows = max(1, round(self.ratio * math.prod(shape)))
        return Compressed(shape, torch.tensor(float(noise_std)), seeds, rows, self.kind)


@dataclass(frozen=True)
class compose(Recipe):
    """One operator after another, with noise after the last.

    Attributes:
        first: Applied to x.
        second: Applied to what the first makes of it.

    >>> compose(downsample(), mask(keep=0.5)).draw((8, 8), 5, 0.5, None).obs_shape
    (4, 4)
    """

    first: Recipe = blur()
    second: Recipe = mask()

    def draw(self, shape: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Observer":
        """A = A_2 A_1."""
        import torch

        from observers.compose import Compose

        one = self.first.draw(shape, count, noise_std, generator)
        return Compose(shape, torch.tensor(float(noise_std)), (one, self.second.draw(one.obs_shape, count, noise_std, generator)))


@dataclass(frozen=True)
class stack(Recipe):
    """Two observations of the same x, with noise: instruments or exposures.

    Attributes:
        first: One instrument.
        second: The other.

    >>> stack(mask(), downsample()).draw((8, 8), 5, 0.5, None).obs_shape
    (80,)
    """

    first: Recipe = mask()
    second: Recipe = downsample()

    def draw(self, shape: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Observer":
        """A = (A_1, A_2)."""
        import torch

        from observers.stack import Stack

        parts = [recipe.draw(shape, count, noise_std, generator) for recipe in (self.first, self.second)]
        return Stack(shape, torch.tensor(float(noise_std)), parts)


@dataclass(frozen=True)
class mixed(Recipe):
    """Each datum is seen by one of two instruments, drawn at random, with noise: several instruments in one file.

    Attributes:
        first: One instrument.
        second: The other; `mixed` again for a third.
        share: Of the data that the first sees, above 0 and below 1.

    >>> mixed(mask(), downsample()).draw((8, 8), 5, 0.5, None).obs_shape
    (80,)
    """

    first: Recipe = mask()
    second: Recipe = downsample()
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"mixed: share is {self.share:g}, expected a fraction above 0 and below 1")

    def draw(self, shape: tuple[int, ...], count: int, noise_std: float, generator: "torch.Generator") -> "Observer":
        """Both stacked, then a mask that leaves one of the two to each datum."""
        import torch

        from observers.compose import Compose
        from observers.mask import Mask

        both = stack(self.first, self.second).draw(shape, count, noise_std, generator)
        by_first = (torch.rand(count, 1, generator=generator) < self.share).expand(-1, math.prod(both.parts[0].obs_shape))
        by_second = ~by_first[:, :1].expand(-1, both.obs_shape[0] - by_first.shape[1])
        noise, chosen = torch.tensor(float(noise_std)), torch.cat([by_first, by_second], dim=1)
        return Compose(shape, noise, (both, Mask(both.obs_shape, noise, chosen & both.observed())))
