"""Fits whose noise is not known beforehand: an unknown level, and counts; and the commands that come after."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from emdiff.cli import main
from emdiff.data import Observations
from emdiff.noise import first_noise, with_level
from observers.instruments import Recipe, blur, identity, mask

SMALL = ["--train.steps", "150", "--train.start-steps", "300", "--walk.levels", "8", "--wandb", "off", "--device", "cpu"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plane(count: int) -> np.ndarray:
    """Vectors of 8 entries in a plane."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(count, 2)) @ rng.normal(size=(2, 8)) + 3).astype("float32")


def test_an_unknown_level_is_estimated_kept_near_the_truth_and_used_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    n, x = 0.4, plane(1500)
    obs = x + n * np.random.default_rng(1).normal(size=x.shape).astype("float32")
    np.savez("obs.npz", obs=obs, observer="identity", x=x)
    command = ["fit", "--observations", "obs.npz", "--noise-std", "auto", "--out", "run", *SMALL]
    main([*command, "--iters", "3"])
    assert "estimated from the observations, and by EM" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(row["noise_std"] == pytest.approx(n, rel=0.08) for row in rows) and rows[3]["noise_std"] != rows[1]["noise_std"]
    assert yaml.safe_load(Path("run/config.yaml").read_text())["noise_std"] == "auto"
    main([*command, "--iters", "4"])
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5, "a continued run takes the level of its last round"
    main(["reconstruct", "--run", "run", "--observations", "obs.npz", "--samples", "2", "--out", "r.npz", "--device", "cpu"])
    assert np.load("r.npz")["samples"].shape == (1500, 2, 8)


def test_counts_are_fitted_and_reconstructed_with_a_variance_of_their_own() -> None:
    x = np.exp(plane(600) / 3)
    obs = np.random.default_rng(1).poisson(x / 0.2).astype("float32") * 0.2
    np.savez("obs.npz", obs=obs, observer="identity", noise_gain=0.2, x=x)
    main(["fit", "--observations", "obs.npz", "--out", "run", "--iters", "2", *SMALL])
    row = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert 0.7 < row["chi2"] < 1.3 and row["error"] < np.square(obs - x).mean()
    main(["reconstruct", "--run", "run", "--observations", "obs.npz", "--samples", "2", "--out", "r.npz", "--device", "cpu"])
    mean = np.load("r.npz")["mean"]
    assert np.square(mean - x).mean() < np.square(obs - x).mean()


@pytest.mark.parametrize("recipe", [identity(), mask(keep=0.5), blur(sigma=1.5)], ids=str)
@pytest.mark.parametrize("n", [0.02, 0.3])
def test_the_first_estimate_is_near_on_smooth_images_with_a_dark_border(recipe: Recipe, n: float) -> None:
    rng = np.random.default_rng(0)
    i, j = np.mgrid[:20, :20]
    images = np.stack([np.exp(-((i - a) ** 2 + (j - b) ** 2) / 6) for a, b in rng.uniform(7, 12, (500, 2))]).astype("float32")
    draw = torch.Generator().manual_seed(1)
    observer = recipe.draw((20, 20), 500, n, draw)
    data = Observations(observer.simulate(torch.from_numpy(images), draw), observer)
    assert first_noise(with_level(data, 1.0)) == pytest.approx(n, rel=0.06)


def test_auto_is_refused_where_a_level_is_expected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--observations", "obs.npz", "--noise-std", "loud"])
    assert stop.value.code == 2 and "noise" in capsys.readouterr().err
