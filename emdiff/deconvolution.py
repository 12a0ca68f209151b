r"""Extreme deconvolution: a mixture of Gaussians fitted to observations, each with an operator and noise of its own, by maximum likelihood.

obs_i = A_i x_i + n_i,  x ~ sum_j w_j N(mu_j, S_j). Observations are whitened first (A and obs divided by the noise), so that cov_obs = I and

    C_ij = I + A_i S_j A_i^T,   g_ij = A_i^T C_ij^-1 (obs_i - A_i mu_j),   r_ij prop. to w_j N(obs_i; A_i mu_j, C_ij),

are all that is needed: E[x | obs_i, j] = mu_j + S_j g_ij and V[x | obs_i, j] = S_j - S_j A_i^T C_ij^-1 A_i S_j. With N_j = sum_i r_ij,
h_j = sum_i r_ij g_ij and Q_j = sum_i r_ij (g_ij g_ij^T - A_i^T C_ij^-1 A_i), one iteration of expectation maximisation is

    w_j <- N_j / N,     mu_j <- mu_j + S_j h_j / N_j,     S_j <- S_j + S_j (Q_j / N_j - h_j h_j^T / N_j^2) S_j.

Eigenvalues of S_j do not fall below a floor far below what the noise leaves visible; clipping them there is the exact M-step under that bound. EM is
slow along directions that the noise hides, so its steps are extrapolated (SQUAREM) on (log w, mu, log-Cholesky factor of S), where every point is a
mixture; an extrapolation that lowers the likelihood is halved towards the plain step, so that the likelihood never falls.

Sources: Extreme deconvolution (Bovy, Hogg & Roweis 2011); Simple and globally convergent methods for accelerating the convergence of any EM
algorithm (Varadhan & Roland 2008), scheme S3.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from emdiff.data import Observations

PAIRS = 2**21
"""Numbers in the largest array of an E-step."""


class Whitened(NamedTuple):
    """Observations of unit noise, float64.

    Attributes:
        A: Operators over the noise (N or 1, m, d); rows that were not observed are 0.
        obs: Observations over the noise (N, m).
        constant: What the change of units adds to the log-likelihood of each observation (N,).
    """

    A: Tensor
    obs: Tensor
    constant: Tensor

    def rows(self, index: Tensor | slice) -> Whitened:
        """Some of the data."""
        return Whitened(self.A if len(self.A) == 1 else self.A[index], self.obs[index], self.constant[index])


def whitened(data: Observations) -> Whitened:
    """Observations of vectors with their operators in full."""
    shape, d, observer = data.shape, math.prod(data.shape), data.observer
    rows, O = observer.count or 1, data.obs.shape[1:]
    basis = lambda size, axes: torch.eye(size, dtype=data.obs.dtype, device=data.obs.device).reshape(size, 1, *axes).expand(-1, rows, *axes)  # noqa: E731
    A = torch.stack([observer.whiten(observer.forward(e)).flatten(1) for e in basis(d, shape)], dim=-1).double()
    seen = observer.observed().expand(rows, *O).flatten(1)
    if observer.noise.diagonal:
        log_det = -(seen * observer.std().expand(rows, *O).flatten(1).double().log()).sum(1)
    else:
        W = torch.stack([observer.whiten(e).flatten(1) for e in basis(math.prod(O), O)], dim=-1).double()
        log_det = torch.linalg.slogdet(W + torch.diag_embed((~seen).double()))[1]
    constant = log_det - 0.5 * math.log(2 * math.pi) * seen.sum(1)
    return Whitened(A, observer.whiten(data.obs).flatten(1).double(), constant.expand(len(data.obs)))


class Mixture(NamedTuple):
    """sum_j w_j N(mu_j, S_j), float64.

    Attributes:
        weights: w (J,).
        means: mu (J, d).
        covs: S (J, d, d).
    """

    weights: Tensor
    means: Tensor
    covs: Tensor


class Expected(NamedTuple):
    """What an E-step leaves.

    Attributes:
        log_likelihood: Of each observation (N,).
        N: Data of each component (J,).
        h: Sum of r g (J, d).
        Q: Sum of r (g g^T - A^T C^-1 A) (J, d, d).
    """

    log_likelihood: Tensor
    N: Tensor
    h: Tensor
    Q: Tensor


class Fit(NamedTuple):
    """A fitted mixture.

    Attributes:
        mixture: At the last iteration.
        log_likelihood: Mean over the data, before its last step.
        iterations: E-steps taken.
    """

    mixture: Mixture
    log_likelihood: float
    iterations: int


class Terms(NamedTuple):
    """Of a batch of data under every component: log w_j N(obs_i; ...) (n, J), L^-1 A (n or 1, J, m, d), g (n, J, d), with C = L L^T."""

    log_p: Tensor
    LA: Tensor
    g: Tensor


def terms(model: Mixture, data: Whitened) -> Terms:
    """The E-step's terms of a batch."""
    A = data.A[:, None]
    C = A @ model.covs @ A.mT + torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)
    L = torch.linalg.cholesky(C)
    LA = torch.linalg.solve_triangular(L, A.expand(-1, L.shape[1], -1, -1), upper=False)
    gap = data.obs[:, None] - (A @ model.means[..., None])[..., 0]
    if len(L) == 1:
        white = torch.linalg.solve_triangular(L[0], gap.permute(1, 2, 0), upper=False).permute(2, 0, 1)
    else:
        white = torch.linalg.solve_triangular(L, gap[..., None], upper=False)[..., 0]
    log_p = model.weights.log() - 0.5 * white.square().sum(-1) - L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return Terms(log_p, LA, (LA.mT @ white[..., None])[..., 0])


def expect(model: Mixture, data: Whitened) -> Expected:
    """The E-step on all data, in batches."""
    J, d = model.means.shape
    rows = max(1, PAIRS // (J * data.A.shape[1] * (d + data.A.shape[1])))
    N, h, Q = torch.zeros_like(model.weights), torch.zeros_like(model.means), torch.zeros_like(model.covs)
    found = []
    for i in range(0, len(data.obs), rows):
        part = data.rows(slice(i, i + rows))
        t = terms(model, part)
        total = t.log_p.logsumexp(1)
        r = (t.log_p - total[:, None]).exp()
        found.append(total + part.constant)
        N = N + r.sum(0)
        h = h + torch.einsum("nj,njd->jd", r, t.g)
        rg = (r[..., None] * t.g).transpose(0, 1)
        share = r.sum(0, keepdim=True) if len(t.LA) == 1 else r
        root = (share.sqrt()[..., None, None] * t.LA).transpose(0, 1).flatten(1, 2)
        Q = Q + rg.mT @ t.g.transpose(0, 1) - root.mT @ root
    return Expected(torch.cat(found), N, h, Q)


def maximise(model: Mixture, e: Expected, floor: float) -> Mixture:
    """The M-step, eigenvalues of S at least `floor`."""
    N = e.N.clamp(min=1e-9)
    step = e.h / N[:, None]
    covs = model.covs + model.covs @ (e.Q / N[:, None, None] - step[:, :, None] * step[:, None]) @ model.covs
    return Mixture(N / N.sum(), model.means + (model.covs @ step[..., None])[..., 0], clipped(covs, floor))


def clipped(covs: Tensor, floor: float) -> Tensor:
    """Symmetric matrices with eigenvalues raised to `floor`."""
    s, U = torch.linalg.eigh((covs + covs.mT) / 2)
    return (U * s.clamp(min=floor)[:, None]) @ U.mT


def pack(model: Mixture) -> Tensor:
    """A mixture as one vector: log w, mu, Cholesky factor of S with the logarithm of its diagonal."""
    L = torch.linalg.cholesky(model.covs)
    logs = L.tril(-1) + torch.diag_embed(L.diagonal(dim1=-2, dim2=-1).log())
    return torch.cat([model.weights.log(), model.means.flatten(), logs.flatten()])


def unpack(theta: Tensor, like: Mixture) -> Mixture:
    """The inverse of `pack`; weights are normalised."""
    J, d = like.means.shape
    log_w, means, logs = theta.split([J, J * d, J * d * d])
    logs = logs.reshape(J, d, d)
    L = logs.tril(-1) + torch.diag_embed(logs.diagonal(dim1=-2, dim2=-1).exp())
    return Mixture(log_w.softmax(0), means.reshape(J, d), L @ L.mT)


def fit(model: Mixture, data: Whitened, floor: float, iterations: int = 300, tolerance: float = 1e-7, accelerated: bool = True) -> Fit:
    """Maximise the likelihood from `model`, by accelerated EM.

    Args:
        model: Where to start.
        data: Observations.
        floor: Least eigenvalue of S.
        iterations: Most E-steps.
        tolerance: Stop when a cycle of three raises the mean log-likelihood by less.
        accelerated: Extrapolate; else plain steps, which leave alone for longest what the data say least of.

    Returns:
        Fit.
    """
    e, used = expect(model, data), 1
    while used < iterations:
        before = e.log_likelihood.mean()
        first = maximise(model, e, floor)
        e1 = expect(first, data)
        if not accelerated:
            model, e, used = first, e1, used + 1
            if 3 * (e.log_likelihood.mean() - before) < tolerance:
                break
            continue
        second = maximise(first, e1, floor)
        zero, one, two = pack(model), pack(first), pack(second)
        r, v = one - zero, two - 2 * one + zero
        a = -float((r.norm() / v.norm().clamp(min=1e-300)).clamp(1, 1e6))
        while True:
            leap = two if a > -1.01 else zero - 2 * a * r + a * a * v
            model = unpack(leap, model)
            model = model._replace(covs=clipped(model.covs, floor))
            e = expect(model, data)
            used += 1
            if a > -1.01 or bool(e.log_likelihood.mean() >= e1.log_likelihood.mean()):
                break
            a = (a - 1) / 2 if a < -2 else -1.0
        used += 1
        if e.log_likelihood.mean() - before < tolerance:
            break
    return Fit(model, float(e.log_likelihood.mean()), used)


def split(model: Mixture, floor: float) -> Mixture:
    """Twice the components: each halved across its longest axis, where a Gaussian cut in two has parts at +- (2/pi)^1/2 std, of variance 1 - 2/pi."""
    s, U = torch.linalg.eigh(model.covs)
    longest, length = U[..., -1], s[:, -1, None]
    away = math.sqrt(2 / math.pi) * length.sqrt() * longest
    covs = clipped(model.covs - 2 / math.pi * length[..., None] * longest[:, :, None] * longest[:, None], floor)
    return Mixture(torch.cat([model.weights, model.weights]) / 2, torch.cat([model.means - away, model.means + away]), torch.cat([covs, covs]))
