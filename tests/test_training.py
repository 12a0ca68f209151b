"""Training, streams of randomness, saved priors, and tracking."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from emdiff.em import Draws
from emdiff.errors import FitFailed, UsageError
from emdiff.learner import Learner
from emdiff.memory import Optimiser
from emdiff.metrics import residual_chi2
from emdiff.observations import Observations
from emdiff.pairs import PairLoss
from emdiff.prior import Prior, build_network, choose_network, load_prior, sample_prior, save_prior
from emdiff.scale import Scale
from emdiff.streams import stream, stream_seed
from emdiff.training import train
from emdiff.watch import Diverged, Watch
from observers import Identity


class Line(torch.nn.Module):
    """x -> a x, the smallest thing that can be trained."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(()))


def slope_loss(net, index, generator):
    """Its minimiser is a = 3."""
    x = torch.randn(len(index), generator=generator)
    return (net.a * x - 3 * x).square().mean()


def test_training_reaches_the_minimiser_and_leaves_its_argument_alone():
    net = Line()
    trained = train(net, slope_loss, 64, 400, batch=32, rate=0.1)
    assert abs(trained.denoiser.a.item() - 3) < 1e-3 and net.a.item() == 0 and trained.steps == 400


def test_training_is_deterministic_and_depends_on_its_seed():
    a, b, c = (float(train(Line(), slope_loss, 64, 20, batch=8, seed=s).denoiser.a) for s in (1, 1, 2))
    assert a == b != c


def test_held_out_loss_ends_training_and_keeps_the_best_weights():
    """The first 50 data pull a upwards without end, the last 50 want a = 0.2: the best average is passed through."""

    def loss(net, index, generator):
        return torch.where(index < 50, -net.a, (net.a - 0.2).square()).mean()

    trained = train(Line(), loss, 100, 5000, batch=50, rate=1e-3, held_out=50)
    assert trained.steps < 2000 and abs(float(trained.denoiser.a) - 0.2) < 0.1


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(FitFailed, match="rate"):
        train(Line(), lambda net, i, g: net.a * float("nan"), 8, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_a_divergence_though_the_loss_is(value):
    learner = Learner(Line(), slope_loss, Optimiser(), 100, 0)
    learner.losses, watch = [torch.tensor(1.0)] * 20, Watch(learner, None, None, "")
    watch.look(learner)
    learner.average.a.fill_(value)
    with pytest.raises(Diverged, match="weights"):
        watch.look(learner)


def test_each_index_is_seen_once_per_epoch():
    seen = []
    train(Line(), lambda net, i, g: (seen.append(i.clone()), net.a.square())[1], 12, 6, batch=4)
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12)) and first.tolist() != second.tolist()


def test_streams_of_one_seed_share_no_numbers():
    """Walks that re-draw the noise of the observations would look calibrated and be wrong."""
    uses = ["observe", "fit", "first samples", "e-step", "reconstruct", "sample", "chains"]
    draws = torch.stack([torch.randn(4000, generator=stream(0, use)) for use in uses])
    assert (torch.corrcoef(draws) - torch.eye(len(uses))).abs().max() < 0.08
    assert len({stream_seed(s, use, k) for s in range(5) for use in uses for k in range(20)}) == 5 * len(uses) * 20


def test_a_walk_with_the_seed_of_the_observations_is_calibrated():
    """x ~ N(0, 1), n = 1: samples x | obs of the exact posterior have residual chi2 1, whatever the user's seeds."""
    x = torch.randn(2000, 8, generator=stream(0, "truth"))
    obs = Identity((8,), torch.tensor(1.0)).simulate(x, stream(0, "observe"))
    sample = obs / 2 + 0.5**0.5 * torch.randn(obs.shape, generator=stream(0, "e-step", 1))
    assert abs(float(residual_chi2(Observations(obs, Identity((8,), torch.tensor(1.0))), sample).mean()) - 1) < 0.05


def small_prior():
    """An untrained prior with weights that are not all zero."""
    network = {"kind": "unet", "widths": [4, 8], "patch": 1}
    denoiser = build_network((9, 10), **network)
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=stream(0, "weights"))
    return Prior(denoiser.eval(), Scale(3.0, 2.0), (9, 10), 0.1, network)


def test_a_saved_prior_samples_the_same(tmp_path):
    prior = small_prior()
    save_prior(tmp_path / "p.safetensors", prior)
    again = load_prior(tmp_path / "p.safetensors")
    prior.denoiser.bf16 = again.denoiser.bf16 = False
    a, b = (sample_prior(p, 3, stream(1, "x"), 5) for p in (prior, again))
    assert torch.equal(a, b) and a.shape == (3, 9, 10) and again.scale == prior.scale


def test_files_that_are_no_priors_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no prior here"):
        load_prior(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other"):
        with pytest.raises(UsageError, match=f"{name}.safetensors: not a prior"):
            load_prior(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("shape", "kind"), [((28, 28), "unet"), ((3, 32, 32), "unet"), ((1, 64, 64), "unet"), ((17, 23), "unet"), ((5,), "mlp"), ((4, 4), "mlp")]
)
def test_a_network_is_chosen_for_every_shape(shape, kind):
    network = choose_network(shape)
    denoiser = build_network(shape, **network)
    assert network["kind"] == kind and denoiser.xhat(torch.zeros(2, 1, *shape), torch.ones(1)).shape == (2, *shape)


def test_a_network_with_maps_tells_which_entry_of_a_block_was_measured():
    """Half of each 2 x 2 block is measured: moving the measured half must move the estimate, unless c is only seen averaged."""
    z = torch.randn(1, 8, 8, generator=stream(0, "z"))
    left = torch.zeros(1, 8, 8)
    left[..., ::2] = 1.0
    seen = {}
    for maps in (False, True):
        net = build_network((8, 8), kind="unet", widths=[4, 8], patch=2, maps=maps).backbone
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.3, generator=stream(0, "weights"))
        seen[maps] = (net(z, left) - net(z, 1 - left)).abs().max().item()
        assert torch.allclose(net(z, torch.full((1, 8, 8), 0.7)), net(z, torch.full((1, 1, 1), 0.7)), atol=1e-5)
    assert seen[False] < 1e-5 and seen[True] > 1e-2


def test_the_m_step_learns_the_posterior_mean_of_a_gaussian():
    """x ~ N(0, 1) in 2-D: pairs from complete samples give xhat = y / (1 + tau^2) at every level."""
    x = torch.randn(4000, 2, generator=stream(0, "x"))
    net = build_network((2,), kind="mlp", width=32, blocks=1)
    trained = train(net, PairLoss(Draws(x, x, 0.0), 0.1), 4000, 600, rate=3e-3).denoiser
    y = torch.tensor([[-1.0, 0.5], [0.3, 1.2]])
    for tau in (0.2, 0.7, 2.0):
        assert torch.allclose(trained.xhat(y[:, None], torch.tensor([tau])), y / (1 + tau**2), atol=0.1)


def test_offline_tracking_writes_a_run_and_never_asks(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    from emdiff.track import Tracker, resolve_mode

    assert resolve_mode("auto") == "offline" and resolve_mode("off") == "off"
    tracker = Tracker("auto", tmp_path / "run", {"iters": 2})
    tracker.log({"iter": 1, "chi2": 0.9, "start": "x"}, {"prior": torch.rand(4, 8, 8)})
    tracker.close()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_pictures_have_a_stated_scale():
    from emdiff.figures import GAP, tile, to_uint8, value_range

    x = np.linspace(0, 1, 5 * 4 * 6, dtype="float32").reshape(5, 4, 6)
    picture = to_uint8(tile(x, 3), *value_range(x))
    assert picture.shape == (10, 21) and picture.max() == 255 and picture[0, 0] == 0 and picture[4, 0] == picture[0, 6] == GAP
    assert value_range(x * 1e5)[1] > 9e4 and tile(np.zeros((2, 3, 4, 4)), 2).shape == (5, 10, 3)
