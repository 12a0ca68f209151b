r"""Restarting chains from a pool: exact posteriors where the pool explains the observations, no more widening than needed, and no trapped chains."""

from __future__ import annotations

import math

import pytest
import torch
from exact import covariance, normal, observer, uniform
from torch import Tensor

from emdiff.denoise import GaussianDenoiser
from emdiff.em import Walk, e_step
from emdiff.mixture import MixtureDenoiser
from emdiff.observations import Observations
from emdiff.pool import LEAST, applies, choose, distances, noise, restart
from emdiff.prior import Prior
from emdiff.scale import Scale
from observers import Identity, Observer, Projection

d = 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(3000 + seed)


@pytest.mark.parametrize("name", ["identity", "mask", "projection"])
def test_distances_are_those_of_the_observer(name: str) -> None:
    made: Observer = observer(name, 5, (d,))
    data, pool = Observations(made.simulate(normal(5, d), generator()), made), normal(7, d, seed=3)
    for j, x in enumerate(pool):
        gap = (data.obs - made.forward(x.expand(5, d))) / made.std() * made.observed()
        torch.testing.assert_close(distances(pool, data)[:, j], gap.square().sum(1))


def test_resampling_by_the_likelihood_gives_the_posterior() -> None:
    """One observation, asked many times: mean and covariance of the chosen are those of the Gaussian posterior, and the noise is not widened."""
    S, count = covariance(d, 2), 4000
    prior = GaussianDenoiser.from_covariance(torch.zeros(d, dtype=torch.float64), S)
    A, obs = normal(1, 2, d, seed=5), normal(1, 2, seed=6)
    made = Projection((d,), torch.tensor(0.5, dtype=torch.float64), A)
    chosen = choose(prior.sample(20_000, generator(1)), Observations(obs.expand(count, 2).clone(), made), generator(2))
    K = S @ A[0].T @ torch.linalg.inv(A[0] @ S @ A[0].T + 0.25 * torch.eye(2, dtype=torch.float64))
    V = S - K @ A[0] @ S
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(V), (chosen.x - obs @ K.T).T, upper=False)
    assert (chosen.widening == 1).all()
    assert (white.mean(1).abs() < 5 / math.sqrt(count)).all()
    assert ((white @ white.T / count - torch.eye(d)).abs() < 0.15).all()


def test_the_noise_is_widened_just_until_some_of_the_pool_explain_the_observation() -> None:
    made = Identity((1,), torch.tensor(0.01, dtype=torch.float64))
    pool = torch.linspace(-1, 1, 21, dtype=torch.float64)[:, None]
    chosen = choose(pool, Observations(torch.tensor([[0.05], [0.0]], dtype=torch.float64), made), generator())
    assert chosen.widening.tolist() == [1, 64]  # halfway between two members; on one of them, .1 from the next

    def effective(f: float) -> float:
        share = (-0.5 * (pool[:, 0] / 0.01).square() / f).softmax(0)
        return float(1 / share.square().sum())

    f = next(4.0**k for k in range(9) if effective(4.0**k) >= LEAST)
    assert chosen.widening[1] == f


def two_modes() -> Prior:
    weights, means = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    covs = 0.01 * torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    return Prior(MixtureDenoiser(weights, means, covs), Scale(0.0, 1.0), (2,), 0.05, {})


def right_mode(chains: Tensor, pool: int) -> float:
    """Share of chains that end in the mode that their observation names, its first entry with noise .5; half of them start in the other."""
    prior, count = two_modes(), 400
    truth = torch.where(torch.arange(count)[:, None] < count // 2, -1.0, 1.0).double() * prior.denoiser.means[1]
    made = Projection((2,), torch.tensor(0.5, dtype=torch.float64), torch.tensor([[[1.0, 0.0]]], dtype=torch.float64))
    data = Observations(made.forward(truth), made)
    if pool:
        chains = restart(prior._replace(denoiser=prior.denoiser.float()), float32(data), chains.float(), pool, 0.3, generator(1)).double()
    walk = Walk("cg", tau_first=0.3, tau_last=0.05, levels=12, batch=count)
    x = e_step(prior.denoiser.double(), data, chains, walk, generator(2)).sample
    return float((x[:, 0].sign() == truth[:, 0].sign()).double().mean())


def float32(data: Observations) -> Observations:
    return Observations(data.obs.float(), data.observer.to("cpu", torch.float32))


def test_chains_in_the_wrong_mode_stay_there_unless_they_restart() -> None:
    wrong = torch.tensor([[2.0, 0.0]], dtype=torch.float64).expand(400, 2)
    assert right_mode(wrong, 0) == 0.5
    assert right_mode(wrong, 512) == 1.0


def test_a_chain_that_the_pool_cannot_serve_goes_on_from_where_it_was() -> None:
    prior = two_modes()._replace(denoiser=two_modes().denoiser.float())
    made = Identity((2,), torch.tensor([0.5, 1e-4]))
    chains = torch.full((2, 2), 7.0)
    x = restart(prior, Observations(torch.tensor([[2.0, 0.0], [2.0, 0.05]]), made), chains, 64, 0.01, generator())
    assert (x[1] == 7).all()
    x = restart(prior, Observations(torch.tensor([[2.0, 0.0], [2.0, 0.05]]), made), None, 64, 0.01, generator())
    assert (x != 7).all()


def test_the_noise_counts_in_units_of_x() -> None:
    """A known full covariance R is a projection by R^(-1/2) with unit noise: both have the noise of R."""
    matrix = 4 * torch.eye(2).expand(3, 2, 2)
    data = Observations(torch.zeros(3, 2), Projection((2,), torch.tensor(1.0), matrix))
    assert noise(data).tolist() == [0.25] * 3
    assert noise(Observations(torch.zeros(3, 2), Projection((2,), 0.1 + uniform(3).float(), matrix / 4))).shape == (3,)


def test_pools_are_for_vectors() -> None:
    assert applies(Observations(torch.zeros(3, 5), Identity((5,), torch.tensor(1.0))))
    assert not applies(Observations(torch.zeros(3, 28, 28), Identity((28, 28), torch.tensor(1.0))))
