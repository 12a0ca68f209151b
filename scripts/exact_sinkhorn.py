r"""The Sinkhorn divergence between a truth in the plane and a mixture fitted to it, of the laws themselves and not of samples.

For laws a and b with densities, C = |x - y|^2 and a regularisation e, the entropic plan and its potentials are

    P = argmin <P, C> + e KL(P | a (x) b) = a b exp((f + g - C) / e),     f(x) = -e log int b(y) exp((g(y) - C(x, y)) / e) dy,   g likewise,

    sharp  T = <P, C>,     dual  T = <P, C> + e KL(P | a (x) b) = int a f + int b g,     S(a, b) = T(a, b) - T(a, a)/2 - T(b, b)/2.

S of the sharp T is what exact_tools estimates from samples; S of the dual T is convex in each law, and positive unless a = b (Feydy et al. 2019).

Densities are taken on a regular grid, where sums are integrals up to an error that falls like exp(-2 pi^2 std^2 / spacing^2). exp(-C / e) is a product
over the axes, so that f from g costs two products of matrices, each column (row) less its largest exponent. T(a, a): f <- (f + f')/2, f' the right-hand
side above, halves the error each time. T(a, b): f and g in turn, which by itself takes tens of thousands of steps where mass must move between parts
of the plane that are more than some e^1/2 apart; Anderson's acceleration, which learns such few slow directions, takes tens to hundreds.

Sources: Interpolating between optimal transport and MMD using Sinkhorn divergences (Feydy et al. 2019); Anderson acceleration for
fixed-point iterations (Walker & Ni 2011).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from emdiff.deconvolution import Mixture

SHARES = np.array([0.3, 0.2, 0.35, 0.15])
MEANS = np.array([[-1.0, -0.5], [0.8, -0.8], [0.0, 0.9], [0.9, 0.4]])
ROOTS = np.array([[[0.3, 0.0], [0.1, 0.1]], [[0.1, 0.0], [0.0, 0.3]], [[0.4, 0.0], [0.0, 0.05]], [[0.1, 0.0], [-0.1, 0.15]]])
"""The truth that is a mixture: shares (4,), means (4, 2) and roots (4, 2, 2) of its covariances."""

SPACING = 0.02
"""Of the grid. Half of it changes no divergence below by more than a hundred-thousandth of itself."""

EDGE = 2.75
"""The grid covers [-EDGE, EDGE]^2."""

LOST = 1e-4
"""Most mass that a density may have beyond the grid."""

TINY = 1e-300

PAST = 12


class Transport(NamedTuple):
    """Both values of T, or of S; and of T the potential f / e (G, G)."""

    sharp: float
    dual: float
    potential: Tensor | None = None


def axis(spacing: float = SPACING, edge: float = EDGE) -> Tensor:
    """Coordinates (G,) of the grid, the same along both axes."""
    return (torch.arange(round(2 * edge / spacing), dtype=torch.float64) + 0.5) * spacing - edge


def truth_density(name: str, t: Tensor) -> Tensor:
    """Density (G, G) of exact_mixtures.points(name, ...) at the points (t_i, t_j), t (G,).

    Arcs with Gaussian noise are integrals over the angle, uniform: the trapezium rule on the ring, Gauss-Legendre on the moons' half circles.
    """
    if name == "mixture":
        return mixture_density(Mixture(*map(torch.from_numpy, (SHARES, MEANS, ROOTS @ ROOTS.swapaxes(1, 2)))), t)
    if name == "ring":
        angle, std = np.arange(1024) * 2 * math.pi / 1024, 0.03
        centres, weight = np.stack([np.cos(angle), np.sin(angle)]), np.full(1024, 1 / 1024)
    else:
        node, gauss = np.polynomial.legendre.leggauss(384)
        angle, std = (node + 1) * math.pi / 2, 0.05
        upper, lower = np.stack([np.cos(angle), np.sin(angle)]), np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)])
        centres, weight = np.concatenate([upper, lower], 1) - [[0.5], [0.25]], np.tile(gauss / 4, 2)
    bell = torch.exp(-((t[:, None] - torch.from_numpy(centres)[:, None]) ** 2) / (2 * std**2)) / (math.sqrt(2 * math.pi) * std)
    return (bell[0] * torch.from_numpy(weight)) @ bell[1].T


def mixture_density(model: Mixture, t: Tensor) -> Tensor:
    """Density (G, G) of a mixture in the plane at the points (t_i, t_j), t (G,)."""
    x = torch.stack(torch.meshgrid(t, t, indexing="ij"), -1)
    density = torch.zeros_like(x[..., 0])
    for weight, mean, cov in zip(*model):
        gap = x - mean
        power = (gap @ torch.linalg.inv(cov) * gap).sum(-1)
        density += weight / (2 * math.pi * torch.linalg.det(cov).sqrt()) * torch.exp(-power / 2)
    return density


def masses(density: Tensor, t: Tensor) -> Tensor:
    """Masses (G, G) of the cells, of sum 1.

    Raises:
        ValueError: a part LOST of the mass is not on the grid, or the grid too coarse for the density.
    """
    mass = density * (t[1] - t[0]) ** 2
    if abs(float(mass.sum()) - 1) > LOST:
        raise ValueError(f"the cells of the grid hold {float(mass.sum()):.6f} of the mass")
    return mass / mass.sum()


def smoothed(L: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """log (left exp(L) right), L (G, G), -inf allowed; left and right non-negative and symmetric, (G, G)."""
    for K in (left, right):
        top = L.amax(0).clamp(min=-1e6)
        L = ((K @ (L - top).exp()).clamp(min=TINY).log() + top).T
    return L


def transport(a: Tensor, b: Tensor, t: Tensor, reg: float, start: Tensor | None = None, tolerance: float = 1e-7, most: int = 3000) -> Transport:
    """T between masses a and b (G, G) on the grid t (G,).

    Args:
        a: Masses, of sum 1.
        b: Masses; a itself is recognised, and takes a few steps only.
        t: Coordinates along each axis.
        reg: e.
        start: A guess of f / e, such as that of T(a, a).
        tolerance: The steps end when the plan's masses at x differ from a by this in all.
        most: Steps.

    Raises:
        ValueError: `most` steps were too few.
    """
    C = (t[:, None] - t) ** 2
    K, log_a, log_b = torch.exp(-C / reg), a.log(), b.log()
    update = lambda log_p, g: -smoothed(log_p + g, K, K)
    f, past = torch.zeros_like(a) if start is None else start, Past(a.sqrt())
    for _ in range(most):
        g = f if a is b else update(log_a, f)
        new = update(log_b, g)
        if float((a * torch.expm1((f - new).clamp(max=50))).abs().sum()) < tolerance:
            break
        f = (f + new) / 2 if a is b else past.next(new, new - f)
    else:
        raise ValueError(f"no plan after {most} steps")
    cost = sum(float((log_a + f + smoothed(log_b + g, *pair)).exp().sum()) for pair in ((K * C, K), (K, K * C)))
    return Transport(cost, reg * float((a * f).sum() + (b * g).sum()), f)


class Past:
    """Anderson's acceleration of a fixed-point iteration, over its last PAST steps; residuals count by `weight` (G, G)."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.values, self.residuals = weight.flatten(), list[Tensor](), list[Tensor]()

    def next(self, value: Tensor, residual: Tensor) -> Tensor:
        """Where to go on from a value (G, G) of the map and how far it is from its argument (G, G)."""
        self.values, self.residuals = [*self.values, value.flatten()][-PAST:], [*self.residuals, self.weight * residual.flatten()][-PAST:]
        if len(self.values) == 1:
            return value
        V, M = torch.stack(self.values, 1).diff(), torch.stack(self.residuals, 1).diff()
        square = M.T @ M
        share = torch.linalg.solve(square + 1e-10 * square.trace() * torch.eye(len(square)), M.T @ self.residuals[-1])
        return (self.values[-1] - V @ share).reshape(value.shape)


def divergence(a: Tensor, b: Tensor, t: Tensor, reg: float) -> Transport:
    """S between masses a and b (G, G) on the grid t (G,), of the sharp T and of the dual one."""
    aa, bb = transport(a, a, t, reg), transport(b, b, t, reg)
    ab = transport(a, b, t, reg, aa.potential)
    return Transport(ab.sharp - aa.sharp / 2 - bb.sharp / 2, ab.dual - aa.dual / 2 - bb.dual / 2)


def to_truth(name: str, model: Mixture, reg: float = 0.05, spacing: float = SPACING) -> Transport:
    """S between a truth of exact_mixtures and a mixture in the plane."""
    t = axis(spacing)
    return divergence(masses(truth_density(name, t), t), masses(mixture_density(model, t), t), t, reg)
