r"""The peer's E-step, done again on a denoiser of emdiff: DDPM with moment-matching guidance, as in diffusion-priors.

For levels sigma_0 > sigma_1 > ... > sigma_T, geometric, and f the posterior's denoiser,

    x_s = x_t - (1 - (sigma_s/sigma_t)^2) (x_t - f(x_t)) + sigma_s (1 - (sigma_s/sigma_t)^2)^(1/2) eps,      the result is f(x_T),
    f(x_t) = xhat + V At v,   (cov_obs + A V At) v = obs - A xhat  by conjugate gradients from 0,   V u = sigma_t^2 (d xhat / d x_t)' u.

A step costs one evaluation and, for i iterations, i + 1 vector-Jacobian products. Inner products are each datum's own; the published code shares
them across whatever batch it is given.

Source: Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al. 2024), Sec. 4.2 and Algorithm 3; its repository's
priors/diffusion.py (DDPM, PosteriorDenoiser), which takes 64 steps and 1 iteration unless told otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emdiff.accumulate import levels
from emdiff.denoise import Denoiser
from emdiff.observations import Observations
from emdiff.prior import TAU_FIRST


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of each datum, shape (B, 1, ...)."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def guided(denoiser: Denoiser, data: Observations, xt: Tensor, sigma: float, iterations: int) -> Tensor:
    """f(x_t) of a batch, shape (B, *S)."""
    with torch.enable_grad():
        xt = xt.detach().requires_grad_(True)
        xhat = denoiser.xhat(xt[:, None], xt.new_tensor([sigma]))
    V = lambda u: sigma**2 * torch.autograd.grad(xhat, xt, u, retain_graph=True)[0]  # noqa: E731
    b = data.obs - data.observer.forward(xhat.detach())
    b = torch.where(data.observer.observed().expand(b.shape), b, 0.0)
    v, r, p = torch.zeros_like(b), b, b
    for _ in range(iterations):
        product = data.observer.forward(V(data.observer.adjoint(p))) + data.observer.cov(p)
        step = dot(r, r) / dot(p, product).clamp(min=1e-20)
        v, r, before = v + step * p, r - step * product, r
        p = r + dot(r, r) / dot(before, before).clamp(min=1e-20) * p
    return xhat.detach() + V(data.observer.adjoint(v))


@torch.no_grad()
def ddpm_sample(
    prior_denoiser: Denoiser,
    observations: Observations,
    steps: int = 64,
    iterations: int = 1,
    generator: torch.Generator | None = None,
    sigma_last: float = 0.02,
    batch: int = 500,
) -> Tensor:
    """Sample x | obs.

    Args:
        prior_denoiser: Of the prior, in units in which the data have mean 0 and variance 1.
        observations: Standardised observations (N).
        steps: Steps T from TAU_FIRST to sigma_last.
        iterations: Of conjugate gradients per step.
        generator: Source of randomness.
        sigma_last: The last level.
        batch: Data at once.

    Returns:
        Samples (N, *S).
    """
    sigmas, done = levels(TAU_FIRST, sigma_last, steps + 1), []
    for i in range(0, len(observations), batch):
        data = observations.rows(slice(i, i + batch))
        xt = math.sqrt(1 + TAU_FIRST**2) * torch.randn(len(data), *data.shape, generator=generator, dtype=data.obs.dtype, device=data.obs.device)
        for t, s in zip(sigmas, sigmas[1:]):
            share = 1 - (s / t) ** 2
            eps = torch.randn(xt.shape, generator=generator, dtype=xt.dtype, device=xt.device)
            xt = xt - share * (xt - guided(prior_denoiser, data, xt, t, iterations)) + s * math.sqrt(share) * eps
        done.append(guided(prior_denoiser, data, xt, sigmas[-1], iterations))
    return torch.cat(done)
