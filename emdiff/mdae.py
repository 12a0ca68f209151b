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

ChannelMDAE: the network of the paper, which sees all M measurements of one fixed set of levels and has M outputs (eq. 18-20).

Source: Multimeasurement Generative Models (Saremi & Srivastava 2022), Sec. 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emdiff.denoise import Denoiser
from emdiff.measurement import align, effective, pool


class MDAE(Denoiser):
    """A noise-conditional multidenoising autoencoder on the sufficient statistic.

    Args:
        backbone: F(z, c), z (B, *S), c broadcastable, as in `emdiff.nn`; data are standardised to mean 0 and variance 1.
        spread: Std of an entry of x given the others, in units of its marginal std, in (0, 1].
        bf16: Run the backbone in bfloat16 autocast; the estimator around it stays in the precision of its input.

    >>> from emdiff.nn import MLP
    >>> MDAE(MLP((3,))).xhat(torch.zeros(2, 4, 3), torch.ones(4)).shape
    torch.Size([2, 3])
    """

    def __init__(self, backbone: nn.Module, bf16: bool = False, spread: float = 1.0) -> None:
        super().__init__()
        self.backbone, self.bf16, self.spread = backbone, bf16, spread

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        """E[x | y], shape (B, *S); y (B, M, *S)."""
        ybar, p = pool(y, sigma)
        z, c = wiener_share(p) * ybar, torch.log1p(p) / 2
        with torch.autocast(ybar.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.backbone(z, c)
        rest = (1 + self.spread**2 * p).reciprocal_()
        scale = (rest * (self.spread**2 + (1 - self.spread**2) * rest)).sqrt_()
        return torch.addcmul((1 - rest) * ybar, scale, out.to(ybar.dtype))

    def loss(self, target: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """The mean over entries of (1 + 1/tau^2) (xhat - target)^2, shape (B,): of order 1 at the start for every level; arguments as in the base."""
        p = pool(y, sigma).precision
        return ((1 + p) * (self.xhat(y, sigma) - target).square()).flatten(1).mean(1)


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
