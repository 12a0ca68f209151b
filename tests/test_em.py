r"""EM on Gaussians: pairs have the exact EM update as their regression, over-relaxed jumps the predicted smaller one; chains keep the posterior."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exact import UnitNoise, covariance, dense, matrix, noise_variance, normal, observer, uniform
from torch import Tensor

from emdiff.denoise import Denoiser, GaussianDenoiser
from emdiff.em import BLIND, RETRIES, Draws, Walk, choose_guidance, e_step, escaped, posterior, walk_levels
from emdiff.gaussian import condition
from emdiff.guidance import FusedPosterior, PosteriorDenoiser
from emdiff.observations import Observations
from emdiff.pairs import PairLoss
from emdiff.prior import TAU_FIRST
from emdiff.relax import over_relaxed
from observers import Identity, Mask, Observer, Projection

B, d, TAU = 5, 3, 0.4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)  # apart from the seeds of `normal` and `uniform`


def centred(cov: Tensor) -> GaussianDenoiser:
    return GaussianDenoiser.from_covariance(torch.zeros(len(cov), dtype=torch.float64), cov)


def scalar(s: float) -> GaussianDenoiser:
    return centred(torch.full((1, 1), s, dtype=torch.float64))


def denoiser(prior: Denoiser, made: Observer, obs: Tensor) -> Denoiser:
    """Exact guidance: fused where it applies, else CG to the end."""
    direct = made.as_measurement(obs)
    return PosteriorDenoiser(prior, made, obs, "cg", 60, 1e-13) if direct is None else FusedPosterior(prior, *direct)


class Joint:
    """Population covariances of (x, y, xhat) when obs is drawn from the truth and x | obs from the prior; averages over data with own operators.

    The jump is xhat = Ky y + Ko obs, its coefficients read off the library; all else is dense algebra.
    """

    def __init__(self, prior: GaussianDenoiser, truth: Tensor, made: Observer, tau: float) -> None:
        S, sigma, none = prior.covariance(), torch.tensor([tau], dtype=torch.float64), torch.zeros(B, *made.obs_shape, dtype=torch.float64)
        A, R = dense(made, B), torch.diag_embed(noise_variance(made, B))
        R = torch.where(made.observed().expand(none.shape).flatten(1)[..., None], R, 1e12 * R)  # never observed, whatever its stated noise
        K = S @ A.mT @ torch.linalg.inv(A @ S @ A.mT + R)
        Ky = matrix(lambda e: denoiser(prior, made, none).xhat(e[:, None], sigma), B, (d,))
        Ko = matrix(lambda e: denoiser(prior, made, e).xhat(torch.zeros(B, 1, d, dtype=torch.float64), sigma), B, made.obs_shape)
        C_obs = A @ truth @ A.mT + R
        Ko = Ko * made.observed().expand(none.shape).flatten(1)[:, None, :]
        V = S - K @ A @ S
        x = K @ C_obs @ K.mT + V
        y, y_obs = x + tau**2 * torch.eye(d, dtype=torch.float64), K @ C_obs
        V_last = torch.linalg.inv(torch.linalg.inv(V) + torch.eye(d, dtype=torch.float64) / tau**2)
        cross = Ky @ y_obs @ Ko.mT
        self.em, self.y, self.V_last = x.mean(0), y.mean(0), V_last.mean(0)
        self.xhat_y = (Ky @ y + Ko @ y_obs.mT).mean(0)
        self.xhat = (Ky @ y @ Ky.mT + Ko @ C_obs @ Ko.mT + cross + cross.mT).mean(0)


def implied(slope: Tensor, tau: float) -> Tensor:
    """The prior covariance whose Bayes estimator is slope y_tau: slope = S (S + tau^2)^-1."""
    return tau**2 * torch.linalg.solve(torch.eye(len(slope), dtype=torch.float64) - slope, slope)


OBSERVERS = pytest.mark.parametrize("name", ["identity", "mask", "projection"])


@OBSERVERS
@pytest.mark.parametrize("level", [TAU, 0.7, 5.0])
def test_regressing_jumps_on_measurements_is_the_exact_em_update_at_every_level(name: str, level: float) -> None:
    joint = Joint(centred(covariance(d, 1)), covariance(d, 2), observer(name, B, (d,), rows=2), TAU)
    y_level = joint.y + (level**2 - TAU**2) * torch.eye(d, dtype=torch.float64)
    S = implied(joint.xhat_y @ torch.linalg.inv(y_level), level)
    torch.testing.assert_close(S, joint.em, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(S, joint.y - TAU**2 * torch.eye(d, dtype=torch.float64), rtol=1e-6, atol=1e-7)


@OBSERVERS
def test_jumps_taken_for_samples_lose_their_posterior_covariance(name: str) -> None:
    """Cov[xhat] = EM update - V[x | y, obs], smaller in every direction."""
    joint = Joint(centred(covariance(d, 1)), covariance(d, 2), observer(name, B, (d,), rows=2), TAU)
    torch.testing.assert_close(joint.xhat, joint.em - joint.V_last, rtol=1e-6, atol=1e-7)
    assert torch.linalg.eigvalsh(joint.em - joint.xhat)[0] > 0.01


def test_the_truth_is_the_fixed_point_of_pairs_and_not_of_over_relaxed_jumps() -> None:
    truth = covariance(d, 2)
    for name in ("identity", "mask", "projection"):
        joint = Joint(centred(truth), truth, observer(name, B, (d,), rows=2), TAU)
        torch.testing.assert_close(joint.em, truth, rtol=1e-6, atol=1e-7)
        assert torch.linalg.eigvalsh(truth - joint.xhat)[0] > 0.01


def test_exact_em_is_slow_and_over_relaxed_em_is_not_where_nothing_varies() -> None:
    """The two rates of em's docstring, for a direction of true variance 0 under noise n."""
    n, s, tau = 0.7, 0.09, 0.25
    made, zero = Identity((d,), torch.tensor(n, dtype=torch.float64)), torch.zeros(d, d, dtype=torch.float64)
    joint = Joint(centred(s * torch.eye(d, dtype=torch.float64)), zero, made, tau)
    em = s * (1 - (s / (s + n**2)) ** 2)
    assert joint.em[0, 0].item() == pytest.approx(em)
    assert joint.xhat[0, 0].item() == pytest.approx(em**2 / (em + tau**2), rel=0.15)


def drawn(made: Observer, truth: GaussianDenoiser, count: int) -> Observations:
    return Observations(made.simulate(truth.sample(count, generator(100)), generator(101)), made)


def spread(cov: Tensor, count: int) -> Tensor:
    """Standard error of each entry of a sample covariance of normal vectors."""
    return torch.sqrt((cov.square() + torch.outer(cov.diagonal(), cov.diagonal())) / count)


def second_moment(a: Tensor) -> Tensor:
    return a.T @ a / len(a)


def test_em_by_walks_stays_at_the_truth_with_pairs_and_shrinks_as_predicted_without() -> None:
    """1-D: the maximum-likelihood variance of these observations is Var[obs] - n^2, and EM does not leave it."""
    count, n = 20_000, 0.7
    data = drawn(Identity((1,), torch.tensor(n, dtype=torch.float64)), scalar(1.0), count)
    s = float(second_moment(data.obs)) - n**2
    walk, error = Walk(tau_last=TAU, batch=count), 5 * math.sqrt(2 / count) * (s + TAU**2)
    prior = scalar(s)
    for k in range(3):
        draws = e_step(prior, data, None, walk, generator(k))
        assert draws.tau == pytest.approx(TAU) and draws.restarted == 0 and not draws.kept.any()
        prior = scalar(float(second_moment(draws.y)) - TAU**2)
        assert abs(prior.covariance().item() - s) < error
    relaxed = over_relaxed(e_step(scalar(s), data, None, walk, generator()))
    lost = 1 / (1 / s + 1 / n**2 + 1 / TAU**2)
    assert relaxed.tau == 0 and torch.equal(relaxed.y, relaxed.x) and lost > 1.5 * error
    assert abs(float(second_moment(relaxed.y)) - (s - lost)) < error


def test_em_by_walks_with_masks_stays_at_the_truth() -> None:
    """3-D, per-datum noise, 40 % missing: the implied covariance stays within its Monte Carlo error over three iterations."""
    count, truth = 6000, covariance(d, 2)
    made = Mask((d,), 0.3 + uniform(count, seed=4), uniform(count, d, seed=5) < 0.6)
    data, walk = drawn(made, centred(truth), count), Walk(tau_last=TAU, batch=count)
    S, error = truth, 5 * spread(truth + TAU**2 * torch.eye(d, dtype=torch.float64), count)
    for k in range(3):
        draws = e_step(centred(S), data, None, walk, generator(k))
        S = second_moment(draws.y) - TAU**2 * torch.eye(d, dtype=torch.float64)
        assert ((S - truth).abs() < 1.5 * error).all()


def test_em_by_walks_approaches_the_truth_from_elsewhere_as_exact_em_does() -> None:
    count, n, s = 20_000, 0.7, 3.0
    data = drawn(Identity((1,), torch.tensor(n, dtype=torch.float64)), scalar(1.0), count)
    total = float(second_moment(data.obs))
    for k in range(3):
        gain = s / (s + n**2)
        expected = gain**2 * total + gain * n**2
        y = e_step(scalar(s), data, None, Walk(tau_last=TAU, batch=count), generator(k)).y
        s = float(second_moment(y)) - TAU**2
        assert s == pytest.approx(expected, abs=5 * math.sqrt(2 / count) * (expected + TAU**2))


@pytest.mark.parametrize("batch", [64, 1000])
def test_the_law_of_an_e_step_does_not_depend_on_its_batches(batch: int) -> None:
    count, truth = 1000, covariance(d, 2)
    made = Mask((d,), 0.3 + uniform(count, seed=4), uniform(count, d, seed=5) < 0.6)
    data, done = drawn(made, centred(truth), count), []
    draws = e_step(centred(truth), data, None, Walk(tau_last=TAU, batch=batch), generator(), progress=done.append)
    assert draws.y.shape == draws.x.shape == (count, d) and done[-1] == count and len(done) == math.ceil(count / batch)
    A, R = dense(made, count), torch.diag_embed(noise_variance(made, count))
    K = truth @ A.mT @ torch.linalg.inv(A @ truth @ A.mT + R)
    V = truth - K @ A @ truth + TAU**2 * torch.eye(d, dtype=torch.float64)
    gap = draws.y - torch.einsum("bde,be->bd", K, data.obs)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(V), gap[..., None], upper=False)[..., 0]
    assert (white.mean(0).abs() < 5 / math.sqrt(count)).all()
    assert ((second_moment(white) - torch.eye(d)).abs() < 5 * math.sqrt(2 / count) + 0.02).all()


def returned(monkeypatch: pytest.MonkeyPatch, prior: GaussianDenoiser, made: Observer, obs: Tensor, chains: Tensor, walk: Walk) -> Tensor:
    """Where an E-step takes chains, without noise in the rows given and with one unit of noise in each row appended."""
    noises = walk.levels * d
    rows = len(chains) + noises
    chains = torch.cat([chains, torch.zeros(noises, d, dtype=torch.float64)])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", UnitNoise(rows - noises))
        return e_step(prior, Observations(obs.expand(rows, -1), made), chains, walk, generator()).y


def test_persistent_chains_keep_the_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sampling: y' = F y + G eps with P = F P F^T + G G^T, P = V[x | obs] + tau_last^2 I, and the posterior mean stays where it is."""
    S = covariance(d, 2)
    made = Projection((d,), torch.tensor(0.5, dtype=torch.float64), normal(1, 2, d, seed=5))
    A = made.matrix[0]
    K = S @ A.T @ torch.linalg.inv(A @ S @ A.T + 0.25 * torch.eye(2, dtype=torch.float64))
    P = S - K @ A @ S + 0.01 * torch.eye(d, dtype=torch.float64)
    errors = []
    for count in (8, 16, 32):
        walk = Walk(guidance="cg", tau_first=0.8, tau_last=0.1, levels=count, iterations=12, tolerance=1e-10, batch=1000)
        ends = returned(monkeypatch, centred(S), made, torch.zeros(1, 2, dtype=torch.float64), torch.eye(d, dtype=torch.float64), walk)
        F, G = ends[:d].T, ends[d:].T
        errors.append(float((F @ P @ F.T + G @ G.T - P).norm() / P.norm()))
        assert torch.linalg.matrix_norm(F, 2) < 1
    assert errors[-1] < 0.01 and errors[0] / errors[1] > 2.5 and errors[1] / errors[2] > 2.5
    obs = normal(1, 2, seed=6)
    mean = obs @ K.T
    torch.testing.assert_close(returned(monkeypatch, centred(S), made, obs, mean, walk)[:1], mean, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("tau_chains", [None, 0.3])
def test_chains_re_enter_with_the_noise_that_their_level_lacks(monkeypatch: pytest.MonkeyPatch, tau_chains: float | None) -> None:
    """y = chain + (tau_first^2 - tau_chains^2)^(1/2) eps; with x = 0 for certain, the one level after it keeps (tau_last/tau_first)^2 of that."""
    made = Identity((1,), torch.tensor(0.7, dtype=torch.float64))
    data, chains = Observations(torch.zeros(4, 1, dtype=torch.float64), made), torch.zeros(4, 1, dtype=torch.float64)
    chains[3] = 1
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", UnitNoise(1))
        y = e_step(scalar(0.0), data, chains, Walk(tau_first=0.8, tau_last=0.1, levels=2), generator(), tau_chains=tau_chains).y
    keep = (0.1 / 0.8) ** 2
    expected = [0, keep * math.sqrt(0.64 - (tau_chains or 0.1) ** 2), 0.1 * math.sqrt(1 - keep), keep]
    assert y[:, 0].tolist() == pytest.approx(expected)


def test_a_walk_with_a_solver_reports_its_residuals() -> None:
    made, prior = observer("projection", B, (d,)), centred(covariance(d, 2))
    data = drawn(made, prior, B)
    chains = condition(prior, made, data.obs, generator()).x
    exact = e_step(prior, data, chains, Walk(guidance="cg", tau_first=0.8, iterations=12, tolerance=1e-6, batch=2), generator())
    short = e_step(prior, data, chains, Walk(guidance="cg", tau_first=0.8, iterations=1, tolerance=1e-6, batch=2), generator())
    assert exact.residual < 1e-3 < short.residual and short.iterations == 1 < exact.iterations <= 12


class Bursting(Denoiser):
    """A posterior that goes wrong where its observation is above 1."""

    def __init__(self, inner: Denoiser, bad: Tensor, calls: list[float], value: float) -> None:
        super().__init__()
        self.inner, self.bad, self.calls, self.value = inner, bad, calls, value

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        self.calls[0] -= 1
        return torch.where(self.bad & (self.calls[0] >= 0), self.value, self.inner.xhat(y, sigma))


def bursting(monkeypatch: pytest.MonkeyPatch, calls: float, value: float) -> None:
    """Posteriors go wrong for the next so many calls, all together."""
    left, target = [calls], posterior
    monkeypatch.setattr("emdiff.em.posterior", lambda prior, data, walk: Bursting(target(prior, data, walk), data.obs > 1, left, value))


BURST = drawn(Identity((1,), torch.tensor(0.7, dtype=torch.float64)), scalar(1.0), 50)
BAD = BURST.obs[:, 0] > 1
SHORT = Walk(tau_last=TAU, levels=4, batch=20)


@pytest.mark.parametrize("value", [math.nan, 1e9])
def test_a_chain_that_escapes_is_walked_again_and_counted(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    walk = SHORT._replace(batch=50)
    bursting(monkeypatch, walk.levels + 2, value)
    draws = e_step(scalar(1.0), BURST, None, walk, generator(), bound=30.0)
    assert 0 < BAD.sum() == draws.restarted and not draws.kept.any()
    assert draws.x.abs().max() < 10 and draws.y.abs().max() < 10
    calm = e_step(scalar(1.0), BURST, None, walk, generator(), bound=30.0)
    assert torch.equal(draws.x[~BAD], calm.x[~BAD]) and not torch.equal(draws.x[BAD], calm.x[BAD])


@pytest.mark.parametrize("value", [math.nan, 1e9])
def test_a_chain_that_always_escapes_keeps_its_last_sample(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    bursting(monkeypatch, math.inf, value)
    chains = normal(50, 1, seed=8)
    for before, walk in ((None, SHORT), (chains, SHORT), (chains, SHORT._replace(tau_first=2.0))):
        draws = e_step(scalar(1.0), BURST, before, walk, generator(), bound=30.0)
        assert draws.restarted == RETRIES * BAD.sum() and torch.equal(draws.kept, BAD)
        last = torch.zeros_like(chains) if before is None else before
        assert torch.equal(draws.x[BAD], last[BAD]) and torch.equal(draws.y[BAD], last[BAD])
        assert draws.x.abs().max() < 10


def test_samples_beyond_the_bound_and_nan_escape() -> None:
    x = torch.tensor([[0.0, 2.9], [0.0, -3.1], [math.nan, 0.0], [math.inf, 0.0]])
    assert escaped(x, 3.0).tolist() == [False, True, True, True]


def test_infinite_samples_escape_any_bound() -> None:
    assert escaped(torch.tensor([[math.inf], [-math.inf], [math.nan], [1e30]]), math.inf).tolist() == [True, True, True, False]


class Recorder(Denoiser):
    """Keeps what a loss is asked for."""

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError("the loss alone is under test")

    def loss(self, target: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        self.target, self.y, self.sigma = target, y, sigma
        return (target - y[:, 0]).square().flatten(1).mean(1)


def test_levels_are_stratified_log_normal_and_in_range() -> None:
    loss, count = PairLoss(Draws(normal(4, 2), normal(4, 2), 1e-4), 1e-4, centre=-1.5), 200
    for seed in range(3):
        tau = loss.levels(count, generator(seed))
        share = torch.distributions.Normal(-1.5, 1.3).cdf(tau.log())
        inner = torch.arange(1, count - 1)
        assert torch.equal((share * count).floor().sort().values[1:-1], inner.to(share))
        assert not torch.equal(tau, tau.sort().values)
    assert not torch.equal(loss.levels(count, generator(1)), loss.levels(count, generator(2)))
    cut = PairLoss(Draws(normal(4, 2), normal(4, 2), 0.5), 0.5, centre=2.0).levels(count, generator())
    assert cut.min() >= 0.5 and cut.max() == TAU_FIRST


@pytest.mark.parametrize("tau", [0.0, TAU])
def test_pairs_are_measurements_of_the_stated_level(tau: float) -> None:
    """Input minus the walk's last measurement has variance tau'^2 - tau^2; the target is the jump, unchanged."""
    count, net = 20_000, Recorder()
    draws = Draws(normal(100, 2), normal(100, 2, seed=1), tau)
    index = torch.randint(100, (count,), generator=generator())
    loss = PairLoss(draws, TAU)
    value = loss(net, loss.read(index), generator())
    assert value.item() == pytest.approx((net.target - net.y[:, 0]).square().mean().item())
    assert torch.equal(net.target, draws.x[index]) and net.sigma.shape == (count, 1, 1) and net.sigma.min() >= TAU
    added = (net.sigma[:, 0].double().square() - tau**2).clamp(min=0).sqrt()
    use = added[:, 0] > 1e-2
    noise = (net.y[:, 0] - draws.y[index])[use] / added[use]
    assert abs(noise.mean().item()) < 5 / math.sqrt(noise.numel())
    assert abs(noise.square().mean().item() - 1) < 5 * math.sqrt(2 / noise.numel())


def test_maps_of_levels_are_fusions_with_observations_and_never_finer_than_the_walk() -> None:
    count, tau, net = 8000, 0.1, Recorder()
    draws, index = Draws(normal(100, 2), normal(100, 2, seed=1), tau), torch.arange(8000) % 100
    sigma_z = torch.tensor([[0.7, math.inf], [0.05, 1.9]])  # a hidden entry, and a level below the walk's
    loss = PairLoss(draws, tau, sigma_z, centre=1.0)
    loss(net, loss.read(index), generator())
    sigma, y = net.sigma[:, 0].double(), net.y[:, 0]
    assert sigma.min() >= tau and y.isfinite().all() and (y[sigma.isinf()] == 0).all()
    maps = sigma[:, 0] != sigma[:, 1]
    for share, expected in ((maps, 0.8), (maps & sigma.isinf().any(1), 0.1)):
        assert share.double().mean().item() == pytest.approx(expected, abs=5 * math.sqrt(expected / count))
    finest = sigma[:, 0] < tau * 1.001
    first, second = sigma[maps & ~finest], sigma[maps & finest]
    torch.testing.assert_close(first[:, 1] ** -2, first[:, 0] ** -2 - 0.7**-2, rtol=1e-4, atol=1e-5)
    assert (second[:, 1] <= 1.9001).all() and second[:, 1].max() > 1.8
    added = (sigma.square() - tau**2).clamp(min=0).sqrt()
    use = sigma.isfinite() & (added > 1e-2)
    noise = ((y - draws.y[index])[use] / added[use]).square()
    assert abs(noise.mean().item() - 1) < 5 * math.sqrt(2 / len(noise))


def test_guidance_is_fused_where_it_is_exact_and_refused_where_it_is_not() -> None:
    cases = [("identity", "auto", "fused"), ("mask", "auto", "fused"), ("projection", "auto", "cg"), ("mask", "gmres", "gmres")]
    for name, wanted, expected in cases:
        made = observer(name, B, (d,))
        data = Observations(normal(B, *made.obs_shape), made)
        kind, reason = choose_guidance(data, wanted)
        assert kind == expected and reason
        assert isinstance(posterior(scalar(1.0), data, Walk(guidance=kind)), FusedPosterior if kind == "fused" else PosteriorDenoiser)
    with pytest.raises(ValueError, match="projection mixes entries; use cg"):
        choose_guidance(Observations(normal(B, 4), observer("projection", B, (d,))), "fused")


def test_walks_start_where_something_is_left_to_learn() -> None:
    whole = Observations(normal(B, d), Identity((d,), torch.tensor(0.7, dtype=torch.float64)))
    masked = Observations(normal(B, d), observer("mask", B, (d,)))
    persistent = walk_levels(masked, Walk(tau_first=2.0, levels=5))
    np.testing.assert_allclose(persistent, np.geomspace(2.0, 0.1, 5))
    fused = [(tau**-2 + BLIND**-2) ** -0.5 for tau in walk_levels(masked, Walk(levels=5))]
    np.testing.assert_allclose(fused, np.geomspace((TAU_FIRST**-2 + BLIND**-2) ** -0.5, (100 + BLIND**-2) ** -0.5, 5))
    fused = [(tau**-2 + 0.7**-2) ** -0.5 for tau in walk_levels(whole, Walk(levels=5))]
    np.testing.assert_allclose(fused, np.geomspace(0.7, (100 + 0.7**-2) ** -0.5, 6)[1:])
