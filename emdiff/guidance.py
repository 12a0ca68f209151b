r"""Guidance: the denoiser of the posterior p(x | obs), obs = A x + n, made of a denoiser of the prior.

The measurements y of a walk and the observation are conditionally independent given x, so the posterior M-density p(y | obs) has the
score (xhat(y, obs) - y_m) / sigma_m^2 with xhat(y, obs) = E[x | y, obs]: a posterior is a prior with another denoiser.

MomentMatched, for any A. With E[x | y] = xhat, V[x | y] = V, and p(x | y) taken as Gaussian,

    xhat(y, obs) = xhat + V At (cov_obs + A V At)^-1 (obs - A xhat)

exact for a Gaussian prior, and good where tau is small. One vector-Jacobian product per solver iteration. The system is solved whitened,
(I + K Kt) a = r with K = cov_obs^(-1/2) A V^(1/2) and r = cov_obs^(-1/2) (obs - A xhat). A residual r' leaves the error
V^(1/2) Kt (I + K Kt)^-1 r' in xhat(y, obs), and |Kt (I + K Kt)^-1| <= max_s s/(1 + s^2) = 1/2, so with V <= tau^2, as it is where p(x | y) is
log-concave,

    error of the jump <= tau |r'| / 2.

What matters at a level is an error as compared with that level, since the walk adds noise of its order to every entry: a solve stops at
|r'| <= 2 tolerance d^(1/2), at every tau alike. The iterations this takes follow the condition number 1 + tau^2 |cov_obs^(-1/2) A|^2: many at
coarse levels, one where tau is below the noise.

Fused, where At cov_obs^-1 A is diagonal. The observation then is one more measurement of x, with its own level for every entry (infinite where
nothing was observed): xhat(y, obs) = xhat of the prior at (y, obs). One forward pass, exact.

Sources: Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al. 2024), Sec. 4.2, for moment matching;
fusion is sufficiency (measurement) applied to obs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emdiff.denoise import Denoiser, Moments, Product
from emdiff.linalg import SOLVERS, Image, Solve, lanczos_sqrt
from emdiff.measurement import effective, pool

if TYPE_CHECKING:
    from observers import Observer

LANCZOS = 8
"""Most products for V^(1/2)."""

TOLERANCE = 0.05
"""Of a jump, in units of its level (PosteriorDenoiser)."""


class PosteriorDenoiser(Denoiser):
    """Moment-matched guidance.

    Args:
        prior: Denoiser of p(x).
        observer: A and cov_obs of the batch's data.
        obs: Their observations (B, *O).
        solver: "cg", or "gmres" where the learned V is too far from symmetric.
        iterations: Most solver iterations.
        tolerance: Largest error of the jump that an unfinished solve may leave, rms over entries, in units of the level tau.
        coarse: Level above which a solve takes one iteration. There p(x | y) is far from Gaussian, and V, tau^2 times a Jacobian, magnifies what the
            network has wrong: a single step along V At (obs - A xhat) does better than a solution (docs/method.md).

    Attributes:
        solve: The last solve, whitened: residuals and iteration counts per datum; None before the first. A datum that took more than one iteration
            in an `xhat` has its solution as the first direction of the next, of a level nearby (linalg.cg); where one is enough, the residual is a
            better direction than a guess.

    Raises:
        ValueError: for an unknown solver.
    """

    coherent = False
    """Each level's V is matched anew."""

    def __init__(
        self,
        prior: Denoiser,
        observer: Observer,
        obs: Tensor,
        solver: str = "cg",
        iterations: int = 3,
        tolerance: float = TOLERANCE,
        coarse: float = math.inf,
    ) -> None:
        super().__init__()
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; choose from {', '.join(SOLVERS)}")
        self.prior, self.observer, self.obs = prior, observer, obs
        self.solver, self.iterations, self.tolerance, self.coarse = solver, iterations, tolerance, coarse
        self.solve: Solve | None = None
        self._guess: Tensor | None = None

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        """E[x | y, obs], shape (B, *S), detached from y."""
        xhat, V = self.prior.moments(y, sigma)
        one = math.isfinite(self.coarse) and _coarsest(sigma) > self.coarse
        rows = lambda a, index: a[index] if a.ndim > 1 and len(a) > 1 else a

        def restrict(index: Tensor) -> Image:
            return self._product(self.prior.moments(y[index], rows(sigma, index)).V, self.observer.rows(index))

        b, guess = self.obs - self.observer.forward(xhat), None if one else self._guess
        self.solve = self._solve(V, b, guess, 1 if one else self.iterations, restrict)
        hard = (self.solve.iterations > 1).reshape(-1, *[1] * (self.solve.x.ndim - 1))
        self._guess = torch.where(hard, self.solve.x, 0.0)
        return _plus(xhat, self.solve.image)

    def draw(self, y: Tensor, sigma: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A sample of x | y, obs, shape (B, *S), for p(x | y) = N(xhat, V), by pathwise conditioning (Wilson et al. 2021):

        x0 = xhat + V^(1/2) xi,   x = x0 + V At (cov_obs + A V At)^-1 (obs - A x0 - n0),   n0 ~ N(0, cov_obs)
        """
        xhat, V = self.prior.moments(y, sigma)
        xi = torch.randn(xhat.shape, generator=generator, dtype=xhat.dtype, device=xhat.device)
        x0 = xhat + lanczos_sqrt(V, xi, min(LANCZOS, xi[0].numel()))
        self.solve = self._solve(V, self.obs - self.observer.simulate(x0, generator))
        return _plus(x0, self.solve.image)

    def _solve(
        self, V: Product, b: Tensor, guess: Tensor | None = None, iterations: int | None = None, restrict: Callable[[Tensor], Image] | None = None
    ) -> Solve:
        """(cov_obs + A V At)^-1 b, whitened, with V At of it as the image, for b in the units of the observations' noise and spread."""
        r = b / self.observer.std()
        enough = 2 * self.tolerance * math.sqrt(math.prod(self.observer.shape))
        relative = enough / r.flatten(1).norm(dim=1).clamp(min=torch.finfo(r.dtype).tiny)
        return SOLVERS[self.solver](self._product(V, self.observer), r, iterations or self.iterations, relative, guess, restrict)

    @staticmethod
    def _product(V: Product, observer: Observer) -> Image:
        """p -> (I + K Kt) p and V At cov_obs^(-1/2) p, for the data of an observer."""
        std = observer.std()

        def product(p: Tensor) -> tuple[Tensor, Tensor]:
            q = p / std
            VAtq = V(observer.adjoint(q))
            return (observer.cov(q) + observer.forward(VAtq)) / std, VAtq

        return product

    def moments(self, y: Tensor, sigma: Tensor) -> Moments:
        """E[x | y, obs] and products with V - V At (cov_obs + A V At)^-1 A V, each product one solve."""
        xhat, V = self.prior.moments(y, sigma)
        self.solve = self._solve(V, self.obs - self.observer.forward(xhat))

        def product(u: Tensor) -> Tensor:
            Vu = V(u)
            correction = self._solve(V, self.observer.forward(Vu)).image
            return Vu if correction is None else Vu - correction

        return Moments(_plus(xhat, self.solve.image), product)


def _coarsest(sigma: Tensor) -> float:
    """The largest level of the mean of the measurements, over data and entries; sigma as in `measurement.align`."""
    return float(effective(sigma.reshape(-1)) if sigma.ndim <= 1 else sigma.square().reciprocal().sum(1).rsqrt().max())


def _plus(x: Tensor, image: Tensor | None) -> Tensor:
    """x + image, or x where the solve needed no product."""
    return x if image is None else x + image


class FusedPosterior(Denoiser):
    """Exact guidance by an observation that is one more measurement of x.

    Args:
        prior: Denoiser of p(x) that takes a level per entry where the observation has one.
        z: The observation as a measurement (B, *S), from `Observer.as_measurement`; finite everywhere.
        sigma_z: Its levels (B or 1, *S), infinite where nothing was observed.
    """

    def __init__(self, prior: Denoiser, z: Tensor, sigma_z: Tensor) -> None:
        super().__init__()
        self.prior = prior
        first = sigma_z.flatten(1)[:, :1]
        uniform = bool((sigma_z.flatten(1) == first).all())
        self.sigma_z = first.reshape(-1, *[1] * (z.ndim - 1)) if uniform else sigma_z
        self.weight = self.sigma_z.square().reciprocal()
        self.information = self.weight * z

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        """E[x | y, obs], shape (B, *S)."""
        return self.prior.xhat(*self._joined(y, sigma))

    def moments(self, y: Tensor, sigma: Tensor) -> Moments:
        """E[x | y, obs] and products with V[x | y, obs]: those of the prior at (y, obs)."""
        return self.prior.moments(*self._joined(y, sigma))

    def _joined(self, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(y, z) reduced to their sufficient statistic (B, 1, *S), and its level; what z adds to it is computed once, in __init__."""
        ybar, precision = pool(y, sigma)
        total = precision + self.weight
        known = torch.where(total > 0, total, 1.0)
        return torch.addcmul(self.information, precision, ybar).div_(known)[:, None], total.rsqrt()[:, None]
