"""Extreme deconvolution against Bayes' rule datum by datum, and against a quasi-Newton method on the marginal likelihood."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import covariance, dense, noise_variance, normal, observer, posterior
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from exact_gaussian import DIM, Moments, log_likelihood, maximum_likelihood, problem  # noqa: E402

from emdiff.deconvolution import Mixture, Whitened, clipped, expect, fit, maximise, pack, split, unpack, whitened  # noqa: E402
from emdiff.observations import Observations  # noqa: E402
from observers import Identity, Projection  # noqa: E402
from observers.correlated import Full  # noqa: E402

N, D, J = 7, 3, 2
MODEL = Mixture(torch.tensor([0.3, 0.7], dtype=torch.float64), normal(J, D, seed=20), torch.stack([covariance(D, 1), covariance(D, 2)]))


def observed(name: str) -> Observations:
    made = observer(name, N, (D,), rows=2)
    return Observations(torch.where(made.observed(), normal(N, *made.obs_shape, seed=3), 0.0), made)


def by_hand(data: Observations) -> tuple[Tensor, list[list[tuple[np.ndarray, np.ndarray]]], Tensor]:
    """r (N, J), the posterior moments of each datum and component, and log p(obs) (N,), by dense algebra on the entries that were observed."""
    A, R = dense(data.observer, N).numpy(), noise_variance(data.observer, N).numpy()
    seen = data.observer.observed().expand(data.obs.shape).numpy()
    parts, logs = [], torch.zeros(N, J, dtype=torch.float64)
    for i in range(N):
        s = seen[i]
        each = [posterior(m.numpy(), S.numpy(), A[i][s], np.diag(R[i][s]), data.obs[i].numpy()[s]) for m, S in zip(MODEL.means, MODEL.covs)]
        logs[i] = torch.tensor([e for _, _, e in each]) + MODEL.weights.log()
        parts.append([(m, V) for m, V, _ in each])
    return logs.softmax(1), parts, logs.logsumexp(1)


@pytest.mark.parametrize("name", ["identity", "mask", "projection"])
def test_an_iteration_is_that_of_bayes_rule_datum_by_datum(name: str) -> None:
    data = observed(name)
    r, parts, log_p = by_hand(data)
    e = expect(MODEL, whitened(data))
    torch.testing.assert_close(e.log_likelihood, log_p)
    after = maximise(MODEL, e, 0.0)
    torch.testing.assert_close(after.weights, r.mean(0))
    for j in range(J):
        share = (r[:, j] / r[:, j].sum()).numpy()
        mean = sum(w * p[j][0] for w, p in zip(share, parts))
        second = sum(w * (p[j][1] + np.outer(p[j][0], p[j][0])) for w, p in zip(share, parts))
        torch.testing.assert_close(after.means[j], torch.from_numpy(mean))
        torch.testing.assert_close(after.covs[j], torch.from_numpy(second - np.outer(mean, mean)))


@pytest.mark.parametrize("shared", [True, False])
def test_correlated_noise_is_whitened_with_its_covariance(shared: bool) -> None:
    """log p(obs) of one Gaussian, against the dense law; one covariance for all, or one for each datum."""
    cov = torch.stack([covariance(D, seed=30 + i) for i in range(1 if shared else N)])
    data = Observations(normal(N, D, seed=31), Identity((D,), Full(cov)))
    one = Mixture(torch.ones(1, dtype=torch.float64), MODEL.means[:1], MODEL.covs[:1])
    law = torch.distributions.MultivariateNormal(MODEL.means[0], MODEL.covs[0] + cov.expand(N, D, D))
    torch.testing.assert_close(expect(one, whitened(data)).log_likelihood, law.log_prob(data.obs))


def test_data_that_share_an_operator_are_treated_as_if_each_had_its_own() -> None:
    data = whitened(observed("projection"))
    shared = Whitened(data.A[:1], data.obs, data.constant)
    for a, b in zip(expect(MODEL, shared), expect(MODEL, shared._replace(A=data.A[:1].expand(N, -1, -1)))):
        torch.testing.assert_close(a, b)


def test_the_gaussian_of_one_component_is_the_maximum_likelihood_estimate_in_few_steps() -> None:
    """Masks and projections; plain EM leaves .5 of the truth's gap after 20 iterations with projections (docs/exact.md)."""
    data, x, truth = problem(1500, 1, torch.float64)
    matrix = normal(1500, 2, DIM, seed=5)
    made = Projection((DIM,), torch.tensor(0.3, dtype=torch.float64), matrix / matrix.norm(dim=-1, keepdim=True))
    for seen in (data, Observations(made.simulate(x, torch.Generator().manual_seed(1)), made)):
        one = Mixture(torch.ones(1).double(), torch.zeros(1, DIM).double(), torch.eye(DIM).double()[None])
        found = fit(one, whitened(seen), 1e-8, 300, 1e-11)
        mle = maximum_likelihood(seen)
        best = log_likelihood(seen, mle)
        gap = (best - log_likelihood(seen, Moments(found.mixture.means[0], found.mixture.covs[0]))) / (best - log_likelihood(seen, truth))
        assert found.iterations < 150
        assert -1e-6 < gap < 1e-3
        torch.testing.assert_close(found.mixture.covs[0], mle.cov, rtol=0, atol=2e-3)


def two_clouds(count: int) -> Whitened:
    """Two Gaussians in the plane, each datum seen through an operator of its own."""
    g = torch.Generator().manual_seed(3)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    left = torch.rand(count, generator=g) < 0.4
    right = torch.tensor([1.0, 0.5]) + draw(count, 2) * torch.tensor([0.2, 0.6])
    x = torch.where(left[:, None], torch.tensor([-1.0, 0.0]) + 0.3 * draw(count, 2), right)
    A = draw(count, 2, 2) / 0.3
    return Whitened(A, (A @ x[..., None])[..., 0] + draw(count, 2), torch.zeros(count, dtype=torch.float64))


def test_accelerated_em_reaches_the_maximum_that_a_quasi_newton_method_finds() -> None:
    data = two_clouds(600)
    start = split(Mixture(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.eye(2).double()[None]), 1e-8)
    found = fit(start, data, 1e-8, 500, 1e-11)
    theta = pack(found.mixture).clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-13, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -marginal(unpack(theta, start), data).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert -float(closure().detach()) - found.log_likelihood < 1e-6
    torch.testing.assert_close(unpack(theta.detach(), start).means, found.mixture.means, rtol=0, atol=0.01)


def marginal(model: Mixture, data: Whitened) -> Tensor:
    """log p(obs) (N,), written anew with torch's own distribution."""
    A = data.A[:, None]
    C = A @ model.covs @ A.mT + torch.eye(2)
    law = torch.distributions.MultivariateNormal((A @ model.means[..., None])[..., 0], C)
    return (model.weights.log() + law.log_prob(data.obs[:, None])).logsumexp(1) + math.log(2 * math.pi)


def test_acceleration_never_lowers_the_likelihood_and_is_ahead_of_plain_em() -> None:
    data = two_clouds(600)
    model = split(Mixture(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.eye(2).double()[None]), 1e-8)
    path = [fit(model, data, 1e-8, n, 0.0).log_likelihood for n in (3, 6, 9, 15, 30)]
    assert path == sorted(path)
    for _ in range(30):
        plain = expect(model, data)
        model = maximise(model, plain, 1e-8)
    assert path[-1] > float(plain.log_likelihood.mean())


def test_packing_is_undone_and_a_split_keeps_mean_and_covariance() -> None:
    for a, b in zip(unpack(pack(MODEL), MODEL), MODEL):
        torch.testing.assert_close(a, b)
    for a, b in zip(total(split(MODEL, 0.0)), total(MODEL)):
        torch.testing.assert_close(a, b)


def total(model: Mixture) -> tuple[Tensor, Tensor]:
    mean = model.weights @ model.means
    far = model.means - mean
    return mean, torch.einsum("j,jde->de", model.weights, model.covs + far[:, :, None] * far[:, None])


def test_eigenvalues_are_raised_to_the_floor_and_others_kept() -> None:
    U = torch.linalg.qr(normal(3, 3, seed=8))[0]
    s = torch.tensor([-0.2, 0.01, 2.0], dtype=torch.float64)
    raised = torch.linalg.eigvalsh(clipped((U * s) @ U.T, 0.1))
    torch.testing.assert_close(raised, torch.tensor([0.1, 0.1, 2.0], dtype=torch.float64))
