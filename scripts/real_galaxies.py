r"""Simulated galaxies for real_work.py: Sersic profiles of random shape, a PSF and a noise level for each; and how their size and shape are measured.

A galaxy is I(r) ~ exp(-b (r/R)^(1/n)), b = 2n - 1/3 + .009876/n, so that half of its light is within R, r^2 = q u^2 + v^2/q along the axes of an
ellipse of axis ratio q. Per object: R log-normal, median 2.5 pixels, log-std .3, cut to [1.4, 5]; n log-uniform in [.7, 2.5]; q from an
ellipticity (1 - q^2)/(1 + q^2) of Rayleigh law, .25, at most .7; any position angle; flux log-normal about FLUX with log-std .3; centre within half
a pixel of the middle. Pixels are means over 5 x 5 points. PSF: elliptical Gaussian of sigma 1 to 1.8 pixels and ellipticity up to .1; noise std per
object from .1 to .3, log-uniform, where the brightest pixel of a typical clean galaxy is about 6.

Measured are, with the same aperture for every image, about the centroid under a Gaussian weight of std WEIGHT pixels, iterated:

    half-light radius    of the curve of growth: the radius within which half of the light within APERTURE lies
    ellipticity          (e1^2 + e2^2)^(1/2), e1 = (Qxx - Qyy)/T, e2 = 2 Qxy/T, T = Qxx + Qyy, of second moments Q under the same weight

Sources: b of the half-light radius, Prugniel & Simien (1997), The fundamental plane of early-type galaxies; weighted moments, Kaiser, Squires &
Broadhurst (1995), A method for weak lensing observations.
"""

from __future__ import annotations

import math

import torch
from scipy.stats import ks_2samp
from torch import Tensor

from observers import Blur

SIDE, FLUX = 24, 100.0

WEIGHT, APERTURE = 3.0, 10.0
"""Pixels."""

FINE = 5
"""Points per pixel and axis."""


def _grid(points: int) -> tuple[Tensor, Tensor]:
    """Coordinates in pixels about the middle, (SIDE points, SIDE points) each."""
    i = (torch.arange(SIDE * points) + 0.5) / points - SIDE / 2
    return torch.meshgrid(i, i, indexing="ij")


def galaxies(count: int, generator: torch.Generator) -> Tensor:
    """Clean images (count, SIDE, SIDE)."""
    draw = lambda low, high: low + (high - low) * torch.rand(count, 1, 1, generator=generator)  # noqa: E731
    log_normal = lambda s: torch.exp(s * torch.randn(count, 1, 1, generator=generator))  # noqa: E731
    R, n = (2.5 * log_normal(0.3)).clamp(1.4, 5.0), torch.exp(draw(math.log(0.7), math.log(2.5)))
    e = (0.25 * torch.sqrt(-2 * torch.log1p(-draw(0.0, 1.0)))).clamp(max=0.7)
    q, angle, flux = torch.sqrt((1 - e) / (1 + e)), draw(0.0, math.pi), FLUX * log_normal(0.3)
    v0, u0 = draw(-0.5, 0.5), draw(-0.5, 0.5)
    made = [sersic(R[k], n[k], q[k], angle[k], v0[k], u0[k]) for k in torch.arange(count).split(128)]
    return torch.cat(made) * flux


def sersic(R: Tensor, n: Tensor, q: Tensor, angle: Tensor, y0: Tensor, x0: Tensor) -> Tensor:
    """Images (N, SIDE, SIDE) of sum 1: half-light radius, index, axis ratio, position angle and centre, each (N, 1, 1)."""
    b, (i, j) = 2 * n - 1 / 3 + 0.009876 / n, _grid(FINE)
    y, x, c, s = i - y0, j - x0, angle.cos(), angle.sin()
    r = torch.sqrt(q * (c * x + s * y) ** 2 + (c * y - s * x) ** 2 / q)
    fine = torch.exp(-b * (r / R) ** (1 / n))
    images = torch.nn.functional.avg_pool2d(fine[:, None], FINE)[:, 0]
    return images / images.sum((1, 2), keepdim=True)


def telescope(count: int, generator: torch.Generator, size: int = 13) -> Blur:
    """A PSF (size, size) of sum 1 and a noise level for each object; beyond the edge the sky is empty."""
    draw = lambda low, high: low + (high - low) * torch.rand(count, 1, 1, generator=generator)  # noqa: E731
    i = torch.arange(size) - size // 2.0
    y, x = torch.meshgrid(i, i, indexing="ij")
    sigma, e, angle = draw(1.0, 1.8), draw(0.0, 0.1), draw(0.0, math.pi)
    u, v, q = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin(), torch.sqrt((1 - e) / (1 + e))
    psf = torch.exp(-(q * u**2 + v**2 / q) / (2 * sigma**2))
    noise = torch.exp(draw(math.log(0.1), math.log(0.3))).flatten()
    return Blur((SIDE, SIDE), noise, psf / psf.sum((1, 2), keepdim=True), "zero")


def centroid(x: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of images (N, SIDE, SIDE) in pixels about the middle, each (N, 1, 1); at most 3 pixels off it."""
    i, j = _grid(1)
    y0, x0 = torch.zeros(len(x), 1, 1), torch.zeros(len(x), 1, 1)
    for _ in range(8):
        w = x * torch.exp(-((i - y0) ** 2 + (j - x0) ** 2) / (2 * WEIGHT**2))
        total = w.sum((1, 2), keepdim=True).clamp(min=1e-6)
        step = lambda a, a0, w=w, total=total: (a0 + 2 * (w * (a - a0)).sum((1, 2), keepdim=True) / total).clamp(-3, 3)
        y0, x0 = step(i, y0), step(j, x0)
    return y0, x0


def ellipticity(x: Tensor) -> Tensor:
    """|e| of images (N, SIDE, SIDE), shape (N,)."""
    (i, j), (y0, x0) = _grid(1), centroid(x)
    u, v = j - x0, i - y0
    w = x * torch.exp(-(u**2 + v**2) / (2 * WEIGHT**2))
    Q = lambda a: (w * a).sum((1, 2))  # noqa: E731
    return torch.sqrt((Q(u * u) - Q(v * v)) ** 2 + 4 * Q(u * v) ** 2) / Q(u * u + v * v).clamp(min=1e-6)


def half_light(x: Tensor, points: int = 5) -> Tensor:
    """Half-light radius in pixels of images (N, SIDE, SIDE), shape (N,); light is spread evenly over each pixel. The first crossing counts."""
    fine = x.repeat_interleave(points, 1).repeat_interleave(points, 2) / points**2
    (i, j), (y0, x0) = _grid(points), centroid(x)
    edges, width, found = round(APERTURE * 4), 0.25, []
    for a, y, z in zip(fine.split(256), y0.split(256), x0.split(256)):
        ring = (torch.sqrt((i - y) ** 2 + (j - z) ** 2) / width).long().clamp(max=edges).flatten(1)
        light = torch.zeros(len(a), edges + 1).scatter_add(1, ring, a.flatten(1))[:, :edges].cumsum(1)
        half = light[:, -1:] / 2
        k = (light >= half).int().argmax(1, keepdim=True)
        before = torch.where(k > 0, light.gather(1, (k - 1).clamp(min=0)), 0.0)
        share = (half - before) / (light.gather(1, k) - before).clamp(min=1e-9)
        found.append(width * (k + share.clamp(0, 1))[:, 0])
    return torch.cat(found)


def distances(x: Tensor, clean: Tensor) -> dict[str, float]:
    """Kolmogorov-Smirnov distances of both figures between images (N, SIDE, SIDE) and clean ones (M, SIDE, SIDE)."""
    ks = lambda measure: float(ks_2samp(measure(x).numpy(), measure(clean).numpy()).statistic)  # noqa: E731
    return {"ks_radius": ks(half_light), "ks_ellipticity": ks(ellipticity)}
