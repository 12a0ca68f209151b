r"""The Poisson multimeasurement noise model: x >= 0 is counted M times, y_m ~ Poisson(x), entry by entry.

    p(y | x) = exp(-M x) prod_m x^{y_m} / y_m!,      xhat(y) = E[x | y] = (y_m + 1) p(y + 1_m) / p(y)  for any m     (eq. 5)
    V[x | y] = xhat(y) (xhat(y + 1_m) - xhat(y))       since E[x^2 | y] = (y_m + 1) (y_m + 2) p(y + 2 1_m) / p(y)

All that y says of x is in the total s = sum_m y_m, so the learned denoiser sees s alone (pooled). For x ~ Gamma(a, b): xhat = (a + s)/(b + M).

Sampling a Poisson M-density is open in the paper (Remark 7). The walks here are our own extension: one measurement at a time is replaced,

    plain    y_m ~ Poisson(xhat(y))                         drops the spread of x about xhat: its stationary law is too narrow (`plain_moments`)
    spread   x ~ Gamma with mean xhat and variance V, y_m ~ Poisson(x):   for a Gamma prior x | y is just that Gamma, and this is exact Gibbs sampling

of x and y_m in turn. Both keep the mean of y. spread needs xhat at y + 1_m, one more evaluation for each entry of x, so it is for vectors.

Source: Multimeasurement Generative Models (Saremi & Srivastava 2022), Sec. 2.1; An empirical Bayes approach to statistics (Robbins 1956).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


def count(x: Tensor, M: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw y_m ~ Poisson(x), m = 1..M: x (B, *S) >= 0 -> (B, M, *S), of the dtype of x."""
    return torch.poisson(x[:, None].expand(-1, M, *x.shape[1:]), generator=generator)


def robbins(log_p: Callable[[Tensor], Tensor], y: Tensor, m: int = 0) -> Tensor:
    """E[x | y] of scalar data from the log of their M-density, which need not be normalised (eq. 5).

    Args:
        log_p: (B, M) -> (B,).
        y: Counts (B, M).
        m: Which measurement; the result is the same for all.
    """
    one = torch.zeros_like(y)
    one[:, m] = 1
    return (y[:, m] + 1) * (log_p(y + one) - log_p(y)).exp()


class PoissonDenoiser(nn.Module, ABC):
    """E[x | y] of counts; subclasses define it on totals."""

    @abstractmethod
    def from_total(self, s: Tensor, M: int) -> Tensor:
        """E[x | s]: totals (B, *S) of M counts -> (B, *S), non-negative."""

    def xhat(self, y: Tensor) -> Tensor:
        """E[x | y], shape (B, *S); counts (B, M, *S)."""
        return self.from_total(y.sum(1), y.shape[1])

    def variance(self, y: Tensor) -> Tensor:
        """The diagonal of V[x | y], shape (B, *S), by one evaluation for each entry of x; not below 0."""
        s, M = y.sum(1), y.shape[1]
        flat, d = s.flatten(1), s[0].numel()
        more = (flat[:, None] + torch.eye(d, dtype=s.dtype, device=s.device)).reshape(-1, *s.shape[1:])
        raised = torch.diagonal(self.from_total(more, M).reshape(len(s), d, d), dim1=1, dim2=2).reshape(s.shape)
        xhat = self.from_total(s, M)
        return (xhat * (raised - xhat)).clamp(min=0)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """|x - xhat(y)|^2 per entry, shape (B,): its least value is the trace of V[x | y] over d."""
        return (x - self.xhat(y)).square().flatten(1).mean(1)


class GammaDenoiser(PoissonDenoiser):
    """The exact denoiser of independent x ~ Gamma(a, b), of mean a/b.

    Args:
        a: Shape, positive, broadcastable against x.
        b: Rate, positive, likewise.

    >>> GammaDenoiser(torch.tensor(1.0), torch.tensor(1.0)).xhat(torch.tensor([[[2.0], [3.0]]]))
    tensor([[2.]])
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def from_total(self, s: Tensor, M: int) -> Tensor:
        """(a + s)/(b + M), shape (B, *S)."""
        return (self.a + s) / (self.b + M)

    def log_p(self, y: Tensor) -> Tensor:
        """log p(y) of scalar data (B, M), shape (B,): the integral of p(y | x) over the Gamma density."""
        s, M = y.sum(1), y.shape[1]
        return (
            torch.lgamma(self.a + s) - torch.lgamma(self.a) + self.a * self.b.log() - (self.a + s) * (self.b + M).log() - torch.lgamma(y + 1).sum(1)
        )

    def risk(self, M: int) -> Tensor:
        """E |x - xhat|^2 per entry, a / (b (b + M)): the least that any denoiser reaches."""
        return self.a / (self.b * (self.b + M))


class PoissonMDAE(PoissonDenoiser):
    """A learned denoiser of counts.

    With z = 2 sqrt(s/M + 3/(8M)), whose noise has about the std M^(-1/2) whatever x is (Anscombe 1948), xhat = (z/2 + F(z, c))^2 in units of the
    mean of x;
    the network sees (z - 2)/2 and c = log(1 + M mean)/2, its precision there.

    Args:
        backbone: F(z, c) as in `nn`.
        mean: Mean of x over data and entries, positive.
    """

    def __init__(self, backbone: nn.Module, mean: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean))

    def from_total(self, s: Tensor, M: int) -> Tensor:
        """E[x | s], shape (B, *S)."""
        root = torch.sqrt((s + 0.375) / (M * self.mean))
        c = torch.log1p(M * self.mean).reshape([1] * s.ndim) / 2
        return self.mean * (root + self.backbone(root - 1, c.to(s.dtype))).square()


class PoissonLoss:
    """The least-squares loss of counts (eq. 12), per entry: for `training.train`.

    Args:
        x: Clean data (N, *S), non-negative.
        M: Measurements.
    """

    def __init__(self, x: Tensor, M: int) -> None:
        self.x, self.M = x, M

    def __call__(self, denoiser: PoissonDenoiser, index: Tensor, generator: torch.Generator) -> Tensor:
        """The mean loss of a batch of indices (B,), in units of the data's mean squared, shape ()."""
        x = self.x[index.to(self.x.device)].to(generator.device)
        return denoiser.loss(x, count(x, self.M, generator)).mean() / self.x.mean().square()


def gibbs_walk(denoiser: PoissonDenoiser, y: Tensor, steps: int, spread: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """Replace one measurement of every datum `steps` times, a random one each time, the same for the batch.

    Args:
        denoiser: Of the prior.
        y: Counts (B, M, *S); not changed.
        steps: Replacements.
        spread: Draw x about xhat; see the module.
        generator: Source of randomness.

    Returns:
        Counts (B, M, *S).
    """
    order = torch.randint(y.shape[1], (steps,), generator=generator, device=y.device)
    for m in order.tolist():
        x = spread_draw(denoiser, y, generator) if spread else denoiser.xhat(y)
        y = y.clone()
        y[:, m] = torch.poisson(x.clamp(min=0), generator=generator)
    return y


def spread_draw(denoiser: PoissonDenoiser, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x from the Gamma law with mean xhat(y) and variance V[x | y], entry by entry, shape (B, *S)."""
    mean, variance = denoiser.xhat(y), denoiser.variance(y)
    rate = mean / variance.clamp(min=1e-12)
    return torch._standard_gamma((mean * rate).clamp(1e-6, 1e9), generator=generator) / rate


class Moments2(NamedTuple):
    """Second moments of counts of one scalar datum.

    Attributes:
        mean: E y_m.
        variance: Var y_m.
        covariance: Cov(y_m, y_l) for m != l.
    """

    mean: float
    variance: float
    covariance: float


def exact_moments(a: float, b: float) -> Moments2:
    """Of the M-density of x ~ Gamma(a, b): Cov(y_m, y_l) = Var x."""
    return Moments2(a / b, a / b + a / b**2, a / b**2)


def plain_moments(a: float, b: float, M: int) -> Moments2:
    """Of the stationary law of the plain walk on x ~ Gamma(a, b).

    With q = E y_m^2, r = E y_m y_l, mu = a/b, E s^2 = M q + M (M-1) r and lambda = (a + s)/(b + M), a replacement leaves both where they are if

        q = mu + E lambda^2 = mu + (a^2 + 2 a M mu + M q + M (M-1) r)/(b + M)^2,      r = E lambda y_l = (a mu + q + (M-1) r)/(b + M).
    """
    mu, n = a / b, b + M
    A = torch.tensor([[1 - M / n**2, -M * (M - 1) / n**2], [-1 / n, 1 - (M - 1) / n]], dtype=torch.float64)
    right = torch.tensor([mu + (a**2 + 2 * a * M * mu) / n**2, a * mu / n], dtype=torch.float64)
    q, r = torch.linalg.solve(A, right).tolist()
    return Moments2(mu, q - mu**2, r - mu**2)
