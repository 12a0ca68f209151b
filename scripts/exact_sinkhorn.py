r"""The Sinkhorn divergence between a truth in the plane and a mixture fitted to it: of the laws themselves, not of samples.

For laws a and b with densities, C = |x - y|^2 and a regularisation e, the entropic plan P and its potentials f, g (here in units of e) are

    P = argmin <P, C> + e KL(P | a (x) b) = a b exp(f + g - C / e),      f(x) = -log int b(y) exp(g(y) - C(x, y) / e) dy,   g likewise,

    sharp  T = <P, C>,     dual  T = <P, C> + e KL(P | a (x) b) = e int a f + e int b g,     S(a, b) = T(a, b) - T(a, a)/2 - T(b, b)/2.

S of the sharp T is what exact_tools estimates from samples; S of the dual T is convex in each law, and positive unless a = b (Feydy et al. 2019).

Densities are taken on a regular grid, where sums are integrals up to an error that falls like exp(-2 pi^2 std^2 / spacing^2). exp(-C / e) is a
product over the axes, so that f from g costs two products of matrices, each column less its largest exponent. T(a, a): f <- (f + f')/2, f' the
right-hand side above, halves the error each time. T(a, b): f and g in turn, which by itself takes tens of thousands of steps where mass must move
between parts of the plane some e^1/2 apart; Anderson's acceleration, which learns such few slow directions, takes tens to hundreds.

Sources: Interpolating between optimal transport and MMD using Sinkhorn divergences (Feydy et al. 2019); Anderson acceleration for fixed-point
iterations (Walker & Ni 2011).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from emdiff.deconvolution import Mixture, clipped

SHARES = np.array([0.3, 0.2, 0.35, 0.15])
MEANS = np.array([[-1.0, -0.5], [0.8, -0.8], [0.0, 0.9], [0.9, 0.4]])
ROOTS = np.array([[[0.3, 0.0], [0.1, 0.1]], [[0.1, 0.0], [0.0, 0.3]], [[0.4, 0.0], [0.0, 0.05]], [[0.1, 0.0], [-0.1, 0.15]]])
"""The truth that is a mixture: shares (4,), means (4, 2) and roots (4, 2, 2) of its covariances."""

SPACING, EDGE = 0.02, 2.8
"""Of the grid, which covers [-EDGE, EDGE]^2."""

THIN = 0.7
"""Axes of Gaussians with a smaller std, in spacings, are given that: the grid would miss or overcount what is thinner."""

LOST = 1e-3
"""Most mass that may be off the grid; the rest is normalised."""

PAST = 12
"""Steps that the acceleration remembers; with 5 it stands still where a cloud lies apart from the others."""


class Transport(NamedTuple):
    """Both values of T, or of S, in squared units of length; and of T the potential f (G, G)."""

    sharp: float
    dual: float
    f: Tensor | None = None


def axis(spacing: float = SPACING) -> Tensor:
    """Coordinates (G,) of the grid, the same along both axes."""
    return (torch.arange(round(2 * EDGE / spacing), dtype=torch.float64) + 0.5) * spacing - EDGE


def truth_density(name: str, t: Tensor) -> Tensor:
    """Density (G, G) of exact_mixtures.points(name, ...) at the points (t_i, t_j), t (G,).

    A curve with Gaussian noise is an integral over the angle: the trapezium rule for the ring, Gauss-Legendre for the moons' half circles.
    """
    if name == "mixture":
        return mixture_density(Mixture(*map(torch.from_numpy, (SHARES, MEANS, ROOTS @ ROOTS.swapaxes(1, 2)))), t)
    if name == "ring":
        angle, weight, std = np.arange(1024) * math.pi / 512, np.full(1024, 1 / 1024), 0.03
        centres = np.stack([np.cos(angle), np.sin(angle)])
    else:
        (node, weight), std = np.polynomial.legendre.leggauss(384), 0.05
        c, s, weight = np.cos((node + 1) * math.pi / 2), np.sin((node + 1) * math.pi / 2), np.tile(weight / 4, 2)
        centres = np.concatenate([np.stack([c - 0.5, s - 0.25]), np.stack([0.5 - c, 0.25 - s])], 1)
    bell = torch.exp(-((t[:, None] - torch.from_numpy(centres)[:, None]) ** 2) / (2 * std**2)) / (math.sqrt(2 * math.pi) * std)
    return (bell[0] * torch.from_numpy(weight)) @ bell[1].T


def mixture_density(model: Mixture, t: Tensor) -> Tensor:
    """Density (G, G) of a mixture in the plane at the points (t_i, t_j), t (G,); none of its Gaussians thinner than THIN."""
    x, found = torch.stack(torch.meshgrid(t, t, indexing="ij"), -1), t.new_zeros(len(t), len(t))
    for weight, mean, cov in zip(model.weights, model.means, clipped(model.covs, float(THIN * (t[1] - t[0])) ** 2)):
        power = ((x - mean) @ torch.linalg.inv(cov) * (x - mean)).sum(-1)
        found += weight / (2 * math.pi * torch.linalg.det(cov).sqrt()) * torch.exp(-power / 2)
    return found


def masses(density: Tensor, t: Tensor) -> Tensor:
    """Masses (G, G) of the cells, of sum 1, for a density (G, G) on the grid t (G,).

    Raises:
        ValueError: more than LOST of the mass is off the grid, or the grid too coarse for the density.
    """
    mass = density * (t[1] - t[0]) ** 2
    if abs(float(mass.sum()) - 1) > LOST:
        raise ValueError(f"the cells of the grid hold {float(mass.sum()):.6f} of the mass")
    return mass / mass.sum()


def smoothed(L: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """log (left exp(L) right), L (G, G), -inf allowed; left and right non-negative and symmetric, (G, G)."""
    for K in (left, right):
        top = L.amax(0).clamp(min=-1e6)
        L = ((K @ (L - top).exp()).clamp(min=1e-300).log() + top).T
    return L


def transport(a: Tensor, b: Tensor, t: Tensor, reg: float, start: Tensor | None = None, tolerance: float = 1e-7) -> Transport:
    """T between masses a and b (G, G) on the grid t (G,); b may be a itself, which takes few steps.

    `reg` is e, `start` a guess of f, and the steps end when the plan's masses at x differ from a by `tolerance` in all.
    """
    C = (t[:, None] - t) ** 2
    K, log_a, log_b = torch.exp(-C / reg), a.log(), b.log()
    update = lambda log_p, g: -smoothed(log_p + g, K, K)
    f, root, values, residuals = torch.zeros_like(a) if start is None else start, a.sqrt().flatten(), list[Tensor](), list[Tensor]()
    for _ in range(5000):
        g = f if a is b else update(log_a, f)
        new = update(log_b, g)
        if float((a * torch.expm1((f - new).clamp(max=50))).abs().sum()) < tolerance:
            break
        values, residuals = [*values, new.flatten()][-PAST:], [*residuals, root * (new - f).flatten()][-PAST:]
        f = (f + new) / 2 if a is b else accelerated(torch.stack(values, 1), torch.stack(residuals, 1)).reshape(f.shape)
    else:
        raise ValueError("no plan after 5000 steps")
    cost = sum(float((log_a + f + smoothed(log_b + g, *pair)).exp().sum()) for pair in ((K * C, K), (K, K * C)))
    return Transport(cost, reg * float((a * f).sum() + (b * g).sum()), f)


def accelerated(values: Tensor, residuals: Tensor) -> Tensor:
    """Anderson's next argument (n,), from the last values (n, k) of a map and how far these are from their arguments, weighted (n, k)."""
    M = residuals.diff()
    square = M.T @ M
    share = torch.linalg.solve(square + 1e-10 * square.trace() * torch.eye(len(square)), M.T @ residuals[:, -1])
    return values[:, -1] - values.diff() @ share


def divergence(a: Tensor, b: Tensor, t: Tensor, reg: float) -> Transport:
    """S between masses a and b (G, G) on the grid t (G,) with regularisation `reg`, of the sharp T and of the dual one."""
    aa, bb = transport(a, a, t, reg), transport(b, b, t, reg)
    ab = transport(a, b, t, reg, aa.f)
    return Transport(ab.sharp - aa.sharp / 2 - bb.sharp / 2, ab.dual - aa.dual / 2 - bb.dual / 2)


def to_truth(name: str, model: Mixture, reg: float = 0.05, spacing: float = SPACING) -> Transport:
    """S between a truth of exact_mixtures and a mixture in the plane."""
    t = axis(spacing)
    return divergence(masses(truth_density(name, t), t), masses(mixture_density(model, t), t), t, reg)
