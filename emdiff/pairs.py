r"""The M-step's pairs: what a denoiser is retrained on, and how.

A walk ends with a measurement y of level tau_last and its jump xhat(y, obs) = E[x | y, obs], a posterior mean: training on
re-noised jumps xhat + tau eps loses V[x | y, obs] in every iteration, and the prior contracts. The pair (y, xhat) loses nothing:

    y_tau = y + (tau^2 - tau_last^2)^(1/2) eps  is a measurement of level tau,   E[x | y_tau] = E[ E[x | y, obs] | y_tau ],

so regressing the jump on y_tau has the minimiser of the exact EM update, for every level tau >= tau_last at once.

The pairs are derived in docs/method.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from emdiff.em import Draws
from emdiff.mdae import MDAE
from emdiff.near import beside
from emdiff.prior import TAU_FIRST
from emdiff.rows import Array, chosen_rows

EVEN = 4.0
"""Coarsest level at which a departure from a base is trained, in units of the data's std."""


def drawn(draws: Draws) -> Draws:
    """The draws without the data whose chains were kept."""
    if draws.kept is None or not bool(draws.kept.any()):
        return draws
    index = (~draws.kept).nonzero()[:, 0]
    return draws._replace(y=chosen_rows(draws.y, index), x=chosen_rows(draws.x, index), kept=None)


class Pairs(NamedTuple):
    """A batch of pairs.

    Attributes:
        x: Jumps (B, *S).
        y: The measurements that they are jumps from (B, *S).
        sigma_z: Levels (B, *S) of the observations of other data, where they were not drawn from those of all; else None.
    """

    x: Tensor
    y: Tensor
    sigma_z: Tensor | None = None


class PairLoss:
    """The M-step's loss: regress the jumps on measurements of every level from tau_last up.

    Levels are log-normal about exp(centre) with a log-std of 1.3, stratified over the batch and cut to [tau_last, TAU_FIRST]. Where
    observations are fused with levels per entry, four in five inputs have the level map that fusion with some datum's observation
    makes of their level, so that the prior knows the maps it will be walked with.

    Args:
        draws: Of the E-step.
        tau_last: Finest level to train.
        sigma_z: Levels of the observations as measurements (N, *S), where they differ between entries; else None.
        centre: Mean of log tau.
        even: Levels even in log tau from tau_last to EVEN instead: where a base is right at coarse levels, the departure is learned at fine ones.
        carried: Take levels of observations from the batch's neighbours, read with it, in place of a draw from all of sigma_z: where these lie in
            a file, and a draw on a GPU would have to wait for it.
    """

    def __init__(
        self, draws: Draws, tau_last: float, sigma_z: Array | None = None, centre: float = -0.3, even: bool = False, carried: bool = False
    ) -> None:  # fmt: skip
        self.draws, self.tau_last, self.sigma_z, self.centre, self.even = draws, tau_last, sigma_z, centre, even
        self.carried = carried and sigma_z is not None

    def read(self, index: Tensor) -> Pairs:
        """The pairs at indices (B,), where they lie."""
        at = beside(index, self.draws.x)
        sigma_z = self.sigma_z[index.roll(1)] if self.carried else None
        return Pairs(self.draws.x[at], self.draws.y[at], sigma_z)

    def __call__(self, denoiser: MDAE, batch: Pairs, generator: torch.Generator) -> Tensor:
        """The mean loss of a batch on the generator's device, shape ()."""
        x, y, tau = self.inputs(batch, generator)
        return denoiser.loss(x, y[:, None], tau[:, None]).mean()

    def inputs(self, batch: Pairs, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Jumps x (B, *S), measurements y (B, *S) and their levels (B, *S or ones), drawn for a batch."""
        x, y, device = batch.x, batch.y, generator.device
        tau = self.levels(len(x), generator).reshape(-1, *[1] * (x.ndim - 1))
        if self.sigma_z is not None:
            tau = self._fused(tau, batch.sigma_z, generator)
        eps = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=device)
        unseen = tau.isinf()
        extra = torch.where(unseen, 0.0, tau.square() - self.draws.tau**2).clamp(min=0).sqrt()
        return x, torch.where(unseen, 0.0, y + extra * eps), tau

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels (count,), one in each of `count` equal shares of the log-normal's mass, shuffled."""
        like = {"generator": generator, "device": generator.device}
        share = (torch.rand(1, **like) + torch.arange(count, device=generator.device)) % count / count
        share = share[torch.randperm(count, **like)].clamp(1e-3, 1 - 1e-3)
        if self.even:
            return self.tau_last * (EVEN / self.tau_last) ** share
        log_tau = self.centre + 1.3 * math.sqrt(2) * torch.erfinv(2 * share - 1)
        return log_tau.exp().clamp(self.tau_last, TAU_FIRST)

    def _fused(self, tau: Tensor, sigma: Tensor | None, generator: torch.Generator) -> Tensor:
        """Fuse four in five levels with those of random observations, one of the five being that observation alone; none falls below the draws'."""
        draw = lambda: torch.rand(tau.shape, generator=generator, device=generator.device)  # noqa: E731
        if sigma is None:
            rows = torch.randint(len(self.sigma_z), (len(tau),), generator=generator, device=generator.device)
            sigma = self.sigma_z[rows.to(self.sigma_z.device)].to(generator.device)
        alone = torch.where(draw() < 0.25, math.inf, tau)
        fused = (alone**-2 + sigma**-2).rsqrt().clamp(min=max(self.draws.tau, 1e-3))
        return torch.where(draw() < 0.8, fused, tau)
