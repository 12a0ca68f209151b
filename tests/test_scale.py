r"""The scale of data is read off their observations alone, and standardised observations are those of standardised data."""

from __future__ import annotations

import pytest
import torch
from exact import normal, observer, uniform

from emdiff import rows
from emdiff.errors import UsageError
from emdiff.observations import Observations
from emdiff.scale import Scale, estimate_scale
from observers import Identity, Mask, Observer

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
