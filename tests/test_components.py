"""How many Gaussians: one where there is one, several where they are told apart; and the whole start through the command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from exact_gaussian import Moments, log_likelihood, maximum_likelihood, problem  # noqa: E402
from exact_mixtures import as_projection, noise, points  # noqa: E402

from emdiff.cli import main  # noqa: E402
from emdiff.components import AVERAGED, MEMBERS, STEPS, WORK, Candidates, candidates, fit_mixture, least_variance, share_out, work  # noqa: E402
from emdiff.deconvolution import Fit, Mixture, Whitened, expect, fit, maximise, split, whitened  # noqa: E402
from emdiff.observations import Observations, write_observations  # noqa: E402
from emdiff.prior import load_prior, sample_prior  # noqa: E402
from emdiff.restarts import average, clustered, fits_from, good, starts  # noqa: E402
from emdiff.start import choose_start, is_vector  # noqa: E402
from observers import Identity, Projection  # noqa: E402


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clouds(count: int, seed: int = 0) -> Observations:
    """Four Gaussians in the plane, of bench_exact, with full noise covariances."""
    x, R = points("mixture", count, seed), noise(count, seed)
    return as_projection(x + np.einsum("nij,nj->ni", np.linalg.cholesky(R), np.random.default_rng(seed).normal(size=x.shape)), R)


@pytest.mark.parametrize("seed", [0, 1])
def test_gaussian_data_get_one_gaussian_and_it_is_the_maximum_likelihood_estimate(seed: int) -> None:
    data, _, truth = problem(1500, seed, torch.float64)
    start = fit_mixture(data, generator())
    assert start.members == {1: 1} and 1 in start.held_out
    best = log_likelihood(data, maximum_likelihood(data))
    found = Moments(start.denoiser.means[0].double(), start.denoiser.covs[0].double())
    assert -1e-6 < (best - log_likelihood(data, found)) / (best - log_likelihood(data, truth)) < 0.01


def test_clouds_get_several_and_the_average_is_better_than_its_members_on_observations_that_no_fit_has_seen() -> None:
    data, other = clouds(600), whitened(clouds(1500, seed=1))
    start = fit_mixture(data, generator())
    assert max(start.members) >= 4 and sum(start.members.values()) > 1
    held_out = lambda model: float(expect(model, other).log_likelihood.mean())  # noqa: E731
    found = candidates(whitened(data), 1e-4, generator())
    alone = fit(found.models[8], whitened(data), 1e-4, 300).mixture
    assert held_out(start.denoiser.model()) > held_out(alone) + 0.005
    again = fit_mixture(data, generator())
    assert torch.equal(again.denoiser.means, start.denoiser.means) and torch.equal(again.denoiser.weights, start.denoiser.weights)


def test_every_fifth_is_held_out_once() -> None:
    """The held-out value of one Gaussian is the mean over five fits, each to the four fifths that it is not judged on."""
    data = whitened(clouds(100))
    found = candidates(data, 1e-4, generator())
    one = Mixture(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.eye(2).double()[None])
    values = []
    for fifth in torch.arange(100).split(20):
        rest = torch.tensor([i for i in range(100) if i not in fifth])
        values.append(expect(fit(one, data.rows(rest), 1e-4, STEPS).mixture, data.rows(fifth)).log_likelihood)
    torch.testing.assert_close(found.held_out[1].sort().values, torch.cat(values).sort().values)


def test_shares_maximise_the_held_out_likelihood_of_the_average() -> None:
    """At the maximum of sum_i log sum_J s_J p_J(i) the mean over i of p_J / sum s p is 1 where s_J > 0, and at most 1 elsewhere."""
    p = torch.rand(200, 3, generator=generator(), dtype=torch.float64) + torch.tensor([0.2, 0.2, 0.0])
    shares = Candidates({}, {1: p[:, 0], **{2**j: p[:, j - 1].log() for j in (1, 2, 3)}}, 4).shares()
    assert set(shares) == {2, 4, 8} and sum(shares.values()) == pytest.approx(1)
    s = torch.tensor(list(shares.values()), dtype=torch.float64)
    slope = (p / (p @ s)[:, None]).mean(0)
    assert float(s[2]) < 1e-6 < 0.1 < float(s[:2].min()) and slope[2] < 1 and torch.allclose(slope[:2], torch.ones(2).double(), atol=1e-4)


def test_fits_of_bad_maxima_are_left_out_and_those_that_differ_by_what_noise_explains_stay() -> None:
    """4 Gaussians of 23 parameters, 1500 data: half a unit for each is .0077 of the mean log-likelihood."""
    model = Mixture(*(t.double() for t in (torch.full((4,), 0.25), torch.zeros(4, 2), torch.eye(2).expand(4, 2, 2))))
    fits = [Fit(model, -1 - gap, 1) for gap in (0.0078, 0.0, 0.0076)]
    assert [f.log_likelihood for f in good(fits, 1500)] == [-1.0, -1.0076]
    data, model = whitened(clouds(1000, seed=2)), Mixture(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.eye(2).double()[None])
    for _ in range(2):
        model = split(fit(model, data, 1e-4, STEPS).mixture, 1e-4)
    one = Mixture(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.eye(2).double()[None])
    found = fits_from(4, model, one, data, 1e-4, 6, STEPS, False, generator())
    assert 0 < len(good(found, 1000)) < 6 and {f.log_likelihood for f in found} >= {f.log_likelihood for f in good(found, 1000)}


def test_plain_fits_are_the_textbook_iteration_and_many_gaussians_start_from_clusters_only(monkeypatch: pytest.MonkeyPatch) -> None:
    data, one = whitened(clouds(300)), Mixture(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.eye(2).double()[None])
    model = split(one, 1e-4)
    found = fit(model, data, 1e-4, 5, 0.0, accelerated=False)
    for _ in range(4):
        model = maximise(model, expect(model, data), 1e-4)
    assert found.iterations == 5
    torch.testing.assert_close(found.mixture.means, model.means)
    torch.testing.assert_close(found.mixture.covs, model.covs)
    seen: list[tuple[Mixture, bool]] = []

    def record(start: Mixture, *rest: object, accelerated: bool) -> Fit:
        seen.append((start, accelerated))
        return Fit(start, 0.0, 1)

    monkeypatch.setattr("emdiff.restarts.fit", record)
    for J, plain, first in ((4, True, True), (16, True, False), (16, False, True)):
        seen.clear()
        fits_from(J, model, one, data, 1e-4, 3, 7, plain, generator())
        assert len(seen) == 3 and (seen[0][0] is model) == first and {accelerated for _, accelerated in seen} == {not plain}


def test_few_gaussians_have_many_starts() -> None:
    assert [starts(J) for J in (1, 2, 4, 32, 64)] == [1, 3, 5, 1, 1]


def test_fits_are_shared_out_within_their_limits() -> None:
    free = lambda J: 0.0  # noqa: E731
    assert share_out({2: 0.5, 4: 0.5}, 2, free) == {2: MEMBERS / 2, 4: MEMBERS / 2}
    assert share_out({2: 0.97, 4: 0.03}, 2, free) == {2: MEMBERS}
    large = share_out({32: 0.5, 64: 0.5}, 32, free)
    assert AVERAGED / 2 < sum(J * count for J, count in large.items()) <= AVERAGED
    assert share_out({8: 1.0}, 8, lambda J: WORK / 3) == {8: 3} and share_out({4: 0.4, 8: 0.6}, 8, lambda J: WORK) == {8: 1}


def test_an_average_has_the_mean_density() -> None:
    data = whitened(clouds(50))
    one = Mixture(torch.tensor([1.0]).double(), torch.tensor([[0.0, 1.0]]).double(), torch.eye(2).double()[None])
    two = clustered(2, one, data, 1e-4, generator())
    assert float(two.weights.sum()) == pytest.approx(1) and float(torch.linalg.eigvalsh(two.covs).min()) >= 1e-4
    density = lambda model: expect(model, data).log_likelihood.exp()  # noqa: E731
    torch.testing.assert_close(density(average([one, two])), (density(one) + density(two)) / 2)
    torch.testing.assert_close(density(average([one, two], [3.0, 1.0])), 0.75 * density(one) + 0.25 * density(two))


@pytest.mark.parametrize("mixed", [False, True])
def test_what_the_mixture_misses_is_learned(mixed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clouds at +-1 behind one Gaussian: E x^4 / (E x^2)^2 is 3 for the base and 1.16 for the truth. By fusion, and by moment matching."""
    monkeypatch.setattr("emdiff.components.COMPONENTS", 1)
    draw = generator()
    x = torch.sign(torch.randn(2000, 1, generator=draw)) * torch.tensor([[1.0, 0.0]]) + 0.2 * torch.randn(2000, 2, generator=draw)
    observer = Projection((2,), torch.tensor(0.3), torch.tensor([[[0.8, 0.6], [-0.6, 0.8]]])) if mixed else Identity((2,), torch.tensor(0.3))
    write_observations(tmp_path / "obs.npz", Observations(observer.simulate(x, draw), observer))
    small = ["--train.steps", "200", "--train.start-steps", "200", "--wandb", "off", "--device", "cpu", "--iters", "3", "--walk.levels", "16"]
    main(["fit", "--observations", str(tmp_path / "obs.npz"), "--out", str(tmp_path / "run"), *small])
    row = json.loads((tmp_path / "run/round_003/metrics.json").read_text())
    drawn = sample_prior(load_prior(tmp_path / "run/round_003/prior.safetensors"), 2000, generator(1), 32)[:, 0]
    assert row["restarted"] == 0 and max(row["departure_kept"]) > 0.5
    assert float(drawn.pow(4).mean() / drawn.square().mean() ** 2) < 1.7


def test_work_and_least_variance_follow_the_data() -> None:
    """n = .5 in each of 2 directions, 400 data: a tenth of n^2 / 20; shared operators cost no factorisation per datum."""
    data = Whitened(torch.eye(2).double()[None] / 0.5, torch.zeros(400, 2).double(), torch.zeros(400).double())
    assert least_variance(data) == pytest.approx(0.1 * 0.25 / 20)
    assert work(data._replace(A=data.A.expand(400, 2, 2)), 3) > 4 * work(data, 3)


def test_vectors_start_from_a_mixture_and_images_do_not() -> None:
    assert is_vector((128,)) and is_vector((4, 5)) and not is_vector((129,)) and not is_vector((8, 8))
    vectors, images = (Observations(torch.randn(9, *s), Identity(s, torch.tensor(0.5))) for s in ((5,), (8, 8)))
    assert choose_start(vectors).kind == "mixture" and choose_start(images).kind == "self-supervised"
    with pytest.raises(ValueError, match="at most 128 entries"):
        choose_start(images, "mixture")


def test_a_fit_of_a_gaussian_ends_with_its_maximum_likelihood_prior(tmp_path: Path) -> None:
    """Through the command, with a network that has nothing to learn: what is kept of it is little or nothing, and chi2 is 1."""
    data, x, _ = problem(1000, 0)
    write_observations(tmp_path / "obs.npz", data, x)
    small = ["--train.steps", "60", "--train.start-steps", "60", "--wandb", "off", "--device", "cpu", "--iters", "2"]
    main(["fit", "--observations", str(tmp_path / "obs.npz"), "--out", str(tmp_path / "run"), *small])
    start, *rounds = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert start["start"] == "mixture" and start["components"] == 1 and start["members"] == {"1": 1}
    for row in rounds:
        assert max(row["departure_kept"]) < 0.3 and abs(row["chi2"] - 1) < 0.06
