r"""Figures that say whether a fit can be believed.

Without the truth:
    residual chi2     mean over data of |obs - A x|^2_{cov_obs^-1} / dim, over what was observed. 1 for samples x | obs under the true prior;
                      below: the samples follow the noise; above: they over-smooth.
    agreement         a distance between prior samples observed anew (A x + n) and the observations, divided by the same distance between two
                      halves of the observations. Near 1: nobody can tell them apart. Distances: sliced 1-Wasserstein; energy,
                      2 E|a - b| - E|a - a'| - E|b - b'|.
With the truth x*:    error |x - x*|^2 / d of one sample and of the mean; sample std over true std.
With feature vectors: Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), by torchmetrics.

Sources: Sliced and Radon Wasserstein barycenters of measures (Bonneel et al. 2015); Energy statistics (Szekely & Rizzo 2013); GANs trained by a two
time-scale update rule (Heusel et al. 2017); Demystifying MMD GANs (Binkowski et al. 2018) for the kernel distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from emdiff.data import Data, Observations, batches
from emdiff.rows import Array, row_spans


def standardised_residual(data: Observations, x: Tensor) -> Tensor:
    """R^-1 (obs - A x) with R R^T = cov_obs, 0 where nothing was observed, shape (N, *O); x (N, *S) in the data's units. N(0, 1) at the true x."""
    return data.observer.whiten(data.obs - data.observer.forward(x))


def residual_chi2(data: Data, x: Array, tau: float = 0.0) -> Tensor:
    """|obs - A x|^2_{cov_obs^-1} / dim of each datum.

    A jump from level tau lacks V[x | y], and with it the part of the residual that is not noise of the observation. Measurements y of that level lack
    nothing: where observations are measurements z of x of level sigma_z, theirs is |z - y|^2 / (sigma_z^2 + tau^2) / dim.

    Args:
        data: Observations (N, *O); for tau above 0 each a measurement of x.
        x: Samples, or measurements of level tau, (N, *S) in the same units.
        tau: Their level.

    Returns:
        Shape (N,); expectation 1 and variance 2 / dim at the true x.
    """
    parts = []
    for where, part in batches(data):
        if tau:
            z, sigma = part.observer.as_measurement(part.obs)
            seen = sigma.isfinite().expand(z.shape)
            square = torch.where(seen, (z - x[where].to(z)).square() / (sigma.square() + tau**2), 0.0)
            parts.append(square.flatten(1).sum(1) / seen.flatten(1).sum(1).clamp(min=1))
            continue
        seen = part.observer.observed().expand(part.obs.shape)
        z = standardised_residual(part, x[where].to(part.obs.device))
        parts.append(z.square().flatten(1).sum(1) / seen.flatten(1).sum(1).clamp(min=1))
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


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| over all pairs, an entry with itself included, so that it is never negative.

    Args:
        a, b: Samples (n, *O), (m, *O).

    Returns:
        The distance, in the units of the samples.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()
    mean = lambda p, q: float(torch.stack([torch.cdist(part, q).mean(1).sum() for part in p.split(512)]).sum() / len(p))  # noqa: E731
    return 2 * mean(a, b) - mean(a, a) - mean(b, b)


class Agreement(NamedTuple):
    """Distances of prior samples, observed anew, to observations.

    Attributes:
        distance: By name: "sliced_wasserstein", "energy"; in units of obs.
        floor: The same between two halves of the observations.
        each: Distance over floor of each random half.
    """

    distance: dict[str, float]
    floor: dict[str, float]
    each: dict[str, list[float]]

    def ratio(self, name: str) -> float:
        """Distance over floor; near 1 where the two cannot be told apart."""
        return self.distance[name] / max(self.floor[name], 1e-30)

    def error(self, name: str) -> float:
        """Standard error of the ratio, from its spread over random halves: of the choice of observations and noise, not of the prior samples."""
        ratios = torch.tensor(self.each[name], dtype=torch.float64)
        return float(ratios.std() / len(ratios) ** 0.5)


def agreement(
    data: Data, x: Tensor, generator: torch.Generator, names: tuple[str, ...] = ("sliced_wasserstein", "energy"), repeats: int = 1
) -> Agreement:
    """Compare prior samples, observed anew, to observations; of these, only so many random ones as there are prior samples are read, twice.

    Each prior sample is observed by the operator of one datum, and compared with other data.

    Args:
        data: Observations.
        x: Prior samples (n, *S), in the same units.
        generator: Source of randomness, on the CPU.
        names: Distances wanted.
        repeats: Random halves to average over.
    """
    n = min(len(x), len(data) // 2)
    distance, floor, each = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), {name: [] for name in names}
    for _ in range(repeats):
        order = torch.randperm(len(data), generator=generator)
        first, second = data.rows(order[:n]), data.rows(order[n : 2 * n])
        again = first.observer.simulate(x[:n], generator)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        for name in names:
            apart = DISTANCES[name](again, second.obs, torch.Generator().manual_seed(seed))
            half = DISTANCES[name](first.obs, second.obs, torch.Generator().manual_seed(seed))
            distance[name], floor[name] = distance[name] + apart / repeats, floor[name] + half / repeats
            each[name].append(apart / max(half, 1e-30))
    return Agreement(distance, floor, each)


DISTANCES: dict[str, Callable[[Tensor, Tensor, torch.Generator], float]] = {
    "sliced_wasserstein": lambda a, b, generator: sliced_wasserstein(a, b, generator=generator),
    "energy": lambda a, b, generator: energy_distance(a, b),
}


def chi2_spread(data: Data) -> tuple[float, float]:
    """What noise alone makes of chi2: the std of one datum's, root mean square over data, and of the mean of all."""
    counts = [part.observer.observed().expand(part.obs.shape).flatten(1).sum(1) for _, part in batches(data)]
    seen = torch.cat(counts).clamp(min=1).double()
    variance = 2 / seen
    return float(variance.mean().sqrt()), float((variance.sum() / len(data) ** 2).sqrt())


class Moments:
    """Mean and standard deviation of all entries of what is added, in float64, about the mean of the first part."""

    def __init__(self) -> None:
        self.shift, self.count, self.total, self.squares = math.nan, 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        """Add values of any shape."""
        values = values.double()
        self.shift = self.shift if self.count else float(values.mean())
        values = values - self.shift
        total, squares = torch.stack([values.sum(), values.square().sum()]).tolist()
        self.count, self.total, self.squares = self.count + values.numel(), self.total + total, self.squares + squares

    def found(self) -> tuple[float, float]:
        """Mean and standard deviation."""
        variance = max(self.squares - self.total**2 / self.count, 0.0) / max(self.count - 1, 1)
        return self.shift + self.total / self.count, math.sqrt(variance)


def moments(x: Array) -> tuple[float, float]:
    """Mean and standard deviation of all entries of an array, read in parts."""
    sums = Moments()
    for part in row_spans(x):
        sums.add(x[part])
    return sums.found()


def sample_figures(data: Data, x: Array) -> dict[str, float]:
    """Figures of posterior samples x (N, *S), one per observation, in the user's units."""
    mean, std = moments(x)
    return {"chi2": float(residual_chi2(data, x).mean()), "sample_mean": mean, "sample_std": std}


def prior_figures(data: Data, x: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Figures of prior samples x (n, *S), in the user's units; the agreement is over 4 random sets of 2n observations."""
    found, name = agreement(data, x, generator, ("sliced_wasserstein",), repeats=4), "sliced_wasserstein"
    figures = {"prior_mean": float(x.mean()), "prior_std": float(x.std())}
    return figures | {"observation_agreement": found.ratio(name), "observation_agreement_error": found.error(name)}


def truth_figures(x: Array, truth: Array) -> dict[str, float]:
    """Error of one sample per entry, and sample std over true std; x and truth (N, *S), where x lies."""
    squares, mine, theirs = 0.0, Moments(), Moments()
    for part in row_spans(x):
        sample = x[part]
        true = truth[part].to(sample)
        squares += float((sample - true).double().square().sum())
        mine.add(sample)
        theirs.add(true)
    std, true_std = mine.found()[1], theirs.found()[1]
    return {"error": squares / math.prod(x.shape), "std_ratio": std / true_std if true_std else math.inf}


class Likeness(NamedTuple):
    """Distances of images to real ones in the space of a feature network."""

    frechet: float
    kernel: float


class FeatureDistance:
    """Frechet and kernel distances to one set of real images in the space of a feature network; they compare only with one another.

    The kernel distance is the squared maximum mean discrepancy with a cubic kernel, unbiased, the mean over SUBSETS random subsets.

    Args:
        features: Images (B, C, H, W) -> (B, features.num_features); the network must be named next to every figure.
        real: Images (N, C, H, W); their features are computed once.
        most: Largest subset for the kernel distance.
    """

    SUBSETS = 20

    def __init__(self, features: nn.Module, real: Tensor, most: int = 500) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.features, self.most = features, most
        self.fid = FrechetInceptionDistance(features, reset_real_features=False, normalize=True, input_img_size=tuple(real.shape[1:]))
        self.real = torch.cat([self._update(part, True) for part in real.split(1000)])

    def _update(self, part: Tensor, real: bool) -> Tensor:
        """Hand images to the Frechet distance; returns their features."""
        self.fid.update(part, real=real)
        with torch.no_grad():
            return self.features(part)

    def __call__(self, fake: Tensor) -> Likeness:
        """Both distances of images (n, C, H, W), taken as they are."""
        from torchmetrics.image.kid import poly_mmd

        self.fid.reset()
        found = torch.cat([self._update(part, False) for part in fake.split(1000)])
        size, draw = min(self.most, len(found), len(self.real)), torch.Generator().manual_seed(0)
        pick = lambda f: f[torch.randperm(len(f), generator=draw)[:size]].double()  # noqa: E731
        kernel = [float(poly_mmd(pick(self.real), pick(found))) for _ in range(self.SUBSETS)]
        return Likeness(float(self.fid.compute()), sum(kernel) / len(kernel))
