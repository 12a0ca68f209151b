r"""What the tests compare with: dense algebra, and the linear map of a sampler read off without sampling.

A sampler that is linear in its noise is known once it has been run on unit vectors. `UnitNoise` stands in for `torch.randn`: each call hands the
next rows of the batch one unit vector each, so that row r of the result is the response to the r-th scalar noise of the run.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from emdiff.denoise import Denoiser
from emdiff.nn import UNet
from observers import Identity, Mask, Observer, Projection

M, SIGMA, U = 3, 0.7, 0.25
LEVELS = torch.tensor([0.7, 1.9, 0.4], dtype=torch.float64)
"""Unequal levels of M measurements."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64."""
    return torch.empty(shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Uniform on [0, 1), float64."""
    return torch.empty(shape, dtype=torch.float64).uniform_(generator=torch.Generator().manual_seed(seed))


def with_infinite() -> Tensor:
    """Levels per datum, measurement and entry (4, M, 2, 3); some infinite, and entry (0, 2) of datum 1 never measured."""
    sigma = 0.3 + uniform(4, M, 2, 3)
    sigma[uniform(4, M, 2, 3, seed=1) < 0.3] = math.inf
    sigma[1, :, 0, 2] = math.inf
    return sigma


def covariance(d: int, seed: int = 0) -> Tensor:
    """A covariance (d, d) with eigenvalues from about .1 to several."""
    W = normal(d, d, seed=seed)
    return W @ W.T / 2 + 0.1 * torch.eye(d, dtype=torch.float64)


class UnitNoise:
    """A stand-in for torch.randn; rows before `first` get no noise.

    Attributes:
        row: The row that the next scalar goes to; after a run, the number of rows needed.
    """

    def __init__(self, first: int) -> None:
        self.row = first

    def __call__(self, *shape, generator=None, dtype=None, device=None) -> Tensor:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        flat = torch.zeros(shape[0], math.prod(shape[1:]), dtype=dtype)
        rows = torch.arange(flat.shape[1])
        fits = rows + self.row < shape[0]
        flat[(rows + self.row)[fits], rows[fits]] = 1
        self.row += flat.shape[1]
        return flat.reshape(shape)


def dense(observer: Observer, count: int) -> Tensor:
    """A as matrices (count, o, d)."""
    eye = torch.eye(math.prod(observer.shape), dtype=torch.float64)
    return torch.stack([observer.forward(e.reshape(1, *observer.shape).expand(count, *observer.shape)).flatten(1) for e in eye], -1)


def noise_variance(observer: Observer, count: int) -> Tensor:
    """The diagonal of cov_obs (count, o)."""
    return observer.std().square().expand(count, *observer.obs_shape).flatten(1)


def matrix(product, B: int, shape: tuple[int, ...]) -> Tensor:
    """The matrices (B, d, d) of a product on batches (B, *shape)."""
    eye = torch.eye(math.prod(shape), dtype=torch.float64)
    return torch.stack([product(e.reshape(1, *shape).expand(B, *shape)).flatten(1) for e in eye], -1)


def posterior(mean: np.ndarray, S: np.ndarray, H: np.ndarray, R: np.ndarray, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Of x ~ N(mean, S) given data = H x + N(0, R): posterior mean (d,), covariance (d, d), and log density of the data."""
    C = H @ S @ H.T + R
    gap = data - H @ mean
    gain = np.linalg.solve(C, H @ S).T
    evidence = -0.5 * (gap @ np.linalg.solve(C, gap) + np.linalg.slogdet(C)[1] + len(gap) * math.log(2 * math.pi))
    return mean + gain @ gap, S - gain @ H @ S, evidence


def measurements(y: Tensor, sigma: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(H, R, data) of one datum's finite measurements y (M, d) of levels (M, d)."""
    d = y.shape[1]
    seen = sigma.flatten().isfinite().numpy()
    H = np.tile(np.eye(d), (y.shape[0], 1))[seen]
    return H, np.diag(sigma.flatten().numpy()[seen] ** 2), y.flatten().numpy()[seen]


def stacked(*parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Several independent sets of linear data as one."""
    from scipy.linalg import block_diag

    H, R, data = zip(*parts)
    return np.concatenate(H), block_diag(*R), np.concatenate(data)


class Autograd(Denoiser):
    """A denoiser stripped of its closed-form moments: V by vector-Jacobian products."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner = inner

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        return self.inner.xhat(y, sigma)


def observer(name: str, count: int, shape: tuple[int, ...], rows: int = 4) -> Observer:
    """An observer whose operators and noise differ from datum to datum."""
    d = math.prod(shape)
    if name == "identity":
        return Identity(shape, 0.3 + uniform(count, *shape, seed=1))
    if name == "mask":
        return Mask(shape, 0.3 + uniform(count, *shape, seed=2), uniform(count, *shape, seed=3) < 0.6)
    return Projection(shape, 0.3 + uniform(count, seed=4), normal(count, rows, d, seed=5))


def mixture_posterior(weights: Tensor, means: Tensor, covs: Tensor, H: np.ndarray, R: np.ndarray, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and covariance of one datum under a mixture of Gaussians, component by component."""
    parts = [posterior(m.numpy(), S.numpy(), H, R, data) for m, S in zip(means, covs)]
    log_r = np.log(weights.numpy()) + [evidence for _, _, evidence in parts]
    r = np.exp(log_r - log_r.max())
    r = r / r.sum()
    mean = sum(w * m for w, (m, _, _) in zip(r, parts))
    second = sum(w * (V + np.outer(m, m)) for w, (m, V, _) in zip(r, parts))
    return mean, second - np.outer(mean, mean)


def unet() -> UNet:
    """A small U-Net of 8 x 8 images, untrained, with weights that all matter."""
    torch.manual_seed(0)
    net = UNet((8, 8), widths=(4, 8), patch=1)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return net


Z, C = normal(6, 8, 8, seed=1).float(), torch.linspace(0.1, 2.0, 6).reshape(6, 1, 1)
"""Its inputs: six images and their levels."""
