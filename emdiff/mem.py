r"""Energies: denoisers whose score is the gradient of a scalar, p(y) prop. to exp(-f(y)).

    xhat^(m)(y) = y_m - sigma_m^2 grad_m f(y)   (eq. 11),       score = -grad f,       xhat: the precision-weighted mean over m

MEM2 (eq. 21, here for unequal levels): a quadratic form in the outputs nu of any denoiser, and a metaencoder h that may be left out,

    f(y) = sum_m |y_m - nu_m(y)|^2 / (2 sigma_m^2) + h(y, nu(y)).

The gradient goes through nu: detaching it anywhere would make the Jacobian of xhat, and with it V[x | y] and all guidance, that of another model.
It is
differentiable once more in every mode, since training and moments both need its derivative. With M = 1 this is DEEN, neural empirical Bayes.

Two views. Pooled: the network sees ybar and tau, any number of measurements of any levels; the energy of y is then

    f(y) = f(ybar; tau) + sum_m |y_m - ybar|^2 / (2 sigma_m^2),

whose gradient has xhat(y) = ybar - tau^2 grad f(ybar; tau) for every m. Channels, the paper's: all M measurements of one fixed set of levels.

Source: Multimeasurement Generative Models (Saremi & Srivastava 2022), Sec. 4.2; Neural empirical Bayes (Saremi & Hyvarinen 2019).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from emdiff.denoise import Denoiser
from emdiff.measurement import align, pool
from emdiff.paper_nets import level_channels

COARSEST = 40.0
"""In units of the data's std: an entry that was not measured is taken as measured at ybar = 0 with this level, which has a 1600th of the
weight of the prior.
"""

Scalar = Callable[[Tensor, Tensor, Tensor], Tensor]


class EnergyDenoiser(Denoiser):
    """A denoiser that is the gradient of an energy; subclasses define `free_energy`.

    Args:
        levels: sigma_1..sigma_M of the channel view, shape (M,); None for the pooled one.
    """

    def __init__(self, levels: Tensor | None = None) -> None:
        super().__init__()
        self.pooled = levels is None
        self.register_buffer("levels", None if levels is None else levels.clone())

    @abstractmethod
    def free_energy(self, y: Tensor, sigma: Tensor) -> Tensor:
        """f of what the network sees, shape (B,): y (B, M, *S), or ybar (B, 1, *S) with levels (B or 1, 1, *S or ones)."""

    def energy(self, y: Tensor, sigma: Tensor) -> Tensor:
        """f(y) = -log p(y) + const of all measurements, shape (B,); finite levels."""
        if not self.pooled:
            return self.free_energy(y, self._own(sigma))
        ybar, tau = self._reduced(y, sigma)
        return self.free_energy(ybar, tau) + ((y - ybar).square() / align(sigma, y).square()).flatten(1).sum(1) / 2

    def nu(self, y: Tensor, sigma: Tensor) -> Tensor:
        """The M estimates y_m - sigma_m^2 grad_m f, shape (B, M, *S)."""
        if not self.pooled:
            return self._estimates(y, self._own(sigma))
        return self._estimates(*self._reduced(y, sigma)).expand(y.shape)

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        """E[x | y], shape (B, *S)."""
        if self.pooled:
            return self._estimates(*self._reduced(y, sigma))[:, 0]
        return pool(self.nu(y, sigma), sigma).ybar

    def loss(self, target: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """As `MDAE.loss` where pooled, as the base otherwise; shape (B,)."""
        if not self.pooled:
            return super().loss(target, y, sigma)
        p = pool(y, sigma).precision
        return ((1 + p) * (self.xhat(y, sigma) - target).square()).flatten(1).mean(1)

    def _own(self, sigma: Tensor) -> Tensor:
        """The levels, if they are those that the network was made for.

        Raises:
            ValueError: for other levels.
        """
        if sigma.shape != self.levels.shape or not torch.allclose(sigma.to(self.levels), self.levels):
            raise ValueError(f"this energy was made for levels {self.levels.tolist()}, not {sigma.tolist()}; the pooled view takes any")
        return sigma

    def _reduced(self, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(ybar (B, 1, *S), tau (B or 1, 1, *S or ones)), tau at most COARSEST."""
        ybar, p = pool(y, sigma)
        return ybar[:, None], p.clamp(min=COARSEST**-2).rsqrt()[:, None]

    def _estimates(self, y: Tensor, sigma: Tensor) -> Tensor:
        """y - sigma^2 grad f, differentiable again wherever the caller records gradients; works in inference mode too."""
        again = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            y, sigma = (t.clone() if t.is_inference() else t for t in (y, sigma))
            leaf = y if again and y.requires_grad else y.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.free_energy(leaf, sigma).sum(), leaf, create_graph=again)
            return leaf - align(sigma, leaf).square() * slope if again else y - align(sigma, y).square() * slope


class MEM(EnergyDenoiser):
    """MEM2: the quadratic form of a denoiser's outputs, with an optional metaencoder.

    Args:
        inner: nu; pooled (MDAE) or one output per measurement (ChannelMDAE).
        metaencoder: h(z, nu, c) -> (B,), with z and nu (B, M, *S), z scaled to variance 1; None for h = 0.
        levels: Those of inner, for the channel view; None where inner is pooled.

    >>> from emdiff.mdae import MDAE
    >>> from emdiff.nn import MLP
    >>> MEM(MDAE(MLP((3,)))).score(torch.zeros(2, 4, 3), torch.ones(4)).shape
    torch.Size([2, 4, 3])
    """

    def __init__(self, inner: Denoiser, metaencoder: Scalar | None = None, levels: Tensor | None = None) -> None:
        super().__init__(levels)
        self.inner, self.metaencoder = inner, metaencoder

    def free_energy(self, y: Tensor, sigma: Tensor) -> Tensor:
        """sum_m |y_m - nu_m|^2 / (2 sigma_m^2) + h, shape (B,)."""
        nu = self.inner.nu(y, sigma)
        return quadratic(y, nu, sigma) + meta(self.metaencoder, y, nu, sigma)


def quadratic(y: Tensor, nu: Tensor, sigma: Tensor) -> Tensor:
    """sum_m |y_m - nu_m|^2 / (2 sigma_m^2), shape (B,)."""
    return ((y - nu) / align(sigma, y)).square().flatten(1).sum(1) / 2


def scaled(y: Tensor, sigma: Tensor) -> Tensor:
    """y / sqrt(1 + sigma^2): measurements of standardised data, brought to variance 1."""
    return y / torch.sqrt(1 + align(sigma, y).square())


def coordinate(y: Tensor, sigma: Tensor) -> Tensor:
    """c of the levels, shape (B or 1, 1, *S or ones); all measurements of a channel view share theirs."""
    return torch.log1p(align(sigma, y).square().reciprocal().sum(1, keepdim=True)) / 2


def meta(metaencoder: Scalar | None, y: Tensor, nu: Tensor, sigma: Tensor) -> Tensor:
    """h(y, nu), shape (B,); 0 without a metaencoder."""
    return y.new_zeros(len(y)) if metaencoder is None else metaencoder(scaled(y, sigma), nu, coordinate(y, sigma))


class ImageMeta(nn.Module):
    """A metaencoder for images, h(z, nu, c): an encoder on the channels of z, nu and c; its head starts at 0, and so does h.

    Args:
        encoder: (B, 2 M C + 2, H, W) -> (B, 1), with a last layer `head`.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        nn.init.zeros_(encoder.head.weight)
        nn.init.zeros_(encoder.head.bias)

    def forward(self, z: Tensor, nu: Tensor, c: Tensor) -> Tensor:
        """Shape (B,)."""
        return self.encoder(stacked(c, z, nu))[:, 0]


class VectorMeta(nn.Module):
    """A metaencoder for data of any shape, flattened: two hidden layers; h starts at 0.

    Args:
        entries: M d, the entries of z.
        width: Hidden features.
    """

    def __init__(self, entries: int, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3 * entries, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, z: Tensor, nu: Tensor, c: Tensor) -> Tensor:
        """Shape (B,)."""
        return self.net(torch.cat([a.expand(z.shape).flatten(1) for a in (z, nu, c / 3)], dim=1))[:, 0]


def stacked(c: Tensor, *images: Tensor) -> Tensor:
    """Images (B, M, *S) and the features of c as channels of one image (B, ..., H, W)."""
    flat = [a.reshape(len(a), -1, *a.shape[-2:]) for a in images]
    return torch.cat([*flat, level_channels(c, flat[0])], dim=1)
