"""MDAE, MEM2 and MUVB: the score is the energy's gradient, the Jacobian is whole, unequal levels, and guidance runs on all of them."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from emdiff.denoise import GaussianDenoiser
from emdiff.errors import UsageError
from emdiff.guidance import PosteriorDenoiser
from emdiff.mdae import ChannelMDAE
from emdiff.measurement import align, measure, pool
from emdiff.mem import MEM
from emdiff.models import build_model, fixed_levels
from emdiff.muvb import MUVB, kl
from emdiff.precision import set_precision
from emdiff.prior import Prior, build_network, load_prior, save_prior
from emdiff.scale import Scale
from observers import Identity

LEVELS = [0.75, 1.25, 0.5]
SIGMA = torch.tensor(LEVELS, dtype=torch.float64)
NET = {"mdae": {"kind": "mlp", "width": 16, "blocks": 1}, "mem": {"kind": "mlp", "width": 16, "blocks": 1},
       "muvb": {"kind": "mlp", "latent": 3, "width": 16}}  # fmt: skip
CASES = [(kind, view, meta) for kind in ("mem", "muvb") for view in ("pooled", "channels") for meta in (None, {"width": 16})]


def make(kind, view="pooled", meta=None, shape=(3,), net=None):
    """A denoiser in float64 whose weights are all away from 0."""
    torch.manual_seed(0)
    model = build_model(shape, kind, net or NET[kind], LEVELS if view == "channels" else None, meta).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.25)
    return model


def measured(batch=2, shape=(3,), seed=1):
    draw = torch.Generator().manual_seed(seed)
    return measure(torch.randn(batch, *shape, generator=draw, dtype=torch.float64), SIGMA, draw)


def slope(f, y, step=1e-5):
    """Central differences of f: (B, M, d) -> (B,) in each of the M d entries of a single datum."""
    out = torch.zeros_like(y)
    for i in range(y.numel()):
        e = torch.zeros_like(y).flatten()
        e[i] = step
        e = e.reshape(y.shape)
        out.view(-1)[i] = (f(y + e) - f(y - e)).sum() / (2 * step)
    return out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind,view,meta", CASES)
def test_the_score_is_minus_the_gradient_of_the_energy(kind, view, meta, training):
    """By finite differences; in train mode with the latent variable's draws held."""
    model, y = make(kind, view, meta).train(training), measured(1)

    def energy(y):
        torch.manual_seed(5)
        return model.energy(y, SIGMA).detach()

    torch.manual_seed(5)
    torch.testing.assert_close(model.score(y, SIGMA).detach(), -slope(energy, y), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind,view,meta", [("mdae", "pooled", None), ("mdae", "channels", None), *CASES])
def test_moments_hold_the_whole_jacobian_of_xhat(kind, view, meta):
    """V u = mean_m sigma_m^2 (d xhat / d y_m)^T u, against finite differences of xhat in eval mode."""
    model, y, u = make(kind, view, meta).eval(), measured(1), torch.tensor([[0.3, -1.0, 0.7]], dtype=torch.float64)
    found = model.moments(y, SIGMA)
    gradient = slope(lambda y: (model.xhat(y, SIGMA) * u).sum(-1).detach(), y)
    expected = (align(SIGMA, y).square() * gradient).mean(1)
    torch.testing.assert_close(found.V(u), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.xhat, model.xhat(y, SIGMA))
    assert not torch.allclose(found.V(u), u, rtol=1e-2)


@pytest.mark.parametrize("kind,view,meta", CASES)
def test_the_jacobian_of_a_gradient_is_symmetric(kind, view, meta):
    """As that of E[x | y] is and that of an MDAE is not: <w, V u> = <u, V w> for the score's Jacobian in y."""
    model, y = make(kind, view, meta).eval(), measured(1)
    full = torch.autograd.functional.jacobian(lambda y: model.score(y, SIGMA), y).reshape(9, 9)
    torch.testing.assert_close(full, full.T, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["mem", "muvb"])
def test_pooled_energies_give_one_estimate_for_all_measurements(kind):
    """Eq. 8 is exact: y_m - sigma_m^2 grad_m f is the same for every m, though the levels differ."""
    model, y = make(kind).eval(), measured(4).requires_grad_(True)
    (g,) = torch.autograd.grad(model.energy(y, SIGMA).sum(), y)
    estimates = y - align(SIGMA, y).square() * g
    torch.testing.assert_close(estimates, model.xhat(y, SIGMA)[:, None].expand(y.shape), rtol=1e-9, atol=1e-10)


def test_mem_of_a_gaussian_has_its_closed_form():
    """With nu = xhat = K ybar of N(0, S): xhat_mem = nu + K^T (ybar - nu), since f = |ybar - K ybar|^2 / (2 tau^2); with detached nu it would
    be nu.
    """
    S = torch.tensor([[1.0, 0.4], [0.4, 0.7]], dtype=torch.float64)
    inner = GaussianDenoiser.from_covariance(torch.zeros(2, dtype=torch.float64), S)
    y, tau2 = measured(5, (2,)), 1 / SIGMA.pow(-2).sum()
    K, ybar = torch.linalg.solve(S + tau2 * torch.eye(2, dtype=torch.float64), S), pool(y, SIGMA).ybar
    torch.testing.assert_close(MEM(inner).xhat(y, SIGMA), ybar @ (2 * K - K @ K), rtol=1e-8, atol=1e-10)


class ExactEncoder(torch.nn.Module):
    """q(z | y) of x = W z + s noise, W with orthogonal columns, undone what `MUVB.posterior` does: w^(1/2) mean, w log std, and its bounds."""

    def __init__(self, W, s):
        super().__init__()
        self.W, self.s = W, s

    def forward(self, z, c):
        tau2 = 1 / torch.expm1(2 * c.flatten(1))
        y, w, noise = z.flatten(1) * (1 + tau2).sqrt(), 1 / (1 + tau2), self.s**2 + tau2
        variance = 1 / (1 + self.W.square().sum(0) / noise)
        log_std = variance.log() / 2
        log_std = (log_std / (1 - (log_std / 5).square()).sqrt() / w).expand(len(y), -1)
        mean = 3 * torch.sinh(variance * (y @ self.W) / noise / 3)
        return torch.cat([mean / w.sqrt(), log_std], dim=1)


class Loadings(torch.nn.Module):
    def __init__(self, W):
        super().__init__()
        self.W = W

    def forward(self, z, c):
        return (z @ self.W.T)[:, None]


@pytest.mark.parametrize("spread", [0.2, 0.6])
def test_muvb_of_a_gaussian_has_its_closed_form(spread):
    """With the true q, f is -log N(0, W W^T + (spread^2 + tau^2) I) + const, so xhat is the Bayes estimator, at every level, though eps are few."""
    W = torch.tensor([[0.9, 0.3], [0.6, -0.45], [0.0, 0.5]], dtype=torch.float64)
    model = MUVB(ExactEncoder(W, spread), Loadings(W), 2, spread=spread).double().eval()
    exact = GaussianDenoiser(torch.zeros(3, dtype=torch.float64), W, torch.full((3,), spread**2, dtype=torch.float64))
    for sigma in (SIGMA, 0.05 * SIGMA, 10 * SIGMA):
        y = measured(4)
        torch.testing.assert_close(model.xhat(y, sigma), exact.xhat(y, sigma), rtol=1e-9, atol=1e-10)


class Constant(torch.nn.Module):
    """An encoder that says the same of all data."""

    def __init__(self, said):
        super().__init__()
        self.said = said

    def forward(self, z, c):
        return self.said.expand(len(z), -1)


@pytest.mark.parametrize("training", [False, True])
def test_the_free_energy_is_an_expectation_over_q(training):
    """A linear decoder and q = N(m, diag(s^2)): E |y - W z|^2 = |y - W m|^2 + sum_ij W_ij^2 s_j^2, in training over fresh draws for every datum; in
    eval mode over the fixed ones, whose second moments stand for 1."""
    W, said = torch.tensor([[0.9, 0.3], [0.6, -0.45], [0.0, 0.5]], dtype=torch.float64), torch.tensor([0.02, -0.03, -1.2, -0.4], dtype=torch.float64)
    model = MUVB(Constant(said), Loadings(W), 2, levels=SIGMA[:1], draws=4).double().train(training)
    y, sigma = torch.full((20_000 if training else 2, 1, 3), 0.7, dtype=torch.float64), SIGMA[:1]
    mean, std = said[:2], (said[2:] / (1 + (said[2:] / 5).square()).sqrt()).exp()
    second = torch.eye(2, dtype=torch.float64) if training else (model.eps[:, 0].T @ model.eps[:, 0]) / 4
    spread = torch.trace(W @ torch.diag(std) @ second @ torch.diag(std) @ W.T)
    due = ((y[0, 0] - W @ mean).square().sum() + spread) / (2 * sigma[0] ** 2) + kl(mean[None], std.log()[None])[0]
    torch.manual_seed(0)
    found = model.energy(y, sigma)
    assert float(found.mean()) == pytest.approx(float(due), rel=0.01 if training else 1e-4)  # the mean of q is 1e-5 off what was said
    assert (float(found.std()) > 0.1) == training


def test_no_posterior_of_latents_is_much_wider_than_their_prior_or_far_out_in_it():
    """Mean and log std are as the encoder says near 0, and twice differentiable there; beyond, log std is held from -5 to 1/2, and the mean times its
    slope, which is that of the KL, below 3; a claim far beyond has a slope still."""
    said = torch.tensor([-1e-3, -1e6, 1e6, 1e-3, -1e6, 1e6], dtype=torch.float64, requires_grad=True)
    model = MUVB(Constant(said), Loadings(torch.eye(3)), 3, levels=SIGMA)
    mean, log_std = model.posterior(measured(1), SIGMA)
    near, low, high = mean[0].tolist()
    assert near == pytest.approx(-1e-3) and 20 < high == -low < 45
    torch.testing.assert_close(log_std[0], torch.tensor([1e-3, -5.0, 0.5], dtype=torch.float64), rtol=1e-5, atol=0)
    (slope,) = torch.autograd.grad(mean.square().sum() / 2, said)
    assert slope.abs().max() < 3 and slope[1] < -1e-5 and slope[2] > 1e-5

    def bounded(said):
        model.encoder.said = said
        return model.posterior(measured(1), SIGMA)

    at = torch.tensor([0.4, 0.0, -0.3, -0.7, 0.0, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bounded, at) and torch.autograd.gradgradcheck(bounded, at)


@pytest.mark.parametrize("view", ["channels", "pooled"])
def test_muvb_of_fixed_levels_runs_in_bfloat16(view, monkeypatch):
    """Where the hardware has it. Estimates differ by the rounding of that; at all levels, fine ones among them, it stays in float32."""
    net, levels = {"kind": "resnet", "widths": (8, 16), "latent": 8}, torch.tensor([3.0, 3.0])
    model = build_model((8, 8), "muvb", net, levels.tolist() if view == "channels" else None, {"widths": (8, 16)}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    y = 3 * torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = model.xhat(y, levels).detach()
    monkeypatch.setattr("emdiff.precision.has_bfloat16", lambda device: False)
    assert torch.equal(set_precision(model, "cpu").xhat(y, levels), exact)
    monkeypatch.setattr("emdiff.precision.has_bfloat16", lambda device: True)  # others compute in it too, slowly
    found = set_precision(model, "cpu").xhat(y, levels).detach()
    error = float(((found - exact).square().mean() / exact.var()).sqrt())
    assert found.dtype == torch.float32 and (1e-3 < error < 0.05 if view == "channels" else error == 0)


@pytest.mark.parametrize("kind, written, read", [("muvb", 2, False), ("muvb", 3, True), ("mem", 2, True), ("mem", None, True)])
def test_a_prior_that_this_version_would_compute_otherwise_is_refused(kind, written, read, tmp_path):
    """Weights of a MUVB under other bounds would be another energy; those of other kinds are what they were."""
    network = {"kind": kind, "net": NET[kind], "levels": LEVELS, "metaencoder": None, "spectral": False}
    path = tmp_path / "prior.safetensors"
    save_prior(path, Prior(build_network((3,), **network), Scale(0.0, 1.0), (3,), 0.4, network))
    with safe_open(path, "pt") as file:
        about, weights = json.loads(file.metadata()["emdiff"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = {k: v for k, v in about.items() if k != "format"} | ({"format": written} if written else {})
    save_file(weights, path, {"emdiff": json.dumps(about)})
    if read:
        assert load_prior(path).network == network
    else:
        with pytest.raises(UsageError, match="train it again"):
            load_prior(path)


def test_what_was_not_measured_moves_no_estimate():
    """A measurement of infinite level adds nothing, and where no entry was measured xhat is finite and does not depend on y."""
    for kind in ("mem", "muvb"):
        model, y = make(kind).eval(), measured(2)
        more = torch.cat([y, torch.full_like(y[:, :1], 7.0)], dim=1)
        torch.testing.assert_close(model.xhat(more, torch.cat([SIGMA, torch.tensor([math.inf])])), model.xhat(y, SIGMA))
        nothing = torch.tensor([math.inf], dtype=torch.float64)
        blind = model.xhat(y[:, :1], nothing)
        torch.testing.assert_close(blind, model.xhat(y[:, :1] + 100, nothing))


def test_batches_do_not_mix_and_inference_mode_is_allowed():
    for kind, view, meta in CASES:
        model, y = make(kind, view, meta).eval(), measured(4)
        with torch.inference_mode():
            together = model.xhat(y.clone(), SIGMA.clone())
        alone = torch.cat([model.xhat(y[i : i + 1], SIGMA) for i in range(4)])
        torch.testing.assert_close(together.clone(), alone.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind,view,meta", [("mdae", "channels", None), *CASES])
def test_guidance_runs_on_every_parametrisation(kind, view, meta):
    """Moment matching with converged CG solves (Sigma + V) a = obs - xhat with this model's own V, dense by one product per entry."""
    model, y = make(kind, view, meta).eval(), measured(1)
    obs, noise = torch.tensor([[0.5, -0.2, 1.0]], dtype=torch.float64), 2.0
    found = model.moments(y, SIGMA)
    V = torch.stack([found.V(e[None])[0] for e in torch.eye(3, dtype=torch.float64)]).T
    exact = found.xhat + torch.linalg.solve(V + noise**2 * torch.eye(3, dtype=torch.float64), (obs - found.xhat).T).T @ V.T
    guided = PosteriorDenoiser(model, Identity((3,), torch.tensor(noise, dtype=torch.float64)), obs, "gmres", 3, 1e-12)
    torch.testing.assert_close(guided.xhat(y, SIGMA), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["mem", "muvb"])
def test_training_reaches_the_weights_through_the_score(kind):
    """Every parameter but the constants of an energy has a gradient, which finite differences confirm along a random direction."""
    model, y = make(kind, meta={"width": 16}).eval(), measured(3)
    target = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    model.loss(target, y, SIGMA).mean().backward()
    direction = [torch.randn_like(p) for p in model.parameters()]
    slope_found = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), direction) if p.grad is not None)

    def at(step):
        with torch.no_grad():
            [p.add_(d, alpha=step) for p, d in zip(model.parameters(), direction)]
        value = float(model.loss(target, y, SIGMA).mean().detach())
        with torch.no_grad():
            [p.sub_(d, alpha=step) for p, d in zip(model.parameters(), direction)]
        return value

    assert slope_found == pytest.approx((at(1e-6) - at(-1e-6)) / 2e-6, rel=1e-4)


def test_kl_against_torch():
    mean, log_std = torch.randn(4, 3, dtype=torch.float64), 0.3 * torch.randn(4, 3, dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, log_std.exp()), normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1)
    torch.testing.assert_close(kl(mean, log_std), expected)


def test_other_levels_than_its_own_are_refused():
    for kind in ("mdae", "mem", "muvb"):
        model = make(kind, "channels")
        assert fixed_levels(model).tolist() == LEVELS and fixed_levels(make(kind)) is None
        with pytest.raises(ValueError, match="made for levels"):
            model.xhat(measured(), 2 * SIGMA)


@pytest.mark.parametrize(
    "kind,net,meta",
    [
        ("mdae", {"kind": "u2net", "width": 1 / 32}, None),
        ("mem", {"kind": "unet", "widths": [4, 8], "patch": 1}, {"widths": [4, 8], "blocks": [1, 1]}),
        ("mem", {"kind": "u2net", "width": 1 / 32}, None),
        ("muvb", {"kind": "resnet", "latent": 4, "widths": [4, 8], "blocks": [1, 1]}, {"widths": [4, 8], "blocks": [1, 1]}),
    ],
)
@pytest.mark.parametrize("view", ["pooled", "channels"])
def test_image_networks_have_scores_that_are_gradients(kind, net, meta, view):
    model, y = make(kind, view, meta, (1, 9, 8), net).eval(), measured(1, (1, 9, 8))
    u = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    if kind == "mdae":
        assert isinstance(model, ChannelMDAE) == (view == "channels")
        along = (model.xhat(y + 1e-5 * u, SIGMA) - model.xhat(y - 1e-5 * u, SIGMA)) / 2e-5
        exact = torch.autograd.functional.jvp(lambda y: model.xhat(y, SIGMA), y, u)[1]
        torch.testing.assert_close(exact, along.detach(), rtol=1e-5, atol=1e-8)
        return
    along = (model.energy(y + 1e-5 * u, SIGMA) - model.energy(y - 1e-5 * u, SIGMA)).detach() / 2e-5
    torch.testing.assert_close(-(model.score(y, SIGMA).detach() * u).flatten(1).sum(1), along, rtol=1e-6, atol=1e-8)


def test_unknown_combinations_are_refused():
    for shape, kind, net in [((8, 8), "vae", {"kind": "mlp"}), ((8, 8), "mem", {"kind": "resnet"}), ((5,), "mdae", {"kind": "unet"}),
                             ((5,), "muvb", {"kind": "resnet"}), ((8, 8), "muvb", {"kind": "unet"})]:  # fmt: skip
        with pytest.raises(ValueError, match="choose"):
            build_model(shape, kind, net)
