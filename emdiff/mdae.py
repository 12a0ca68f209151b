r"""Multidenoising autoencoders: learned denoisers.

MDAE (pooled): the network sees ybar alone, which loses nothing (measurement), costs the same for every M, and serves every noise
level, maps of levels included. With precision p = 1/tau^2 and data standardised to variance 1 (preconditioning after Elucidating the
Design Space of Diffusion-Based Generative Models, Karras et al. 2022, Table 1, entry by entry):

    xhat = (1-q) ybar + (q (spread^2 + (1 - spread^2) q))^(1/2) F(z, c),      q = 1 / (1 + spread^2 p),      c = log(1 + p)/2
    z = w ybar / mean(w)^(1/2),      w = p/(1+p),  the mean over the entries of the datum

z has variance 1 on average over a datum; where all its levels are equal it is sqrt(p/(1+p)) ybar, Karras's. Where they differ, entries count by
their Wiener gain w: with sqrt(p/(1+p)) entry by entry, those measured coarsely would enter as unit noise, which a convolution mixes with the
others before any non-linearity could tell them apart (docs/method.md, Levels per entry).

spread = 1 is the paper's choice, with 1-q = p/(1+p) and (1+p)^(-1/2) before F. A smaller spread, the std of an entry given its surroundings
rather than its marginal std, passes less noise for F to cancel at coarse levels (docs/method.md, The start).

With a base, for vectors: xhat = D0(ybar, tau) + keep(c) (1+p)^(-1/2) F(z, c), D0 the exact denoiser of a mixture of Gaussians that was fitted to
the observations (mixture, components). F is 0 at first, so learning starts at that mixture and finds only the departure from it; keep, piecewise
linear in c, is the share of F that data held out from its training confirm (shrink). A prior with keep = 0 is the mixture.

ChannelMDAE: the network of the paper, which sees all M measurements of one fixed set of levels and has M outputs (eq. 18-20).

Source: Multimeasurement Generative Models (Saremi & Srivastava 2022), Sec. 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emdiff.denoise import Denoiser, Moments
from emdiff.measurement import align, effective, pool
from emdiff.mixture import MixtureDenoiser

KNOTS = 13
"""Levels, evenly spaced in c, at which `keep` is known."""

TOP = 6.5
"""c of the last knot; -log of the finest level that a walk may have is 6.9, and `keep` is constant beyond the last knot."""


class MDAE(Denoiser):
    """A noise-conditional multidenoising autoencoder on the sufficient statistic.

    Args:
        backbone: F(z, c), z (B, *S), c broadcastable, as in `emdiff.nn`; data are standardised to mean 0 and variance 1.
        spread: Std of an entry of x given the others, in units of its marginal std, in (0, 1]. Has no part where there is a base.
        bf16: Run the backbone in bfloat16 autocast; the estimator around it stays in the precision of its input.
        base: The mixture whose departure is learned, or None.

    Attributes:
        keep: Share of F that is kept at each knot, in [0, 1], shape (KNOTS,); 0 at first.

    >>> from emdiff.nn import MLP
    >>> MDAE(MLP((3,))).xhat(torch.zeros(2, 4, 3), torch.ones(4)).shape
    torch.Size([2, 3])
    """

    def __init__(self, backbone: nn.Module, bf16: bool = False, spread: float = 1.0, base: MixtureDenoiser | None = None) -> None:
        super().__init__()
        self.backbone, self.bf16, self.spread, self.base = backbone, bf16, spread, base
        if base is not None:
            self.register_buffer("keep", torch.zeros(KNOTS))

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        """E[x | y], shape (B, *S); y (B, M, *S)."""
        ybar, p = pool(y, sigma)
        if self.base is not None:
            base = self.base.xhat(y, sigma)
            return base + self.departure(ybar, p) if self.departs() else base
        rest = (1 + self.spread**2 * p).reciprocal_()
        scale = (rest * (self.spread**2 + (1 - self.spread**2) * rest)).sqrt_()
        return torch.addcmul((1 - rest) * ybar, scale, self._backbone(ybar, p))

    def departs(self) -> bool:
        """Whether the prior differs from its base."""
        return bool((self.keep > 0).any())

    def departs_within(self) -> tuple[float, float]:
        """The coarsest and the finest level between which the prior may differ from its base, where it does."""
        some = (self.keep > 0).nonzero()[:, 0]
        level = lambda knot: torch.expm1(torch.tensor(2 * knot * TOP / (KNOTS - 1))).rsqrt().item()  # noqa: E731
        return level(max(int(some[0]) - 1, 0)), level(int(some[-1]) + 1) if some[-1] < KNOTS - 1 else 0.0

    def departure(self, ybar: Tensor, p: Tensor) -> Tensor:
        """What is added to the base's estimate, (B, *S), for ybar (B, *S) of precision p."""
        return kept(self.keep, p) * self.untempered(ybar, p)

    def untempered(self, ybar: Tensor, p: Tensor) -> Tensor:
        """The departure as the network has it, all of it kept."""
        return (1 + p).rsqrt() * self._backbone(ybar, p)

    def _backbone(self, ybar: Tensor, p: Tensor) -> Tensor:
        z, c = wiener_share(p) * ybar, torch.log1p(p) / 2
        with torch.autocast(ybar.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.backbone(z, c)
        return out.to(ybar.dtype)

    def moments(self, y: Tensor, sigma: Tensor) -> Moments:
        """As in the base class; with a base, whose part is in closed form, only the departure is differentiated."""
        if self.base is None:
            return super().moments(y, sigma)
        xhat, V = self.base.moments(y, sigma)
        if not self.departs():
            return Moments(xhat, V)
        ybar, p = pool(y, sigma)
        with torch.enable_grad():
            leaf = ybar.detach().requires_grad_(True)
            added = self.departure(leaf, p)
        variance = torch.where(p > 0, 1 / p, 0.0)

        def product(u: Tensor) -> Tensor:
            (g,) = torch.autograd.grad(added, leaf, u.to(added.dtype), retain_graph=True)
            return V(u) + variance * g

        return Moments(xhat + added.detach(), product)

    def loss(self, target: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """The mean over entries of (1 + 1/tau^2) (xhat - target)^2, shape (B,): of order 1 at the start for every level; arguments as in the base.

        Where there is a base, xhat is here the base and all of the departure, whatever is kept of it."""
        ybar, p = pool(y, sigma)
        if self.base is None:
            xhat = self.xhat(y, sigma)
        else:
            with torch.no_grad():
                xhat = self.base.xhat(y, sigma)
            xhat = xhat + self.untempered(ybar, p)
        return ((1 + p) * (xhat - target).square()).flatten(1).mean(1)


def kept(keep: Tensor, p: Tensor) -> Tensor:
    """`keep` at precisions p of any shape, linear between knots."""
    at = (torch.log1p(p) / 2 * ((KNOTS - 1) / TOP)).clamp(max=KNOTS - 1)
    low = at.floor().clamp(max=KNOTS - 2).long()
    return torch.lerp(keep[low], keep[low + 1], (at - low).to(keep.dtype))


def wiener_share(p: Tensor) -> Tensor:
    """w / mean(w)^(1/2) with w = p/(1+p), the mean over a datum: what brings ybar of precision p (B or 1, *S or ones) to variance 1 on average."""
    w = p / (1 + p)
    return w * w.mean(tuple(range(1, w.ndim)), keepdim=True).clamp(min=1e-12).rsqrt()


class ChannelMDAE(Denoiser):
    """The paper's multidenoising autoencoder: M measurements in, M estimates out, one fixed set of levels.

    Args:
        backbone: F(z, c), z (B, M, *S) -> (B, M, *S); c (B or 1, ...) is constant here.
        sigma: The noise levels, shape (M,).

    Raises:
        ValueError: if asked for other levels than its own.
    """

    def __init__(self, backbone: nn.Module, sigma: Tensor, bf16: bool = False) -> None:
        super().__init__()
        self.backbone, self.bf16 = backbone, bf16
        self.register_buffer("sigma", sigma)

    def nu(self, y: Tensor, sigma: Tensor) -> Tensor:
        """The M estimates, shape (B, M, *S) (eq. 20); the input is divided by sqrt(1 + sigma^2), as in Table 1."""
        if sigma.shape != self.sigma.shape or not torch.equal(sigma.to(self.sigma), self.sigma):
            raise ValueError(f"this MDAE was made for levels {self.sigma.tolist()}, not {sigma.tolist()}; the pooled MDAE takes any")
        z = y / torch.sqrt(1 + align(self.sigma, y).square())
        c = torch.log1p(effective(self.sigma) ** -2) / 2
        with torch.autocast(y.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.backbone(z, c.reshape([1] * y.ndim))
        return out.to(y.dtype)

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        """The precision-weighted mean of the M estimates, shape (B, *S)."""
        return pool(self.nu(y, sigma), sigma).ybar
