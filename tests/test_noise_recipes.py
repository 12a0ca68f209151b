r"""`emdiff observe` draws the noise that it is told: its moments, its file, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exact import normal
from torch import Tensor

from emdiff import commands_observe
from emdiff.cli import main
from emdiff.observations import read_observations
from observers.noise import Noise
from observers.noise_recipes import NoiseRecipe, counts, level, low_rank, per_datum, per_entry, stationary

N, O = 4000, (6, 4)
RECIPES: list[NoiseRecipe] = [
    level(),
    per_datum(spread=3.0),
    per_entry(spread=3.0),
    per_entry(shared=True),
    low_rank(rank=2),
    low_rank(shared=False),
    stationary(),
    counts(gain=0.1),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to work in, with clean data of 3 to 5."""
    monkeypatch.chdir(tmp_path)
    np.savez("clean.npz", x=(4 + torch.rand(50, *O, generator=torch.Generator().manual_seed(2)) * 2 - 1).numpy())


def draw(recipe: NoiseRecipe, count: int = N) -> Noise:
    return recipe.draw(O, count, 0.5, torch.Generator().manual_seed(0))


def everything(O: tuple[int, ...]) -> Tensor:
    return torch.ones([1] * (1 + len(O)), dtype=torch.bool)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not isinstance(r, counts)], ids=str)
def test_noise_has_the_covariance_that_its_law_says(recipe: NoiseRecipe) -> None:
    noise = draw(recipe)
    noise.check(O)
    r = noise.draw(torch.zeros(N, *O), everything(O), torch.Generator().manual_seed(1))
    white = noise.whiten(r, everything(O)).flatten(1).double()
    assert (white.T @ white / N - torch.eye(24, dtype=torch.float64)).abs().max() < 6 / N**0.5
    np.testing.assert_allclose((r / noise.std(O)).square().mean(0), 1, atol=6 * (2 / N) ** 0.5)


def test_levels_are_log_uniform_within_the_spread() -> None:
    for recipe in (per_datum(spread=3.0), per_entry(spread=3.0)):
        s = torch.log(draw(recipe).noise_std / 0.5) / torch.log(torch.tensor(3.0))
        assert s.abs().max() <= 1 and abs(float(s.mean())) < 6 * (1 / 3 / N) ** 0.5 and float(s.var()) == pytest.approx(1 / 3, rel=0.05)
    assert draw(per_datum()).noise_std.shape == (N,) and draw(per_entry(shared=True)).noise_std.shape == (1, *O)


def test_patterns_have_the_strength_that_was_asked_for_and_neighbours_are_correlated() -> None:
    F = low_rank(rank=4, strength=3.0).draw((4000,), 5, 0.5, torch.Generator().manual_seed(0)).noise_factor
    assert float(F.square().sum(2).mean()) == pytest.approx((3 * 0.5) ** 2, rel=0.05)
    r = stationary(length=2.0).draw((16, 16), 5, 0.5, torch.Generator()).draw(torch.zeros(500, 16, 16), everything((16, 16)))
    lag = [float((r * r.roll(k, 2)).mean() / r.square().mean()) for k in (1, 2, 8)]
    assert lag[0] > 0.5 and lag[0] > lag[1] > abs(lag[2]) and float(r.std()) == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_files_keep_the_law_also_where_they_are_made_in_parts(recipe: NoiseRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all data share is that of the first part, what is per datum is not repeated, and the residual is white."""
    monkeypatch.setattr(commands_observe, "BLOCK", 4 * 24 * 20)
    from observers.recipes import identity

    commands_observe.observe_command(Path("clean.npz"), identity(), recipe, 0.5, None, Path("obs.npz"), 0)
    read, x = read_observations("obs.npz"), torch.from_numpy(np.load("clean.npz")["x"])
    for name, tensor in read.observer.noise.tensors().items():
        per = tensor.ndim and len(tensor) == 50
        assert per or tensor.ndim == 0 or len(tensor) == 1, name
        assert not per or len(tensor.flatten(1).unique(dim=0) if tensor.ndim > 1 else tensor.unique()) == 50, name
    noise = read.observer.noise.at(x) if isinstance(recipe, counts) else read.observer.noise
    white = read.observer.with_noise(noise).whiten(read.obs - x)
    assert float(white.square().mean()) == pytest.approx(1, abs=6 * (2 / white.numel()) ** 0.5)
    kinds = {"level", "per_datum", "per_entry"}
    assert type(recipe).__name__ in kinds or type(read.observer.noise).__name__ != "Diagonal"


def test_the_command_line_draws_counts_without_read_out_noise() -> None:
    main(["observe", "--data", "clean.npz", "--noise-std", "0", "--noise", "counts", "--noise.gain", "0.1", "--out", "obs.npz"])
    with np.load("obs.npz") as made:
        np.testing.assert_allclose(made["obs"] / 0.1, np.round(made["obs"] / 0.1), atol=1e-3)
        assert made["noise_gain"] == np.float32(0.1) and made["noise_std"] == 0


def test_without_a_law_files_are_what_they_were() -> None:
    """White noise of one level draws nothing before the noise itself."""
    main(["observe", "--data", "clean.npz", "--noise-std", "0.5", "--out", "obs.npz"])
    from emdiff.streams import stream

    x = torch.from_numpy(np.load("clean.npz")["x"])
    expected = x + 0.5 * torch.randn(x.shape, generator=stream(0, "observe"))
    np.testing.assert_allclose(np.load("obs.npz")["obs"], expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--noise-std", "0"], ["--noise-std", "0"]),
        (["--noise-std", "0", "--noise", "per_datum"], ["--noise-std", "0"]),
        (["--noise-std", "1", "--noise", "per_datum", "--noise.spread", "1"], ["spread", "1"]),
        (["--noise-std", "1", "--noise", "low_rank", "--noise.rank", "0"], ["rank", "0"]),
        (["--noise-std", "1", "--noise", "low_rank", "--noise.strength", "0"], ["strength", "0"]),
        (["--noise-std", "1", "--noise", "stationary", "--noise.length", "-1"], ["length", "-1"]),
        (["--noise-std", "1", "--noise", "counts", "--noise.gain", "0"], ["gain", "0"]),
        (["--noise-std", "1", "--noise", "pink"], ["pink"]),
        (["--noise-std", "1", "--noise", "stationary", "--observer", "mask"], ["--noise stationary", "mask", "low_rank"]),
        (["--noise-std", "1", "--noise", "counts", "--observer", "projection"], ["--noise counts", "projection", "0 or more"]),
    ],
)
def test_noise_that_cannot_be_is_refused(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["observe", "--data", "clean.npz", "--out", "o.npz", *arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not Path("o.npz").exists() and not list(Path(".").glob("*.tmp"))


def test_means_of_normal_data_may_be_observed_with_any_noise_but_counts() -> None:
    np.savez("clean.npz", x=normal(6, 8).float().numpy())
    for recipe in RECIPES[:-1]:
        commands_observe.observe_command(Path("clean.npz"), commands_observe_identity(), recipe, 0.5, None, Path("obs.npz"), 0)
        assert np.isfinite(np.load("obs.npz")["obs"]).all()


def commands_observe_identity():
    from observers.recipes import identity

    return identity()
