r"""Over-relaxation by strata against closed forms: what a prior has too much of is taken out, where and as far as the observations say so."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import SMALL, here, refused, vectors  # noqa: F401
from test_survive_train import until_done
from torch import Tensor

from emdiff.cli import main
from emdiff.data import Observations
from emdiff.denoise import GaussianDenoiser
from emdiff.em import Draws, Walk, e_step
from emdiff.interrupt import Stopped
from emdiff.observations import write_observations
from emdiff.reading import read_yaml
from emdiff.strata import COUNT, EDGES, TAU, Strata, Sums, estimate, local_mean, relaxed_by_strata, shrinkage, survey, tally
from observers import Identity, Mask

S, n, N = (5, 18), 0.4, 3000
"""Images of independent entries: the left half varies little, the right half much."""

LEFT, RIGHT = slice(0, 7), slice(11, 18)
"""Columns whose windows lie in one half."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def variances(left: float, right: float) -> Tensor:
    v = torch.full(S, right, dtype=torch.float64)
    v[:, :9] = left
    return v


def prior(v: Tensor) -> GaussianDenoiser:
    return GaussianDenoiser.from_covariance(torch.zeros(S, dtype=torch.float64), torch.diag(v.flatten()))


def observed(v: Tensor, masked: bool = False) -> Observations:
    """Of images with these variances, a third of the entries not seen where masked."""
    noise = torch.tensor(n, dtype=torch.float64)
    seen = torch.rand(N, *S, generator=generator(1), dtype=torch.float64) < 2 / 3
    made = Mask(S, noise, seen) if masked else Identity(S, noise)
    return Observations(made.simulate(prior(v).sample(N, generator(2)), generator(3)), made)


def held(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def relaxed(truth: Tensor, believed: Tensor, masked: bool = False) -> tuple[Draws, Draws, float]:
    """Exact draws under a prior, and what is made of them."""
    data = observed(truth, masked)
    draws = e_step(prior(believed), data, None, Walk(levels=24), generator(4))
    return draws, *relaxed_by_strata(prior(believed), data, draws, generator(5), held, 1000)


def variance_of(draws: Draws, part: slice) -> float:
    """Of the samples that pairs are of, from the pairs: y has tau^2 more."""
    return float(draws.y[..., part].double().square().mean()) - draws.tau**2


@pytest.mark.parametrize("masked", [False, True])
def test_variance_that_the_truth_has_not_is_taken_out_where_it_is_and_nowhere_else(masked: bool) -> None:
    """Left the truth has 0 and the prior .03, right both have .3: exact EM leaves nearly all of it, strata a quarter, since windows tell variances
    apart by what samples happen to deviate."""
    exact, new, share = relaxed(variances(1e-12, 0.3), variances(0.03, 0.3), masked)
    V, seen = 0.03, 2 / 3 if masked else 1.0
    left_by_em = V - seen * (V / (V + n**2)) ** 2 * V
    assert variance_of(exact, LEFT) == pytest.approx(left_by_em, abs=0.001)
    assert 0 < variance_of(new, LEFT) < 0.27 * V
    assert float(new.x[..., LEFT].square().mean()) < variance_of(new, LEFT)  # a jump varies less than what it is a jump to
    assert variance_of(new, RIGHT) == pytest.approx(0.3, abs=0.012) and 0.35 < share < 0.65


def test_draws_of_the_true_prior_stay_what_they_are() -> None:
    exact, new, share = relaxed(variances(0.03, 0.3), variances(0.03, 0.3))
    assert share < 0.02
    for part, v in ((LEFT, 0.03), (RIGHT, 0.3)):
        assert variance_of(new, part) == pytest.approx(v, rel=0.04)


def test_a_prior_that_is_too_narrow_is_left_to_em() -> None:
    _, new, share = relaxed(variances(0.2, 0.3), variances(0.03, 0.3))
    assert share < 0.02


def test_data_whose_chains_were_kept_say_nothing() -> None:
    """A tenth of the states far from their observations would hide what the others have too much of."""
    data, believed = observed(variances(1e-12, 0.3)), prior(variances(0.03, 0.3))
    draws = e_step(believed, data, None, Walk(levels=24), generator(4))
    far = torch.arange(N) < N // 10
    spoilt = Observations(data.obs + 2.0 * far[:, None, None], data.observer)
    new, _ = relaxed_by_strata(believed, spoilt, draws._replace(kept=far), generator(5), held, 1000)
    assert variance_of(new._replace(y=new.y[~far]), LEFT) < 0.27 * 0.03


@pytest.mark.parametrize("v, stratum", [(0.03, 6), (0.3, 12)])
def test_a_stratum_is_what_the_prior_lets_x_vary_and_x_r_the_fused_jump(v: float, stratum: int) -> None:
    """Of x ~ N(0, v): E (x - xhat(y_r))^2 = v/(1 + v), without the level of y; and E (x - x_r)^2 = V[x | y_r, z], in closed form."""
    tau, flat = 0.1, torch.full(S, v, dtype=torch.float64)
    x = prior(flat).sample(N, generator(0))
    y, z = (x + level * torch.randn(x.shape, generator=generator(seed), dtype=x.dtype) for level, seed in ((tau, 1), (n, 2)))
    reference, found = survey(prior(flat), z, torch.full(S, n, dtype=x.dtype)[None], y, tau, generator(3))
    assert EDGES[stratum - 1] < v / (1 + v) < EDGES[stratum] and int(found.flatten().median()) == stratum
    assert float((x - reference).square().mean()) == pytest.approx(1 / (1 / v + 1 / TAU**2 + 1 / n**2), rel=0.02)


def test_relaxed_pairs_are_pairs() -> None:
    """Where x is N(0, v) and its samples are drawn in by k about x_r, y' is N(x', tau^2), and xhat' the regression of x' on y': for v, k, tau in
    closed form, E y' xhat' = E xhat'^2 + cov(y' - xhat', xhat') as of a pair of the law of x'."""
    v, k, tau, count = 0.05, 0.6, 0.1, 400_000
    x = v**0.5 * torch.randn(count, generator=generator(0), dtype=torch.float64)
    y = x + tau * torch.randn(count, generator=generator(1), dtype=torch.float64)
    coarse = y + math.sqrt(TAU**2 - tau**2) * torch.randn(count, generator=generator(2), dtype=torch.float64)
    jump, reference = v / (v + tau**2) * y, v / (v + TAU**2) * coarse
    new_x = reference + (1 - k) * (x - reference)
    eps = torch.randn(count, generator=generator(3), dtype=torch.float64)
    new_y, new_jump = reference + (1 - k) * (y - reference) + tau * math.sqrt(1 - (1 - k) ** 2) * eps, jump - k * (jump - reference)
    error = 5 / math.sqrt(count)
    assert float((new_y - new_x).square().mean()) == pytest.approx(tau**2, rel=4 * error)
    assert abs(float(((new_y - new_x) * new_x).mean())) < tau * error
    assert abs(float(((new_x - new_jump) * new_y).mean())) < tau * error and abs(float(((new_x - new_jump) * reference).mean())) < tau * error


def test_excess_is_unbiased_less_one_standard_error_and_never_negative() -> None:
    """In a stratum of V = .02 with Delta = .01 under noise of two levels, and in one without any; nothing is said of strata without observations."""
    g, tau, each = generator(7), 0.1, 300_000
    stratum = torch.tensor([5, 9, 12]).repeat_interleave(each)
    V = torch.tensor([0.021, 0.075, 0.25], dtype=torch.float64)[torch.tensor([0, 1, 2]).repeat_interleave(each)]
    sigma = torch.where(torch.rand(3 * each, generator=g) < 0.5, 0.3, 1.0).double()
    sigma[2 * each :] = math.inf
    delta = torch.where(stratum == 5, 0.01, 0.0).double()
    n2 = torch.where(sigma.isinf(), 1.0, sigma).square()
    spread = (n2 + tau**2 - (n2 / (V + n2)).square() * delta).sqrt()
    y = torch.zeros(3 * each, dtype=torch.float64)
    z = spread * torch.randn(3 * each, generator=g, dtype=torch.float64)
    sums = tally(stratum, y, V.sqrt(), z, sigma, tau)
    found = estimate(sums, tau)
    error = math.sqrt(2 / float(sums.weight[5]))
    assert float(found.excess[5]) == pytest.approx(0.01 - error, abs=4 * error) and error < 0.002
    assert 0 <= float(found.excess[9]) < 4 * math.sqrt(2 / float(sums.weight[9])) and float(found.excess[12]) == 0
    assert float(found.variance[5]) == pytest.approx(0.021 + tau**2 * 0.021 / (tau**2 + 0.021)) and int(sums.count.sum()) == 3 * each
    some = torch.ones(COUNT, dtype=torch.float64)
    fair = estimate(Sums(1e4 * some, -1e3 * some, some, some), tau)
    assert not fair.excess.any()


def test_shrinkage_leaves_to_em_what_em_does_by_itself() -> None:
    """All of an excess V is taken out where noise hides it, half of V where that is the excess, and nothing of what one iteration removes."""
    strata = Strata(torch.full((COUNT,), 0.02, dtype=torch.float64), torch.full((COUNT,), 0.02, dtype=torch.float64))
    stratum = torch.zeros(3, dtype=torch.long)
    k = shrinkage(strata, stratum, torch.tensor([math.inf, 0.02**0.5, 1e-3]))
    assert k[0] == 1 and float(k[1]) == pytest.approx(1 - math.sqrt(0.25)) and float(k[2]) < 1e-4
    half = strata._replace(excess=strata.excess / 2)
    assert float(shrinkage(half, stratum, torch.full((3,), math.inf))[0]) == pytest.approx(1 - math.sqrt(0.5))
    assert not shrinkage(strata._replace(excess=0 * strata.excess), stratum, torch.tensor([math.inf, 0.1, 1.0])).any()


def test_local_means_are_of_what_is_there() -> None:
    x = torch.rand(2, 3, 7, 6, generator=torch.Generator().manual_seed(0))
    found = local_mean(x)
    assert found.shape == x.shape
    torch.testing.assert_close(found[1, 2, 3, 3], x[1, 2, 1:6, 1:6].mean())
    torch.testing.assert_close(found[0, 1, 0, 0], x[0, 1, :3, :3].mean())
    assert len(EDGES) == COUNT - 1 and list(EDGES) == sorted(EDGES)


def images(path: Path, masked: bool = True) -> None:
    x = torch.nn.functional.avg_pool2d(torch.randn(80, 1, 12, 12, generator=torch.Generator().manual_seed(0)), 5, 1)[:, 0]
    seen = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    made = Mask((8, 8), torch.tensor(0.1), seen) if masked else Identity((8, 8), torch.tensor(0.2))
    write_observations(path, Observations(made.simulate(x, torch.Generator().manual_seed(2)), made), x)


@pytest.mark.parametrize("turns", [[], ["--train.refresh", "30"]])
def test_a_fit_by_strata_trains_on_what_they_leave_and_says_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: list[str]) -> None:
    """That of networks which are hardly trained is too narrow everywhere, so here half of every variance is called excess. The rule against
    following the noise, which is made to hold always, is not asked."""
    monkeypatch.setattr("emdiff.rounds.closes", lambda *question: True)
    monkeypatch.setattr("emdiff.strata.estimate", lambda sums, tau: Strata(sums.square / sums.count, sums.square / sums.count / 2))
    images(tmp_path / "obs.npz")
    how = ["--observations", str(tmp_path / "obs.npz"), "--iters", "3", "--start", "self-supervised", *SMALL, *turns]
    for name, more in (("plain", ["--strata", "false"]), ("strata", [])):
        main(["fit", *how, "--out", str(tmp_path / name), *more])
    rounds = {name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("plain", "strata")}
    assert all("shrunk" not in row for row in rounds["plain"] + rounds["strata"][:2])
    exact = [row for row in rounds["strata"][2:] if not row["over_relaxed"]]
    assert len(exact) == 2 and all(row["over_relaxed"] for row in rounds["plain"][2:])
    assert all(0 < row["shrunk"] <= 1 for row in exact)
    one, other = (np.load(tmp_path / name / "round_002/samples.npy") for name in rounds)
    same = (one == other).all((1, 2))
    assert same.sum() == (50 if turns else 0) and rounds["plain"][2]["chi2"] == rounds["strata"][2]["chi2"]


def test_a_fit_by_strata_that_is_stopped_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped again and again, between the passes over strata too: both passes are done anew from the same draws."""
    monkeypatch.setattr("emdiff.strata.estimate", lambda sums, tau: Strata(sums.square / sums.count, sums.square / sums.count / 2))
    images(tmp_path / "obs.npz")
    how = ["fit", "--observations", str(tmp_path / "obs.npz"), "--iters", "3", "--start", "self-supervised", *SMALL]
    how += ["--walk.batch", "20"]
    main([*how, "--out", str(tmp_path / "whole")])
    passes, plain = [], relaxed_by_strata

    def again() -> None:
        try:
            main([*how, "--out", str(tmp_path / "parts")])
        except SystemExit as end:
            raise Stopped(signal.SIGTERM) from end

    monkeypatch.setattr("emdiff.rounds.relaxed_by_strata", lambda *a, **more: (passes.append(1), plain(*a, **more))[1])
    _, lives = until_done(monkeypatch, again, 11)
    assert lives > 5 and len(passes) > 2  # more often than there are rounds that have strata
    for name in ("samples.npy", "prior.safetensors"):
        assert (tmp_path / "whole/round_003" / name).read_bytes() == (tmp_path / "parts/round_003" / name).read_bytes()


def test_strata_are_refused_where_there_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors("obs.npz")
    images(tmp_path / "images.npz", masked=False)
    strips = Identity((4, 16), torch.tensor(0.2))
    write_observations(tmp_path / "strips.npz", Observations(torch.randn(80, 4, 16, generator=generator(0)), strips))
    cases = (
        ("obs.npz", [], "images"),
        (tmp_path / "images.npz", ["--guidance", "cg"], "guidance fused"),
        (tmp_path / "strips.npz", [], "mixture"),  # which short images start from by themselves
        (tmp_path / "images.npz", ["--noise_std", "auto"], "known"),
        (tmp_path / "images.npz", ["--walk.tau-last", "1", "--walk.tau-relax", "1"], "tau-last"),
    )
    for path, more, word in cases:
        message = refused(capsys, "fit", "--observations", str(path), "--out", "run", "--strata", "true", *SMALL, *more)
        assert "--strata true" in message and word in message and not Path("run").exists()
    main(["fit", "--observations", "obs.npz", "--out", "run", *SMALL])
    assert read_yaml(Path("run/config.yaml"))["strata"] is False
