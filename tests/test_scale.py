r"""The scale of data is read off their observations alone, and standardised observations are those of standardised data."""

from __future__ import annotations

import json

import pytest
import torch
from exact import normal, observer, uniform

from emdiff import rows
from emdiff.errors import UsageError
from emdiff.observations import Observations
from emdiff.scale import Scale, estimate_scale
from observers import Identity, Mask, Observer, build

N, S, d = 4000, (2, 3), 6
names = pytest.mark.parametrize("name", ["identity", "mask", "projection"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)  # apart from the seeds of `normal` and `uniform`


def scaled(name: str, std: float) -> Observer:
    """Per-datum operators; per-datum noise of .3 to 1.3 standard deviations of x."""
    made = observer(name, N, S)
    return made.with_noise(made.noise_std * std)


@names
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (1e5, 3e4), (0.2, 0.007)])
def test_mean_and_std_of_white_data_are_recovered_in_their_own_units(monkeypatch: pytest.MonkeyPatch, name: str, mean: float, std: float) -> None:
    """Some 12,000 observed entries or more, of noise as large as x: standard errors below 1 and .8 % of std."""
    monkeypatch.setattr(rows, "ENTRIES", 700 * d)
    made = scaled(name, std)
    data = Observations(made.simulate(mean + std * normal(N, *S), generator(1)), made)
    got = estimate_scale(data, generator())
    assert (got.mean - mean) / std == pytest.approx(0, abs=0.05)
    assert got.std / std == pytest.approx(1, abs=0.04)


def test_with_complete_observations_these_are_the_plain_moments() -> None:
    made = Identity(S, torch.tensor(0.7, dtype=torch.float64))
    obs = 3 + 2 * normal(200, *S)
    got = estimate_scale(Observations(obs, made), generator())
    assert got.mean == pytest.approx(obs.mean().item(), rel=1e-12)
    assert got.std == pytest.approx((obs.var(unbiased=False).item() - 0.49) ** 0.5, rel=1e-12)


def test_hidden_entries_count_neither_as_data_nor_as_noise() -> None:
    seen = uniform(200, *S, seed=3) < 0.5
    made = Mask(S, torch.tensor(0.7, dtype=torch.float64), seen)
    obs = torch.where(seen, 3 + 2 * normal(200, *S), 0.0)
    got = estimate_scale(Observations(obs, made), generator())
    assert got.mean == pytest.approx(obs[seen].mean().item(), rel=1e-12)
    assert got.std == pytest.approx((obs[seen].var(unbiased=False).item() - 0.49) ** 0.5, rel=1e-12)


@names
def test_a_noise_that_explains_all_the_variation_is_refused(name: str) -> None:
    made = scaled(name, 1.0)
    data = Observations(made.simulate(normal(N, *S), generator(1)), made.with_noise(20 * made.noise_std))
    with pytest.raises(UsageError, match="leaves no signal to learn: .* --noise-std"):
        estimate_scale(data, generator())


@names
def test_standardised_observations_are_those_of_standardised_data(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """(obs - A mean) / std = A (x - mean) / std + n / std, entry by entry, and the noise level follows."""
    monkeypatch.setattr(rows, "ENTRIES", 7 * d)
    made, x, by = observer(name, 20, S), 5 + 3 * normal(20, *S), Scale(4.0, 2.5)
    obs = made.simulate(x, generator(1))
    n = obs - made.forward(x)
    new = by.observations(Observations(obs, made))
    torch.testing.assert_close(new.obs, made.forward(by.standardise(x)) + n / 2.5)
    torch.testing.assert_close(new.observer.std(), made.std() / 2.5)
    assert (new.obs[~made.observed().expand(obs.shape)] == 0).all()
    torch.testing.assert_close(by.restore(by.standardise(x)), x)
    torch.testing.assert_close(by.standardise(torch.tensor([4.0, 6.5])), torch.tensor([0.0, 1.0]))


CHANNELS = torch.tensor([[-3.0, 2.0], [1e3, 40.0], [0.5, 0.02]], dtype=torch.float64)
"""Mean and std of three channels."""


def coloured(unit: float = 1.0, seed: int = 0) -> torch.Tensor:
    """White data (600, 3, 6, 5) with those means and stds."""
    mean, std = (unit * CHANNELS[:, i].reshape(3, 1, 1) for i in (0, 1))
    return mean + std * normal(600, 3, 6, 5, seed=seed)


@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e6])
@pytest.mark.parametrize("kind", ["identity", "mask", "blur", "downsample"])
def test_channels_of_different_scale_have_a_mean_and_std_each(kind: str, unit: float) -> None:
    """Noise of a tenth of the smallest std; float32, in which 1e-9 squared and summed would lose everything."""
    arrays = {"mask": {"mask": uniform(600, 3, 6, 5, seed=3) < 0.5}, "blur": {"psf": torch.ones(1, 3, 3) / 9}}.get(kind, {})
    made = build(kind, (3, 6, 5), arrays, torch.tensor(0.002 * unit))
    obs = made.simulate(coloured(unit).float(), generator(1))
    got = estimate_scale(Observations(obs, made), generator())
    assert got.space == 2 and len(got.channels) == 3
    for (mean, std), (m, s) in zip(got.channels, (unit * CHANNELS).tolist()):
        assert mean == pytest.approx(m, abs=0.1 * s) and std == pytest.approx(s, rel=0.1)
    assert Scale.of(json.loads(json.dumps(list(got)))) == got


def test_channels_that_are_alike_share_one_scale() -> None:
    made = Identity((3, 6, 5), torch.tensor(0.5))
    obs = made.simulate(normal(300, 3, 6, 5).float(), generator(1))
    assert estimate_scale(Observations(obs, made), generator()).channels == ()


@pytest.mark.parametrize("kind", ["identity", "mask", "blur"])
def test_standardised_observations_with_channels_are_those_of_standardised_data(kind: str) -> None:
    arrays = {"mask": {"mask": uniform(20, 3, 6, 5, seed=3) < 0.5}, "blur": {"psf": normal(20, 3, 3)}}.get(kind, {})
    made, x = build(kind, (3, 6, 5), arrays, torch.tensor(0.1, dtype=torch.float64)), coloured()[:20]
    by = Scale(5.0, 20.0, tuple((m, s) for m, s in CHANNELS.tolist()), 2)
    torch.testing.assert_close(by.restore(by.standardise(x)), x)
    assert by.standardise(coloured()).std((0, 2, 3)) == pytest.approx([1, 1, 1], abs=0.02)
    obs = made.simulate(x, generator(1))
    new = by.observations(Observations(obs, made))
    n = (obs - made.forward(x)) / 20
    torch.testing.assert_close(new.obs, new.observer.forward(by.standardise(x)) + n, rtol=1e-7, atol=1e-9)
    z = new.observer.as_measurement(new.obs)
    if kind == "blur":
        assert z is None
        return
    seen = z[1].isfinite().expand(obs.shape)
    torch.testing.assert_close(z[0][seen], by.standardise(obs)[seen])
    torch.testing.assert_close((z[1] * CHANNELS[:, 1].reshape(3, 1, 1)).expand(obs.shape)[seen], torch.full_like(obs[seen], 0.1))
    torch.testing.assert_close(new.rows(slice(3, 5)).observer.forward(x[3:5]), new.observer.forward(x)[3:5])


@pytest.mark.parametrize("unit", [1e-9, 1e6, 1e-20])
def test_the_unit_of_the_data_changes_nothing_but_the_unit(unit: float) -> None:
    x = (normal(500, *S) - 2).float()
    made = [Identity(S, torch.tensor(0.5 * u)) for u in (1.0, unit)]
    plain, scaled_ = (estimate_scale(Observations(m.simulate(u * x, generator(1)), m), generator()) for m, u in zip(made, (1.0, unit)))
    assert scaled_.mean == pytest.approx(unit * plain.mean, rel=1e-5) and scaled_.std == pytest.approx(unit * plain.std, rel=1e-5)
