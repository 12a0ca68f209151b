"""Chains and flows on exact denoisers: stationary laws, Remark 4, collapsed walks, restarts, diagnostics with known answers, constant memory."""

import math

import pytest
import torch

from emdiff.chain import ChainWalk, density, escaped, own_levels, run_chain, start
from emdiff.chain_figures import Autocorrelation, ChainFigures, Thinned, Windows
from emdiff.classifier import WEIGHTS, digit_classifier
from emdiff.denoise import Denoiser, GaussianDenoiser
from emdiff.flow import flow
from emdiff.mdae import MDAE
from emdiff.models import build_model
from emdiff.prior import Prior
from emdiff.scale import Scale

SCALE = Scale(3.0, 0.5)


def gaussian(d=2):
    """x ~ N(3, .25 I) in the units of the data."""
    return Prior(GaussianDenoiser.from_covariance(torch.zeros(d), torch.eye(d)), SCALE, (d,), 0.01, {})


class Keep:
    """Figures that only remember the jumps."""

    def __init__(self):
        self.x = []

    def add(self, x, step, restarted):
        self.x.append(x)


@pytest.mark.parametrize("step", ["sachs", "cheng"])
def test_a_long_chain_has_the_jumps_law_and_the_papers_parameters(step):
    """x ~ N(3, .25): jumps have mean 3 and variance s^2/(s + tau^2) in units of the data; u is the paper's, in the units of the data."""
    prior, keep = gaussian(), Keep()
    chain = ChainWalk((1.0,) * 4, delta=0.3, gamma=1.0, u=1.0, step=step)
    x, restarts = run_chain(prior, chain, 400, 400, torch.Generator().manual_seed(0), keep, count=4000)
    exact = 0.25**2 / (0.25 + 1.0 / 4)
    wide = {"sachs": 1.0, "cheng": 1.0 + 0.3 * 0.5}[step]
    assert restarts == 0 and float(x.mean()) == pytest.approx(3.0, abs=0.02) and exact * 0.93 < float(x.var()) < 1.07 * wide * exact


def test_a_pooled_chain_is_the_collapsed_walk():
    """sigma x M with inverse mass u: one measurement of level sigma/sqrt(M) with u/(M std^2), all in standardised units."""
    target = density(gaussian(), ChainWalk((1.0,) * 4, delta=0.5, u=3.0), "cpu")
    assert target.sigma.tolist() == pytest.approx([1.0 / 0.5 / 2]) and target.u == pytest.approx(3.0 / 0.25 / 4)
    with pytest.raises(ValueError, match="equal levels"):
        density(gaussian(), ChainWalk((1.0, 2.0), delta=0.5), "cpu")


def test_a_channel_prior_is_walked_in_all_its_measurements():
    torch.manual_seed(0)
    model = build_model((2,), "mem", {"kind": "mlp", "width": 8, "blocks": 1}, [2.0, 1.0, 2.0]).eval()
    prior = Prior(model, SCALE, (2,), 0.5, {})
    assert own_levels(prior) == pytest.approx((1.0, 0.5, 1.0))
    target = density(prior, ChainWalk(own_levels(prior), delta=0.2, u=1.0), "cpu")
    state = start(prior, ChainWalk(own_levels(prior), delta=0.2), target, 5, torch.Generator().manual_seed(0))
    assert state.y.shape == (5, 3, 2) and target.u == pytest.approx(4.0) and target.score(state.y).shape == (5, 3, 2)
    x, _ = run_chain(prior, ChainWalk(own_levels(prior), delta=0.2), 20, 10, torch.Generator().manual_seed(0), count=3)
    assert x.shape == (3, 2) and bool(x.isfinite().all())


@pytest.mark.parametrize("noisy", [True, False])
def test_the_start_is_remark_4(noisy):
    """U[0, 1] in the units of the data, of variance 1/12, plus N(0, sigma^2)."""
    chain = ChainWalk((0.8,), delta=0.1, noisy_start=noisy)
    target = density(gaussian(1), chain, "cpu")
    state = start(gaussian(1), chain, target, 40_000, torch.Generator().manual_seed(0))
    y = SCALE.restore(state.y)
    assert float(y.mean()) == pytest.approx(0.5, abs=0.02) and float(y.var()) == pytest.approx(1 / 12 + noisy * 0.64, rel=0.03)
    assert not state.v.any()


def test_a_warm_start_is_a_draw_of_the_m_density():
    """Of N(0, 1) measured with tau: mean 0, variance 1 + tau^2 to the order of the walk, velocities N(0, u); collapsed for M = 4."""
    chain = ChainWalk((0.8,) * 4, delta=0.1, u=2.0, warm_start=True)
    prior = gaussian(1)
    target = density(prior, chain, "cpu")
    state = start(prior, chain, target, 40_000, torch.Generator().manual_seed(0))
    tau = 0.4 / SCALE.std
    assert float(target.sigma) == pytest.approx(tau) and state.y.shape == (40_000, 1, 1)
    exact = 1 + tau**2
    assert float(state.y.mean()) == pytest.approx(0, abs=0.03) and float(state.y.var()) == pytest.approx(exact, rel=0.03)
    assert float(state.v.var()) == pytest.approx(target.u, rel=0.03)
    torch.manual_seed(0)
    model = build_model((2,), "mem", {"kind": "mlp", "width": 8, "blocks": 1}, [2.0]).eval()
    fixed = Prior(model, SCALE, (2,), 0.5, {})
    with pytest.raises(ValueError, match="no warm start"):
        run_chain(fixed, ChainWalk(own_levels(fixed), delta=0.2, warm_start=True), 2, 1, torch.Generator())


def test_a_chain_can_start_at_measurements_of_data():
    """y = x + N(0, sigma^2) in the units of the data, velocities N(0, u); collapsed for M = 4, whose mean has level .4."""
    chain, x = ChainWalk((0.8,) * 4, delta=0.1, u=2.0), torch.full((40_000, 1), 3.0)
    target = density(gaussian(1), chain, "cpu")
    state = start(gaussian(1), chain, target, 40_000, torch.Generator().manual_seed(0), x)
    y = SCALE.restore(state.y)
    assert float(y.mean()) == pytest.approx(3.0, abs=0.01) and float(y.std()) == pytest.approx(0.4, rel=0.02)
    assert float(state.v.var()) == pytest.approx(target.u, rel=0.03)
    jump, _ = run_chain(gaussian(1), ChainWalk((1e-3,), delta=1e-6), 1, 1, torch.Generator().manual_seed(0), x=x[:1])
    assert float(jump) == pytest.approx(3.0, abs=0.01)


def test_one_chain_is_walked_in_float32_and_the_prior_is_left_as_it_was():
    torch.manual_seed(0)
    seen = []

    class Backbone(torch.nn.Conv2d):
        def forward(self, z, c):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(z[:, None])[:, 0]

    prior = Prior(MDAE(Backbone(1, 1, 1), bf16=True), SCALE, (4, 4), 0.01, {})
    run_chain(prior, ChainWalk((1.0,), delta=0.2), 2, 1, torch.Generator().manual_seed(0))
    assert not any(seen) and prior.denoiser.bf16
    run_chain(prior, ChainWalk((1.0,), delta=0.2), 1, 1, torch.Generator().manual_seed(0), count=2)
    assert seen[-1]


class Explosive(Denoiser):
    """A Gaussian's denoiser that repels what is beyond 3: chains break."""

    def xhat(self, y, sigma):
        ybar = y.mean(1)
        return torch.where(ybar.abs() > 3, 50 * ybar, ybar / 2)


def test_a_chain_that_diverges_is_set_back_and_counted():
    prior, keep = Prior(Explosive(), Scale(0.0, 1.0), (1,), 0.01, {}), Keep()
    x, restarts = run_chain(prior, ChainWalk((1.0,), delta=0.5), 4000, 5, torch.Generator().manual_seed(0), keep, count=2)
    assert restarts > 10 and bool(torch.stack(keep.x).isfinite().all()) and float(torch.stack(keep.x).abs().max()) < 1000 and len(keep.x) == 800


def test_escape_is_judged_against_the_m_density():
    sigma = torch.tensor([2.0, 0.5])
    inside = torch.stack([2.2 * torch.ones(50), 1.1 * torch.ones(50)])[None]
    assert escaped(torch.cat([inside, 5 * inside, inside * math.nan]), sigma).tolist() == [False, True, True]


def test_a_gallery_is_evenly_spaced_and_bounded():
    for n in (3, 8, 9, 100, 1000):
        gallery = Thinned(8)
        for i in range(n):
            gallery.add(i)
        gaps = {b - a for a, b in zip(gallery.items, gallery.items[1:])}
        assert len(gallery.items) <= 8 and gallery.items[0] == 0 and gaps <= {gallery.stride} and (n < 8 or len(gallery.items) >= 4)


def test_windows_count_every_jump_once():
    windows = Windows(3, 4)
    labels = [i % 3 for i in range(37)]
    for label in labels:
        windows.add(label)
    table = windows.table()
    assert table.sum(0).tolist() == [labels.count(c) for c in range(3)] and len(table) <= 4
    length = windows.length
    assert all(table[w].tolist() == [labels[w * length : (w + 1) * length].count(c) for c in range(3)] for w in range(len(table)))


def test_autocorrelation_of_an_autoregression():
    """AR(1) with coefficient a: rho_k = a^k, integrated time (1 + a)/(1 - a)."""
    draw, a, x = torch.Generator().manual_seed(0), 0.7, torch.zeros(8)
    correlation = Autocorrelation(8)
    for _ in range(6000):
        x = a * x + (1 - a * a) ** 0.5 * torch.randn(8, generator=draw)
        correlation.add(x)
    assert [float(r) for r in correlation.rho()[:4]] == pytest.approx([1, 0.7, 0.49, 0.343], abs=0.03)
    assert correlation.time() == pytest.approx(1.7 / 0.3, rel=0.15)


def test_figures_of_a_chain_that_sits_still_and_of_one_that_does_not():
    sign = lambda x: torch.stack([(x[:, 0] > 0).float(), (x[:, 0] <= 0).float()], dim=1)
    moving, draw = ChainFigures((4,), 16, sign, 2), torch.Generator().manual_seed(0)
    for i in range(400):
        moving.add(torch.randn(4, generator=draw), i)
    found = moving.figures()
    assert found["stuck"] == 0 and found["moved"] == pytest.approx(1.0, abs=0.1) and found["classes_visited"] == 2 and sum(found["classes"]) == 400
    still, found = ChainFigures((4,), 16, sign, 2), []
    for i in range(100):
        still.add(torch.randn(4, generator=draw) if i < 20 else torch.ones(4), i)
    found = still.figures()
    assert found["stuck"] == 3 and found["longest_stay"] >= 80 and found["autocorrelation_time"] > 10


def test_the_bundled_classifier_is_small_and_for_digits_only():
    assert WEIGHTS.stat().st_size < 200_000
    assert digit_classifier((28, 28), 0.29) is None and digit_classifier((8, 8), 0.13) is None
    assert digit_classifier((28, 28), 0.13)(torch.zeros(3, 28, 28)).shape == (3, 10)


def test_the_bundled_classifier_knows_test_digits():
    from pathlib import Path

    import numpy as np

    file = Path(__file__).parents[2] / "shared" / "data" / "mnist.npz"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    with np.load(file) as data:
        x, labels = torch.from_numpy(data["test_images"][:2000]) / 255, torch.from_numpy(data["test_labels"][:2000])
    assert float((digit_classifier((28, 28), 0.13)(x).argmax(1) == labels).float().mean()) > 0.97


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_the_flow_of_a_gaussian_falls_geometrically_to_its_mean(rate):
    """The distance to the mode shrinks by 1 - rate tau^2/(s + tau^2) per step."""
    prior, sigma = GaussianDenoiser.from_covariance(torch.tensor([1.0, -2.0]), 2.0 * torch.eye(2)), torch.tensor([1.5])
    y = torch.tensor([[4.0, 0.0], [1.0, 1.0]])
    xhat = lambda y: prior.xhat(y[:, None], sigma)
    few = flow(xhat, y, rate, steps=5, tolerance=0.0)
    keep = 1 - rate * 2.25 / 4.25
    torch.testing.assert_close(few.y - prior.mean, keep**5 * (y - prior.mean))
    assert few.steps.tolist() == [5, 5] and not few.converged.any()
    end = flow(xhat, y, rate, tolerance=1e-5)
    assert bool(end.converged.all()) and float((end.y - prior.mean).abs().max()) < 1e-4


def test_a_datum_that_has_arrived_stays():
    """Each datum's steps and end are those it has alone."""
    prior, sigma = GaussianDenoiser.from_covariance(torch.zeros(1), torch.ones(1, 1)), torch.tensor([1.0])
    xhat = lambda y: prior.xhat(y[:, None], sigma)
    y = torch.tensor([[1e-3], [10.0]])
    both = flow(xhat, y, tolerance=1e-4)
    alone = [flow(xhat, y[i : i + 1], tolerance=1e-4) for i in range(2)]
    assert both.steps.tolist() == [int(a.steps) for a in alone] and torch.equal(both.y, torch.cat([a.y for a in alone]))
    assert both.steps[0] < both.steps[1]
