r"""Multimeasurement unnormalised variational Bayes: the energy is the free energy of a latent variable model (eq. 32),

    f(y) = E_q [ sum_m |y_m - nu_m(z)|^2 / (2 sigma_m^2) + h(y, nu(z)) ] + KL(q(z | y) || N(0, I)),      q(z | y) = N(mean(y), diag(std(y)^2)),
    KL = sum_j (mean_j^2 + std_j^2 - 1 - log std_j^2) / 2,      z = mean + std eps,  eps ~ N(0, I)  (reparametrised).

The expectation is a mean over draws of eps. In training they are fresh for every datum. In eval mode they are a fixed set, eps and -eps in pairs,
the same for all
data: f is then a function of y, the score is its exact gradient, and xhat has a Jacobian; fresh draws would make every walk step on another energy.

No q is much wider than the prior, since where nu is linear its precision is I + J^T J / sigma^2, and few lie far out in it. So its log std is held
below WIDEST, and its mean grows with the logarithm of what the encoder says once that is beyond FAR_OUT. An encoder that claims more, as one does
early in training, has a KL whose slope in y, mean * d mean / dy, grows with the square of the claim, and hands the decoder latents unlike any that it
has seen: the loss rises by a factor of up to a million (docs/paper.md). The bounds level off as powers of the claim: what is claimed beyond them can
be taken back, as by tanh it cannot.

Without the metaencoder h and with M = 1 this is UVB (Saremi 2020). Views as in `mem`; the channel view is the paper's.

Pooled, one network has every level. A decoder that has to reproduce ybar to within tau would see its error over tau^2 in the energy, and an encoder
whose q stays off N(0, I) where nothing was measured would add tau^2 times the slope of the KL to xhat. So x has spread about the decoder's output,
x | z ~ N(nu(z), spread^2 I), and q moves off N(0, I) in proportion to what y says, w = 1/(1 + tau^2), as it does for a Gaussian x:

    |ybar - nu|^2 / (2 (spread^2 + tau^2)),      q(z | y) = N(w^(1/2) mean(y), diag(std(y)^(2w))),

and xhat = (spread^2 ybar + tau^2 nu) / (spread^2 + tau^2) where q does not depend on y: the preconditioning of the pooled MDAE (mdae).

Source: Multimeasurement Generative Models (Saremi & Srivastava 2022), App. C.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from emdiff.mem import EnergyDenoiser, Scalar, coordinate, meta, quadratic, scaled, stacked
from emdiff.paper_nets import Decoder, Encoder

WIDEST, NARROWEST, FAR_OUT = 0.5, -5.0, 3.0
"""The largest and least log std of q; from where on |mean| grows slowly."""


class MUVB(EnergyDenoiser):
    """The free energy of a latent variable model as an energy.

    Args:
        encoder: (z (B, M, *S) of variance 1, c) -> mean and log std of q, (B, 2 latent).
        decoder: (latents (K, latent), c (K or 1, ...)) -> nu (K, M, *S).
        latent: Number of latent variables.
        metaencoder: h as in `mem.MEM`, or None.
        levels: As in `mem.EnergyDenoiser`.
        draws: Draws of eps in eval mode, even.
        seed: Seed of those draws.
        spread: Std of x about the decoder's output, in units of the data's std; has no part in the channel view.

    Attributes:
        bf16: Run the networks in bfloat16 autocast; the energy and its gradient are formed in the precision of the input.

    >>> muvb = MUVB(VectorEncoder(3, 2), VectorDecoder((1, 3), 2), 2).eval()
    >>> muvb.xhat(torch.zeros(2, 4, 3), torch.ones(4)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent: int,
        metaencoder: Scalar | None = None,
        levels: Tensor | None = None,
        draws: int = 4,
        seed: int = 0,
        spread: float = 1.0,
    ) -> None:
        super().__init__(levels)
        self.bf16 = False
        self.spread = spread if self.pooled else 0.0
        self.encoder, self.decoder, self.metaencoder, self.latent = encoder, decoder, metaencoder, latent
        half = torch.randn(draws // 2, 1, latent, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("eps", torch.cat([half, -half]))

    def posterior(self, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log std of q(z | y), (B, latent) each, held near the prior as said above."""
        c = coordinate(y, sigma)
        mean, log_std = self._run(self.encoder, scaled(y, sigma), c).chunk(2, dim=1)
        if self.pooled:
            w = -torch.expm1(-2 * c).flatten(1).mean(1, keepdim=True)
            mean, log_std = w.sqrt() * mean, w * log_std
        bound = torch.where(log_std < 0, -NARROWEST, WIDEST)
        return FAR_OUT * torch.asinh(mean / FAR_OUT), log_std / torch.sqrt(1 + (log_std / bound).square())

    def free_energy(self, y: Tensor, sigma: Tensor) -> Tensor:
        """f, shape (B,)."""
        mean, log_std = self.posterior(y, sigma)
        eps = torch.randn(1, *mean.shape, dtype=mean.dtype, device=mean.device) if self.training else self.eps.to(mean.dtype)
        z, c = mean + log_std.exp() * eps, coordinate(y, sigma)
        K = len(z)
        repeat = lambda a: a.expand(K, *a.shape).reshape(-1, *a.shape[1:])
        levels = c if len(c) == 1 else repeat(c)
        nu = self._run(self.decoder, z.flatten(0, 1), levels)
        many, s = repeat(y), sigma if sigma.ndim <= 1 or len(sigma) == 1 else repeat(sigma)
        h = self.metaencoder and partial(self._run, self.metaencoder)
        terms = quadratic(many, nu, torch.hypot(s, s.new_tensor(self.spread))) + meta(h, many, nu, s)
        return terms.reshape(K, len(y)).mean(0) + kl(mean, log_std)

    def _run(self, net: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """The output of a network, computed in bfloat16 if `bf16`, in the precision of the inputs."""
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=self.bf16):
            return net(*inputs).to(inputs[0].dtype)


def kl(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, diag(std^2)) || N(0, I)), shape (B,); arguments (B, latent)."""
    return (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(1) / 2


class ImageEncoder(nn.Module):
    """The encoder of Table 3 on all measurements as channels: (B, M, *S), c -> (B, 2 latent)."""

    def __init__(self, shape: tuple[int, ...], latent: int, **widths) -> None:
        super().__init__()
        self.net = Encoder(_channels(shape) + 2, shape[-2:], 2 * latent, **widths)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """Shape (B, 2 latent)."""
        return self.net(stacked(c, z))


class ImageDecoder(nn.Module):
    """The decoder of Table 3: latents (K, latent), c -> (K, M, *S)."""

    def __init__(self, shape: tuple[int, ...], latent: int, **widths) -> None:
        super().__init__()
        self.shape, self.net = tuple(shape), Decoder(latent + 1, shape[-2:], _channels(shape), **widths)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """Shape (K, *shape)."""
        return self.net(_with_level(z, c)).reshape(len(z), *self.shape)


class VectorEncoder(nn.Module):
    """An encoder for data of any shape, flattened: (B, M, *S), c -> (B, 2 latent)."""

    def __init__(self, entries: int, latent: int, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 * entries, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * latent))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """Shape (B, 2 latent)."""
        return self.net(torch.cat([z.flatten(1), (c / 3).expand(z.shape).flatten(1)], dim=1))


class VectorDecoder(nn.Module):
    """A decoder to data of any shape: latents (K, latent), c -> (K, M, *S)."""

    def __init__(self, shape: tuple[int, ...], latent: int, width: int = 64) -> None:
        super().__init__()
        self.shape = tuple(shape)
        entries = int(torch.Size(shape).numel())
        self.net = nn.Sequential(nn.Linear(latent + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, entries))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """Shape (K, *shape)."""
        return self.net(_with_level(z, c)).reshape(len(z), *self.shape)


def _with_level(z: Tensor, c: Tensor) -> Tensor:
    """Latents with the mean of c over the entries of the datum as one more."""
    level = c.flatten(1).mean(1, keepdim=True).expand(len(z), 1) / 3
    return torch.cat([z, level.to(z.dtype)], dim=1)


def _channels(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape[:-2]).numel())
