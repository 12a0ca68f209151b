"""A mixture's posteriors against Bayes' rule component by component, at every level and through every observer."""

import math

import numpy as np
import pytest
import torch
from exact import Autograd, covariance, dense, matrix, mixture_posterior, noise_variance, normal, observer, uniform
from torch import Tensor

from emdiff.deconvolution import whitened
from emdiff.mixture import MixtureDenoiser
from emdiff.observations import Observations

B, D, J = 6, 3, 4
WEIGHTS = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
MEANS = 2 * normal(J, D, seed=10)
COVS = torch.stack([covariance(D, seed) for seed in range(J)])


def mixture() -> MixtureDenoiser:
    return MixtureDenoiser(WEIGHTS, MEANS, COVS)


def infinite() -> Tensor:
    return torch.tensor([math.inf], dtype=torch.float64)


@pytest.mark.parametrize("name", ["identity", "mask", "projection"])
@pytest.mark.parametrize("tau", [math.inf, 0.4])
def test_given_an_observation_a_mixture_is_the_mixture_of_its_posteriors(name: str, tau: float) -> None:
    """At tau = infinity p(x | obs); else with one more measurement y of x. Means and covariances, datum by datum."""
    made = observer(name, B, (D,), rows=2)
    data = Observations(torch.where(made.observed(), normal(B, *made.obs_shape, seed=3), 0.0), made)
    y = torch.zeros(B, 1, D, dtype=torch.float64) if math.isinf(tau) else normal(B, 1, D, seed=4)
    xhat, V = mixture().given(whitened(data)).covariance(y, torch.tensor([tau], dtype=torch.float64))
    A, R, seen = dense(made, B).numpy(), noise_variance(made, B).numpy(), made.observed().expand(data.obs.shape).numpy()
    for i in range(B):
        H, noise, values = A[i][seen[i]], R[i][seen[i]], data.obs[i].numpy()[seen[i]]
        if not math.isinf(tau):
            H, noise, values = np.concatenate([H, np.eye(D)]), np.concatenate([noise, np.full(D, tau**2)]), np.concatenate([values, y[i, 0].numpy()])
        mean, cov = mixture_posterior(WEIGHTS, MEANS, COVS, H, np.diag(noise), values)
        torch.testing.assert_close(xhat[i], torch.from_numpy(mean), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(V[i], torch.from_numpy(cov), rtol=1e-4, atol=1e-5)


def test_data_that_share_an_operator_share_covariances_and_nothing_else_changes() -> None:
    data = whitened(Observations(normal(B, 2, seed=3), observer("projection", B, (D,), rows=2)))
    shared = mixture().given(data._replace(A=data.A[:1]))
    own = mixture().given(data._replace(A=data.A[:1].expand(B, -1, -1)))
    y, sigma = normal(B, 1, D), torch.tensor([0.7], dtype=torch.float64)
    assert shared.basis.ndim == 3 and own.basis.ndim == 4
    for a, b in zip(shared.covariance(y, sigma), own.covariance(y, sigma)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_v_in_closed_form_is_the_jacobian() -> None:
    y, sigma = normal(B, 2, D), torch.tensor([0.7, 1.1], dtype=torch.float64)
    closed, differentiated = mixture().moments(y, sigma), Autograd(mixture()).moments(y, sigma)
    torch.testing.assert_close(matrix(closed.V, B, (D,)), matrix(differentiated.V, B, (D,)))


def test_one_level_for_all_entries_is_the_same_as_that_level_in_each() -> None:
    y, sigma = normal(B, 1, D), 0.2 + uniform(B, 1)
    for a, b in zip(mixture().covariance(y, sigma), mixture().covariance(y, sigma[..., None].expand(B, 1, D))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_and_huge_levels_harm_nothing(dtype: torch.dtype) -> None:
    """Where tau is far below every component xhat is y, far above it is the mean; in between float32 agrees with float64, far from the data too."""
    sharp = MixtureDenoiser(WEIGHTS, MEANS, 1e-4 * COVS)
    y = MEANS[:, None] + 1e-3 * normal(J, 1, D)
    level = lambda tau: torch.tensor([tau], dtype=dtype)  # noqa: E731
    cast = sharp.to(dtype)
    torch.testing.assert_close(cast.xhat(y.to(dtype), level(1e-6)), y[:, 0].to(dtype), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cast.xhat(y.to(dtype), level(1e7)), (WEIGHTS @ MEANS).to(dtype).expand(J, D), rtol=1e-4, atol=1e-4)
    for tau in (1e-3, 0.05, 1.0, 50.0):
        for far in (y, 100 * y):
            xhat, V = cast.covariance(far.to(dtype), level(tau))
            expected = MixtureDenoiser(WEIGHTS, MEANS, 1e-4 * COVS).covariance(far, torch.tensor([tau], dtype=torch.float64))
            torch.testing.assert_close(xhat.double(), expected[0], rtol=1e-3, atol=1e-3)
            assert bool((torch.linalg.eigvalsh(V.double()) > -1e-6).all())


def test_draws_have_the_posterior_moments() -> None:
    count = 40_000
    y, sigma = normal(1, 1, D, seed=2).expand(count, 1, D), torch.tensor([0.8], dtype=torch.float64)
    for prior in (mixture(), MixtureDenoiser(WEIGHTS.expand(count, J), MEANS, COVS)):
        xhat, V = mixture().covariance(y[:1], sigma)
        x = prior.draw(y, sigma, torch.Generator().manual_seed(0))
        scale = V[0].diagonal().max()
        assert ((x.mean(0) - xhat[0]).abs() < 5 * (scale / count).sqrt()).all()
        assert ((x.T.cov() - V[0]).abs() < 5 * scale * math.sqrt(6 / count)).all()
