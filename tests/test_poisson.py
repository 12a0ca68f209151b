"""The Poisson noise model against Gamma priors in closed form: estimator, risk, training, single-step denoising, and the walks' stationary laws."""

import pytest
import torch

from emdiff.nn import MLP
from emdiff.poisson import GammaDenoiser, PoissonLoss, PoissonMDAE, count, exact_moments, gibbs_walk, plain_moments, robbins, spread_draw
from emdiff.training import Optimiser, train

A, B = 2.5, 0.8


def gamma(a=A, b=B):
    return GammaDenoiser(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))


def draw(n, seed=0, shape=()):
    """x ~ Gamma(A, B), float64, (n, *shape)."""
    generator = torch.Generator().manual_seed(seed)
    return torch._standard_gamma(torch.full((n, *shape), A, dtype=torch.float64), generator=generator) / B, generator


def test_robbins_estimator_is_the_posterior_mean_for_every_measurement():
    """(y_m + 1) p(y + 1_m)/p(y) = (a + s)/(b + M), the same for all m; the M-density itself against quadrature."""
    y = torch.tensor([[0, 0, 0], [1, 4, 2], [7, 0, 3]], dtype=torch.float64)
    for m in range(3):
        torch.testing.assert_close(robbins(gamma().log_p, y, m), (A + y.sum(1)) / (B + 3))
    x = torch.linspace(1e-4, 60, 200_001, dtype=torch.float64)[:, None]
    prior = torch.distributions.Gamma(torch.tensor(A, dtype=torch.float64), torch.tensor(B, dtype=torch.float64)).log_prob(x)
    joint = prior + (y.sum(1) * x.log() - 3 * x - torch.lgamma(y + 1).sum(1))
    torch.testing.assert_close(gamma().log_p(y).exp(), torch.trapezoid(joint.exp(), x[:, 0], dim=0), rtol=1e-6, atol=1e-12)


def test_the_papers_example():
    """p(x) = exp(-x): xhat = (s + 1)/(M + 1)."""
    y = torch.tensor([[[2.0], [3.0], [0.0]]], dtype=torch.float64)
    assert float(gamma(1.0, 1.0).xhat(y)) == pytest.approx(6 / 4)


def test_variance_and_risk_are_those_of_the_gamma_posterior():
    y = torch.tensor([[[2.0, 0.0], [3.0, 1.0]]], dtype=torch.float64)
    torch.testing.assert_close(gamma().variance(y), (A + y.sum(1)) / (B + 2) ** 2)
    x, generator = draw(200_000, shape=(1,))
    found = gamma().loss(x, count(x, 3, generator)).mean()
    assert float(found) == pytest.approx(float(gamma().risk(3)), rel=0.02)


@pytest.fixture(scope="module")
def learned():
    x, _ = draw(20_000, shape=(2,))
    torch.manual_seed(0)
    mdae = PoissonMDAE(MLP((2,), width=32, blocks=1), float(x.mean()))
    return train(mdae, PoissonLoss(x.float(), 3), len(x), 800, 256, optimiser=Optimiser(rate=3e-3)).denoiser


def test_a_poisson_mdae_reaches_the_least_risk(learned):
    """Within 2 % of a/(b (b + M)), where the mean of the counts has a/(b M), 27 % more."""
    x, generator = draw(50_000, seed=7, shape=(2,))
    y = count(x, 3, generator)
    risk, least = float(learned.loss(x.float(), y.float()).mean()), float(gamma().loss(x, y).mean())
    assert 0.99 * least < risk < 1.02 * least < float((y.mean(1) - x).square().mean()) / 1.2


def test_single_step_denoising_is_the_posterior_mean(learned):
    """Total by total: within 5 % for those that are common, within .4 posterior std for the rare ones at the ends."""
    s = torch.arange(0, 30.0)[:, None].expand(-1, 2)
    found, exact = learned.from_total(s, 3), gamma().from_total(s.double(), 3)
    assert float(((found - exact) / exact)[2:25].abs().max()) < 0.05
    assert float(((found - exact) / (exact / (B + 3)).sqrt()).abs().max()) < 0.4


def second_moments(denoiser, spread, M, steps, n=40_000):
    x, generator = draw(n)
    y = gibbs_walk(denoiser, count(x, M, generator)[:, :, None], steps, spread, generator)[..., 0]
    c = torch.cov(y.T)
    return float(y.mean()), float(c.diagonal().mean()), float((c.sum() - c.trace()) / (M * (M - 1)))


@pytest.mark.parametrize("spread", [False, True])
def test_walks_have_the_stationary_moments_that_theory_gives(spread):
    """plain: those of the linear recursion; spread: the M-density's own."""
    expected = exact_moments(A, B) if spread else plain_moments(A, B, 3)
    mean, variance, covariance = second_moments(gamma(), spread, 3, 60)
    assert mean == pytest.approx(expected.mean, rel=0.02)
    assert variance == pytest.approx(expected.variance, rel=0.05) and covariance == pytest.approx(expected.covariance, rel=0.05)


def test_the_plain_walk_is_too_narrow_and_by_how_much():
    """Its covariance between measurements, the variance of x that it keeps: less than a/b^2 for every M, towards it as M grows."""
    kept = [plain_moments(A, B, M).covariance / exact_moments(A, B).covariance for M in (2, 4, 16, 64, 1024)]
    assert all(0 < k < 1 for k in kept)
    mean, *_ = plain_moments(A, B, 3)
    assert mean == A / B
    narrower = plain_moments(A, B, 3).variance, exact_moments(A, B).variance
    assert narrower[0] < narrower[1]


def test_a_spread_draw_is_the_gamma_posterior():
    y = torch.tensor([2.0, 5.0, 1.0], dtype=torch.float64).reshape(1, 3, 1).expand(100_000, 3, 1)
    x = spread_draw(gamma(), y, torch.Generator().manual_seed(0))
    assert float(x.mean()) == pytest.approx((A + 8) / (B + 3), rel=0.01) and float(x.var()) == pytest.approx((A + 8) / (B + 3) ** 2, rel=0.02)


def test_a_walk_leaves_its_argument_alone():
    y = torch.ones(4, 3, 1, dtype=torch.float64)
    gibbs_walk(gamma(), y, 5, generator=torch.Generator().manual_seed(0))
    assert bool((y == 1).all())
