r"""Guidance: the denoiser of the posterior p(x | obs), obs = A x + n, made of a denoiser of the prior.

The measurements y of a walk and the observation are conditionally independent given x, so the posterior M-density p(y | obs) has the
score (xhat(y, obs) - y_m) / sigma_m^2 with xhat(y, obs) = E[x | y, obs]: a posterior is a prior with another denoiser.

MomentMatched, for any A. With E[x | y] = xhat, V[x | y] = V, and p(x | y) taken as Gaussian,

    xhat(y, obs) = xhat + V At (cov_obs + A V At)^-1 (obs - A xhat)

exact for a Gaussian prior, and good where tau is small. One vector-Jacobian product per solver iteration.

Fused, where At cov_obs^-1 A is diagonal. The observation then is one more measurement of x, with its own level for every entry (infinite where
nothing was observed): xhat(y, obs) = xhat of the prior at (y, obs). One forward pass, exact.

Sources: Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al. 2024), Sec. 4.2, for moment matching;
fusion is sufficiency (measurement) applied to obs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emdiff.denoise import Denoiser, Moments
from emdiff.linalg import SOLVERS, Solve, lanczos_sqrt
from emdiff.measurement import align

if TYPE_CHECKING:
    from observers import Observer

LANCZOS = 8
"""Most products for V^(1/2)."""


class PosteriorDenoiser(Denoiser):
    """Moment-matched guidance.

    Args:
        prior: Denoiser of p(x).
        observer: A and cov_obs of the batch's data.
        obs: Their observations (B, *O).
        solver: "cg", or "gmres" where the learned V is too far from symmetric.
        iterations: Most solver iterations; 2-3 are enough where tau is small against the data's spread.
        tolerance: Relative residual at which a datum's solve stops.

    Attributes:
        solve: The last solve: residuals and iteration counts per datum; None before the first.

    Raises:
        ValueError: for an unknown solver.
    """

    def __init__(self, prior: Denoiser, observer: Observer, obs: Tensor, solver: str = "cg", iterations: int = 3, tolerance: float = 1e-3):
        super().__init__()
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; choose from {', '.join(SOLVERS)}")
        self.prior, self.observer, self.obs = prior, observer, obs
        self.solver, self.iterations, self.tolerance = solver, iterations, tolerance
        self.solve: Solve | None = None

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        """E[x | y, obs], shape (B, *S), detached from y."""
        xhat, V = self.prior.moments(y, sigma)
        self.solve = self._solve(V, self.obs - self.observer.forward(xhat))
        return xhat + self.solve.image

    def draw(self, y: Tensor, sigma: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A sample of x | y, obs, shape (B, *S), for p(x | y) = N(xhat, V), by pathwise conditioning (Wilson et al. 2021):

        x0 = xhat + V^(1/2) xi,   x = x0 + V At (cov_obs + A V At)^-1 (obs - A x0 - n0),   n0 ~ N(0, cov_obs)
        """
        xhat, V = self.prior.moments(y, sigma)
        xi = torch.randn(xhat.shape, generator=generator, dtype=xhat.dtype, device=xhat.device)
        x0 = xhat + lanczos_sqrt(V, xi, min(LANCZOS, xi[0].numel()))
        self.solve = self._solve(V, self.obs - self.observer.simulate(x0, generator))
        return x0 + self.solve.image

    def _solve(self, V, b: Tensor) -> Solve:
        def product(p: Tensor) -> tuple[Tensor, Tensor]:
            VAtp = V(self.observer.adjoint(p))
            return self.observer.cov(p) + self.observer.forward(VAtp), VAtp

        return SOLVERS[self.solver](product, b, self.iterations, self.tolerance)

    def moments(self, y: Tensor, sigma: Tensor) -> Moments:
        """E[x | y, obs] and products with V - V At (cov_obs + A V At)^-1 A V, each product one solve."""
        xhat, V = self.prior.moments(y, sigma)
        self.solve = self._solve(V, self.obs - self.observer.forward(xhat))

        def product(u: Tensor) -> Tensor:
            Vu = V(u)
            return Vu - self._solve(V, self.observer.forward(Vu)).image

        return Moments(xhat + self.solve.image, product)


class FusedPosterior(Denoiser):
    """Exact guidance by an observation that is one more measurement of x.

    Args:
        prior: Denoiser of p(x) that takes a level per entry where the observation has one.
        z: The observation as a measurement (B, *S), from `Observer.as_measurement`; finite everywhere.
        sigma_z: Its levels (B or 1, *S), infinite where nothing was observed.
    """

    def __init__(self, prior: Denoiser, z: Tensor, sigma_z: Tensor) -> None:
        super().__init__()
        self.prior, self.z = prior, z
        first = sigma_z.flatten(1)[:, :1]
        uniform = bool((sigma_z.flatten(1) == first).all())
        self.sigma_z = first.reshape(-1, *[1] * (z.ndim - 1)) if uniform else sigma_z

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        """E[x | y, obs], shape (B, *S)."""
        return self.prior.xhat(*self._joined(y, sigma))

    def moments(self, y: Tensor, sigma: Tensor) -> Moments:
        """E[x | y, obs] and products with V[x | y, obs]: those of the prior at (y, obs)."""
        return self.prior.moments(*self._joined(y, sigma))

    def _joined(self, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(y, z) as M + 1 measurements and their levels."""
        s, s_z = align(sigma, y), self.sigma_z[:, None]
        rows, shape = max(s.shape[0], s_z.shape[0]), torch.broadcast_shapes(s.shape[2:], s_z.shape[2:])
        levels = [s.expand(rows, y.shape[1], *shape), s_z.expand(rows, 1, *shape)]
        return torch.cat([y, self.z[:, None]], dim=1), torch.cat(levels, dim=1)
