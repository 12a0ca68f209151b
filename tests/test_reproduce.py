"""scripts/reproduce.py: Fig. 1 against differences; every other experiment runs on a small run, and its figures hold what they must."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from emdiff.cli import main

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with blobs that stand in for digits, and two trained runs."""
    path = tmp_path_factory.mktemp("reproduce")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:28, :28]
    images = np.stack([255 * np.exp(-((y - a) ** 2 + (x - b) ** 2) / 30) for a, b in rng.uniform(9, 19, (600, 2))]).astype(np.uint8)
    labels = rng.integers(0, 10, 600).astype(np.uint8)
    np.savez(path / "mnist.npz", train_images=images, train_labels=labels, test_images=images[:520], test_labels=labels[:520])
    small = ["--train.steps", "4", "--train.batch", "16", "--train.rounds", "1", "--pictures", "0", "--wandb", "off", "--device", "cpu"]
    small += ["--data", str(path / "mnist.npz")]
    main(["train", "--out", str(path / "pooled"), *small, "--model.widths", "[8]"])
    main(["train", "--out", str(path / "fixed"), *small, "--model.sigma", "[1.0]", "--model.measurements", "2",
          "--model.network", "u2net", "--model.width", "0.04"])  # fmt: skip
    return path


def reproduce(folder, monkeypatch, *arguments):
    """The figures that an experiment wrote."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import reproduce as script

    monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments), "--data", str(folder / "mnist.npz"), "--out", str(folder / "out")])
    script.main()
    return json.loads((folder / "out" / f"{arguments[0]}.json").read_text())


def test_figure_1_is_a_density_with_its_score(folder, monkeypatch):
    found = reproduce(folder, monkeypatch, "fig1")
    assert found["mass"] == pytest.approx(1, abs=2e-3) and found["score_against_differences"] < 1e-3 and found["permutation_gap"] < 1e-9
    assert (folder / "out" / "fig1.png").stat().st_size > 10_000


def test_single_step_outputs_and_losses(folder, monkeypatch):
    for run in ("pooled", "fixed"):
        found = reproduce(folder, monkeypatch, "fig5", "--run", folder / run)
        M = 4 if run == "pooled" else 2
        assert found["measurements"] == M and found["plug_in_error"] == pytest.approx(784 / M, rel=0.02)
        assert (found["outputs_variance"] < 1e-8 * found["outputs_error"]) == (run == "pooled")
        found = reproduce(folder, monkeypatch, "losses", "--run", folder / run)
        assert {"train_1x16_quarter_1x1" if run == "pooled" else "train_own"} <= found.keys()


def test_chains_and_quality(folder, monkeypatch):
    few = ["--run", folder / "pooled", "--steps", 16, "--every", 4, "--count", 520, "--levels", 3]
    assert {"1x1", "1x2", "1x4", "1x16"} <= reproduce(folder, monkeypatch, "fig7", *few).keys()
    found = reproduce(folder, monkeypatch, "more", *few)
    assert found["quarter_1x1"]["jumps"] == found["1x16"]["jumps"] == 4 and found["quarter_1x1"]["sigma"] == 0.25
    found = reproduce(folder, monkeypatch, "lifelong", *few)
    assert found["restarts"] == 0 and found["steps_per_second"] > 0
    assert len(found["peak_mb_by_fifth"]) == 4 and sorted(found["peak_mb_by_fifth"]) == found["peak_mb_by_fifth"]
    assert {"pooled", "fixed"} <= reproduce(folder, monkeypatch, "muvb", *few, "--rival", folder / "fixed").keys()
    found = reproduce(folder, monkeypatch, "quality", *few, "--chain", folder / "out" / "lifelong.npz")
    assert found["test_digits"]["frechet"] < found["samples"]["frechet"] and found["chain"]["count"] == 4
