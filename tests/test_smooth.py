r"""The smoothness of x is read off blurred, sampled and coarse observations, and with it the std of x; the prior's start has that covariance."""

from __future__ import annotations

import pytest
import torch
from exact import normal

from emdiff.factors import factor
from emdiff.gaussian import as_smooth, em_iteration
from emdiff.observations import Observations
from emdiff.scale import estimate_scale
from emdiff.smooth import LENGTHS, correlation, correlation_length, smoothed, space
from observers.instruments import blur, compressed, downsample, fourier, identity, mask, stack
from observers.recipes import Recipe

N, S = 400, (16, 16)
MIXING = pytest.mark.parametrize("recipe", [blur(), blur(vary=0.5), downsample(), fourier(), stack(mask(), downsample())], ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)


def observed(recipe: Recipe, length: float, noise: float = 0.05, std: float = 3.0) -> Observations:
    x = 5 + std * smoothed(normal(N, *S, seed=3), 2, length)
    made = recipe.draw(S, N, noise * std, generator(1)).to("cpu", torch.float64)
    return Observations(made.simulate(x, generator(2)), made)


def test_draws_have_the_exponential_covariance_and_vectors_no_space() -> None:
    x = smoothed(normal(4000, 2, 9, 8), 2, 2.0)
    cov = lambda a, b: float((x[:, :, a[0], a[1]] * x[:, :, b[0], b[1]]).mean())  # noqa: E731
    for a, b in (((3, 3), (3, 3)), ((3, 3), (3, 5)), ((0, 1), (2, 4))):
        exact = torch.exp(torch.tensor(-(abs(a[0] - b[0]) + abs(a[1] - b[1])) / 2.0)).item()
        assert cov(a, b) == pytest.approx(exact, abs=0.06)
    assert abs(float((x[:, 0] * x[:, 1]).mean())) < 0.03, "channels are independent"
    shapes = ((5,), (3, 100), (100, 3), (8, 8), (3, 8, 9), (1, 8, 8, 8))
    assert [space(shape) for shape in shapes] == [0, 1, 0, 2, 2, 3]


@pytest.mark.parametrize("shape", [(8, 9), (2, 8, 8)])
def test_the_correlation_is_that_of_the_draws_and_its_factor_the_best_of_its_rank(shape: tuple[int, ...]) -> None:
    d = torch.Size(shape).numel()
    L = smoothed(torch.eye(d, dtype=torch.float64).reshape(d, *shape), 2, 3.0).flatten(1)
    C = L.T @ L
    W, psi = correlation(shape, 3.0, d)
    torch.testing.assert_close((W @ W.T).double(), C, atol=1e-5, rtol=0)
    assert psi.max() < 1e-5
    W, psi = correlation(shape, 3.0, 10)
    best = torch.linalg.eigvalsh(C)[-10:].sum()
    assert float(W.square().sum()) == pytest.approx(float(best), rel=1e-5)
    torch.testing.assert_close(W.square().sum(1) + psi, torch.ones(d))


@MIXING
@pytest.mark.parametrize("length", [0.0, 2.0, 5.0])
def test_length_and_std_are_recovered_whatever_the_operator_weighs(recipe: Recipe, length: float) -> None:
    data = observed(recipe, length)
    assert correlation_length(data, generator()) == pytest.approx(length, rel=0.25, abs=0.35)
    assert estimate_scale(data, generator()).std == pytest.approx(3.0, rel=0.12)


def test_a_white_guess_would_be_wrong_by_far() -> None:
    """Of x correlated over 5 pixels, a blur of sigma 1.5 leaves nearly all power, of a white one 1/(4 pi sigma^2)."""
    data = observed(blur(), 5.0)
    A = data.observer
    white = (A.forward(normal(N, *S, seed=9)).square().mean()).sqrt()
    assert float((data.obs - data.obs.mean()).std() / white) > 2 * 3.0


def test_where_a_is_diagonal_or_x_a_vector_nothing_is_estimated() -> None:
    assert [correlation_length(observed(recipe, 5.0), generator()) for recipe in (identity(), mask())] == [0.0, 0.0]
    made = compressed(ratio=0.5).draw((64,), N, 0.1, generator())
    assert correlation_length(Observations(made.simulate(normal(N, 64).float(), generator()), made), generator()) == 0.0


def test_noise_alone_has_no_length_and_a_constant_the_longest() -> None:
    made = blur().draw(S, N, 1.0, generator())
    assert correlation_length(Observations(made.simulate(torch.zeros(N, *S), generator(5)), made), generator()) == 0.0
    flat = 10 * normal(N, 1, 1).float().expand(N, *S).contiguous()
    assert correlation_length(Observations(made.simulate(flat, generator(5)), made), generator()) == LENGTHS[-1]


def test_what_no_datum_sees_keeps_the_smooth_start_and_not_the_variance_of_the_rest() -> None:
    """Averages of 2 x 2 pixels tell nothing of differences within: of an x of length 5 they have variance 2 (1 - exp(-1/5)), of a white one 2."""
    data = observed(downsample(), 5.0, std=1.0)
    data = Observations((data.obs - 5).float(), data.observer.to("cpu", torch.float32))
    start, root = as_smooth(data, 64, correlation_length(data, generator()))
    assert root.shape == (256, 256)
    prior = start
    for _ in range(3):
        prior = em_iteration(prior, data, 64, generator(), root=root)
    x = prior.sample(2000, generator())
    assert float((x[:, ::2, 0] - x[:, 1::2, 0]).square().mean()) == pytest.approx(0.36, rel=0.25)
    assert float((x[:, ::2, 0] + x[:, 1::2, 0]).square().mean()) == pytest.approx(2 * (1 + 0.82), rel=0.25)


def test_a_covariance_is_split_into_factors_and_a_rest_of_known_correlation() -> None:
    W = normal(60, 3)
    root = smoothed(torch.eye(60, dtype=torch.float64), 1, 2.0).T
    psi = 0.2 + 0.1 * normal(60, seed=2).abs()
    C = root @ root.T
    cov = W @ W.T + psi.sqrt()[:, None] * C * psi.sqrt()
    V, rest = factor([cov], 3, 1e-6, sweeps=200, root=root)
    torch.testing.assert_close(V @ V.T, W @ W.T, atol=0.15, rtol=0)
    torch.testing.assert_close(rest, psi, atol=0.1, rtol=0)
