"""Walks under a mixture and a departure from it: exact where nothing departs, and right where the departure is the exact one of another prior."""

import math

import pytest
import torch
from exact import normal
from torch import Tensor, nn

from emdiff.accumulate import levels
from emdiff.basewalk import Departure, descend, free, fused, guided, matched, positive
from emdiff.deconvolution import Whitened
from emdiff.mdae import KNOTS, MDAE, kept
from emdiff.mixture import MixtureDenoiser
from emdiff.prior import Prior, load_prior, sample_prior, save_prior
from emdiff.scale import Scale
from emdiff.shrink import keep, shares, spread

COUNT = 6000
W = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
M = torch.tensor([[-1.0, 0.0], [1.0, 0.3], [0.1, 0.9]], dtype=torch.float64)
S = torch.diag_embed(torch.tensor([[0.3, 0.02], [0.02, 0.3], [0.05, 0.05]], dtype=torch.float64))
TRUE = MixtureDenoiser(W, M, S)
NEAR = MixtureDenoiser(torch.tensor([0.35, 0.25, 0.4], dtype=torch.float64), M + 0.1, 1.5 * S)


class Exact(MDAE):
    """NEAR and the exact departure of TRUE from it, times a factor."""

    def __init__(self, factor: float = 1.0, base: MixtureDenoiser = NEAR) -> None:
        super().__init__(nn.Identity(), base=base)
        self.keep += 1
        self.factor = factor

    def untempered(self, ybar: Tensor, p: Tensor) -> Tensor:
        y, sigma = ybar[:, None], p.expand(ybar.shape)[:, None].rsqrt() if p[0].numel() > 1 else p[:, None, 0].rsqrt()
        return self.factor * (TRUE.xhat(y, sigma) - self.base.xhat(y, sigma))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nothing() -> tuple[Tensor, Tensor]:
    return torch.zeros(COUNT, 1, 2, dtype=torch.float64), torch.tensor([math.inf], dtype=torch.float64)


def seen(A: Tensor, seed: int = 1) -> Whitened:
    x = TRUE.sample(COUNT, generator(seed))
    return Whitened(A, (A @ x[..., None])[..., 0] + normal(COUNT, A.shape[1], seed=seed), torch.zeros(COUNT, dtype=torch.float64))


def projections() -> Whitened:
    angle = math.pi * torch.rand(COUNT, generator=generator(4), dtype=torch.float64)
    return seen(torch.stack([angle.cos(), angle.sin()], dim=1)[:, None] / 0.15)


def excess(x: Tensor, data: Whitened) -> float:
    """E (x - m)^T V^-1 (x - m) / d - 1 for the exact posterior moments m and V under TRUE: 0 for exact samples, with std .013 here."""
    mean, V = TRUE.given(data).covariance(*nothing())
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(V), (x - mean)[..., None], upper=False)
    return float(white.square().mean()) - 1


def assert_true_moments(x: Tensor, tolerance: float = 0.05) -> None:
    mean = W @ M
    far = M - mean
    cov = torch.einsum("j,jde->de", W, S + far[:, :, None] * far[:, None])
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(x.T.cov(), cov, rtol=0, atol=tolerance)


def test_without_a_departure_draws_are_exact_for_any_levels() -> None:
    data, prior = projections(), Exact(base=TRUE)
    for departure in (None, guided(prior, data)):
        end = descend(TRUE.given(data), departure, (COUNT, 2), levels(20.0, 0.05, 3), generator())
        assert abs(excess(end.x, data)) < 0.05
        torch.testing.assert_close((end.y - end.x).std(), torch.tensor(0.05).double(), rtol=0.1 if departure is None else 1, atol=0)
        torch.testing.assert_close(end.xhat, TRUE.given(data).xhat(end.y[:, None], torch.tensor([0.05]).double()))


def test_the_exact_departure_makes_the_prior_that_it_departs_to() -> None:
    end = descend(NEAR, free(Exact()), (COUNT, 2), levels(20.0, 0.05, 32), generator())
    assert_true_moments(end.x)
    with pytest.raises(AssertionError):
        assert_true_moments(descend(NEAR, free(Exact(-1.0)), (COUNT, 2), levels(20.0, 0.05, 32), generator()).x)


def test_fused_the_exact_departure_makes_the_exact_posterior() -> None:
    """The second entry is not observed."""
    A = torch.tensor([[[1 / 0.4, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    data = seen(A)
    sigma = torch.tensor([[0.4, math.inf]], dtype=torch.float64)
    z = torch.where(sigma.isfinite(), 0.4 * data.obs, 0.0)
    found = {}
    for factor in (1.0, 0.0):
        end = descend(NEAR.given(data), fused(Exact(factor), z, sigma), (COUNT, 2), levels(20.0, 0.05, 32), generator())
        found[factor] = excess(end.x, data)
    assert abs(found[1.0]) < 0.06 < found[0.0]


def test_guided_the_exact_departure_comes_nearer_to_the_posterior_and_from_the_right_states_is_there() -> None:
    """Moment matching of the departure is not exact where it is large; from samples of the posterior, which a pool gives, it has little to mend."""
    data = projections()
    target, taus = NEAR.given(data), levels(1.0, 0.02, 32)
    error = lambda e: abs(excess(e.x, data))  # noqa: E731
    without = error(descend(target, None, (COUNT, 2), taus, generator()))
    anew = error(descend(target, guided(Exact(), data), (COUNT, 2), taus, generator()))
    states = TRUE.given(data).draw(*nothing(), generator(9))
    restarted = error(descend(target, guided(Exact(), data), (COUNT, 2), levels(0.3, 0.02, 32), generator(), states))
    assert restarted < 0.05 and anew < 0.12 < without


def test_a_jacobian_that_is_no_covariance_does_not_make_chains_diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the departure, of the wrong sign: V0 + D has negative eigenvalues, which the matching must not see."""
    data, prior, far = projections(), Exact(-3.0), []
    for cut in (positive, lambda V: V):
        monkeypatch.setattr("emdiff.basewalk.positive", cut)
        end = descend(NEAR.given(data), guided(prior, data), (COUNT, 2), levels(1.0, 0.02, 16), generator())
        far.append(float(end.x.abs().max()))
    print(far)
    assert far[0] < 10 < 100 < far[1]
    V = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.eigvalsh(positive(V)), torch.tensor([0.0, 3.0], dtype=torch.float64))


def test_matching_is_the_conditional_mean_of_a_gaussian() -> None:
    A, V, xhat = normal(2, 2, 3), torch.eye(3, dtype=torch.float64) * 0.7, normal(2, 3, seed=1)
    data = Whitened(A, normal(2, 2, seed=2), torch.zeros(2))
    expected = xhat + (V @ A.mT @ torch.linalg.inv(A @ V @ A.mT + torch.eye(2)) @ (data.obs - (A @ xhat[..., None])[..., 0])[..., None])[..., 0]
    torch.testing.assert_close(matched(xhat, V.expand(2, 3, 3), data), expected)


def test_only_levels_with_a_departure_and_their_neighbours_are_visited() -> None:
    taus = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25]
    assert Departure(lambda y, tau: y, 2.0, 1.0).needed(taus) == [4.0, 2.0, 1.0, 0.5, 0.25]
    assert Departure(lambda y, tau: y, 0.1, 0.01).needed(taus) == [0.25]
    assert Departure(lambda y, tau: y).needed(taus) == taus
    prior = MDAE(nn.Identity(), base=NEAR)
    prior.keep[3] = 0.5
    coarsest, finest = prior.departs_within()
    at = lambda tau: float(kept(prior.keep, torch.tensor([tau**-2]))[0])  # noqa: E731
    assert at(1.01 * coarsest) == 0 < at(0.9 * coarsest) and at(0.99 * finest) == 0 < at(1.1 * finest)


def small() -> MDAE:
    from emdiff.prior import build_network

    torch.manual_seed(0)
    return build_network((2,), "mlp", base=3, width=16, blocks=1)


def test_learning_starts_at_the_base_and_a_saved_prior_is_the_same(tmp_path) -> None:
    denoiser = small()
    denoiser.base = MixtureDenoiser(W, M, S).float()
    y, sigma = normal(5, 2, 2).float(), torch.tensor([0.5, 2.0])
    for value in (0.0, 1.0):
        denoiser.keep[:] = value
        torch.testing.assert_close(denoiser.xhat(y, sigma), denoiser.base.xhat(y, sigma))
    nn.init.normal_(denoiser.backbone.head.weight)
    denoiser.keep[:] = torch.linspace(0, 1, KNOTS)
    prior = Prior(denoiser.eval(), Scale(1.0, 2.0), (2,), 0.05, {"kind": "mlp", "base": 3, "width": 16, "blocks": 1})
    save_prior(tmp_path / "prior.safetensors", prior)
    again = load_prior(tmp_path / "prior.safetensors")
    assert not torch.equal(again.denoiser.xhat(y, sigma), again.denoiser.base.xhat(y, sigma))
    assert torch.equal(again.denoiser.xhat(y, sigma), denoiser.xhat(y, sigma))
    assert torch.equal(sample_prior(again, 4, generator(), 5), sample_prior(prior, 4, generator(), 5))


def test_v_is_the_base_s_and_the_departure_s() -> None:
    """Against the Jacobian of the whole, which the base class differentiates."""
    from exact import Autograd, matrix

    denoiser = small().double()
    denoiser.base = TRUE
    nn.init.normal_(denoiser.backbone.head.weight)
    denoiser.keep[:] = 0.7
    y, sigma = normal(5, 2, 2), torch.tensor([0.5, 2.0], dtype=torch.float64)
    closed, differentiated = denoiser.moments(y, sigma), Autograd(denoiser).moments(y, sigma)
    torch.testing.assert_close(closed.xhat, differentiated.xhat)
    torch.testing.assert_close(matrix(closed.V, 5, (2,)), matrix(differentiated.V, 5, (2,)))


def pairs(index: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x = TRUE.sample(COUNT, generator(7))[index]
    tau = torch.exp(-3 + 3 * torch.rand(len(index), 1, generator=g, dtype=torch.float64))
    return x, x + tau * torch.randn(x.shape, generator=g, dtype=torch.float64), tau


@pytest.mark.parametrize(("factor", "low", "high"), [(1.0, 0.8, 1.0), (2.0, 0.4, 0.6), (-1.0, 0.0, 0.0)])
def test_a_departure_is_kept_as_far_as_held_out_pairs_confirm_it(factor: float, low: float, high: float) -> None:
    kept_ = keep(Exact(factor), pairs, torch.arange(COUNT), generator(8))
    reached = kept_[1:5]
    assert ((reached >= low) & (reached <= high)).all(), kept_


def test_a_network_that_knows_nothing_is_dropped() -> None:
    class Noise(Exact):
        def untempered(self, ybar: Tensor, p: Tensor) -> Tensor:
            return 0.1 * torch.sin(3 * ybar.flip(1)) * p.rsqrt()

    kept_ = keep(Noise(base=TRUE), pairs, torch.arange(COUNT), generator(8))
    assert float(kept_.max()) < 0.1


def test_shares_sum_to_one_and_gaps_are_filled_from_the_finer_side() -> None:
    p = torch.tensor([0.0, 0.3, 7.0, 1e4, 1e12])
    torch.testing.assert_close(shares(p).sum(-1), torch.ones(5))
    values = torch.rand(KNOTS)
    torch.testing.assert_close((shares(p) * values).sum(-1), kept(values, p))
    known = torch.tensor([False, True, False, True, False])
    torch.testing.assert_close(spread(torch.tensor([9.0, 1.0, 9.0, 2.0, 9.0]), known), torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0]))
