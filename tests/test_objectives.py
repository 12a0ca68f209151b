"""Objectives against their definitions and against score matching; training in parts; spectral normalisation under a moving average."""

import math

import pytest
import torch

from emdiff.denoise import Denoiser, GaussianDenoiser
from emdiff.mdae import MDAE
from emdiff.measurement import align, measure, pool
from emdiff.models import build_model
from emdiff.nn import MLP
from emdiff.objectives import OBJECTIVES, ManyLevels, OneSet, errors, patchy
from emdiff.training import Optimiser, train

SIGMA = torch.tensor([0.7, 1.3, 0.4], dtype=torch.float64)
EQUAL = torch.tensor([0.7, 0.7, 0.7], dtype=torch.float64)
S = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)


class Linear(Denoiser):
    """xhat^(m) = a_m ybar: M different estimates, wrong in known ways."""

    def __init__(self, a):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def nu(self, y, sigma):
        return self.a.reshape(1, -1, 1) * pool(y, sigma).ybar[:, None]

    def xhat(self, y, sigma):
        return pool(self.nu(y, sigma), sigma).ybar


class Data:
    """Standardised data in memory."""

    def __init__(self, x):
        self.x = x

    def read(self, index):
        return self.x[index]

    def batch(self, stored, generator):
        return stored


def risks(a, sigma):
    """E |x - a_m ybar|^2 for x ~ N(0, S), in closed form: tr((1 - a)^2 S + a^2 tau^2 I)."""
    tau2 = 1 / sigma.pow(-2).sum()
    return [(1 - b) ** 2 * float(S.trace()) + b**2 * 2 * float(tau2) for b in a]


def draw(n=200_000):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, dtype=torch.float64, generator=generator) @ torch.linalg.cholesky(S).T
    return x, generator


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_have_their_closed_form(name):
    """For a linear denoiser of a Gaussian, with unequal levels."""
    a, (x, generator) = [0.9, 0.4, 0.6], draw()
    L = torch.tensor(risks(a, SIGMA), dtype=torch.float64)
    expected = {"mean": L.mean(), "softmax": (L.softmax(0) * L).sum(), "mdsm": (L / SIGMA**4).sum()}[name]
    found = OBJECTIVES[name](errors(Linear(a), x, measure(x, SIGMA, generator), SIGMA), SIGMA)
    assert found.item() == pytest.approx(expected.item(), rel=0.02)


def test_mdsm_is_the_mean_up_to_a_factor_for_equal_levels_and_not_for_others():
    """M / sigma^4, exactly, on the same draws (Sec. 3.2)."""
    x, generator = draw(50)
    for sigma, equal in ((EQUAL, True), (SIGMA, False)):
        L = errors(Linear([0.9, 0.4, 0.6]), x, measure(x, sigma, generator), sigma)
        ratio = (OBJECTIVES["mdsm"](L, sigma) / OBJECTIVES["mean"](L, sigma)).item()
        assert (ratio == pytest.approx(3 / float(sigma[0]) ** 4)) == equal


@pytest.mark.parametrize("sigma", [EQUAL, SIGMA])
def test_mdsm_is_score_matching_up_to_a_constant(sigma):
    """App. B: E|score_theta - grad log p|^2 and MDSM differ by the same constant for every theta; here two thetas, any levels, the same draws."""
    x, generator = draw()
    y = measure(x, sigma, generator)
    exact = GaussianDenoiser.from_covariance(torch.zeros(2, dtype=torch.float64), S).score(y, sigma)
    gaps = []
    for a in ([0.9, 0.4, 0.6], [0.2, 0.7, 0.5]):
        model = Linear(a)
        matching = (model.score(y, sigma) - exact).square().flatten(1).sum(1).mean()
        gaps.append(float((OBJECTIVES["mdsm"](errors(model, x, y, sigma), sigma) - matching).detach()))
    constant = float(((x[:, None] - y) / align(sigma, y).square() - exact).square().flatten(1).sum(1).mean())
    assert gaps[0] == pytest.approx(gaps[1], rel=0.01) and gaps[0] == pytest.approx(constant, rel=0.01)


def test_softmax_weights_pull_the_larger_loss_harder_and_are_not_differentiated():
    x, generator = draw(2000)
    model = Linear([0.9, -1.0, 0.6])
    L = errors(model, x, measure(x, SIGMA, generator), SIGMA)
    w = L.detach().mean(0).softmax(0)
    (g,) = torch.autograd.grad(OBJECTIVES["softmax"](L, SIGMA), model.a, retain_graph=True)
    (h,) = torch.autograd.grad(3 * OBJECTIVES["mean"](L, SIGMA), model.a)
    torch.testing.assert_close(g, w * h)
    assert float(w[1]) > 0.9


@pytest.mark.parametrize("optimiser", [Optimiser("adam", 0.05), Optimiser("sgd", 0.05, 0.5)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_finds_the_bayes_estimator_with_unequal_levels(objective, optimiser):
    """x ~ N(0, s I): every a_m ends at s / (s + tau^2), whatever the objective and the optimiser."""
    generator = torch.Generator().manual_seed(1)
    x = 1.2 * torch.randn(4000, 2, dtype=torch.float64, generator=generator)
    trained = train(Linear([0.0, 0.0, 0.0]), OneSet(Data(x), SIGMA, objective), len(x), 600, 256, optimiser=optimiser)
    tau2 = float(1 / SIGMA.pow(-2).sum())
    assert trained.denoiser.a.tolist() == pytest.approx([1.44 / (1.44 + tau2)] * 3, abs=0.02)


def test_levels_are_within_their_bounds_and_stratified():
    levels = ManyLevels(Data(torch.zeros(4, 2)), 0.1, 20.0).levels(4096, torch.Generator().manual_seed(0))
    inner = levels[(levels > 0.1) & (levels < 20)].log()
    assert float(levels.min()) >= 0.1 and float(levels.max()) <= 20
    assert float(levels.log().median()) == pytest.approx(-0.3, abs=0.01) and float((levels.log() < -0.3 + 1.3).float().mean()) == pytest.approx(
        0.841, abs=2e-3
    )
    assert len(inner) > 3500


@pytest.mark.parametrize("optimiser", [Optimiser("adam", 0.01), Optimiser("sgd", 0.01)])
def test_a_training_in_parts_has_the_rate_and_average_of_the_whole(optimiser):
    """With data that are all alike the order does not matter: 60 steps at once and 25 + 35 from memory end at the same weights, bit for bit."""
    x = torch.ones(64, 2, dtype=torch.float64)

    def loss(net, index, generator):
        return (net.nu(x[index, None].expand(-1, 3, -1), SIGMA) - 2).square().mean()

    whole = train(Linear([0.0, 0.3, -1.0]), loss, 64, 60, 16, optimiser=optimiser)
    part = train(Linear([0.0, 0.3, -1.0]), loss, 64, 25, 16, optimiser=optimiser, total=60)
    rest = train(Linear([9.0, 9.0, 9.0]), loss, 64, 35, 16, optimiser=optimiser, total=60, memory=part.memory)
    assert rest.memory.step == 60 and torch.equal(whole.denoiser.a, rest.denoiser.a)
    assert torch.equal(whole.memory.weights["a"], rest.memory.weights["a"]) and not torch.equal(whole.denoiser.a, whole.memory.weights["a"])


def test_the_average_of_a_spectrally_normalised_network_is_normalised():
    """Its singular vectors are buffers: an average that kept those of the first step would divide by something else than the norm."""
    torch.manual_seed(0)
    net = {"kind": "mlp", "width": 16, "blocks": 1}
    model = build_model((2,), "mdae", net, [0.5, 1.0], spectral=True)
    x, _ = draw(500)
    trained = train(model, OneSet(Data(x.float()), torch.tensor([0.5, 1.0])), 500, 150, 64, optimiser=Optimiser(rate=0.02))
    weights = [m.weight for m in trained.denoiser.modules() if isinstance(m, torch.nn.Linear)]
    assert [float(torch.linalg.matrix_norm(w, 2)) for w in weights] == pytest.approx([1.0] * len(weights), rel=0.1)


@pytest.mark.parametrize("kind,most", [("mem", 1.04), ("muvb", 1.12)])
def test_energies_learn_a_gaussian(kind, most):
    """Risk of xhat near the least, tr V = .468, at two unequal levels, by second derivatives all the way; without learning it is 1.8."""
    x, generator = draw(4000)
    x, sigma = x.float(), torch.tensor([0.7, 1.3])
    torch.manual_seed(0)
    net = {"kind": "mlp", "width": 32, "blocks": 1} if kind == "mem" else {"kind": "mlp", "latent": 4, "width": 32}
    model = build_model((2,), kind, net, [0.7, 1.3], {"width": 16} if kind == "muvb" else None)
    trained = train(model, OneSet(Data(x), sigma), len(x), 500, 128, optimiser=Optimiser(rate=5e-3))
    truth, draws = draw()
    y = measure(truth, sigma.double(), draws)[:20000].float()
    tau2 = 1 / sigma.double().pow(-2).sum()
    least = float((S - S @ torch.linalg.solve(S + tau2 * torch.eye(2, dtype=torch.float64), S)).trace())
    found = float((trained.denoiser.xhat(y, sigma) - truth[:20000]).square().sum(1).mean())
    assert least * 0.98 < found < most * least


@pytest.mark.parametrize("kind", ["mdae", "mem", "muvb"])
def test_pooled_parametrisations_learn_every_level_in_few_steps(kind):
    """The error beyond the least risk, tr V, after 150 steps, from far below the data's std to far above it."""
    x, generator = draw(4000)
    torch.manual_seed(0)
    model = build_model((2,), kind, {"kind": "mlp", "width": 64} | ({"latent": 16} if kind == "muvb" else {"blocks": 2}))
    trained = train(model, ManyLevels(Data(x.float()), 0.05, 20.0), len(x), 150, 128, optimiser=Optimiser(rate=5e-3)).denoiser
    truth, exact = draw(20_000)[0], GaussianDenoiser.from_covariance(torch.zeros(2, dtype=torch.float64), S)
    for tau in (0.05, 0.1, 0.5, 2.0, 8.0):
        sigma = torch.tensor([tau])
        y = measure(truth, sigma.double(), generator)
        best = exact.xhat(y, sigma.double())
        excess = float((trained.xhat(y.float(), sigma) - best).square().sum(1).mean() / (best - truth).square().sum(1).mean())
        assert excess < 0.1, (tau, excess)


def test_patchy_levels_are_two_of_a_datum_and_none():
    """Half keep theirs; else the finer of two is seen in a uniform share of the entries, and every fourth of the rest sees nothing."""
    n, shape = 20_000, (2, 8, 16)
    tau, other = torch.full((n, 1, 1, 1), 0.5), torch.full((n, 1, 1, 1), 0.2)
    levels = patchy(tau, other, shape, torch.Generator().manual_seed(0))
    assert levels.shape == (n, *shape) and set(levels.unique().tolist()) == {torch.tensor(0.2).item(), 0.5, math.inf}
    seen = (levels == 0.2).float()
    share = seen.flatten(1).mean(1)
    cells = [2 * 128 // side**2 for side in (1, 1, 1, 2, 4, 8)]  # seen or missed one by one, or half as many where both planes go together
    none = sum(1 / (k + 1) + 1 / (k // 2 + 1) for k in cells) / 12  # the mean of (1 - u)^k over a uniform u
    assert (share > 0).float().mean() == pytest.approx((1 - none) / 2, abs=0.01)
    assert (share == 1).float().mean() == pytest.approx(none / 2, abs=0.005)
    blind = levels.isinf().flatten(1).any(1)
    assert blind.float().mean() == pytest.approx((1 - none) / 8, abs=0.01)
    assert (levels[blind] != 0.5).all()
    assert share.mean() == pytest.approx(0.25, abs=0.01)
    middle = seen[(share > 0.3) & (share < 0.7)]
    together = (middle[:, 0] == middle[:, 1]).flatten(1).all(1).float().mean()
    assert together == pytest.approx(0.5, abs=0.03)
    squares = middle[:, 0].reshape(-1, 4, 2, 8, 2).transpose(2, 3).flatten(3)
    assert (squares.amax(3) == squares.amin(3)).flatten(1).all(1).float().mean() == pytest.approx(0.5, abs=0.06)


def test_patchy_levels_of_vectors_fall_on_single_entries_and_keep_to_their_range():
    generator = torch.Generator().manual_seed(0)
    tau = 0.1 + torch.rand(5000, 1, generator=generator)
    other = 0.1 + torch.rand(5000, 1, generator=generator)
    levels = patchy(tau, other, (7,), generator)
    known = torch.where(levels.isinf(), tau, levels)
    assert ((known == tau) | (known == other)).all()
    partly = (levels != levels[:, :1]).any(1)
    assert ((levels == torch.minimum(tau, other)).any(1) | ~partly).all()
    assert 0.3 < partly.float().mean() < 0.5  # of half of the data, those whose share of 7 entries is neither none nor all


def test_a_prior_trained_with_masks_knows_what_one_trained_without_does_not():
    """x = (v, v, -v): one entry seen, with noise .2, tells the others; the least risk of E[x | y] is known in closed form."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=generator) * torch.tensor([1.0, 1.0, -1.0])
    sigma = torch.tensor([[[0.2, math.inf, math.inf]]])
    y = x[:2000, None] + torch.tensor([0.2, 0.0, 0.0]) * torch.randn(2000, 1, 3, generator=generator)
    y[..., 1:] = 0.0
    risk = {}
    for masks in (False, True):
        torch.manual_seed(0)
        loss = ManyLevels(Data(x), 0.05, 20.0, masks)
        trained = train(MDAE(MLP((3,), 64, 2)), loss, len(x), 600, 128, 3e-3).denoiser
        with torch.no_grad():
            risk[masks] = float((trained.xhat(y, sigma) - x[:2000]).square().mean())
    best = 1 / (1 + 1 / 0.04)
    assert best - 0.003 < risk[True] < 2 * best < 4 * best < risk[False]
