r"""The exact denoiser of a mixture of Gaussians, and that of its posterior, which is a mixture again.

x ~ sum_j w_j N(mu_j, S_j), S_j = U_j diag(s_j) U_j^T. Measured with precision p = 1/tau^2, the same for all entries (it may be 0: not measured),

    r_j  prop. to  w_j prod_e (1 + s_je p)^(-1/2) exp(-p a_j^T (1 + s_j p)^-1 a_j / 2),     a_j = U_j^T (ybar - mu_j)
    E[x | y, j] = mu_j + U_j s_j p (1 + s_j p)^-1 a_j,       V[x | y, j] = U_j s_j (1 + s_j p)^-1 U_j^T,

sums and quotients that neither a tiny nor a huge tau harms. Where precisions differ between entries the measurement is an observation with
A = diag(p)^(1/2) and unit noise, and the terms of extreme deconvolution (`deconvolution.terms`) serve, in float64.

Given an observation through any linear operator the posterior p(x | obs) is a mixture with means, covariances and weights of its own for each datum:
`given` makes its denoiser. Guidance and first samples are exact, with no walk.

Source: Extreme deconvolution (Bovy, Hogg & Roweis 2011), eq. 20-25, for the conditional moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emdiff.deconvolution import Mixture, Whitened, terms
from emdiff.denoise import Denoiser, Moments
from emdiff.measurement import pool

LEAST = 1e-6
"""Probability below which components of a posterior are left out."""


class MixtureDenoiser(Denoiser):
    """The Bayes estimator of x ~ sum_j w_j N(mu_j, S_j), vectors of d entries in any shape.

    Args:
        weights: w, non-negative, summing to 1, shape (J,), or (B, J) for a mixture of each datum's own.
        means: mu, shape (J, d) or (B, J, d).
        covs: S, shape (J, d, d) or (B, J, d, d); negative eigenvalues count as 0.

    >>> two = MixtureDenoiser(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1, 1))
    >>> two.xhat(torch.tensor([[[100.0]]]), torch.tensor([1.0]))
    tensor([[1.]])
    """

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor) -> None:
        super().__init__()
        spectrum, basis = torch.linalg.eigh(covs)
        for name, value in {"weights": weights, "means": means, "basis": basis, "spectrum": spectrum.clamp(min=0)}.items():
            self.register_buffer(name, value)

    @property
    def covs(self) -> Tensor:
        """S, shape (J, d, d) or (B, J, d, d)."""
        return (self.basis * self.spectrum[..., None, :]) @ self.basis.mT

    def model(self) -> Mixture:
        """The mixture in float64."""
        return Mixture(self.weights.double(), self.means.double(), self.covs.double())

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        """E[x | y], shape (B, *S)."""
        ybar, precision = pool(y, sigma)
        if precision[0].numel() > 1:
            return self._per_entry(ybar, precision)
        r, parts, _ = self._parts(ybar.flatten(1), precision.reshape(-1, 1))
        return torch.einsum("bj,bjd->bd", r, parts).reshape(ybar.shape)

    def moments(self, y: Tensor, sigma: Tensor) -> Moments:
        """E[x | y] and products with V, in closed form."""
        xhat, V = self.covariance(y, sigma)
        return Moments(xhat, lambda u: torch.einsum("bde,be->bd", V, u.flatten(1)).reshape(u.shape))

    def covariance(self, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E[x | y] (B, *S) and V[x | y] in full (B, d, d)."""
        ybar, precision = pool(y, sigma)
        if precision[0].numel() > 1:
            return self.given(self._as_data(ybar, precision)).covariance(torch.zeros_like(y[:, :1]), y.new_tensor([torch.inf]))
        r, parts, shrunk = self._parts(ybar.flatten(1), precision.reshape(-1, 1))
        xhat = torch.einsum("bj,bjd->bd", r, parts)
        far = r.sqrt()[..., None] * (parts - xhat[:, None])
        roots = (self.basis * (r[..., None] * shrunk).sqrt()[..., None, :]).transpose(-3, -2).flatten(2)
        return xhat.reshape(ybar.shape), roots @ roots.mT + far.mT @ far

    def draw(self, y: Tensor, sigma: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A sample of x | y for each y, shape (B, *S), for a level that is the same for all entries."""
        ybar, precision = pool(y, sigma)
        r, parts, shrunk = self._parts(ybar.flatten(1), precision.reshape(-1, 1))
        j, rows = torch.multinomial(r, 1, generator=generator), torch.arange(len(r), device=r.device)[:, None]
        eps = torch.randn(parts[:, 0].shape, generator=generator, dtype=parts.dtype, device=parts.device)
        basis = self.basis[j[:, 0]] if self.basis.ndim == 3 else self.basis[rows, j][:, 0]
        shrunk = shrunk.expand(len(r), -1, -1)[rows, j][:, 0]
        return (parts[rows, j][:, 0] + (basis @ (shrunk.sqrt() * eps)[..., None])[..., 0]).reshape(ybar.shape)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw x, shape (count, d); from a mixture that all data share."""
        zero = self.means.new_zeros(count, 1, self.means.shape[-1])
        return self.draw(zero, zero.new_tensor([torch.inf]), generator)

    def given(self, data: Whitened) -> MixtureDenoiser:
        """The denoiser of p(x | obs) for each observation of a batch, a mixture of its own for each datum, in the dtype of this one.

        Computed in float64. Where all data share one operator they share the covariances. Components are left out that together have a probability
        below LEAST for every datum of the batch, where data have operators of their own.
        """
        model = self.model()
        t = terms(model, data)
        r = t.log_p.softmax(1)
        if len(t.LA) == 1:
            SA = model.covs @ t.LA[0].mT
            made = MixtureDenoiser(r, model.means + (model.covs @ t.g[..., None])[..., 0], model.covs - SA @ SA.mT)
        else:
            r, j = r.sort(1, descending=True)
            few = 1 + int((r.cumsum(1) < 1 - LEAST).sum(1).max().clamp(max=r.shape[1] - 1))
            j, rows = j[:, :few], torch.arange(len(r), device=r.device)[:, None]
            S, g = model.covs[j], t.g[rows, j]
            SA = S @ t.LA[rows, j].mT
            made = MixtureDenoiser(r[:, :few] / r[:, :few].sum(1, keepdim=True), model.means[j] + (S @ g[..., None])[..., 0], S - SA @ SA.mT)
        return made.to(self.means.dtype)

    def _parts(self, ybar: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r (B, J), E[x | y, j] (B, J, d) and the spectra of V[x | y, j] (B or 1, J, d), for ybar (B, d) of precision p (B or 1, 1)."""
        p = p[..., None]
        keep = 1 / (1 + self.spectrum * p)
        a = _turn(self.basis.mT, ybar[:, None] - self.means)
        log_r = self.weights.log() + 0.5 * (keep.log() - p * a.square() * keep).sum(-1)
        return log_r.softmax(1), self.means + _turn(self.basis, self.spectrum * p * keep * a), self.spectrum * keep

    def _as_data(self, ybar: Tensor, precision: Tensor) -> Whitened:
        """A measurement with a precision for every entry, as an observation of unit noise."""
        root = precision.expand(ybar.shape).flatten(1).double().sqrt()
        return Whitened(torch.diag_embed(root), root * ybar.flatten(1).double(), root.new_zeros(len(root)))

    def _per_entry(self, ybar: Tensor, precision: Tensor) -> Tensor:
        model = self.model()
        t = terms(model, self._as_data(ybar, precision))
        parts = model.means + (model.covs @ t.g[..., None])[..., 0]
        return torch.einsum("bj,bjd->bd", t.log_p.softmax(1), parts).reshape(ybar.shape).to(ybar.dtype)


def _turn(U: Tensor, a: Tensor) -> Tensor:
    """U_j a_bj for U (J, d, d) or (B, J, d, d) and a (B, J, d)."""
    if U.ndim == 3:
        return (U @ a.permute(1, 2, 0)).permute(2, 0, 1)
    return (U @ a[..., None])[..., 0]
