r"""Posterior samplers of the peers, on emdiff's network: the other side of bench_estep. The benchmark's own; emdiff does not use it.

ddpm: ancestral sampling with moment-matching guidance as diffusion-priors does it. Levels fall geometrically from tau_first to tau_last in `steps`
steps; each replaces the part 1 - (tau'/tau)^2 of x_t by the guided jump and adds the noise that leaves level tau'; the last state is guided once
more. A step is one evaluation of the network, `iterations` products of the conjugate gradients from 0, and one more product, V At of their
solution. Its exit at a relative residual of 1e-3 is kept; inner products are per datum, and a datum whose curvature is not positive stops, which
both serve it better than what it does: inner products over the batch, and steps of either sign.

mmps: azula's MMPSDenoiser in azula's own sampler, our network wrapped as an azula denoiser.

Sources: Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al. 2024), Sec. 4.2 and its sampler; azula's documentation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from emdiff.data import Observations
from emdiff.denoise import Denoiser

RTOL = 1e-3


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products per datum, shape (B, 1, ...)."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def guided_jump(denoiser: Denoiser, data: Observations, y: Tensor, tau: float, iterations: int) -> Tensor:
    """xhat + V At (cov_obs + A V At)^-1 (obs - A xhat) by plain conjugate gradients, shape (B, *S); y (B, *S) of level tau."""
    A, leaf = data.observer, y.detach().requires_grad_(True)
    with torch.enable_grad():
        xhat = denoiser.xhat(leaf[:, None], leaf.new_tensor([tau]))

    def VAt(w: Tensor) -> Tensor:
        return tau**2 * torch.autograd.grad(xhat, leaf, A.adjoint(w), retain_graph=True)[0]

    mean = xhat.detach()
    r = data.obs - A.forward(mean)
    w, p, rr = torch.zeros_like(r), r, dots(r, r)
    stop = RTOL**2 * rr
    for _ in range(iterations):
        Cp = A.cov(p) + A.forward(VAt(p))
        curvature = dots(p, Cp)
        going = (curvature > 0) & (rr > stop)
        step = torch.where(going, rr / torch.where(going, curvature, 1.0), 0.0)
        w, r = w + step * p, r - step * Cp
        before, rr = rr, dots(r, r)
        if not bool((going & (rr > stop)).any()):
            break
        p = r + torch.where(before > 0, rr / torch.where(before > 0, before, 1.0), 0.0) * p
    return mean + VAt(w)


@torch.no_grad()
def ddpm(
    denoiser: Denoiser,
    data: Observations,
    iterations: int,
    generator: torch.Generator,
    tau_first: float = 100.0,
    tau_last: float = 1e-3,
    steps: int = 64,
) -> Tensor:
    """One sample of x | obs for each datum, (B, *S), standardised units."""
    taus = [tau_first * (tau_last / tau_first) ** (i / steps) for i in range(steps + 1)]
    draw = lambda: torch.randn(len(data), *data.shape, generator=generator)
    y = math.sqrt(1 + tau_first**2) * draw()
    for tau, lower in zip(taus, taus[1:]):
        share = 1 - (lower / tau) ** 2
        y = y - share * (y - guided_jump(denoiser, data, y, tau, iterations)) + lower * math.sqrt(share) * draw()
    return guided_jump(denoiser, data, y, tau_last, iterations)


def mmps(
    denoiser: Denoiser,
    data: Observations,
    iterations: int,
    seed: int,
    solver: str = "gmres",
    eta: float = 1.0,
    steps: int = 64,
    schedule: str = "VPSchedule",
    ends: dict[str, float] | None = None,
) -> Tensor:
    """One sample of x | obs for each datum, (B, *S), by azula; eta = 1 is its DDPMSampler, else its DDIMSampler.

    Args:
        denoiser: Ours.
        data: Standardised observations, all of one noise.
        iterations: Solver iterations.
        seed: azula draws from torch's global generator, which this seeds.
        solver: "gmres", azula's choice, or "cg".
        eta: Stochasticity.
        steps: Steps from t = 1 to t = 0.
        schedule: Name of azula's schedule.
        ends: Its end points.
    """
    from azula import denoise, noise, sample
    from azula.guidance.mmps import MMPSDenoiser

    class Wrapped(denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = getattr(noise, schedule)(**(ends or {}))

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> denoise.DiracPosterior:
            alpha, sigma = self.schedule(t)
            return denoise.DiracPosterior(mean=denoiser.xhat(x_t[:, None] / alpha, (sigma / alpha).reshape(1)))

    A = data.observer
    std = A.std().flatten()[0]
    cov = lambda w: std**2 * w
    flat = lambda x: A.forward(x).flatten(1)
    torch.manual_seed(seed)
    guided = MMPSDenoiser(Wrapped(), data.obs.flatten(1), flat, cov, solver, iterations)
    silent = {"steps": steps, "silent": True}
    sampler = sample.DDPMSampler(guided, **silent) if eta == 1.0 else sample.DDIMSampler(guided, eta=eta, **silent)
    return sampler(sampler.init((len(data), *data.shape)))
