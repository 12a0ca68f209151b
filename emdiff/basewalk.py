r"""Walks under a prior that is a mixture of Gaussians and a learned departure from it: E[x | y] = D0(y) + delta(y) (mdae).

The mixture's part needs no approximation: given obs it is a mixture of each datum's own (mixture.given), from which x | y, obs is drawn exactly. A
step appends a measurement of such a draw, shifted by the departure, instead of one of the jump (accumulate), so that for delta = 0 every level has
exactly the law it should have, for any number of levels. What the departure adds to V is returned to second order as there, by half of its change:

    x = draw of the mixture given y, obs,  + delta(y, obs)
    ybar' = (tau'/tau)^2 ybar + (1 - (tau'/tau)^2) x + tau' (1 - (tau'/tau)^2)^(1/2) eps,     then + (1 - (tau'/tau)^2) (delta' - delta) / 2.

delta(y, obs): where the observation is one more measurement, the departure at (y, obs). Else the difference of two moment matchings,

    m(xhat, V) = xhat + V At (I + A V At)^-1 (obs - A xhat),        delta(y, obs) = m(D0 + delta, V0 + D) - m(D0, V0),

D = tau^2 (d delta / d y), its symmetric part, with V0 + D cut to be positive semi-definite: a learned Jacobian that is not would make the solve
diverge, and chains with it. Only the departure is matched by moments, so the distant explanations that the mixture knows of are weighed exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from emdiff.deconvolution import Whitened
from emdiff.mdae import MDAE
from emdiff.measurement import pool
from emdiff.mixture import MixtureDenoiser

FULL = 16
"""Most entries of x for which the departure's Jacobian D is formed; above, D = 0 in its moment matching."""


class Departure(NamedTuple):
    """What a walk adds to its mixture.

    Attributes:
        at: (y (B, *S), tau) -> delta (B, *S).
        coarsest: No departure at levels above; infinite where that is not known.
        finest: No departure at levels below.
    """

    at: Callable[[Tensor, float], Tensor]
    coarsest: float = torch.inf
    finest: float = 0.0

    def needed(self, taus: list[float]) -> list[float]:
        """The levels that a walk has to visit: those with a departure, their neighbours, and the last; a mixture's own steps may have any length."""
        active = [self.finest <= tau <= self.coarsest for tau in taus]
        return [tau for i, tau in enumerate(taus) if any(active[max(i - 1, 0) : i + 2]) or i == len(taus) - 1]


class End(NamedTuple):
    """Where a walk ends.

    Attributes:
        y: The last mean of the measurements (B, *S), of level tau.
        xhat: E[x | y, obs], shape (B, *S).
        x: A draw of x | y, obs, shape (B, *S).
        tau: The last level.
    """

    y: Tensor
    xhat: Tensor
    x: Tensor
    tau: float


def descend(
    target: MixtureDenoiser,
    departure: Departure | None,
    shape: tuple[int, ...],
    taus: list[float],
    generator: torch.Generator,
    start: Tensor | None = None,
) -> End:
    """Walk down the levels taus.

    Args:
        target: The mixture, or that of each datum given its observation.
        departure: delta(y, tau); None where there is none, and then the result is drawn at once.
        shape: (B, *S).
        taus: Finite levels, decreasing.
        generator: Source of randomness.
        start: States (B, *S) whose measurement of level taus[0] begins the walk; draws of the target if None.

    Returns:
        End.
    """
    dtype, device = target.means.dtype, target.means.device
    noise = lambda: torch.randn(shape, generator=generator, dtype=dtype, device=device)  # noqa: E731
    level = lambda tau: torch.tensor([tau], dtype=dtype, device=device)  # noqa: E731
    nothing = torch.zeros(shape[0], 1, *shape[1:], dtype=dtype, device=device)
    if departure is None or start is None:
        start = target.draw(nothing, level(torch.inf), generator)
    taus = taus[-1:] if departure is None else departure.needed(taus)
    if len(taus) == 1:
        y = start + taus[-1] * noise()
        return End(y, target.xhat(y[:, None], level(taus[-1])), start, taus[-1])
    tau, y = taus[0], start + taus[0] * noise()
    delta = departure.at(y, tau)
    for after in taus[1:]:
        keep = (after / tau) ** 2
        x = target.draw(y[:, None], level(tau), generator) + delta
        y = keep * y + (1 - keep) * x + after * (1 - keep) ** 0.5 * noise()
        before, delta, tau = delta, departure.at(y, after), after
        y = y + (1 - keep) / 2 * (delta - before)
    delta = departure.at(y, tau)
    return End(y, target.xhat(y[:, None], level(tau)) + delta, target.draw(y[:, None], level(tau), generator) + delta, tau)


def free(prior: MDAE) -> Departure | None:
    """delta of the prior itself; None where it has none."""
    return Departure(lambda y, tau: prior.departure(*pool(y[:, None], y.new_tensor([tau]))), *prior.departs_within()) if prior.departs() else None


def fused(prior: MDAE, z: Tensor, sigma_z: Tensor) -> Departure | None:
    """delta given observations that are measurements z of x, as in `Observer.as_measurement`."""
    if not prior.departs():
        return None

    def at(y: Tensor, tau: float) -> Tensor:
        levels = torch.stack([torch.full_like(z, tau), sigma_z.expand(z.shape)], dim=1)
        return prior.departure(*pool(torch.stack([y, z], dim=1), levels))

    return Departure(at, finest=prior.departs_within()[1])


def guided(prior: MDAE, data: Whitened) -> Departure | None:
    """delta given observations through any operator, by moment matching."""
    if not prior.departs():
        return None

    def at(y: Tensor, tau: float) -> Tensor:
        xhat, V0 = prior.base.covariance(y[:, None], y.new_tensor([tau]))
        delta, D = linearised(prior, y, tau)
        V = V0.double() if D is None else positive(V0.double() + tau**2 * D.double())
        flat = xhat.flatten(1).double()
        with_it, without = matched(flat + delta.double(), V, data), matched(flat, V0.double(), data)
        return (with_it - without).reshape(y.shape).to(y.dtype)

    return Departure(at, *prior.departs_within())


def linearised(prior: MDAE, y: Tensor, tau: float) -> tuple[Tensor, Tensor | None]:
    """delta (B, d) and the symmetric part of its Jacobian (B, d, d), None for more than FULL entries."""
    ybar, p = pool(y[:, None], y.new_tensor([tau]))
    d = y[0].numel()
    if d > FULL:
        return prior.departure(ybar, p).flatten(1), None
    with torch.enable_grad():
        leaf = ybar.detach().requires_grad_(True)
        delta = prior.departure(leaf, p).flatten(1)
        rows = [torch.autograd.grad(delta[:, e].sum(), leaf, retain_graph=e + 1 < d)[0].flatten(1) for e in range(d)]
    J = torch.stack(rows, dim=1)
    return delta.detach(), (J + J.mT) / 2


def positive(V: Tensor) -> Tensor:
    """Symmetric matrices without their negative eigenvalues."""
    s, U = torch.linalg.eigh(V)
    return (U * s.clamp(min=0)[:, None]) @ U.mT


def matched(xhat: Tensor, V: Tensor, data: Whitened) -> Tensor:
    """xhat + V At (I + A V At)^-1 (obs - A xhat), for xhat (B, d), V (B, d, d) and unit noise."""
    AV = data.A @ V
    C = AV @ data.A.mT + torch.eye(data.A.shape[1], dtype=V.dtype, device=V.device)
    gap = data.obs - (data.A @ xhat[..., None])[..., 0]
    return xhat + (AV.mT @ torch.linalg.solve(C, gap[..., None]))[..., 0]
