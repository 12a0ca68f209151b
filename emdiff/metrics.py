r"""Figures that say whether a fit can be believed.

Without the truth:
    residual chi2     mean over data of |obs - A x|^2_{cov_obs^-1} / dim, over what was observed. 1 for samples x | obs under the true prior;
                      below: the samples follow the noise; above: they over-smooth.
    sliced distance   sliced 1-Wasserstein distance between prior samples observed anew (A x + n) and the observations, divided by the same
                      distance between two halves of the observations. Near 1: nobody can tell them apart.
With the truth x*:    error |x - x*|^2 / d of one sample and of the mean; sample std over true std.
With feature vectors: Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), by torchmetrics.

Sources: Sliced and Radon Wasserstein barycenters of measures (Bonneel et al. 2015); GANs trained by a two time-scale update rule
(Heusel et al. 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emdiff.observations import Observations

CHUNK = 1024
"""Data per batch."""


def residual_chi2(data: Observations, x: Tensor) -> Tensor:
    """|obs - A x|^2_{cov_obs^-1} / dim of each datum.

    Args:
        data: Observations (N, *O).
        x: Samples (N, *S) in the same units.

    Returns:
        Shape (N,); expectation 1 and variance 2 / dim at the true x.
    """
    parts = []
    for i in range(0, len(data), CHUNK):
        part = data.rows(slice(i, i + CHUNK))
        seen = part.observer.observed().expand(part.obs.shape)
        z = (part.obs - part.observer.forward(x[i : i + CHUNK])) / part.observer.std()
        parts.append((z.square() * seen).flatten(1).sum(1) / seen.flatten(1).sum(1).clamp(min=1))
    return torch.cat(parts)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 128, generator: torch.Generator | None = None) -> float:
    """Mean over random directions of the 1-Wasserstein distance between the projections of two samples.

    Args:
        a, b: Samples (n, *O) of equal n.
        directions: Number of directions, uniform on the sphere.
        generator: Source of randomness.

    Returns:
        The distance, in the units of the samples.
    """
    theta = torch.randn(a[0].numel(), directions, generator=generator, dtype=a.dtype)
    theta = theta / theta.norm(dim=0)
    return float(((a.flatten(1) @ theta).sort(0).values - (b.flatten(1) @ theta).sort(0).values).abs().mean())


def observation_agreement(data: Observations, x: Tensor, generator: torch.Generator) -> float:
    """Sliced distance of re-observed prior samples to observations, over that between two halves of the observations.

    Each prior sample is observed by the operator of one datum, and compared with other data.

    Args:
        data: Observations.
        x: Prior samples (n, *S), in the same units.
        generator: Source of randomness, on the CPU.

    Returns:
        The ratio; 1 where the two cannot be told apart.
    """
    n = min(len(x), len(data) // 2)
    order = torch.randperm(len(data), generator=generator)
    first, second = data.rows(order[:n]), data.rows(order[n : 2 * n])
    again = first.observer.simulate(x[:n], generator)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    distance = lambda a, b: sliced_wasserstein(a, b, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    return distance(again, second.obs) / max(distance(first.obs, second.obs), 1e-30)


def sample_figures(data: Observations, x: Tensor) -> dict[str, float]:
    """Figures of posterior samples x (N, *S), one per observation, in the user's units."""
    return {"chi2": float(residual_chi2(data, x).mean()), "sample_mean": float(x.mean()), "sample_std": float(x.std())}


def prior_figures(data: Observations, x: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Figures of prior samples x (n, *S), in the user's units."""
    return {"prior_mean": float(x.mean()), "prior_std": float(x.std()), "observation_agreement": observation_agreement(data, x, generator)}


def truth_figures(x: Tensor, truth: Tensor) -> dict[str, float]:
    """Error of one sample per entry, and sample std over true std; x and truth (N, *S)."""
    return {"error": float((x - truth).square().mean()), "std_ratio": float(x.std() / truth.std())}


class Frechet:
    """Frechet distances to one set of real images in the space of a feature network; they compare only with one another.

    Args:
        features: Images (B, C, H, W) -> (B, features.num_features); the network must be named next to every figure.
        real: Images (N, C, H, W); their features are computed once.
    """

    def __init__(self, features: nn.Module, real: Tensor) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.fid = FrechetInceptionDistance(features, reset_real_features=False, normalize=True, input_img_size=tuple(real.shape[1:]))
        for part in real.split(1000):
            self.fid.update(part, real=True)

    def __call__(self, fake: Tensor) -> float:
        """The distance of images (n, C, H, W), taken as they are."""
        self.fid.reset()
        for part in fake.split(1000):
            self.fid.update(part, real=False)
        return float(self.fid.compute())
