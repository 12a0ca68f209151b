"""Minibatch EM: observations take turns, and the others keep their last pairs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import SMALL, here, refused, vectors  # noqa: F401

from emdiff.cli import main
from emdiff.em import Walk
from emdiff.pairs import PairLoss
from emdiff.plan import default_refresh
from emdiff.turns import on_turn

TURNS = ["--start", "self-supervised", "--train.refresh", "60", *SMALL]


@pytest.mark.parametrize(("count", "turn"), [(100, 25), (10, 3), (7, 7), (5, 8), (6, 0)])
def test_turns_visit_every_observation_equally_often(count, turn):
    everyone = torch.arange(count)
    assert on_turn(1, count, turn, 0) is None
    rounds = [everyone if (new := on_turn(k, count, turn, 0)) is None else new for k in range(2, 2 + count)]
    visits = torch.cat(rounds).bincount(minlength=count)
    assert (visits == (turn if 0 < turn < count else count)).all()
    assert all(len(r) == len(r.unique()) for r in rounds)


def test_observations_keep_their_sample_until_their_turn_and_figures_are_of_the_new_ones():
    vectors("obs.npz")
    main(["fit", "--observations", "obs.npz", "--iters", "3", "--out", "run", *TURNS])
    truth, samples = np.load("obs.npz")["x"], [np.load(f"run/{name}/samples.npy") for name in ("start", "round_001", "round_002", "round_003")]
    np.testing.assert_allclose(samples[1], samples[0], atol=1e-5)
    for k in (2, 3):
        new = on_turn(k, 200, 60, 0).numpy()
        old = np.setdiff1d(np.arange(200), new)
        np.testing.assert_allclose(samples[k][old], samples[k - 1][old], atol=1e-5)
        assert (np.abs(samples[k][new] - samples[k - 1][new]).max(1) > 1e-3).all()
        metrics = json.loads(Path(f"run/round_00{k}/metrics.json").read_text())
        assert metrics["error"] == pytest.approx(np.square(samples[k][new] - truth[new]).mean(), rel=1e-4)
        assert metrics["sample_std"] == pytest.approx(samples[k][new].std(ddof=1), rel=1e-4)


def test_the_m_step_trains_on_the_pairs_of_all(monkeypatch):
    """Each pair is a chain and its jump; those of the others are what the round before left."""
    seen = []

    class Recorded(PairLoss):
        def __init__(self, draws, *rest, **more):
            super().__init__(draws, *rest, **more)
            seen.append(draws)

    monkeypatch.setattr("emdiff.rounds.PairLoss", Recorded)
    vectors("obs.npz")
    main(["fit", "--observations", "obs.npz", "--iters", "3", "--out", "run", *TURNS])
    old = np.setdiff1d(np.arange(200), on_turn(3, 200, 60, 0).numpy())
    first, second, third = seen
    assert len(first.x) == len(second.x) == len(third.x) == 200 and first.tau == 0 and second.tau == third.tau == Walk().tau_last
    old = torch.from_numpy(old)
    torch.testing.assert_close(third.y[old], second.y[old])
    torch.testing.assert_close(third.x[old], second.x[old], atol=1e-5, rtol=0)
    gap = (second.y[:] - second.x[:]).std() / Walk().tau_last
    assert 0.7 < gap < 1.3, "y is the jump and noise of the last level"


def test_turns_continue_as_if_never_interrupted():
    vectors("obs.npz")
    main(["fit", "--observations", "obs.npz", "--iters", "3", "--out", "whole", *TURNS])
    main(["fit", "--observations", "obs.npz", "--iters", "2", "--out", "parts", *TURNS])
    main(["fit", "--observations", "obs.npz", "--iters", "3", "--out", "parts", *TURNS])
    for name in ("prior.safetensors", "samples.npy", "chains.npy"):
        assert (Path("whole/round_003") / name).read_bytes() == (Path("parts/round_003") / name).read_bytes(), name


def test_turns_are_refused_where_chains_persist(capsys):
    vectors("obs.npz")
    line = refused(capsys, "fit", "--observations", "obs.npz", "--guidance", "cg", "--train.refresh", "50", "--wandb", "off")
    assert "--train.refresh" in line and "fused" in line


def test_turns_by_default_where_walks_are_slow():
    assert default_refresh(10_000, "fused", "unet", "cpu") == 2000
    for count, guidance, network, device in (
        (5000, "fused", "unet", "cpu"),
        (10_000, "cg", "unet", "cpu"),
        (10_000, "fused", "mlp", "cpu"),
        (10_000, "fused", "unet", "cuda"),
    ):
        assert default_refresh(count, guidance, network, device) == 0
