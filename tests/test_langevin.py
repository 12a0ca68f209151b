r"""Integrators on Gaussians, without sampling: a step is z' = F z + G eps, and its stationary covariance solves P = F P F^T + G G^T."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from exact import SIGMA, M, U, UnitNoise, normal
from scipy.linalg import expm
from torch import Tensor

from emdiff.denoise import GaussianDenoiser
from emdiff.langevin import STEPS, State, Step, cheng, overdamped, sachs, start_velocity, walk, walk_jump

every = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def linear_map(monkeypatch: pytest.MonkeyPatch, step: Step, score: Callable[[Tensor], Tensor], width: int, *numbers: float) -> tuple[Tensor, Tensor]:
    """(F, G) of a step on z = (y, v), y of `width` entries in R^{M}, whose score is linear: the responses to unit states and unit noises."""
    rows = 2 * width + 2 * width
    z = torch.zeros(rows, 2 * width, dtype=torch.float64)
    z[: 2 * width] = torch.eye(2 * width, dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", UnitNoise(2 * width))
        end = step(score, State(z[:, :width, None], z[:, width:, None]), *numbers)
    out = torch.cat([end.y[..., 0], end.v[..., 0]], 1).T
    return out[:, : 2 * width], out[:, 2 * width :]


def stationary(F: Tensor, G: Tensor) -> Tensor:
    """The solution of P = F P F^T + G G^T."""
    n = F.shape[0]
    assert torch.linalg.eigvals(F).abs().max() < 1, "the step is stable"
    return torch.linalg.solve(torch.eye(n * n, dtype=F.dtype) - torch.kron(F, F), (G @ G.T).flatten()).reshape(n, n)


def law(monkeypatch: pytest.MonkeyPatch, step: Step, s: float, delta: float, gamma: float, u: float) -> Tensor:
    """The stationary covariance of (y, v) on N(0, s)."""
    return stationary(*linear_map(monkeypatch, step, lambda y: -y / s, 1, delta, gamma, u))


@pytest.mark.parametrize("delta, var_y", [(0.5, 1.325), (0.25, 1.142), (0.125, 1.067)])
def test_stationary_variances_on_the_standard_normal(monkeypatch: pytest.MonkeyPatch, delta: float, var_y: float) -> None:
    assert law(monkeypatch, cheng, 1.0, delta, 1.0, 1.0)[0, 0].item() == pytest.approx(var_y, abs=6e-4)
    assert law(monkeypatch, sachs, 1.0, delta, 1.0, 1.0)[0, 0].item() == pytest.approx(1.0, abs=5e-5)


def errors(monkeypatch: pytest.MonkeyPatch, step: Step, entry: int, truth: float) -> list[float]:
    """Relative errors of a stationary variance on N(0, .5), gamma = 2, u = .25, for steps halved from .8."""
    return [law(monkeypatch, step, 0.5, delta, 2.0, U)[entry, entry].item() / truth - 1 for delta in (0.8, 0.4, 0.2, 0.1)]


def test_sachs_keeps_the_variance_of_y_and_that_of_v_to_second_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(map(abs, errors(monkeypatch, sachs, 0, 0.5))) < 1e-12
    velocity = errors(monkeypatch, sachs, 1, U)
    for coarse, fine in zip(velocity, velocity[1:]):
        assert coarse / fine == pytest.approx(4, abs=0.35)
    assert abs(velocity[-1]) < 2e-3


def test_cheng_is_of_first_order_in_y(monkeypatch: pytest.MonkeyPatch) -> None:
    position = errors(monkeypatch, cheng, 0, 0.5)
    for coarse, fine in zip(position, position[1:]):
        assert coarse / fine == pytest.approx(2, abs=0.3)
    assert abs(errors(monkeypatch, cheng, 1, U)[-1]) < 0.02


@pytest.mark.parametrize("s, delta, u", [(1.0, 0.5, 1.0), (0.5, 0.8, U), (2.0, 0.3, 3.0)])
def test_overdamped_has_the_variance_of_its_recursion(monkeypatch: pytest.MonkeyPatch, s: float, delta: float, u: float) -> None:
    F, G = linear_map(monkeypatch, overdamped, lambda y: -y / s, 1, delta, 2.0, u)
    P = stationary(F[:1, :1], G[:1])
    assert P.item() == pytest.approx(s / (1 - u * delta**2 / (4 * s)), rel=1e-12)
    assert F[1].tolist() == [0, 1] and (G[1] == 0).all()


def test_cheng_solves_the_diffusion_exactly_while_the_score_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the matrix exponential (Van Loan 1978), with a constant score: any friction, any mass."""
    for delta, gamma, u, psi in ((0.4, 2.0, U, 1.7), (0.9, 0.3, 3.0, -0.6)):
        A = torch.tensor([[0.0, 1.0], [0.0, -gamma]], dtype=torch.float64)
        block = torch.zeros(4, 4, dtype=torch.float64)
        block[:2, :2], block[2:, 2:], block[1, 3] = -A, A.T, 2 * gamma * u
        E = torch.from_numpy(expm((block * delta).numpy()))
        transition, cov = E[2:, 2:].T, E[2:, 2:].T @ E[:2, 2:]
        drift = torch.from_numpy(expm((delta * torch.tensor([[0, 1, 0], [0, -gamma, u * psi], [0, 0, 0]], dtype=torch.float64)).numpy()))[:2, 2]
        F, G = linear_map(monkeypatch, cheng, lambda y: 0 * y, 1, delta, gamma, u)
        torch.testing.assert_close(F, transition)
        torch.testing.assert_close(G @ G.T, cov)
        monkeypatch.setattr(torch, "randn", UnitNoise(1))
        zero = torch.zeros(1, 1, 1, dtype=torch.float64)
        end = cheng(lambda y, psi=psi: psi + 0 * y, State(zero, zero), delta, gamma, u)
        torch.testing.assert_close(torch.stack([end.y, end.v]).flatten(), drift)
        monkeypatch.undo()


def test_sachs_damps_the_velocity_exactly_and_reverses_without_friction(monkeypatch: pytest.MonkeyPatch) -> None:
    F, G = linear_map(monkeypatch, sachs, lambda y: 0 * y, 1, 0.4, 2.0, U)
    assert F[1, 1].item() == pytest.approx(math.exp(-0.8)) and (G @ G.T)[1, 1].item() == pytest.approx(U * (1 - math.exp(-1.6)))
    y, v = normal(3, M, 2), normal(3, M, 2, seed=1)
    score = lambda y: -y.sin()
    there = sachs(score, State(y, v), 0.3, 0.0, U)
    back = sachs(score, State(there.y, -there.v), 0.3, 0.0, U)
    torch.testing.assert_close(back.y, y)
    torch.testing.assert_close(back.v, -v)


@every
def test_the_mean_of_a_walk_is_the_collapsed_walk(monkeypatch: pytest.MonkeyPatch, step: Step) -> None:
    """sigma x M with inverse mass u, averaged over m, is one measurement of level sigma / sqrt(M) with inverse mass u / M."""
    prior = GaussianDenoiser(zeros(1), zeros(1, 1) + 0.8, zeros(1))

    def score(sigma: float, count: int) -> Callable[[Tensor], Tensor]:
        return lambda y: prior.score(y, torch.full((count,), sigma, dtype=torch.float64))

    F, G = linear_map(monkeypatch, step, score(SIGMA, M), M, 0.4, 2.0, U)
    one_F, one_G = linear_map(monkeypatch, step, score(SIGMA / math.sqrt(M), 1), 1, 0.4, 2.0, U / M)
    mean = torch.block_diag(zeros(1, M) + 1 / M, zeros(1, M) + 1 / M)
    torch.testing.assert_close(mean @ F, one_F @ mean)
    torch.testing.assert_close(mean @ G @ G.T @ mean.T, one_G @ one_G.T)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_a_walk_on_an_m_density_has_the_m_density_as_its_law(monkeypatch: pytest.MonkeyPatch, gamma: float) -> None:
    """Cov y = s 11^T + sigma^2 I in R^M, by Sachs exactly."""
    prior = GaussianDenoiser(zeros(1), zeros(1, 1) + 0.8, zeros(1))
    levels = torch.tensor([0.7, 1.9, 0.4], dtype=torch.float64)
    P = stationary(*linear_map(monkeypatch, sachs, lambda y: prior.score(y, levels), M, 0.4, gamma, U))
    torch.testing.assert_close(P[:M, :M], 0.64 + torch.diag(levels.square()))


def bumpy(y: Tensor) -> Tensor:
    return -y - y.sin()


@every
def test_jumps_come_every_so_many_steps_and_do_not_touch_the_chain(step: Step) -> None:
    start, numbers = State(normal(5, M, 2), normal(5, M, 2, seed=1)), (0.4, 2.0, U)
    jump = lambda y: y.mean(1) / 2
    silent = walk(bumpy, start, 10, *numbers, torch.Generator().manual_seed(0), step)
    third = walk(bumpy, start, 3, *numbers, torch.Generator().manual_seed(0), step)
    jumps = list(walk_jump(bumpy, jump, start, 10, 5, *numbers, torch.Generator().manual_seed(0), step))
    assert len(jumps) == 2 and torch.equal(jumps[-1][0].y, silent.y) and torch.equal(jumps[-1][0].v, silent.v)
    assert all(torch.equal(x, jump(state.y)) for state, x in jumps)
    finer = list(walk_jump(bumpy, jump, start, 10, 3, *numbers, torch.Generator().manual_seed(0), step))
    assert len(finer) == 3 and torch.equal(finer[0][0].y, third.y)


@every
def test_a_walk_is_its_steps_and_changes_no_tensor_of_the_caller(step: Step) -> None:
    start, generator = State(normal(5, M, 2), normal(5, M, 2, seed=1)), torch.Generator().manual_seed(0)
    state = start
    for _ in range(4):
        state = step(bumpy, state, 0.4, 2.0, U, generator)
    end = walk(bumpy, start, 4, 0.4, 2.0, U, torch.Generator().manual_seed(0), step)
    assert torch.equal(end.y, state.y) and torch.equal(end.v, state.v)
    assert torch.equal(start.y, normal(5, M, 2)) and torch.equal(start.v, normal(5, M, 2, seed=1))
    assert not torch.equal(end.y, start.y)


def test_velocities_start_from_their_stationary_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", UnitNoise(0))
    y = torch.zeros(3, M, 1, dtype=torch.float64)
    state = start_velocity(y, U)
    assert state.y is y and torch.equal(state.v[..., 0], math.sqrt(U) * torch.eye(3, dtype=torch.float64))
