r"""Figures of merit at known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exact import normal, observer, uniform
from scipy.linalg import sqrtm
from scipy.stats import energy_distance as scipy_energy
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from emdiff import rows
from emdiff.metrics import (
    FeatureDistance,
    agreement,
    chi2_spread,
    energy_distance,
    prior_figures,
    residual_chi2,
    sample_figures,
    sliced_wasserstein,
    truth_figures,
)
from emdiff.observations import Observations
from observers import Identity

N, S, d = 6000, (2, 3), 6
names = pytest.mark.parametrize("name", ["identity", "mask", "projection"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)  # apart from the seeds of `normal` and `uniform`


@names
def test_residual_chi2_at_the_truth_has_mean_one_and_variance_two_over_dim(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(rows, "ENTRIES", 1000 * d)
    made, x = observer(name, N, S), normal(N, *S)
    data = Observations(made.simulate(x, generator(1)), made)
    seen = made.observed().expand(data.obs.shape).flatten(1).sum(1)
    chi2 = residual_chi2(data, x)[seen > 0]
    variance = (2 / seen[seen > 0]).mean()
    assert abs(chi2.mean() - 1) < 5 * (variance / N).sqrt()
    assert chi2.var().item() == pytest.approx(variance.item(), rel=0.2)


@names
def test_residual_chi2_adds_what_the_sample_is_off_by(name: str) -> None:
    """Expectation 1 + |A e|^2_{cov^-1} / dim; here datum by datum without noise."""
    made, x, e = observer(name, 20, S), normal(20, *S), normal(20, *S, seed=1)
    chi2 = residual_chi2(Observations(made.forward(x), made), x + e)
    seen = made.observed().expand(20, *made.obs_shape).flatten(1)
    z = (made.forward(e) / made.std()).flatten(1)
    expected = torch.stack([z[i][seen[i]].square().mean() if seen[i].any() else torch.zeros(()).double() for i in range(20)])
    torch.testing.assert_close(chi2, expected)


def test_sliced_distance_is_a_distance_between_laws() -> None:
    a, b = normal(300, *S), 1.5 * normal(300, *S, seed=1) + 0.3
    far = sliced_wasserstein(a, b, 64, generator())
    assert sliced_wasserstein(a, a[torch.randperm(300)], 64, generator()) == pytest.approx(0, abs=1e-12)
    assert far == pytest.approx(sliced_wasserstein(b, a, 64, generator())) and far > 0.1
    assert sliced_wasserstein(7 * a, 7 * b, 64, generator()) == pytest.approx(7 * far)


def test_sliced_distance_in_one_dimension_is_wasserstein() -> None:
    a, b = normal(300, 1), uniform(300, 1).square()
    assert sliced_wasserstein(a, b, 3, generator()) == pytest.approx(wasserstein_distance(a[:, 0], b[:, 0]))


def test_sliced_distance_of_a_shift_is_its_mean_projection() -> None:
    """E |<theta, c>| = |c| Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)) over the unit sphere."""
    a, c = normal(50, *S), normal(*S, seed=1)
    expected = c.norm().item() * math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))
    assert sliced_wasserstein(a, a + c, 20_000, generator()) == pytest.approx(expected, rel=0.03)


def test_energy_distance_is_that_of_scipy_in_one_dimension_and_exact_for_point_masses() -> None:
    a, b = normal(700, 1), 0.4 + uniform(300, 1).square()
    assert energy_distance(a, b) == pytest.approx(scipy_energy(a[:, 0], b[:, 0]) ** 2)
    c = normal(1, *S)
    assert energy_distance(torch.zeros(9, *S), c.expand(5, *S)) == pytest.approx(2 * c.norm().item(), rel=1e-5)


def test_the_spread_of_chi2_is_that_of_data_whose_truth_is_known() -> None:
    """Per datum root mean square of (2/dim)^1/2, of the mean (sum 2/dim)^1/2 / N; masks leave data different dims."""
    made = observer("mask", N, S)
    x, draws = normal(N, *S), generator(3)
    chi2 = torch.stack([residual_chi2(Observations(made.simulate(x, draws), made), x) for _ in range(400)])
    datum, overall = chi2_spread(Observations(made.simulate(x, draws), made))
    seen = made.observed().expand(N, *S).flatten(1).any(1)
    assert chi2.var(0)[seen].mean().sqrt().item() == pytest.approx(datum, rel=0.15)
    assert chi2.mean(1).std().item() == pytest.approx(overall, rel=0.15)


@names
def test_samples_of_the_true_prior_agree_with_observations_and_others_do_not(name: str) -> None:
    made = observer(name, N, S)
    data = Observations(made.simulate(normal(N, *S), generator(1)), made)
    fresh = normal(N, *S, seed=2)
    for metric, most, bad in (("sliced_wasserstein", 1.6, 3), ("energy", 1.6, 2)):
        right, wide, shifted = (agreement(data, x, generator(), repeats=4).ratio(metric) for x in (fresh, 1.5 * fresh, fresh + 1))
        assert 0.6 < right < most and wide > bad and shifted > bad


def test_figures_of_a_round_are_those_of_their_parts() -> None:
    made = Identity(S, torch.tensor(0.7, dtype=torch.float64))
    x = normal(400, *S)
    data = Observations(made.simulate(x, generator(1)), made)
    figures = sample_figures(data, x) | prior_figures(data, 2 * x + 1, generator())
    assert figures["chi2"] == pytest.approx((data.obs - x).square().mean().item() / 0.49)
    assert figures["sample_std"] == pytest.approx(x.std().item()) and figures["prior_std"] == pytest.approx(2 * x.std().item())
    assert figures["sample_mean"] == pytest.approx(x.mean().item()) and figures["prior_mean"] == pytest.approx(2 * x.mean().item() + 1)
    assert truth_figures(2 * x, x) == pytest.approx({"error": x.square().mean().item(), "std_ratio": 2.0})


class Identities(nn.Module):
    """The first pixels of an image as its features."""

    num_features = 4

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :4].double()


def test_frechet_is_the_closed_form_between_gaussians_of_the_features() -> None:
    real = (0.5 + 0.1 * normal(400, 1, 4, 4)).float()
    fake = (0.4 + 0.15 * normal(300, 1, 4, 4, seed=1) @ (torch.eye(4, dtype=torch.float64) + 0.3)).float()
    a, b = (Identities()(images).numpy() for images in (real, fake))
    C, D = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(C + D - 2 * sqrtm(C @ D).real)
    distance = FeatureDistance(Identities(), real)
    assert distance(fake).frechet == pytest.approx(expected, rel=1e-5)
    assert distance(real).frechet == pytest.approx(0, abs=1e-6)
    assert distance(fake).frechet == pytest.approx(expected, rel=1e-5), "earlier fakes are forgotten"
