"""Covariances of many entries from few samples: moments in parts, and low rank plus diagonal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emdiff.denoise import GaussianDenoiser

DENSE = 128
"""Most entries of x for which covariances are formed in full."""


class Moments:
    """Mean and covariance of vectors (N, d) that come in batches, summed in float64 about 0, near which standardised data lie."""

    def __init__(self, d: int) -> None:
        self.count, self.sum, self.squares = 0, torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)

    def add(self, x: Tensor, spread: Tensor | float = 0.0) -> None:
        """A batch (B, d), and what to add to the sum of its outer products (d, d)."""
        x = x.double()
        self.count, self.sum, self.squares = self.count + len(x), self.sum + x.sum(0).cpu(), self.squares + (x.T @ x + spread).cpu()

    def mean_and_covariance(self, like: Tensor, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(d,) and (d, d), on the device and in the precision of `like`; `total` as in `gaussian.fit_gaussian`."""
        count, squares = float(total(torch.tensor(float(self.count), dtype=torch.float64))), total(self.squares)
        mean = total(self.sum) / count
        return mean.to(like), (squares / count - torch.outer(mean, mean)).to(like)


def factor(covs: list[Tensor], rank: int, floor: float, sweeps: int = 8, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Write a covariance (d, d) as W W^T + psi^(1/2) C psi^(1/2), psi diagonal: principal factors, then the variance that is left.

    The variance of samples along the eigenvectors of their own covariance is too large, by factors where they are fewer than entries, and an EM that
    draws them from what it found last makes more of that in every iteration. So of two covariances, of independent halves of the samples, each gives
    the variances along the other's eigenvectors, as in cross-validation, and W has both halves' directions. Sweeps then begin
    with all variance in psi, so that W takes what C does not explain.

    Args:
        covs: Symmetric; may have negative eigenvalues. One, which is taken for exact, or two.
        rank: Directions of each.
        floor: Least psi.
        sweeps: Alternations between W and psi.
        root: Of C, a correlation, (d, r); C = I where None.

    Returns:
        (W, psi), shapes (d, rank * len(covs)) and (d,).

    Source: A new non-parametric covariance estimator (NERCOME; Lam 2016; Joachimi 2017), for the cross-validated variances.
    """
    C = torch.eye(len(covs[0]), dtype=covs[0].dtype, device=covs[0].device) if root is None else root @ root.T
    diagonal = sum(covs).diagonal() / len(covs)
    psi = torch.zeros_like(diagonal) if len(covs) == 1 else diagonal.clamp(min=floor)
    for _ in range(sweeps):
        B = psi.sqrt()[:, None] * C * psi.sqrt()
        parts = []
        for own, other in zip(covs, reversed(covs)):
            v = torch.linalg.eigh(own - B)[1][:, -rank:]
            parts.append(v * (((other - B) @ v * v).sum(0).clamp(min=0) / len(covs)).sqrt())
        W = torch.cat(parts, dim=1)
        psi = (diagonal - W.square().sum(1)).clamp(min=floor)
    return W, psi


def from_moments(mean: Tensor, covs: list[Tensor], rank: int, sweeps: int = 8, root: Tensor | None = None) -> GaussianDenoiser:
    """N(mean, cov), in full for up to DENSE entries, else low rank plus diagonal, or plus C with a variance per entry; mean (*S,), one or two
    covariances (d, d), the others as in `factor`."""
    if mean.numel() <= DENSE:
        return GaussianDenoiser.from_covariance(mean, sum(covs) / len(covs))
    scale = sum(float(cov.diagonal().mean()) for cov in covs) / len(covs)
    W, psi = factor(covs, rank, 1e-6 * max(scale, 1e-12), sweeps, root)
    if root is None:
        return GaussianDenoiser(mean, W, psi)
    return GaussianDenoiser(mean, torch.cat([W, psi.sqrt()[:, None] * root], dim=1), torch.zeros_like(psi))
