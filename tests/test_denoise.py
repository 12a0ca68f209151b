r"""Denoisers against what they claim to be: E[x | y], V[x | y] and the score, by dense algebra, quadrature and autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exact import LEVELS, SIGMA, Autograd, M, covariance, matrix, measurements, mixture_posterior, normal, posterior, uniform, with_infinite
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from emdiff.denoise import Denoiser, GaussianDenoiser
from emdiff.mdae import MDAE, ChannelMDAE
from emdiff.measurement import effective, pool
from emdiff.mixture import MixtureDenoiser
from emdiff.nn import MLP, UNet

B, S, d = 4, (2, 3), 6


KINDS = {
    "per measurement": LEVELS,
    "per datum and measurement": 0.3 + uniform(B, M),
    "shared map": 0.3 + uniform(1, M, *S),
    "per entry": 0.3 + uniform(B, M, *S),
    "per entry, some infinite": with_infinite(),
}
kinds = pytest.mark.parametrize("sigma", KINDS.values(), ids=KINDS.keys())


def full(sigma: Tensor) -> Tensor:
    """Levels (B, M, *S)."""
    return sigma[None, :, None, None].expand(B, M, *S) if sigma.ndim == 1 else sigma[(...,) + (None,) * (4 - sigma.ndim)].expand(B, M, *S)


def full_rank() -> GaussianDenoiser:
    return GaussianDenoiser.from_covariance(normal(*S, seed=7), covariance(d))


def low_rank() -> GaussianDenoiser:
    """Rank 2 plus a diagonal that is 0 somewhere."""
    psi = uniform(d, seed=8)
    psi[3] = 0
    return GaussianDenoiser(normal(*S, seed=7), normal(d, 2, seed=9), psi)


gaussians = pytest.mark.parametrize("make", [full_rank, low_rank])


def dense_posteriors(prior: GaussianDenoiser, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    mean, cov = prior.mean.flatten().numpy(), prior.covariance().numpy()
    each = [posterior(mean, cov, *measurements(y[i].flatten(1), full(sigma)[i].flatten(1)))[:2] for i in range(B)]
    means, covs = zip(*each)
    return torch.from_numpy(np.stack(means)), torch.from_numpy(np.stack(covs))


@gaussians
@kinds
def test_a_gaussian_denoiser_is_the_dense_posterior(make, sigma: Tensor) -> None:
    prior, y = make(), normal(B, M, *S)
    mean, V = dense_posteriors(prior, y, sigma)
    moments = prior.moments(y, sigma)
    torch.testing.assert_close(prior.xhat(y, sigma).flatten(1), mean)
    torch.testing.assert_close(moments.xhat.flatten(1), mean)
    torch.testing.assert_close(matrix(moments.V, B, S), V)


@gaussians
@kinds
def test_v_is_the_mean_over_measurements_of_the_jacobian_products(make, sigma: Tensor) -> None:
    """A sum over m would be M times too large; an entry that was never measured has no Jacobian to tell of it, and gets 0."""
    prior, y = make(), normal(B, M, *S)
    mean, V = dense_posteriors(prior, y, sigma)
    moments = Denoiser.moments(Autograd(prior), y, sigma)
    measured = full(sigma).isfinite().any(1).flatten(1)
    torch.testing.assert_close(moments.xhat.flatten(1), mean)
    torch.testing.assert_close(matrix(moments.V, B, S), torch.where(measured[..., None], V, 0.0))


def test_from_covariance_keeps_the_covariance_and_cuts_negative_eigenvalues() -> None:
    S6 = covariance(d)
    torch.testing.assert_close(GaussianDenoiser.from_covariance(torch.zeros(S), S6).covariance(), S6)
    s, Q = torch.linalg.eigh(S6 - torch.eye(d, dtype=torch.float64))
    assert s[0] < 0
    cut = GaussianDenoiser.from_covariance(torch.zeros(S), S6 - torch.eye(d, dtype=torch.float64)).covariance()
    torch.testing.assert_close(cut, Q @ torch.diag(s.clamp(min=0)) @ Q.T)


@gaussians
def test_samples_and_products_have_the_covariance(make) -> None:
    prior, count = make(), 40_000
    cov = prior.covariance()
    torch.testing.assert_close(prior.prior_product(normal(B, *S)).flatten(1), normal(B, *S).flatten(1) @ cov)
    x = prior.sample(count, torch.Generator().manual_seed(0)).flatten(1) - prior.mean.flatten()
    error = 5 * torch.sqrt((cov.square() + torch.outer(cov.diagonal(), cov.diagonal())) / count)
    assert ((x.T @ x / count - cov).abs() < error + 1e-12).all()


J, k = 3, 2
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = 2 * normal(J, k, seed=10)
COVS = torch.stack([covariance(k, seed) for seed in range(J)])


def mixture() -> MixtureDenoiser:
    return MixtureDenoiser(WEIGHTS, MEANS, COVS)


def mixture_levels(infinite: bool) -> Tensor:
    sigma = 0.3 + 2 * uniform(B, M, k)
    if infinite:
        sigma[0, :, 1], sigma[1], sigma[2, 0] = math.inf, math.inf, math.inf
    return sigma


@pytest.mark.parametrize("infinite", [False, True])
def test_a_mixture_denoiser_is_the_posterior_mean_component_by_component(infinite: bool) -> None:
    y, sigma = 2 * normal(B, M, k), mixture_levels(infinite)
    each = [mixture_posterior(WEIGHTS, MEANS, COVS, *measurements(y[i], sigma[i])) for i in range(B)]
    torch.testing.assert_close(mixture().xhat(y, sigma), torch.from_numpy(np.stack([mean for mean, _ in each])))
    V = matrix(mixture().moments(y, sigma).V, B, (k,))
    for i, (_, cov) in enumerate(each):
        measured = sigma[i].isfinite().any(0)
        torch.testing.assert_close(V[i][measured], torch.from_numpy(cov)[measured])


def test_a_mixture_denoiser_is_bayes_rule_on_a_grid() -> None:
    prior = MixtureDenoiser(WEIGHTS, MEANS[:, :1], COVS[:, :1, :1])
    y = 2 * normal(B, M, 1)
    x = torch.linspace(-25, 25, 20_001, dtype=torch.float64)
    p = (WEIGHTS[:, None] * torch.distributions.Normal(MEANS[:, :1], COVS[:, 0, :1].sqrt()).log_prob(x).exp()).sum(0)
    likelihood = (-0.5 * ((y - x) / LEVELS[:, None]).square()).sum(1).exp()
    w = p * likelihood / (p * likelihood).sum(1, keepdim=True)
    mean = (w * x).sum(1)
    moments = prior.moments(y, LEVELS)
    torch.testing.assert_close(moments.xhat[:, 0], mean, rtol=1e-9, atol=1e-9)
    V = moments.V(torch.ones(B, 1, dtype=torch.float64))[:, 0]
    torch.testing.assert_close(V, (w * (x - mean[:, None]).square()).sum(1), rtol=1e-9, atol=1e-9)


def test_mixture_samples_have_the_mixture_moments() -> None:
    count = 40_000
    x = mixture().sample(count, torch.Generator().manual_seed(0))
    mean = WEIGHTS @ MEANS
    cov = torch.einsum("j,jde->de", WEIGHTS, COVS + MEANS[:, :, None] * MEANS[:, None, :]) - torch.outer(mean, mean)
    scale = cov.diagonal().max()
    assert ((x.mean(0) - mean).abs() < 5 * (scale / count).sqrt()).all()
    assert ((x.T.cov() - cov).abs() < 5 * scale * math.sqrt(3 / count)).all()


def m_density(means: Tensor, covs: Tensor) -> MultivariateNormal:
    """The law of y in R^{Md}: blocks S everywhere, sigma_m^2 I added on the diagonal."""
    ones = torch.ones(M, M, dtype=torch.float64)
    width = means.shape[-1]
    noise = torch.diag(LEVELS.square().repeat_interleave(width))
    return MultivariateNormal(means.repeat(1, M), torch.stack([torch.kron(ones, cov) for cov in covs]) + noise)


def gradient(log_p, y: Tensor) -> Tensor:
    leaf = y.clone().requires_grad_(True)
    return torch.autograd.grad(log_p(leaf.flatten(1)).sum(), leaf)[0]


@gaussians
def test_the_score_is_the_gradient_of_the_gaussian_m_density(make) -> None:
    prior, y = make(), normal(B, M, *S)
    law = m_density(prior.mean.flatten()[None], prior.covariance()[None])
    torch.testing.assert_close(prior.score(y, LEVELS), gradient(law.log_prob, y))


def test_the_score_is_the_gradient_of_the_mixture_m_density() -> None:
    law, y = m_density(MEANS, COVS), 2 * normal(B, M, k)
    expected = gradient(lambda flat: (WEIGHTS.log() + law.log_prob(flat[:, None])).logsumexp(1), y)
    torch.testing.assert_close(mixture().score(y, LEVELS), expected)


def randomised(net: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """All weights drawn at random, in float64: none of the zeros of initialisation hides a mistake."""
    net = net.double()
    for i, p in enumerate(net.parameters()):
        p.data = scale * normal(*p.shape, seed=seed + i) / math.sqrt(max(p[0].numel(), 1))
    return net


def test_the_pooled_score_is_permutation_equivariant() -> None:
    order, y = [2, 0, 1], normal(B, M, *S)
    for denoiser in (full_rank(), MDAE(randomised(MLP(S, width=8, blocks=1)))):
        torch.testing.assert_close(denoiser.score(y, LEVELS)[:, order], denoiser.score(y[:, order], LEVELS[order]))


NETS = {
    "mlp": lambda shape: MLP(shape, width=8, blocks=2),
    "unet": lambda shape: UNet(shape, widths=(4, 8), patch=2, embed=4),
    "unet, gain": lambda shape: UNet(shape, widths=(4, 8), patch=2, embed=4, gain=True),
    "unet, gain by maps": lambda shape: UNet(shape, widths=(4, 8), patch=2, embed=4, maps=True, gain=True),
    "unet, patch 1, three stages": lambda shape: UNet(shape, widths=(4, 6, 8), patch=1, blocks=2, embed=4),
}
SHAPES = [(8, 12), (7, 5), (3, 9, 6), (1, 1, 1)]
nets = pytest.mark.parametrize("net", NETS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def levels_of(shape: tuple[int, ...]) -> Tensor:
    """Levels (B, M, *shape), some infinite; datum 1 was not measured at all."""
    sigma = 0.2 + 2 * uniform(B, M, *shape, seed=11)
    sigma[uniform(B, M, *shape, seed=12) < 0.4] = math.inf
    sigma[1] = math.inf
    return sigma


@nets
@shapes
@pytest.mark.parametrize("spread", [1.0, 0.4])
def test_an_untrained_mdae_is_the_skip_connection_alone(net: str, shape: tuple[int, ...], spread: float) -> None:
    """Which is the Bayes estimator of white data of variance spread^2, whatever the level map."""
    mdae = MDAE(NETS[net](shape).double(), spread=spread)
    y, sigma = normal(B, M, *shape), levels_of(shape)
    ybar, p = pool(y, sigma)
    torch.testing.assert_close(mdae.xhat(y, sigma), spread**2 * p / (1 + spread**2 * p) * ybar)
    torch.testing.assert_close(mdae.xhat(y, LEVELS), spread**2 / (spread**2 + effective(LEVELS) ** 2) * pool(y, LEVELS).ybar)


class Recorder(nn.Module):
    """Keeps what a backbone is given, and returns what it is told."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        self.z, self.c = z, c
        return self.out


@pytest.mark.parametrize("spread", [1.0, 0.4])
def test_the_backbone_sees_unit_variance_and_its_target_has_unit_variance(spread: float) -> None:
    """Of x ~ N(0, 1): E z^2 = 1, the mean over a datum, and F = (x - skip ybar) / scale with E F^2 = 1; checked as quadratic forms."""
    sigma = levels_of(S)
    y = normal(B, M, *S)
    ybar, p = pool(y, sigma)
    net = Recorder(torch.ones(B, *S, dtype=torch.float64))
    out = MDAE(net, spread=spread).xhat(y, sigma)
    gain = torch.where(p > 0, net.z / ybar.where(p > 0, 1.0), 0.0)
    measured = (p > 0).flatten(1).any(1).double()
    torch.testing.assert_close((gain.square() * (1 + 1 / p.where(p > 0, 1.0))).flatten(1).mean(1), measured)
    wiener = (p / (1 + p)).expand(gain.shape).flatten(1)
    torch.testing.assert_close(gain.flatten(1) * wiener[:, :1], gain.flatten(1)[:, :1] * wiener)
    torch.testing.assert_close(net.c.expand(B, *S), -torch.log(torch.sqrt(1 / (1 + p))))
    net.out = torch.zeros(B, *S, dtype=torch.float64)
    skip = torch.where(p > 0, MDAE(net, spread=spread).xhat(y, sigma) / torch.where(p > 0, ybar, 1.0), 0.0)
    scale = out - skip * ybar
    torch.testing.assert_close(scale.square(), (1 - skip).square() + torch.where(p > 0, skip.square() / p, 0.0))


def test_the_loss_of_an_mdae_is_the_weighted_error_and_starts_at_one() -> None:
    mdae, count = MDAE(MLP((1,), width=4, blocks=1).double()), 20_000
    x = normal(count, 1)
    for tau in (0.1, 1.0, 10.0):
        y = (x + tau * normal(count, 1, seed=1))[:, None]
        sigma = torch.tensor([tau], dtype=torch.float64)
        loss = mdae.loss(x, y, sigma)
        torch.testing.assert_close(loss, ((1 + tau**-2) * (y[:, 0] / (1 + tau**2) - x).square())[:, 0])
        assert loss.mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / count))


def test_v_of_an_mdae_is_the_jacobian_of_xhat_by_finite_differences() -> None:
    mdae, y = MDAE(randomised(MLP((3,), width=8, blocks=2), scale=1.0)), normal(B, M, 3)
    tau2, h = effective(LEVELS) ** 2, 1e-5
    columns = [(mdae.xhat(y + h * e, LEVELS) - mdae.xhat(y - h * e, LEVELS)) / (2 * h) for e in torch.eye(3, dtype=torch.float64)]
    jacobian = torch.stack(columns, -1).detach()
    assert (jacobian - jacobian.mT).abs().max() > 1e-3, "an untrained Jacobian is not symmetric, so the transpose shows"
    torch.testing.assert_close(matrix(mdae.moments(y, LEVELS).V, B, (3,)), tau2 * jacobian.mT, rtol=1e-6, atol=1e-8)


@nets
@shapes
@pytest.mark.parametrize("maps", [False, True])
def test_a_network_treats_each_datum_alone(net: str, shape: tuple[int, ...], maps: bool) -> None:
    mdae, y = MDAE(randomised(NETS[net](shape), scale=1.0)), normal(B, M, *shape)
    sigma = levels_of(shape) if maps else 0.2 + uniform(B, M)
    whole = mdae.xhat(y, sigma)
    for i in range(B):
        torch.testing.assert_close(mdae.xhat(y[i : i + 1], sigma[i : i + 1])[0], whole[i])
    assert whole.shape == (B, *shape) and (whole - pool(y, sigma).ybar).abs().max() > 1e-2


CONSTANT = [("mlp", (7, 5)), ("unet", (8, 12)), ("unet", (3, 8, 8)), ("unet, patch 1, three stages", (8, 12)), ("unet", (7, 5))]


@pytest.mark.parametrize("net, shape", CONSTANT)
def test_a_constant_map_of_levels_is_a_level(net: str, shape: tuple[int, ...]) -> None:
    mdae, y, sigma = MDAE(randomised(NETS[net](shape), scale=1.0)), normal(B, M, *shape), 0.2 + uniform(B, M)
    maps = sigma[(...,) + (None,) * len(shape)].expand(y.shape)
    torch.testing.assert_close(mdae.xhat(y, maps), mdae.xhat(y, sigma))


def test_a_network_tells_one_level_from_another() -> None:
    for net in NETS:
        mdae, y = MDAE(randomised(NETS[net]((8, 8)), scale=1.0)), normal(1, 1, 8, 8)
        F = [mdae.backbone(y[:, 0], torch.full((1, 1, 1), c, dtype=torch.float64)) for c in (0.1, 3.0)]
        assert (F[0] - F[1]).abs().max() > 1e-3


def test_a_trained_mdae_approaches_the_bayes_estimator_at_every_level() -> None:
    """Excess risk over the closed form is a few percent of what the untrained network has."""
    generator = torch.Generator().manual_seed(0)
    cov = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    exact = GaussianDenoiser.from_covariance(torch.zeros(2), cov)
    torch.manual_seed(0)
    mdae = MDAE(MLP((2,), width=32, blocks=1))
    optimiser = torch.optim.Adam(mdae.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 400)

    def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
        x = exact.sample(count, generator)
        tau = (1.3 * torch.randn(count, 1, 1, generator=generator) - 0.3).exp()
        return x, x[:, None] + tau * torch.randn(count, 1, 2, generator=generator), tau

    def excess() -> float:
        _, y, tau = batch(4000)
        with torch.no_grad():
            return float(((1 + tau[:, 0] ** -2) * (mdae.xhat(y, tau) - exact.xhat(y, tau)).square()).mean())

    generator.manual_seed(1)
    before = excess()
    for _ in range(400):
        optimiser.zero_grad()
        mdae.loss(*batch(256)).mean().backward()
        optimiser.step()
        schedule.step()
    generator.manual_seed(1)
    assert excess() < 0.03 * before


def test_the_paper_s_mdae_scores_each_measurement_with_its_own_output_and_takes_no_other_levels() -> None:
    nu, y = normal(B, M, 2), normal(B, M, 2, seed=1)
    net = Recorder(nu)
    mdae = ChannelMDAE(net, LEVELS)
    torch.testing.assert_close(mdae.score(y, LEVELS), (nu - y) / LEVELS[:, None].square())
    torch.testing.assert_close(mdae.xhat(y, LEVELS), pool(nu, LEVELS).ybar)
    torch.testing.assert_close(net.z, y / torch.sqrt(1 + LEVELS[:, None].square()))
    torch.testing.assert_close(net.c.flatten(), torch.log1p(effective(LEVELS) ** -2)[None] / 2)
    torch.testing.assert_close(mdae.loss(y[:, 0], y, LEVELS), (nu - y[:, :1]).square().mean((1, 2)))
    with pytest.raises(ValueError, match="made for levels"):
        mdae.xhat(y, torch.full((M,), SIGMA, dtype=torch.float64))


def test_a_u_net_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="use the MLP"):
        UNet((5,))
