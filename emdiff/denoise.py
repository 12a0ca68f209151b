r"""Denoisers: the Bayes estimator xhat(y) = E[x | y] of measurements y_m = x + sigma_m eps_m, and all that follows from it.

    score of the M-density     grad_m log p(y) = (xhat(y) - y_m) / sigma_m^2                            (eq. 7, Miyasawa 1961)
    posterior covariance       V u = sigma_m^2 (d xhat / d y_m) u  for every m, so the MEAN over m of these products

V u is computed as a vector-Jacobian product: the exact V is symmetric, so the transpose costs nothing; a learned one is symmetric only
approximately, and its users (linalg) guard for that.

A denoiser of the posterior p(x | obs) is again a denoiser (guidance): walks and jumps do not know the difference.

Source: Multimeasurement Generative Models (Saremi & Srivastava 2022), Sec. 2.2 and 4.1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from emdiff.measurement import align, pool

Product = Callable[[Tensor], Tensor]


class Moments(NamedTuple):
    """Posterior mean and covariance given measurements.

    Attributes:
        xhat: E[x | y], shape (B, *S), detached.
        V: Maps u (B, *S) to V[x | y] u (B, *S).
    """

    xhat: Tensor
    V: Product


class Denoiser(nn.Module, ABC):
    """The Bayes estimator of x given measurements with known noise levels.

    Subclasses define `xhat`, differentiable in y; those with a closed form also override `moments`. A denoiser that has one output
    per measurement overrides `nu`.

    Attributes:
        coherent: Whether the estimates at all levels are those of one law of x, so that they are a martingale along a walk.
    """

    coherent = True

    @abstractmethod
    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        """E[x | y].

        Args:
            y: Measurements (B, M, *S).
            sigma: Noise levels as in `measurement.align`; infinite where an entry was not measured.

        Returns:
            The Bayes estimator (B, *S).
        """

    def nu(self, y: Tensor, sigma: Tensor) -> Tensor:
        """The M estimates of x, one per measurement, shape (B, M, *S); all equal unless a subclass says otherwise (eq. 8, 20)."""
        return self.xhat(y, sigma)[:, None].expand(y.shape)

    def score(self, y: Tensor, sigma: Tensor) -> Tensor:
        """grad_m log p(y), shape (B, M, *S), for finite levels."""
        return (self.nu(y, sigma) - y) / align(sigma, y).square()

    def loss(self, target: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """The least-squares objective: the mean over the M outputs of their squared errors per entry (eq. 19 divided by d).

        Args:
            target: x, or any unbiased stand-in for E[x | y], shape (B, *S).
            y: Measurements (B, M, *S).
            sigma: Noise levels as in `measurement.align`.

        Returns:
            One value per datum, shape (B,).
        """
        return (self.nu(y, sigma) - target[:, None]).square().flatten(1).mean(1)

    def moments(self, y: Tensor, sigma: Tensor) -> Moments:
        """E[x | y] and products with V[x | y], the mean over the finite m of sigma_m^2 (d xhat / d y_m)^T u.

        The products of one call share one forward pass; each is one vector-Jacobian product.
        """
        with torch.enable_grad():
            leaf = y.detach().requires_grad_(True)
            xhat = self.xhat(leaf, sigma)
        variance = align(sigma, y).square()
        finite = variance.isfinite()
        count = finite.expand(-1, y.shape[1], *finite.shape[2:]).sum(1).clamp(min=1)

        def product(u: Tensor) -> Tensor:
            (g,) = torch.autograd.grad(xhat, leaf, u.to(xhat.dtype), retain_graph=True)
            return torch.where(finite, variance * g, 0.0).sum(1) / count

        return Moments(xhat.detach(), product)


class GaussianDenoiser(Denoiser):
    r"""The exact denoiser of x ~ N(mean, S), S = W W^T + diag(psi): a full covariance (psi = 0, W square) or low rank plus diagonal.

    With P = diag(1/tau^2), which may be 0, and G = W / (1 + psi P) row by row (Woodbury):

        V = (S^-1 + P)^-1 = diag(psi / (1 + psi P)) + G (I + W^T P G)^-1 G^T,      xhat = mean + V P (ybar - mean)

    Args:
        mean: E[x], shape S.
        factor: W, shape (d, r), d the number of entries of x.
        psi: Diagonal, non-negative, shape (d,).

    >>> prior = GaussianDenoiser(torch.zeros(1), torch.ones(1, 1), torch.zeros(1))
    >>> prior.xhat(torch.tensor([[[1.0]]]), torch.tensor([1.0]))
    tensor([[0.5000]])
    """

    def __init__(self, mean: Tensor, factor: Tensor, psi: Tensor) -> None:
        super().__init__()
        for name, value in {"mean": mean, "factor": factor, "psi": psi}.items():
            self.register_buffer(name, value)

    @classmethod
    def from_covariance(cls, mean: Tensor, cov: Tensor) -> GaussianDenoiser:
        """From a mean of shape S and a full covariance (d, d); negative eigenvalues count as 0."""
        s, basis = torch.linalg.eigh(cov)
        return cls(mean, basis * s.clamp(min=0).sqrt(), torch.zeros_like(s))

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        """E[x | y], shape (B, *S)."""
        ybar, precision = pool(y, sigma)
        return self.mean + self._covariance_product(precision)(precision * (ybar - self.mean))

    def moments(self, y: Tensor, sigma: Tensor) -> Moments:
        """E[x | y] and products with V, in closed form."""
        return Moments(self.xhat(y, sigma), self._covariance_product(pool(y, sigma).precision))

    def _covariance_product(self, precision: Tensor) -> Product:
        """u -> V u for precisions (B or 1, *S or ones)."""
        P = precision.flatten(1).expand(-1, self.psi.shape[0])
        shrunk = 1 / (1 + self.psi * P)
        G = self.factor * shrunk[..., None]
        inner = torch.einsum("dr,bd,bds->brs", self.factor, P, G)
        root = torch.linalg.cholesky(inner + torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device))

        H = torch.linalg.solve_triangular(root, G.mT, upper=False)  # G (I + W^T P G)^-1 G^T = H^T H

        def product(u: Tensor) -> Tensor:
            flat = u.flatten(1)
            along = (flat @ H[0].T) @ H[0] if len(H) == 1 else ((flat[:, None] @ H.mT) @ H)[:, 0]
            return (self.psi * shrunk * flat + along).reshape(u.shape)

        return product

    def prior_product(self, u: Tensor) -> Tensor:
        """S u, shape (B, *S)."""
        flat = u.flatten(1)
        return (self.psi * flat + (flat @ self.factor) @ self.factor.T).reshape(u.shape)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw x ~ N(mean, S), shape (count, *S)."""
        like = {"generator": generator, "dtype": self.psi.dtype, "device": self.psi.device}
        d, r = self.factor.shape
        x = torch.randn(count, r, **like) @ self.factor.T + self.psi.sqrt() * torch.randn(count, d, **like)
        return self.mean + x.reshape(count, *self.mean.shape)

    def covariance(self) -> Tensor:
        """The full covariance S, shape (d, d)."""
        return self.factor @ self.factor.T + torch.diag(self.psi)
