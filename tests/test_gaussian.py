r"""The Gaussian start against dense algebra: exact posteriors, the textbook EM update, its fixed point, and what it recovers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exact import UnitNoise, covariance, dense, noise_variance, normal, observer, posterior, uniform

from emdiff import gaussian
from emdiff.denoise import GaussianDenoiser
from emdiff.factors import factor, from_moments
from emdiff.gaussian import condition, em_iteration, fit_gaussian, identity_moments
from emdiff.observations import Observations
from observers import Identity, Mask

S, d = (2, 3), 6
NAMES = ["identity", "mask", "projection"]
names = pytest.mark.parametrize("name", NAMES)


def prior() -> GaussianDenoiser:
    return GaussianDenoiser.from_covariance(normal(*S, seed=7), covariance(d))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)  # apart from the seeds of `normal` and `uniform`


def observed(name: str, count: int, truth: GaussianDenoiser) -> Observations:
    made = observer(name, count, truth.mean.shape)
    return Observations(made.simulate(truth.sample(count, generator()), generator(1)), made)


def dense_posteriors(p: GaussianDenoiser, data: Observations) -> tuple[np.ndarray, np.ndarray]:
    """Means (N, d) and covariances (N, d, d), datum by datum; an entry that was not observed has a row of zeros in A and tells nothing."""
    A, R = dense(data.observer, len(data)).numpy(), noise_variance(data.observer, len(data)).numpy()
    obs, mean, cov = data.obs.flatten(1).numpy(), p.mean.flatten().numpy(), p.covariance().numpy()
    parts = [posterior(mean, cov, A[i], np.diag(R[i]), obs[i]) for i in range(len(data))]
    return np.stack([m for m, _, _ in parts]), np.stack([V for _, V, _ in parts])


def low_rank() -> GaussianDenoiser:
    return GaussianDenoiser(normal(*S, seed=7), normal(d, 2, seed=9), uniform(d, seed=8))


@names
@pytest.mark.parametrize("make", [prior, low_rank])
def test_pathwise_conditioning_is_exact_in_mean_and_covariance(monkeypatch: pytest.MonkeyPatch, name: str, make) -> None:
    """Its map from the noises of x0 and n0 to x is linear: L L^T is the posterior covariance."""
    p, data = make(), observed(name, 4, prior())
    for i in range(4):
        one = data.rows(slice(i, i + 1))
        mean, V = dense_posteriors(p, one)
        count = 1 + p.factor.shape[1] + d + one.obs[0].numel()
        shared = Observations(one.obs.expand(count, *one.obs.shape[1:]), one.observer)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", UnitNoise(1))
            draws = condition(p, shared.observer, shared.obs)
        torch.testing.assert_close(draws.xhat.flatten(1), torch.from_numpy(mean).expand(count, d), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(draws.x[:1].flatten(1), torch.from_numpy(mean), rtol=1e-4, atol=1e-5)
        L = (draws.x - draws.x[:1]).flatten(1)[1:]
        torch.testing.assert_close(L.T @ L, torch.from_numpy(V[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mask", "projection"])
def test_an_em_iteration_is_the_textbook_update(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """mean = average posterior mean, S = average of V_i + (m_i - mean)(m_i - mean)^T; batches do not matter."""
    p, data = prior(), observed(name, 50, prior())
    means, V = dense_posteriors(p, data)
    mean = means.mean(0)
    cov = (V + np.einsum("ni,nj->nij", means - mean, means - mean)).mean(0)
    monkeypatch.setattr(gaussian, "CHUNK", 7)
    new = em_iteration(p, data, rank=2)
    np.testing.assert_allclose(new.mean.flatten().numpy(), mean, rtol=1e-9)
    np.testing.assert_allclose(new.covariance().numpy(), cov, rtol=1e-8, atol=1e-10)


def likelihood(p: GaussianDenoiser, data: Observations) -> float:
    A, R = dense(data.observer, len(data)), torch.diag_embed(noise_variance(data.observer, len(data)))
    seen = data.observer.observed().expand(data.obs.shape).flatten(1)
    R = torch.where(torch.diag_embed(seen) | ~torch.eye(R.shape[-1], dtype=torch.bool), R, torch.eye(R.shape[-1], dtype=torch.float64))
    law = torch.distributions.MultivariateNormal(A @ p.mean.flatten(), A @ p.covariance() @ A.mT + R)
    return float(law.log_prob(data.obs.flatten(1)).sum())


@names
def test_em_never_lowers_the_likelihood(name: str) -> None:
    data = observed(name, 60, prior())
    p = GaussianDenoiser.from_covariance(torch.zeros(S, dtype=torch.float64), torch.eye(d, dtype=torch.float64))
    values = [likelihood(p, data)]
    for _ in range(6):
        p = em_iteration(p, data, rank=2)
        values.append(likelihood(p, data))
    assert (np.diff(values) > 0).all() and values[1] - values[0] > 1


def test_the_closed_form_for_plain_noise_is_the_fixed_point_of_em() -> None:
    """Its negative eigenvalues cut off: a direction of variance 0 stays at 0, the others are where the gradient vanishes."""
    made = Identity(S, torch.tensor(0.7, dtype=torch.float64))
    thin = GaussianDenoiser(normal(*S, seed=7), normal(d, 3), torch.zeros(d, dtype=torch.float64))
    data = Observations(made.simulate(thin.sample(200, generator()), generator(1)), made)
    mean, cov = identity_moments(data)
    assert torch.linalg.eigvalsh(cov)[0] < -0.01
    p = from_moments(mean, [cov], rank=2)
    again = em_iteration(p, data, rank=2)
    torch.testing.assert_close(again.mean, p.mean)
    torch.testing.assert_close(again.covariance(), p.covariance())
    torch.testing.assert_close(fit_gaussian(data).covariance(), p.covariance())
    assert all(likelihood(p, data) > likelihood(GaussianDenoiser.from_covariance(mean, f * p.covariance()), data) for f in (0.9, 1.1))


def test_there_is_no_closed_form_where_noise_or_entries_differ() -> None:
    obs = normal(5, *S)
    for made in (observer("identity", 5, S), observer("mask", 5, S)):
        assert identity_moments(Observations(obs, made)) is None
    assert identity_moments(Observations(normal(5, 4), observer("projection", 5, S))) is None
    mask = Mask(S, torch.tensor(0.7, dtype=torch.float64), torch.ones(1, *S))
    torch.testing.assert_close(identity_moments(Observations(obs, mask)), identity_moments(Observations(obs, Identity(S, mask.noise_std))))


def test_em_with_masks_comes_close_to_the_fit_of_complete_noiseless_data() -> None:
    """Half of the entries missing, per-datum noise: within three times the standard error of the fully observed fit."""
    count, shape = 3000, (3,)
    cov = torch.tensor([[1.0, 0.7, 0.2], [0.7, 0.8, -0.1], [0.2, -0.1, 0.5]], dtype=torch.float64)
    truth = GaussianDenoiser.from_covariance(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), cov)
    made = Mask(shape, 0.1 + 0.3 * uniform(count), uniform(count, *shape, seed=1) < 0.6)
    data = Observations(made.simulate(truth.sample(count, generator()), generator(1)), made)
    fit = fit_gaussian(data, iterations=40)
    error = torch.sqrt(cov.diagonal() / count)
    assert ((fit.mean - truth.mean).abs() < 3 * 2 * error).all()
    spread = torch.sqrt((cov.square() + torch.outer(cov.diagonal(), cov.diagonal())) / count)
    assert ((fit.covariance() - cov).abs() < 3 * 3 * spread).all()


def test_factor_recovers_low_rank_plus_diagonal() -> None:
    W, psi = normal(12, 1), torch.full((12,), 0.3, dtype=torch.float64)
    cov = W @ W.T + torch.diag(psi)
    got, diagonal = factor([cov], 1, floor=1e-6)
    torch.testing.assert_close(got @ got.T + torch.diag(diagonal), cov, rtol=0, atol=2e-3)
    _, floored = factor([cov - torch.eye(12, dtype=torch.float64)], 1, floor=1e-3)
    assert floored.min() == 1e-3


def test_many_entries_are_fitted_by_low_rank_plus_diagonal() -> None:
    many = gaussian.DENSE + 2
    W = normal(many, 2)
    p = from_moments(torch.zeros(many, dtype=torch.float64), [W @ W.T + 0.5 * torch.eye(many, dtype=torch.float64)], rank=2)
    assert p.factor.shape == (many, 2) and p.psi.min() > 0.4
    torch.testing.assert_close(p.covariance(), W @ W.T + 0.5 * torch.eye(many, dtype=torch.float64), rtol=0, atol=2e-2)
    assert from_moments(torch.zeros(5), [torch.eye(5)], rank=2).factor.shape == (5, 5)


@pytest.mark.parametrize("name", ["mask", "projection"])
def test_one_sample_per_datum_gives_the_dense_update_within_its_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    p, count = prior(), 4000
    data = observed(name, count, prior())
    exact = em_iteration(p, data, rank=d)
    monkeypatch.setattr(gaussian, "DENSE", 2)
    drawn = em_iteration(p, data, rank=d - 1, generator=generator(2))
    cov = exact.covariance()
    assert ((drawn.mean - exact.mean).flatten().abs() < 5 * (cov.diagonal() / count).sqrt()).all()
    assert ((drawn.covariance() - cov).abs() < 5 * torch.sqrt((cov.square() + torch.outer(cov.diagonal(), cov.diagonal())) / count)).all()


def test_an_unfitted_direction_keeps_its_variance_where_nothing_tells_of_it() -> None:
    """An entry that no datum shows stays at its prior variance, 1."""
    seen = torch.tensor([[1, 1, 0]])
    made = Mask((3,), torch.tensor(0.7, dtype=torch.float64), seen)
    data = Observations(made.simulate(normal(500, 3), generator()), made)
    fit = fit_gaussian(data, iterations=5)
    assert fit.covariance()[2, 2].item() == pytest.approx(1) and abs(fit.mean[2].item()) < 1e-12
    assert math.isclose(fit.covariance()[0, 2].item(), 0, abs_tol=1e-12)


def test_factors_of_few_samples_keep_what_both_halves_hold() -> None:
    """Of 120 samples in 150 dimensions, x = 3 g u + noise: one covariance finds spread in noise alone, and a cross-validated one next to none."""
    draw, u = torch.Generator().manual_seed(0), torch.zeros(150, dtype=torch.float64).index_fill(0, torch.arange(10), 10**-0.5)
    x = torch.randn(120, 150, generator=draw, dtype=torch.float64) + 3 * torch.randn(120, 1, generator=draw, dtype=torch.float64) * u
    halves = [torch.cov(part.T) for part in (x[::2], x[1::2])]
    kept = {len(covs): factor(covs, 8, 1e-6)[0] @ factor(covs, 8, 1e-6)[0].T for covs in ([torch.cov(x.T)], halves)}
    along = {count: float(u @ WW @ u) for count, WW in kept.items()}
    spurious = {count: float(WW.trace()) - along[count] for count, WW in kept.items()}
    assert along[1] == pytest.approx(9, rel=0.3) and along[2] > 4  # eigenvectors of 60 samples are off, and this is what u and they share
    assert spurious[1] > 4 * spurious[2] > 0


def test_em_on_fewer_data_than_entries_does_not_make_up_factors(spread: float = 0.5) -> None:
    """144 entries, each datum seen in a third of them, x white: ten iterations leave posterior means no worse than the mean of x."""
    N, d, draw = 60, 144, torch.Generator().manual_seed(1)
    x = spread * torch.randn(N, d, generator=draw)
    data = Observations((made := Mask((d,), torch.tensor(0.1), torch.rand(N, d, generator=draw) < 1 / 3)).simulate(x, draw), made)
    prior = fit_gaussian(data, 10, rank=32, generator=draw, length=0.0)
    unseen = ~made.mask.bool()
    error = (condition(prior, made, data.obs, draw).xhat - x).square()[unseen].mean()
    assert float(error) < 1.25 * spread**2
