"""When an iteration over-relaxes, against Gaussians in closed form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import SMALL, here, vectors  # noqa: F401
from torch import Tensor

from emdiff.cli import main
from emdiff.data import Data, Observations
from emdiff.denoise import GaussianDenoiser
from emdiff.em import Draws, Walk, e_step, walk_levels
from emdiff.metrics import chi2_spread, residual_chi2
from emdiff.outline import Choice, Plan
from emdiff.pairs import PairLoss
from emdiff.relax import CLOSE, SPREAD, closes, default_relax, followed, over_relaxed, relaxed_walk, spreads
from emdiff.scale import Scale
from emdiff.streams import stream
from observers import Identity, Mask

N, n = 40_000, 0.3


def prior(s: float) -> GaussianDenoiser:
    """N(0, s) in two independent entries."""
    return GaussianDenoiser.from_covariance(torch.zeros(2, dtype=torch.float64), s * torch.eye(2, dtype=torch.float64))


def observed(s: float, masked: bool = False, noise: Tensor | float = n) -> Observations:
    """x ~ N(0, s) under noise; of masked data a third of the entries were not seen."""
    noise = torch.as_tensor(noise, dtype=torch.float64)
    seen = torch.rand(N, 2, generator=stream(1, "seen"), dtype=torch.float64) < 2 / 3
    made = Mask((2,), noise, seen) if masked else Identity((2,), noise)
    return Observations(made.simulate(prior(s).sample(N, stream(2, "x")), stream(3, "n")), made)


@pytest.mark.parametrize("masked", [False, True])
def test_draws_of_the_true_prior_are_as_far_from_the_observations_as_noise_and_level_say(masked: bool) -> None:
    data = observed(0.5, masked)
    draws = e_step(prior(0.5), data, None, Walk(levels=24), stream(0, "walk"))
    assert abs(followed(data, draws) - 1) < 4 * chi2_spread(data)[1]
    jumps, V = residual_chi2(data, draws.x), 1 / (1 / 0.5 + 1 / n**2 + 1 / draws.tau**2)
    assert float(jumps[jumps > 0].mean()) == pytest.approx(1 - V / n**2, abs=0.02)  # a jump lacks its posterior variance


@pytest.mark.parametrize("s", [0.01, 0.05])
def test_draws_of_too_wide_a_prior_are_closer_as_predicted(s: float) -> None:
    """x is 0 and the prior N(0, s): the formula of relax's docstring, and a decision that it makes."""
    data = observed(1e-12, masked=True)
    draws = e_step(prior(s), data, None, Walk(levels=24), stream(0, "walk"))
    found, error = followed(data, draws), chi2_spread(data)[1]
    predicted = 1 - s * n**4 / ((s + n**2) ** 2 * (n**2 + draws.tau**2))
    assert abs(found - predicted) < 4 * error and predicted < 1 - 10 * error
    assert closes(2, plan(), data, found) == (predicted < CLOSE)


def test_data_whose_chains_were_kept_do_not_count() -> None:
    data, y = observed(1e-12), torch.zeros(N, 2, dtype=torch.float64)
    kept = torch.arange(N) % 2 == 0
    y[kept] = 1e3
    assert followed(data, Draws(y, y, 1e-6, kept=kept)) == pytest.approx(1, abs=0.03)


def test_levels_per_entry_are_those_that_measured() -> None:
    noise = 0.1 + torch.rand(N, 2, generator=stream(4, "noise"), dtype=torch.float64)
    data = observed(0.5, noise=noise)
    draws = e_step(prior(0.5), data, None, Walk(levels=16), stream(0, "walk"))
    assert abs(followed(data, draws) - 1) < 4 * chi2_spread(data)[1]


def plan(relax: int = 5, **changes: object) -> Plan:
    return Plan(10, Choice("self-supervised", ""), Walk(levels=24), {}, relax=relax)._replace(**changes)


def test_only_chance_or_an_unknown_noise_level_keep_iterations_exact_where_samples_are_close() -> None:
    data = observed(1e-12)
    draws = e_step(prior(0.05), data, None, Walk(levels=24), stream(0, "walk"))
    chi2 = followed(data, draws)
    assert closes(5, plan(), data, chi2) and not closes(6, plan(), data, chi2)
    assert not closes(2, plan(level=0.3), data, chi2) and not closes(2, plan(), data.rows(slice(0, 20)), chi2)
    assert followed(data, over_relaxed(draws)) is None and followed(data, draws._replace(sample=draws.x)) is None


def test_over_relaxing_ends_what_does_not_vary_and_costs_the_rest_at_most_the_level() -> None:
    """Re-noised jumps of level tau: s becomes about s^2 / (s + tau^2) where the truth is 0; a wide direction loses its posterior variance at tau."""
    for true, s in ((1e-12, 0.01), (1.0, 1.0)):
        data = observed(true)
        draws = e_step(prior(s), data, None, Walk(levels=24), stream(0, "walk"))
        exact = float(draws.y.square().mean()) - draws.tau**2
        relaxed = over_relaxed(draws)
        assert relaxed.tau == 0 and relaxed.y is relaxed.x
        left, tolerance = float(relaxed.y.square().mean()), 4 * math.sqrt(1 / N) * (exact + draws.tau**2)
        V = 1 / (1 / s + 1 / n**2 + 1 / draws.tau**2)
        assert abs(exact - V - left) < tolerance and draws.tau**2 > V
        if true < 1:
            assert left == pytest.approx(exact**2 / (exact + draws.tau**2), rel=0.15)


def test_an_iteration_over_relaxes_where_samples_spread_more_than_the_data() -> None:
    decide = lambda k, std, how=plan(): spreads(k, how, std, Scale(7.0, 2.0))  # noqa: E731
    assert decide(2, 2.1) and decide(5, 2.1) and not decide(6, 2.1)
    assert not decide(2, 2.0) and not decide(2, 2 * SPREAD) and not decide(2, 1.5)
    fine = plan(walk=Walk(tau_last=0.05, tau_relax=0.05))
    assert not decide(2, 2.1, fine)


def test_the_rules_are_on_where_they_can_be_told() -> None:
    assert default_relax(0.1, "fused", 0.25) and default_relax(1.0, "cg", 0.25) and not default_relax(0.1, "cg", 0.25)


def test_an_over_relaxed_walk_takes_the_steps_of_the_exact_one_as_far_as_it_goes() -> None:
    """Levels fused with the observations fall by about the same factor: that of the exact walk, up to rounding the number of levels."""
    n = 1.6
    whole = Observations(torch.zeros(5, 3, dtype=torch.float64), Identity((3,), torch.tensor(n, dtype=torch.float64)))
    factor = lambda taus: float(np.diff([math.log(n), *(-0.5 * math.log(t**-2 + n**-2) for t in taus)]).min())  # noqa: E731
    for walk in (Walk(), Walk(levels=12), Walk(tau_first=0.8, levels=20)):
        short = relaxed_walk(whole, walk)
        taus, exact = walk_levels(whole, short), walk_levels(whole, walk)
        assert taus[-1] == walk.tau_relax and len(taus) < 0.8 * len(exact)
        if math.isinf(walk.tau_first):
            assert factor(taus) == pytest.approx(factor(exact), rel=1.5 / len(taus))


@pytest.mark.parametrize("turns", [[], ["--train.refresh", "60"]])
def test_draws_that_follow_the_noise_make_a_round_train_on_re_noised_jumps_of_all(turns: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In rounds 2 and 4 of a fit: the chi2 told is that of the rule's question, pairs are complete samples, and the others are exact."""
    asked, trained = [], []

    class Recorded(PairLoss):
        def __init__(self, draws: Draws, *rest: Any, **more: Any) -> None:
            super().__init__(draws, *rest, **more)
            trained.append(draws)

    def even(k: int, plan: Plan, data: Data, chi2: float) -> bool:
        asked.append((k, chi2))
        return k % 2 == 0

    monkeypatch.setattr("emdiff.rounds.PairLoss", Recorded)
    monkeypatch.setattr("emdiff.rounds.closes", even)
    vectors("obs.npz")
    main(["fit", "--observations", "obs.npz", "--iters", "4", "--out", "run", "--start", "self-supervised", *SMALL, *turns])
    rounds = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()][1:]
    assert [k for k, _ in asked] == [2, 3, 4] and [row["over_relaxed"] for row in rounds] == [False, True, False, True]
    assert [row["chi2"] for row in rounds[1:]] == [chi2 for _, chi2 in asked]
    assert [draws.tau for draws in trained] == [0, 0, Walk().tau_last, 0] and all(len(draws.x) == 200 for draws in trained)
    assert all(torch.equal(draws.y[:], draws.x[:]) == (draws.tau == 0) for draws in trained)
