r"""EM against references that share nothing with it: the maximum of the marginal likelihood, found by a quasi-Newton method.

The scale of what data can tell is the gap l(mle) - l(truth), half a chi-squared: an estimate with a much smaller gap is as good as the MLE.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from exact_gaussian import DIM, Moments, log_likelihood, maximum_likelihood, moments, problem  # noqa: E402
from exact_mixtures import as_projection, noise  # noqa: E402

from emdiff.denoise import GaussianDenoiser  # noqa: E402
from emdiff.em import Walk, e_step  # noqa: E402
from emdiff.gaussian import condition, fit_gaussian  # noqa: E402
from emdiff.guidance import PosteriorDenoiser  # noqa: E402
from emdiff.observations import Observations  # noqa: E402
from observers import Projection  # noqa: E402

COUNT = 1500


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(5000 + seed)


def masked(seed: int) -> tuple[Observations, Moments]:
    data, _, truth = problem(COUNT, seed, torch.float64)
    return data, truth


def projected(seed: int) -> tuple[Observations, Moments]:
    """Two rows of its own for every datum, noise of its own."""
    _, x, truth = problem(COUNT, seed, torch.float64)
    matrix = torch.randn(COUNT, 2, DIM, generator=generator(seed), dtype=torch.float64)
    matrix = matrix / matrix.norm(dim=-1, keepdim=True)
    noise = 0.1 + 0.4 * torch.rand(COUNT, generator=generator(seed + 1), dtype=torch.float64)
    observer = Projection((DIM,), noise, matrix)
    return Observations(observer.simulate(x, generator(seed + 2)), observer), truth


def share(data: Observations, model: Moments, truth: Moments) -> float:
    """How far the model's likelihood is below the maximum, over how far the truth's is."""
    best = log_likelihood(data, maximum_likelihood(data))
    return float((best - log_likelihood(data, model)) / (best - log_likelihood(data, truth)))


def test_the_maximum_is_one() -> None:
    """No gradient is left, and the truth's gap is half a chi-squared of 20 degrees."""
    data, truth = projected(0)
    mle = maximum_likelihood(data)
    mean, cov = mle.mean.clone().requires_grad_(True), mle.cov.clone().requires_grad_(True)
    gradients = torch.autograd.grad(log_likelihood(data, Moments(mean, cov)), [mean, cov])
    assert max(float(g.abs().max()) for g in gradients) < 1e-3 * COUNT
    gap = float(log_likelihood(data, mle) - log_likelihood(data, truth))
    assert 3 < gap < 25


@pytest.mark.parametrize("make", [masked, projected])
def test_the_gaussian_start_is_the_maximum_likelihood_estimate(make) -> None:
    """In the limit; after the 20 iterations of a fit's start, the projected one is still .5 of the truth's gap away (docs/exact.md)."""
    data, truth = make(0)
    prior = fit_gaussian(data, 800)
    assert -1e-9 < share(data, Moments(prior.mean, prior.covariance()), truth) < 0.01


def closed_form(y: Tensor, tau: float) -> Moments:
    """The M-step on pairs for a Gaussian prior: regressing the jumps on measurements y of level tau gives the moments of y, less the noise."""
    mean, cov = moments(y)
    return Moments(mean, cov - tau**2 * torch.eye(len(cov), dtype=torch.float64))


@pytest.mark.parametrize("make, guidance, levels", [(masked, "fused", 128), (projected, "cg", 32)])
def test_em_by_walks_comes_as_near_as_the_maximum_likelihood_estimate(make, guidance: str, levels: int) -> None:
    """Sampled E-steps and closed M-steps, from 40 exact iterations; the mean of the last, since one sample per datum leaves Monte Carlo noise.

    With 32 fused levels from infinity the walk's error of a few per cent in V shows at this size: a share of about .7 instead of .1.
    """
    data, truth = make(1)
    prior = fit_gaussian(data, 40)
    walk = Walk(guidance, float("inf") if guidance == "fused" else 0.8, 0.1, levels=levels, iterations=2, batch=COUNT)
    chains, late = condition(prior, data.observer, data.obs, generator(1)).x, []
    for k in range(20):
        draws = e_step(prior, data, None if guidance == "fused" else chains, walk, generator(10 + k), tau_chains=walk.tau_last if k else 0.0)
        chains, model = draws.y, closed_form(draws.y, walk.tau_last)
        prior = GaussianDenoiser.from_covariance(*model)
        late += [model] if k >= 10 else []
    model = Moments(torch.stack([m.mean for m in late]).mean(0), torch.stack([m.cov for m in late]).mean(0))
    assert share(data, model, truth) < 0.5


def test_a_full_noise_covariance_is_a_whitened_projection() -> None:
    """E[x | obs] by conjugate gradients on R^(-1/2) obs equals S (S + R)^-1 obs, datum by datum."""
    count, S = 6, torch.tensor([[1.0, 0.3], [0.3, 0.4]], dtype=torch.float64)
    R, obs = noise(count, 0), torch.randn(count, 2, generator=generator(3), dtype=torch.float64)
    data = as_projection(obs.numpy(), R)
    data = Observations(data.obs.double(), data.observer.to("cpu", torch.float64))
    prior = GaussianDenoiser.from_covariance(torch.zeros(2, dtype=torch.float64), S)
    expected = torch.einsum("de,nef,nf->nd", S, torch.linalg.inv(S + torch.from_numpy(R)), obs)
    torch.testing.assert_close(condition(prior, data.observer, data.obs, generator(4)).xhat, expected, rtol=1e-5, atol=1e-6)


def test_a_complete_sample_has_the_posterior_moments_that_the_jump_lacks() -> None:
    """`PosteriorDenoiser.draw` under a Gaussian prior, many times for one datum: mean and covariance of x | y, obs."""
    count, tau = 20_000, 0.4
    data, truth = projected(2)
    one = data.rows(slice(0, 1))
    A, S = one.observer.matrix[0], truth.cov
    prior = GaussianDenoiser.from_covariance(truth.mean, S)
    y = truth.mean + torch.randn(DIM, generator=generator(5), dtype=torch.float64)
    target = PosteriorDenoiser(prior, one.observer, one.obs.expand(count, -1), "cg", DIM, 1e-10)
    x = target.draw(y.expand(count, 1, DIM), torch.tensor([tau], dtype=torch.float64), generator(6))
    precision = torch.linalg.inv(S) + torch.eye(DIM) / tau**2 + A.T @ A / one.observer.std().flatten()[0] ** 2
    V = torch.linalg.inv(precision)
    mean = V @ (torch.linalg.solve(S, truth.mean) + y / tau**2 + A.T @ one.obs[0] / one.observer.std().flatten()[0] ** 2)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(V), (x - mean).T, upper=False)
    assert (white.mean(1).abs() < 5 / count**0.5).all()
    assert ((white @ white.T / count - torch.eye(DIM)).abs() < 5 * (2 / count) ** 0.5).all()
