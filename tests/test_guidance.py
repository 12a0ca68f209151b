r"""Guidance: the denoiser of p(x | obs) equals the dense posterior of x given the measurements and the observation together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exact import (
    LEVELS,
    Autograd,
    M,
    covariance,
    dense,
    matrix,
    measurements,
    mixture_posterior,
    noise_variance,
    normal,
    observer,
    posterior,
    stacked,
    uniform,
)
from torch import Tensor
from torch.distributions import MultivariateNormal

from emdiff.denoise import Denoiser, GaussianDenoiser
from emdiff.guidance import FusedPosterior, PosteriorDenoiser
from emdiff.mixture import MixtureDenoiser
from observers import Observer

B, S, d = 4, (2, 3), 6
OBSERVERS = ["identity", "mask", "projection"]
ITERATIONS = {"cg": 80, "gmres": 6}
observers = pytest.mark.parametrize("name", OBSERVERS)
diagonal = pytest.mark.parametrize("name", OBSERVERS[:2])
solvers = pytest.mark.parametrize("solver", ITERATIONS)
Y = 1.5 * normal(B, M, *S, seed=20)


def prior() -> GaussianDenoiser:
    return GaussianDenoiser.from_covariance(normal(*S, seed=7), covariance(d))


def observed(name: str) -> tuple[Observer, Tensor]:
    made = observer(name, B, S)
    return made, made.simulate(normal(B, *S, seed=21), torch.Generator().manual_seed(22))


def linear_data(made: Observer, obs: Tensor, y: Tensor, sigma: Tensor, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All that is known of datum i: its measurements, and the entries of its observation that carry information."""
    A, variance = dense(made, B)[i].numpy(), noise_variance(made, B)[i].numpy()
    seen = (A != 0).any(1)
    observation = A[seen], np.diag(variance[seen]), obs[i].flatten().numpy()[seen]
    return stacked(measurements(y[i].flatten(1), sigma[i].flatten(1)), observation)


def dense_posteriors(made: Observer, obs: Tensor, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    p = prior()
    parts = [posterior(p.mean.flatten().numpy(), p.covariance().numpy(), *linear_data(made, obs, y, sigma, i)) for i in range(B)]
    return torch.from_numpy(np.stack([m for m, _, _ in parts])), torch.from_numpy(np.stack([V for _, V, _ in parts]))


SIGMAS = {"per measurement": LEVELS[None, :, None, None].expand(B, M, *S), "per entry": 0.3 + uniform(B, M, *S, seed=23)}
sigmas = pytest.mark.parametrize("sigma", SIGMAS.values(), ids=SIGMAS.keys())


@observers
@solvers
@sigmas
@pytest.mark.parametrize("wrap", [lambda p: p, Autograd], ids=["closed form", "autograd"])
def test_moment_matching_is_the_dense_posterior_of_a_gaussian(name: str, solver: str, sigma: Tensor, wrap) -> None:
    made, obs = observed(name)
    mean, V = dense_posteriors(made, obs, Y, sigma)
    target = PosteriorDenoiser(wrap(prior()), made, obs, solver, ITERATIONS[solver], 1e-12)
    torch.testing.assert_close(target.xhat(Y, sigma).flatten(1), mean, rtol=1e-7, atol=1e-8)
    assert target.solve.residual.shape == (B,) and (target.solve.residual < 1e-8).all()
    moments = target.moments(Y, sigma)
    torch.testing.assert_close(moments.xhat.flatten(1), mean, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(matrix(moments.V, B, S), V, rtol=1e-7, atol=1e-8)


@diagonal
@sigmas
@pytest.mark.parametrize("wrap", [lambda p: p, Autograd], ids=["closed form", "autograd"])
def test_fusion_is_the_dense_posterior_of_a_gaussian(name: str, sigma: Tensor, wrap) -> None:
    made, obs = observed(name)
    mean, V = dense_posteriors(made, obs, Y, sigma)
    moments = FusedPosterior(wrap(prior()), *made.as_measurement(obs)).moments(Y, sigma)
    torch.testing.assert_close(moments.xhat.flatten(1), mean)
    torch.testing.assert_close(matrix(moments.V, B, S), V)


def test_fusion_with_one_level_for_all_entries_keeps_it_one_level_and_is_exact() -> None:
    """A uniform observation noise is collapsed to a level per datum, so that a network needs no map."""
    made = observer("identity", B, S).with_noise(0.3 + uniform(B))
    obs = normal(B, *S, seed=21)
    target = FusedPosterior(prior(), *made.as_measurement(obs))
    assert target.sigma_z.shape == (B, 1, 1)
    mean, _ = dense_posteriors(made, obs, Y, SIGMAS["per measurement"])
    torch.testing.assert_close(target.xhat(Y, LEVELS).flatten(1), mean)


@diagonal
def test_before_any_measurement_a_fused_posterior_is_that_of_the_observation(name: str) -> None:
    made, obs = observed(name)
    nothing = torch.full((B, M, *S), math.inf, dtype=torch.float64)
    mean, V = dense_posteriors(made, obs, Y, nothing)
    moments = FusedPosterior(prior(), *made.as_measurement(obs)).moments(Y, torch.full((M,), math.inf, dtype=torch.float64))
    torch.testing.assert_close(moments.xhat.flatten(1), mean)
    torch.testing.assert_close(matrix(moments.V, B, S), V)


@diagonal
@sigmas
def test_fusion_is_exact_for_a_mixture_where_moment_matching_is_not(name: str, sigma: Tensor) -> None:
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    means, covs = 2 * normal(3, d, seed=24), torch.stack([covariance(d, seed) / 4 for seed in range(3)])
    mixture = MixtureDenoiser(weights, means, covs)
    made = observer(name, B, (d,))
    obs = made.simulate(2 * normal(B, d, seed=21), torch.Generator().manual_seed(22))
    y, sigma = 2 * Y.flatten(2), 3 * sigma.flatten(2)
    parts = [mixture_posterior(weights, means, covs, *linear_data(made, obs, y, sigma, i)) for i in range(B)]
    expected = torch.from_numpy(np.stack([mean for mean, _ in parts]))
    moments = FusedPosterior(mixture, *made.as_measurement(obs)).moments(y, sigma)
    torch.testing.assert_close(moments.xhat, expected)
    torch.testing.assert_close(matrix(moments.V, B, (d,)), torch.from_numpy(np.stack([V for _, V in parts])))
    matched = PosteriorDenoiser(mixture, made, obs, "cg", 80, 1e-12).xhat(y, sigma)
    assert (matched - expected).abs().max() > 1e-2


@observers
def test_the_score_of_a_posterior_is_the_gradient_of_its_m_density(name: str) -> None:
    """grad_y log p(y | obs) = grad_y log p(y, obs), the joint law being Gaussian in R^{Md + o}."""
    made, p = observer(name, B, S), prior()
    obs = made.simulate(normal(B, *S, seed=21), torch.Generator().manual_seed(22))
    score = PosteriorDenoiser(p, made, obs, "cg", 80, 1e-12).score(Y, LEVELS)
    for i in range(B):
        H, R, data = linear_data(made, obs, Y, SIGMAS["per measurement"], i)
        H, R = torch.from_numpy(H), torch.from_numpy(R)
        joint = MultivariateNormal(H @ p.mean.flatten(), H @ p.covariance() @ H.T + R)
        leaf = torch.from_numpy(data).requires_grad_(True)
        (expected,) = torch.autograd.grad(joint.log_prob(leaf), leaf)
        torch.testing.assert_close(score[i].flatten(), expected[: M * d], rtol=1e-7, atol=1e-8)


def posterior_of(name: str, solver: str, index: slice) -> Denoiser:
    made, obs = observed(name)
    part = made.rows(index)
    if solver == "fused":
        return FusedPosterior(prior(), *part.as_measurement(obs[index]))
    return PosteriorDenoiser(prior(), part, obs[index], solver, 2, 1e-3)


@pytest.mark.parametrize("name, solver", [(n, s) for n in OBSERVERS for s in (*ITERATIONS, "fused") if (n, s) != ("projection", "fused")])
def test_a_batch_of_one_is_guided_like_a_batch_of_n(name: str, solver: str) -> None:
    whole = posterior_of(name, solver, slice(None))
    moments, score = whole.moments(Y, LEVELS), whole.score(Y, LEVELS)
    V = moments.V(Y[:, 0])
    for i in range(B):
        rows = slice(i, i + 1)
        one = posterior_of(name, solver, rows)
        torch.testing.assert_close(one.score(Y[rows], LEVELS), score[rows])
        torch.testing.assert_close(one.moments(Y[rows], LEVELS).xhat, moments.xhat[rows])
        torch.testing.assert_close(one.moments(Y[rows], LEVELS).V(Y[rows, 0]), V[rows])


class Skewed(Denoiser):
    """xhat = y J^T with a Jacobian that is far from symmetric."""

    J = 0.5 * torch.eye(d, dtype=torch.float64) + 0.2 * normal(d, d, seed=25)

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        return y.mean(1) @ self.J.T


@observers
def test_gmres_solves_the_system_of_a_jacobian_that_is_not_symmetric(name: str) -> None:
    made, sigma = observer(name, B, (d,)), torch.full((M,), 0.7, dtype=torch.float64)
    y, obs = Y.flatten(2), made.simulate(normal(B, d, seed=21), torch.Generator().manual_seed(22))
    V = sigma[0] ** 2 / M * Skewed.J.T
    A, R = dense(made, B), torch.diag_embed(noise_variance(made, B))
    xhat = y.mean(1) @ Skewed.J.T
    gap = obs - torch.einsum("bod,bd->bo", A, xhat)
    expected = xhat + torch.einsum("de,boe,bo->bd", V, A, torch.linalg.solve(R + A @ V @ A.mT, gap))
    target = PosteriorDenoiser(Skewed(), made, obs, "gmres", d, 1e-10)
    torch.testing.assert_close(target.xhat(y, sigma), expected, rtol=1e-7, atol=1e-8)


def test_an_unknown_solver_is_refused() -> None:
    made, obs = observed("identity")
    with pytest.raises(ValueError, match="unknown solver 'lu'; choose from cg, gmres"):
        PosteriorDenoiser(prior(), made, obs, "lu")


@observers
@solvers
@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_an_unfinished_solve_leaves_an_error_below_its_tolerance_in_units_of_the_level(name: str, solver: str, tau: float) -> None:
    """|error of the jump| <= tolerance tau d^(1/2) by the bound of the module, at every level; and it does stop early."""
    made, obs = observed(name)
    y, sigma = prior().mean + tau * normal(B, 1, *S, seed=30), torch.tensor([tau], dtype=torch.float64)
    exact = PosteriorDenoiser(prior(), made, obs, solver, 80 if solver == "cg" else d, 1e-12).xhat(y, sigma)
    used = []
    for tolerance in (0.3, 0.03):
        target = PosteriorDenoiser(prior(), made, obs, solver, 80 if solver == "cg" else d, tolerance)
        error = (target.xhat(y, sigma) - exact).flatten(1).norm(dim=1)
        assert (error <= tolerance * tau * math.sqrt(d)).all()
        used.append(float(target.solve.iterations.double().mean()))
    assert used[0] < used[1] or used[1] <= 1


def test_above_the_coarse_level_a_solve_takes_one_iteration() -> None:
    made, obs = observed("projection")
    target = PosteriorDenoiser(prior(), made, obs, "cg", 9, 1e-9, coarse=1.0)
    for tau, most in ((3.0, 1), (1.0, 9)):
        target.xhat(Y[:, :1], torch.tensor([tau], dtype=torch.float64))
        assert (target.solve.iterations <= most).all() and (target.solve.iterations > 1).any() == (most > 1)
    target.xhat(Y, torch.full((M,), math.sqrt(M) * 0.9, dtype=torch.float64))
    assert (target.solve.iterations > 1).any()
    target.xhat(Y, torch.full((1, M, *S), math.sqrt(M) * 1.1, dtype=torch.float64))
    assert (target.solve.iterations == 1).all()


def test_the_solution_of_a_level_is_the_first_direction_of_the_next() -> None:
    """Asked again at the same y, a solve that took several iterations takes one."""
    made, obs = observed("projection")
    target = PosteriorDenoiser(prior(), made, obs, "cg", 80, 1e-6)
    first = target.xhat(Y, LEVELS)
    assert (target.solve.iterations > 1).all()
    torch.testing.assert_close(target.xhat(Y, LEVELS), first, rtol=1e-5, atol=1e-5)
    assert (target.solve.iterations == 1).all()
