r"""Self-supervised starts: recorrupted observations are as good as clean targets, and first samples have the posterior's law."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import SIGMA, UnitNoise, covariance, dense, noise_variance, normal, observer, posterior, uniform
from torch import Tensor

from emdiff.cli import main
from emdiff.denoise import GaussianDenoiser
from emdiff.first_samples import SPREAD, Deviations, deviations, first_samples, hidden_variance
from emdiff.observations import Observations, write_observations
from emdiff.start import antithetic, choose_start, recorrupt, self_supervised_loss
from emdiff.training import train
from observers import Identity, Mask, Observer, Projection

S, d = (2, 3), 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)  # apart from the seeds of `normal` and `uniform`


def sigma_of(count: int) -> Tensor:
    """Levels per datum and entry."""
    return 0.3 + uniform(count, *S, seed=1)


def test_input_and_target_share_one_noise_and_scale_it_oppositely() -> None:
    """y - z = a w, z - target = w / a, with the level sigma_z sqrt(1 + a^2) and the target's variance in the weight."""
    count = 500
    z, sigma = normal(count, *S), sigma_of(count)
    batch = recorrupt(z, sigma, generator())
    a = (batch.sigma[:, 0] / sigma).square().sub(1).sqrt()
    torch.testing.assert_close(a, a[:, :1, :1].expand(a.shape), rtol=1e-6, atol=1e-6)
    assert a.min() >= 0.05 - 1e-6 and a.max() <= 2 + 1e-6 and a.min() < 0.07 and a.max() > 1.8
    torch.testing.assert_close(batch.y[:, 0] - z, a.square() * (z - batch.target), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(batch.weight, 1 / (sigma.square() * (1 + a.clamp(min=1) ** -2) + 0.5))
    w = (batch.y[:, 0] - z) / a / sigma
    assert abs(w.square().mean().item() - 1) < 5 * math.sqrt(2 / w.numel())


def test_the_noises_of_input_and_target_are_uncorrelated_with_the_stated_levels() -> None:
    count = 40_000
    x, sigma = normal(1, *S).expand(count, *S), sigma_of(1)
    batch = recorrupt(x + sigma * normal(count, *S, seed=2), sigma, generator(), (0.5, 2.0))
    a2 = (batch.sigma[:, 0] / sigma).square() - 1
    into = (batch.y[:, 0] - x) / batch.sigma[:, 0]
    out = (batch.target - x) / (sigma * torch.sqrt(1 + 1 / a2))
    error = 5 / math.sqrt(count)
    assert (into.mean(0).abs() < error).all() and (out.mean(0).abs() < error).all(), "both are unbiased"
    assert ((into.square().mean(0) - 1).abs() < 1.5 * error).all() and ((out.square().mean(0) - 1).abs() < 1.5 * error).all()
    assert ((into * out).mean(0).abs() < error).all()


def masked(count: int) -> tuple[Tensor, Tensor]:
    """Observations as measurements, and levels, some infinite."""
    seen = uniform(count, *S, seed=3) < 0.6
    return torch.where(seen, normal(count, *S), 0.0), torch.where(seen, sigma_of(count), math.inf)


def test_hidden_entries_are_targets_as_they_are_and_tell_the_input_nothing() -> None:
    count = 20_000
    z, sigma = masked(count)
    batch = recorrupt(z, sigma, generator(), (0.15, 6.0))
    seen, into = sigma.isfinite(), batch.sigma[:, 0].isfinite()
    assert not (into & ~seen).any() and (batch.y[:, 0][~into] == 0).all()
    assert (batch.weight > 0).equal(seen) and batch.target.isfinite().all() and batch.y.isfinite().all()
    hidden = seen & ~into
    torch.testing.assert_close(batch.target[hidden], z[hidden])
    torch.testing.assert_close(batch.weight[hidden], 1 / (sigma[hidden].square() + 0.5))
    a2 = (batch.sigma[:, 0] / sigma).square() - 1
    assert a2[into].min() == pytest.approx(0.15**2, rel=0.05) and a2[into].max() == pytest.approx(36, rel=0.05)
    torch.testing.assert_close((batch.y[:, 0] - z)[into], (a2 * (z - batch.target))[into])
    share = hidden.flatten(1).sum(1) / seen.flatten(1).sum(1).clamp(min=1)
    assert share.mean().item() == pytest.approx(0.5, abs=0.02) and share.min() == 0 and share.max() == 1


def test_both_signs_of_w_share_levels_and_hidden_entries_and_their_means_are_the_observation() -> None:
    z, sigma = masked(500)
    batch = antithetic(recorrupt(z, sigma, generator()), z)
    one, other = (part.chunk(2) for part in (batch.y[:, 0], batch.target))
    seen, into = sigma.isfinite(), batch.sigma[:500, 0].isfinite()
    assert torch.equal(batch.sigma[:500], batch.sigma[500:]) and torch.equal(batch.weight[:500], batch.weight[500:])
    torch.testing.assert_close((one[0] + one[1])[into] / 2, z[into])
    torch.testing.assert_close((other[0] + other[1])[seen] / 2, z[seen])
    assert (one[0] - one[1])[into].abs().min() > 0 and not one[1][~into].any()


def test_the_gradient_of_both_signs_is_steins_and_stays_quiet_near_the_observations() -> None:
    """xhat = k y, k scalar: d/dk of the mean of both losses is 2 (k (z^2 + a^2 w^2) - z^2 + w^2) against 2 (z + a w)(k (z + a w) - z + w / a), whose
    variance grows as 1/a^2. Their mean is that of Stein's estimate, 2 ((k - 1) E z^2 + sigma^2) as a -> 0."""
    count, a, k = 20_000, 0.01, 0.7
    x, sigma = normal(count, 1), torch.full((count, 1), SIGMA, dtype=torch.float64)
    z = x + SIGMA * normal(count, 1, seed=1)
    batch = recorrupt(z, sigma, generator(), (a, a))
    slope = lambda b: 2 * (b.y[:, 0] * (k * b.y[:, 0] - b.target))[:, 0]  # noqa: E731
    both = slope(antithetic(batch, z)).chunk(2)
    stein = 2 * float(((k - 1) * z.square() + SIGMA**2).mean())
    mean = (both[0] + both[1]) / 2
    assert mean.mean().item() == pytest.approx(stein, abs=6 * float(mean.std()) / math.sqrt(count))
    assert float(mean.std()) < 0.05 * float(slope(batch).std())


def regression(inputs: Tensor, targets: Tensor) -> Tensor:
    """The least-squares map (d_out, d_in)."""
    return torch.linalg.lstsq(inputs, targets).solution.T


def test_the_minimiser_on_a_gaussian_is_the_bayes_estimator_of_the_clean_x() -> None:
    """E[x | input] = S (S + sigma^2 (1 + a^2) I)^-1 input, by regression on 100,000 draws."""
    count, a = 100_000, 0.6
    S2 = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    x = normal(count, 2) @ torch.linalg.cholesky(S2).T
    sigma = torch.tensor([[SIGMA]], dtype=torch.float64)
    batch = recorrupt(x + SIGMA * normal(count, 2, seed=1), sigma, generator(), (a, a))
    total = S2 + SIGMA**2 * (1 + a**2) * torch.eye(2, dtype=torch.float64)
    expected = S2 @ torch.linalg.inv(total)
    error = 5 * math.sqrt((1 + SIGMA**2 * (1 + a**-2)) / count / float(torch.linalg.eigvalsh(total)[0]))
    assert (regression(batch.y[:, 0], batch.target) - expected).abs().max() < error < 0.05


def test_the_minimiser_with_hidden_entries_predicts_them_from_the_rest() -> None:
    """Entry 1 hidden, entry 0 visible with one a: E[x_1 | input_0] = S_10 / (S_00 + sigma^2 (1 + a^2)) input_0."""
    count, a = 100_000, 0.6
    S2 = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    x = normal(count, 2) @ torch.linalg.cholesky(S2).T
    seen = uniform(count, 2, seed=3) < 0.7
    sigma = torch.where(seen, torch.tensor(SIGMA, dtype=torch.float64), math.inf)
    z = torch.where(seen, x + SIGMA * normal(count, 2, seed=1), 0.0)
    batch = recorrupt(z, sigma, generator(), (a, a))
    rows = seen[:, 1] & batch.sigma[:, 0, 1].isinf() & batch.sigma[:, 0, 0].isfinite()
    slope = regression(batch.y[rows, 0, :1], batch.target[rows, 1:]).item()
    assert rows.sum() > 5000 and slope == pytest.approx(0.6 / (1 + SIGMA**2 * (1 + a**2)), abs=5 * math.sqrt(1.5 / int(rows.sum())))


def test_the_bayes_estimator_has_the_least_self_supervised_loss() -> None:
    """Masks and per-datum noise; the loss averages over the entries that were observed."""
    count = 20_000
    prior = GaussianDenoiser.from_covariance(torch.zeros(S, dtype=torch.float64), covariance(d))
    made = Mask(S, 0.3 + uniform(count, seed=4), uniform(count, *S, seed=3) < 0.6)
    batch = recorrupt(*made.as_measurement(made.simulate(prior.sample(count, generator(1)), generator(2))), generator(3))
    error = (batch.weight * (prior.xhat(batch.y, batch.sigma) - batch.target).square())[made.mask]
    least = self_supervised_loss(prior, batch).item()
    assert least == pytest.approx(error.mean().item())
    for factor in (0.6, 1.6):
        other = GaussianDenoiser.from_covariance(prior.mean, factor * covariance(d))
        assert self_supervised_loss(other, batch).item() > least
    shifted = GaussianDenoiser.from_covariance(prior.mean + 0.2, covariance(d))
    assert self_supervised_loss(shifted, batch).item() > least


def chosen(made, wanted: str = "auto") -> str:
    return choose_start(Observations(normal(5, *made.obs_shape), made), wanted).kind


def test_the_start_is_self_supervised_where_parts_of_observations_predict_each_other() -> None:
    noise = torch.tensor(SIGMA, dtype=torch.float64)
    large = (12, 12)
    seen = uniform(5, *large, seed=3) < 0.6
    assert chosen(Identity(large, noise)) == chosen(observer("identity", 5, large)) == "self-supervised"
    assert chosen(Mask(large, noise, seen)) == chosen(Mask(large, noise, torch.ones(1, *large))) == "self-supervised"
    assert chosen(Mask(large, noise, seen[:1])) == chosen(Mask(large, noise, seen[:1].expand(5, *large))) == "gaussian"
    assert chosen(observer("projection", 5, large)) == "gaussian"
    seen = uniform(5, *S, seed=3) < 0.6
    assert chosen(Mask(S, noise, seen)) == chosen(observer("projection", 5, S)) == "mixture"
    assert chosen(Identity(S, noise), "gaussian") == "gaussian"
    for made in (Projection(S, noise, normal(1, 4, d)), Mask(S, noise, seen[:1])):
        with pytest.raises(ValueError, match="no objective here: .*; use --start gaussian or auto"):
            chosen(made, "self-supervised")


def test_first_samples_of_a_gaussian_have_its_posterior_as_their_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sampling: from zero noise and unit noises, with enough products for V^(1/2) to be exact."""
    monkeypatch.setattr("emdiff.first_samples.LANCZOS", 8)
    prior = GaussianDenoiser.from_covariance(normal(*S, seed=7), covariance(d))
    obs, mean, V, one = first_posterior(prior, "identity")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", UnitNoise(1))
        x = first_samples(prior, Observations(obs.expand(1 + d, *S), one), None).flatten(1)
    L = x[1:] - x[:1]
    torch.testing.assert_close(x[0], torch.from_numpy(mean), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(L.T @ L, torch.from_numpy(V), rtol=1e-3, atol=1e-4)


class Shrunk(torch.nn.Module):
    """xhat = k y, with the posterior covariance that its slope stands for."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    def xhat(self, y: Tensor, sigma: Tensor) -> Tensor:
        return self.k * y[:, 0]

    def moments(self, y: Tensor, sigma: Tensor):
        return self.xhat(y, sigma), lambda v: sigma[:, 0].square() * self.k * v


@pytest.mark.parametrize("k", [0.6, 0.7, 0.75, 0.9])
def test_first_samples_deviate_by_the_error_of_the_estimator(k: float) -> None:
    """x of variance 1.5 in noise of variance .5: k = .75 is the best slope; the error of any is (1 - k)^2 1.5 + k^2 .5. Seven standard errors, and
    no truth is looked at."""
    count, n2 = 20_000, 0.5
    x = 1.5**0.5 * normal(count, 5, seed=1)
    one = Identity((5,), torch.tensor(n2**0.5, dtype=torch.float64))
    data = Observations(one.simulate(x, generator(2)), one)
    by = deviations(Shrunk(k), [data.rows(slice(0, 15_000)), data.rows(slice(15_000, count))], generator(3))
    error = (1 - k) ** 2 * 1.5 + k**2 * n2
    assert by.v == 0 and by.c**2 == pytest.approx(error / (k * n2), abs=7 * math.sqrt(2 / (5 * count)) / k)
    deviation = first_samples(Shrunk(k), data, generator(4), by) - k * data.obs
    assert float(deviation.square().mean()) == pytest.approx(error, rel=0.03)


def test_what_deviations_are_scaled_by_is_bounded_and_where_entries_are_missing_the_variance_of_hidden_ones() -> None:
    one = Identity((5,), torch.tensor(0.5, dtype=torch.float64))
    data = Observations(100 * normal(50, 5), one)
    assert deviations(Shrunk(0.01), [data], generator()) == (SPREAD[1] ** 0.5, 0)
    prior = equicorrelated(0.8)
    data, _ = half_seen(prior, 4000)
    both = [data.rows(slice(0, 3000)), data.rows(slice(3000, 4000))]
    g = generator(9)
    assert deviations(prior, both, generator(9)) == (1, (hidden_variance(prior, both[0], g) + hidden_variance(prior, both[1], g)) / 2)


def half_seen(prior: GaussianDenoiser, count: int, n: float = 0.3) -> tuple[Observations, Tensor]:
    """Data of a Gaussian on two entries seen and two unseen of its four, in an order of each datum's own; and which were seen."""
    seen = uniform(count, 4, seed=11).argsort(1) < 2
    made = Mask((4,), torch.tensor(n, dtype=torch.float64), seen)
    return Observations(made.simulate(prior.sample(count, generator(7)), generator(8)), made), seen


def equicorrelated(rho: float) -> GaussianDenoiser:
    zero, one = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    return GaussianDenoiser.from_covariance(zero, 2 * (rho * torch.ones_like(one) + (1 - rho) * one))


def test_hidden_entries_tell_the_variance_of_an_entry_given_the_others() -> None:
    """Entries hidden one at a time, of two seen: the variance given the other one, S_11 - S_12^2/(S_22 + n^2); 5 standard errors."""
    for rho in (0.0, 0.8):
        prior, count = equicorrelated(rho), 40_000
        data, _ = half_seen(prior, count)
        v = hidden_variance(prior, data, generator(9), 0.01)
        expected = 2 - (2 * rho) ** 2 / (2 + 0.09)
        assert v == pytest.approx(expected, abs=5 * (expected + 0.09) * math.sqrt(2 / (0.01 * 2 * count)) + 0.02)


@pytest.mark.parametrize("count", [1, 3])
def test_the_variance_of_hidden_entries_is_a_number_for_next_to_no_data(count: int) -> None:
    """Of two to six entries seen a twentieth is none."""
    data, _ = half_seen(equicorrelated(0.8), count)
    found = [hidden_variance(equicorrelated(0.8), data, generator(seed)) for seed in range(20)]
    assert all(0 <= v < math.inf for v in found) and max(found) > 0


def test_deviations_of_first_samples_have_the_stated_variance_and_the_structure_of_the_posterior() -> None:
    prior, v, n, count = equicorrelated(0.8), 0.7, 0.3, 40_000
    data, seen = half_seen(prior, count, n)
    xhat, x = first_samples(prior, data), first_samples(prior, data, generator(9), Deviations(v=v))
    gap = x - xhat
    A = torch.eye(4, dtype=torch.float64)[:2]
    S = prior.covariance()
    V = S - S @ A.T @ torch.linalg.inv(A @ S @ A.T + n**2 * torch.eye(2, dtype=torch.float64)) @ A @ S
    assert gap[~seen].square().mean().item() == pytest.approx(v, rel=1e-6)
    assert gap[seen].square().mean().item() == pytest.approx(V[0, 0].item(), abs=5 * n**2 * math.sqrt(2 / (2 * count)))
    assert (gap.mean(0).abs() < 5 * gap.std(0) / math.sqrt(count)).all(), "the mean of a sample is the estimate"
    belief = (V[2, 3] / V[2, 2]).item()
    assert torch.corrcoef(gap[~seen].reshape(-1, 2).T)[0, 1].item() > 0.9 > belief > 0.2, "one factor: what a measurement would move moves together"


def test_first_samples_with_missing_entries_and_no_deviation_are_the_posterior_mean() -> None:
    prior = GaussianDenoiser.from_covariance(normal(*S, seed=7), covariance(d))
    obs, mean, _, one = first_posterior(prior, "mask")
    torch.testing.assert_close(first_samples(prior, Observations(obs, one)).flatten(), torch.from_numpy(mean), rtol=1e-6, atol=1e-7)


def first_posterior(prior: GaussianDenoiser, name: str) -> tuple[Tensor, np.ndarray, np.ndarray, Observer]:
    """An observation (1, *O) of the prior's, its dense posterior mean and covariance, its observer."""
    one = observer(name, 3, S).rows(slice(1, 2))
    obs = one.simulate(prior.sample(1, generator()), generator(1))
    A, R = dense(one, 1)[0].numpy(), torch.diag(noise_variance(one, 1)[0]).numpy()
    mean, V, _ = posterior(prior.mean.flatten().numpy(), prior.covariance().numpy(), A, R, obs.flatten().numpy())
    return obs, mean, V, one


def test_the_start_of_a_fit_has_both_signs_in_each_batch_and_a_rate_that_ends_at_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, rates = [], []

    def loss(denoiser, batch):
        one, other = batch.y.chunk(2)
        seen.append(len(batch.y) == 8 and torch.equal(*batch.sigma.chunk(2)) and not torch.equal(one, other))
        return self_supervised_loss(denoiser, batch)

    def trained(*arguments, **more):
        rates.append(arguments[-1])
        return train(*arguments, **more)

    monkeypatch.setattr("emdiff.firsts.self_supervised_loss", loss)
    monkeypatch.setattr("emdiff.firsts.train", trained)
    x = 1 + normal(100, 3).float()
    write_observations(tmp_path / "obs.npz", Observations(x, Identity((3,), torch.tensor(0.5))))
    short = ["--train.steps", "2", "--train.start-steps", "4", "--train.batch", "8", "--walk.levels", "3", "--wandb", "off", "--device", "cpu"]
    start = ["--start", "self-supervised", "--iters", "1"]
    main(["fit", "--observations", str(tmp_path / "obs.npz"), "--out", str(tmp_path / "run"), *start, *short])
    assert len(seen) == 4 and all(seen) and rates[0].anneal


@pytest.mark.parametrize("missing", [False, True])
def test_the_start_of_a_fit_hides_observed_entries_where_some_are_missing_and_only_there(tmp_path: Path, monkeypatch, missing: bool) -> None:
    hidden = []

    def loss(denoiser, batch):
        hidden.append(bool((batch.sigma[:, 0].isinf() & (batch.weight > 0)).any()))
        return self_supervised_loss(denoiser, batch)

    monkeypatch.setattr("emdiff.firsts.self_supervised_loss", loss)
    x, g = normal(60, 4, 4).float(), generator(5)
    seen = torch.rand(60, 4, 4, generator=g) < (0.5 if missing else 2.0)
    made = Mask((4, 4), torch.tensor(0.2), seen)
    write_observations(tmp_path / "obs.npz", Observations(made.simulate(x, g), made))
    short = ["--train.steps", "2", "--train.start-steps", "4", "--train.batch", "16", "--walk.levels", "3", "--wandb", "off", "--device", "cpu"]
    main(["fit", "--observations", str(tmp_path / "obs.npz"), "--out", str(tmp_path / "run"), "--start", "self-supervised", "--iters", "1", *short])
    assert len(hidden) == 4 and all(h == missing for h in hidden)


@pytest.mark.parametrize(
    "start, batch, shares",
    [
        ("self-supervised", 32, [1 / 2, 1 / 3, 1 / 4, 1 / 4]),
        ("self-supervised", 64, [1 / 2] * 4),
        ("self-supervised", 128, [1] * 4),
        ("gaussian", 32, [1] * 4),
    ],
)
def test_rates_of_small_batches_fall_after_a_start_that_leaves_a_trained_network(start, batch, shares, tmp_path: Path, monkeypatch) -> None:
    rates = []

    def trained(denoiser, loss, count, steps, batch, rate, *more, **named):
        rates.append(rate)
        return train(denoiser, loss, count, steps, batch, rate, *more, **named)

    monkeypatch.setattr("emdiff.rounds.train", trained)
    write_observations(tmp_path / "obs.npz", Observations(1 + normal(100, 3).float(), Identity((3,), torch.tensor(0.5))))
    short = ["--train.steps", "2", "--train.start-steps", "4", "--train.rate", "0.01", "--walk.levels", "3", "--wandb", "off", "--device", "cpu"]
    short += ["--train.batch", str(batch)]
    main(["fit", "--observations", str(tmp_path / "obs.npz"), "--out", str(tmp_path / "run"), "--start", start, "--iters", "4", *short])
    assert rates == pytest.approx([0.01 * share for share in shares])


def test_first_samples_of_a_fit_deviate_where_entries_are_missing(tmp_path: Path) -> None:
    """Smooth fields, half of the entries seen: an untrained estimate is 0, and samples vary as the data do."""
    g = generator(3)
    x = (torch.randn(200, 1, 4, generator=g) * torch.ones(200, 4, 4)).float()
    one = Mask((4, 4), torch.tensor(0.2), torch.rand(200, 4, 4, generator=g) < 0.5)
    write_observations(tmp_path / "obs.npz", Observations(one.simulate(x, g), one))
    short = ["--train.steps", "2", "--train.start-steps", "150", "--walk.levels", "3", "--wandb", "off", "--device", "cpu"]
    main(["fit", "--observations", str(tmp_path / "obs.npz"), "--out", str(tmp_path / "run"), "--start", "self-supervised", "--iters", "1", *short])
    row = json.loads((tmp_path / "run/start/metrics.json").read_text())
    samples = np.load(tmp_path / "run/start/samples.npy")
    assert row["start_factor"] == 1 and 0 < row["start_variance"] < 1.5
    assert 0.8 < float(samples.std()) < 1.2
