"""The command line as a user meets it: whole runs on small data, and every kind of bad input ends with status 2 and one useful line."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from emdiff.cli import dashes, main
from observers import REGISTRY

SMALL = ["--train.steps", "20", "--train.start-steps", "30", "--walk.levels", "6", "--wandb", "off", "--device", "cpu"]
COV = np.array([[1.0, 0.6, 0.0], [0.6, 1.0, 0.3], [0.0, 0.3, 0.5]])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def vectors(path="obs.npz", n=200, **changes):
    """A file of noisy 3-vectors."""
    rng = np.random.default_rng(0)
    x = 5 + rng.multivariate_normal(np.zeros(3), COV, n).astype("float32")
    fields = {"obs": x + 0.4 * rng.standard_normal(x.shape).astype("float32"), "observer": "identity", "noise_std": 0.4, "x": x, **changes}
    np.savez(path, **{k: v for k, v in fields.items() if v is not None})
    return path


def refused(capsys, *arguments):
    """The one line with which a command ends with status 2, and which leaves no run behind."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    assert not Path("runs").exists()
    return lines[0]


def folder_state(path):
    """Names and contents of a folder."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}


def test_a_whole_session_on_images():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:9, :8]
    images = np.stack([np.exp(-((y - a) ** 2 + (x - b) ** 2) / 4) for a, b in rng.uniform(2, 6, (120, 2))]).astype("float32")
    np.savez("clean.npz", x=images)
    main(["observe", "--data", "clean.npz", "--observer", "mask", "--observer.keep", "0.6", "--noise-std", "0.1", "--out", "obs.npz"])
    main(["fit", "--observations", "obs.npz", "--iters", "2", "--out", "run", *SMALL])
    main(["sample", "--run", "run", "--count", "5", "--levels", "4", "--out", "s.npz", "--device", "cpu"])
    main(["reconstruct", "--run", "run", "--observations", "obs.npz", "--samples", "3", "--out", "r.npz", "--device", "cpu"])
    with np.load("s.npz") as s, np.load("r.npz") as r:
        assert s["x"].shape == (5, 9, 8) and np.isfinite(s["x"]).all()
        assert r["samples"].shape == (120, 3, 9, 8)
        np.testing.assert_allclose(r["mean"], r["samples"].mean(1), atol=1e-5)
        np.testing.assert_allclose(r["std"], r["samples"].std(1, ddof=1), atol=1e-5)
        before = np.square(np.load("run/start/samples.npy") - images).mean()
        assert before < images.var()
    names = {p.name for p in Path("run/figures").iterdir()}
    assert {"prior_002.png", "samples_000.png", "rows_002.png", "progress.png"} <= names and Path("s.png").stat().st_size > 1000
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["iter"] for row in rows] == [0, 1, 2] and all(np.isfinite(row["error"]) for row in rows)
    assert {"chi2", "observation_agreement", "seconds_e", "seconds_m", "restarted"} <= rows[2].keys()


@pytest.mark.parametrize("observer", ["projection"])
def test_an_observer_that_mixes_entries_is_fitted_with_cg(observer, capsys):
    vectors("clean.npz")
    main(["observe", "--data", "clean.npz", "--observer", observer, "--noise-std", "0.1", "--out", "obs.h5"])
    main(["fit", "--observations", "obs.h5", "--iters", "2", "--out", "run", "--start", "gaussian", *SMALL])
    out = capsys.readouterr().out
    assert "gaussian: as asked" in out and "cg: observer projection mixes" in out
    metrics = json.loads(Path("run/round_002/metrics.json").read_text())
    assert metrics["solver_iterations"] > 0 and 0 <= metrics["solver_residual"] < 1
    main(["reconstruct", "--run", "run", "--observations", "obs.h5", "--samples", "2", "--out", "r.npz", "--device", "cpu"])
    with np.load("r.npz") as file:
        assert file["samples"].shape == (200, 2, 3) and np.isfinite(file["samples"]).all()


@pytest.mark.parametrize("start", ["mixture", "self-supervised"])
def test_continuing_equals_an_uninterrupted_run(start):
    vectors()
    fit = ["fit", "--observations", "obs.npz", "--start", start, *SMALL]
    main([*fit, "--iters", "3", "--out", "whole"])
    main([*fit, "--iters", "1", "--out", "parts"])
    Path("parts/round_002").mkdir()
    (Path("parts/round_002") / "samples.npy").write_bytes(b"half-written by a run that was killed")
    main([*fit, "--iters", "3", "--out", "parts"])
    for name in ("prior.safetensors", "samples.npy", "chains.npy"):
        assert (Path("whole/round_003") / name).read_bytes() == (Path("parts/round_003") / name).read_bytes(), name


def test_training_never_sees_the_truth():
    vectors("with.npz")
    vectors("without.npz", x=None)
    vectors("wrong.npz", x=np.full((200, 3), 7.0, "float32"))
    for name in ("with", "without", "wrong"):
        main(["fit", "--observations", f"{name}.npz", "--iters", "2", "--stop", "auto", "--out", name, *SMALL])
    assert len({(Path(name) / "best.json").read_text() for name in ("with", "without", "wrong")}) == 1, "nor does the choice of the best"
    priors = {name: (Path(name) / "round_002/prior.safetensors").read_bytes() for name in ("with", "without", "wrong")}
    assert priors["with"] == priors["without"] == priors["wrong"]
    assert "error" not in json.loads(Path("without/round_002/metrics.json").read_text())


def test_units_do_not_matter():
    """Data in units a million times smaller or larger, far from 0, give the same run in their units."""
    with np.load(vectors()) as file:
        fields = dict(file)
    results = {}
    for unit in (1.0, 1e-6, 1e5):
        np.savez("scaled.npz", **{**fields, "obs": fields["obs"] * np.float32(unit), "noise_std": 0.4 * unit, "x": fields["x"] * np.float32(unit)})
        main(["fit", "--observations", "scaled.npz", "--iters", "2", "--out", f"run{unit:g}", *SMALL])
        results[unit] = np.load(f"run{unit:g}/round_002/samples.npy") / unit
    for unit in (1e-6, 1e5):
        np.testing.assert_allclose(results[unit], results[1.0], atol=0.02)


def test_the_resolved_configuration_is_a_config_file(capsys):
    vectors()
    main(["fit", "--observations", "obs.npz", "--iters", "1", "--out", "run", *SMALL])
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["start"] == "mixture" and config["guidance"] == "fused" and config["train"]["steps"] == 20
    main(["fit", "--config", "run/config.yaml", "--iters", "2"])
    assert "continued after round 1" in capsys.readouterr().out and Path("run/round_002/metrics.json").is_file()


def test_fine_observations_are_walked_to_finer_levels():
    vectors(noise_std=0.02)
    main(["fit", "--observations", "obs.npz", "--iters", "1", "--out", "run", *SMALL])
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["walk"]["tau_last"] == pytest.approx(0.01 / np.load("obs.npz")["obs"].std(), rel=0.05)


def test_print_config_round_trips(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--observations", "obs.npz", "--walk.levels", "7", "--print_config"])
    Path("c.yaml").write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "c.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(Path("c.yaml").read_text())


@pytest.mark.parametrize("name", sorted(p.name for p in (Path(__file__).parent.parent / "configs").glob("*.yaml") if p.name != "sweep.yaml"))
def test_shipped_configurations_are_valid(name, capsys):
    path = Path(__file__).parent.parent / "configs" / name
    wanted = yaml.safe_load(path.read_text())
    command = ["train", "--data", "digits"] if "model" in wanted else ["fit", "--observations", "obs.npz"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--config", str(path), "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert stop.value.code == 0
    for key, value in wanted.items():
        assert shown[key] == value if not isinstance(value, dict) else all(shown[key][k] == v for k, v in value.items())


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "configs" / "observe").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipe_of_every_observer_makes_observations(path):
    np.savez("clean.npz", x=np.random.default_rng(0).normal(size=(6, 16, 12)).astype("float32"))
    main(["observe", "--config", str(path), "--data", "clean.npz", "--out", "obs.npz"])
    with np.load("obs.npz") as made:
        assert str(made["observer"]) == path.stem and len(made["obs"]) == 6 and np.isfinite(made["obs"]).all()
    assert {p.stem for p in path.parent.glob("*.yaml")} == set(REGISTRY)


def test_help_imports_no_torch():
    code = "import sys, emdiff.cli as c\ntry: c.main(['fit', '--help'])\nexcept SystemExit: print('TORCH' if 'torch' in sys.modules else 'NONE')"
    clock = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("NONE") and "--walk.tau_last" in done.stdout
    print(f"help took {time.perf_counter() - clock:.2f} s")


def test_dashes():
    assert dashes("--noise-std=-0.5") == "--noise_std=-0.5" and dashes("--walk.tau-last") == "--walk.tau_last" and dashes("a-b") == "a-b"


def pickled(path):
    """A file whose observations are Python objects."""
    np.savez(path, obs=np.array([{"a": 1}, {"b": 2}], dtype=object), noise_std=0.4, observer="identity")


BAD_FILES = {
    "missing": (lambda: None, ["obs.npz"]),
    "not an npz": (lambda: Path("obs.npz").write_text("hello"), ["obs.npz"]),
    "pickled": (lambda: pickled("obs.npz"), ["obs.npz", "obs"]),
    "no noise": (lambda: vectors(noise_std=None), ["obs.npz", "--noise-std"]),
    "zero noise": (lambda: vectors(noise_std=0.0), ["obs.npz", "0", "noise_std"]),
    "negative noise": (lambda: vectors(noise_std=-0.5), ["obs.npz", "-0.5", "noise_std"]),
    "mask shape": (lambda: vectors(observer="mask", mask=np.ones((200, 4))), ["obs.npz", "4"]),
    "x shape": (lambda: vectors(shape=np.array([7])), ["obs.npz", "7"]),
    "all NaN": (lambda: vectors(obs=np.full((9, 3), np.nan, "float32")), ["obs.npz", "NaN"]),
    "infinities": (lambda: vectors(obs=np.where(np.eye(9, 3) > 0, np.inf, 1.0).astype("float32")), ["obs.npz", "inf"]),
    "one observation": (lambda: vectors(obs=np.ones((1, 3), "float32")), ["obs.npz", "1"]),
    "constant": (lambda: vectors(obs=np.full((9, 3), 2.5, "float32")), ["obs.npz", "2.5"]),
    "unknown observer": (lambda: vectors(observer="telescope"), ["telescope", "identity"]),
    "noise above the data": (lambda: vectors(noise_std=50.0), ["noise"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(case, capsys):
    make, words = BAD_FILES[case]
    make()
    line = refused(capsys, "fit", "--observations", "obs.npz", *SMALL)
    assert all(word.lower() in line.lower() for word in words), line


BAD_FLAGS = {
    "no iterations": (["--iters", "0"], ["--iters", "0"]),
    "negative iterations": (["--iters", "-3"], ["--iters", "-3"]),
    "iterations that are no number": (["--iters", "many"], ["iters", "many"]),
    "unknown flag": (["--walk.levelz", "3"], ["walk.levelz"]),
    "unknown choice": (["--start", "magic"], ["start", "magic"]),
    "no levels": (["--walk.levels", "1"], ["--walk.levels", "1"]),
    "negative rate": (["--train.rate", "-1"], ["--train.rate", "-1"]),
    "levels that rise": (["--walk.tau-first", "0.05"], ["--walk.tau-first", "0.05"]),
    "over-relaxing above the first level": (["--relax", "3", "--walk.tau-first", "0.2"], ["tau-relax 0.25", "tau-first 0.2", "--relax 0"]),
    "a pool where walks start anew": (["--walk.pool", "64"], ["--walk.pool 64", "give 0"]),
    "unknown override": (["--observer", "sonar"], ["sonar"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_refused(case, capsys):
    vectors()
    flags, words = BAD_FLAGS[case]
    line = refused(capsys, "fit", "--observations", "obs.npz", *SMALL, *flags)
    assert all(word in line for word in words), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused(capsys):
    vectors()
    assert "--device cuda" in refused(capsys, "fit", "--observations", "obs.npz", *SMALL, "--device", "cuda")


def test_unknown_keys_in_a_config_are_refused(capsys):
    vectors()
    Path("c.yaml").write_text("observations: obs.npz\nlearning_rate: 3\n")
    assert "learning_rate" in refused(capsys, "fit", "--config", "c.yaml")


def test_out_of_another_run_is_refused_and_unharmed(capsys):
    vectors()
    main(["fit", "--observations", "obs.npz", "--iters", "1", "--out", "run", *SMALL])
    before = folder_state("run")
    capsys.readouterr()
    line = refused(capsys, "fit", "--observations", "obs.npz", "--out", "run", *SMALL, "--seed", "5")
    assert "run" in line and "seed = 0" in line and "5" in line and "--out" in line
    vectors("other.npz", n=150)
    assert "other observations" in refused(capsys, "fit", "--observations", "other.npz", "--out", "run", *SMALL)
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    assert "not empty" in refused(capsys, "fit", "--observations", "obs.npz", "--out", "full", *SMALL)
    assert folder_state("run") == before and folder_state("full") == {"thesis.txt": b"mine"}


def test_no_space_is_said(capsys, monkeypatch):
    import errno

    import emdiff.files

    vectors()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(emdiff.files.os, "replace", full)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--observations", "obs.npz", "--out", "run", *SMALL])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "No space left" in line and "run" in line
    assert not [p for p in Path(".").rglob("*.tmp")]


def test_a_disk_that_is_too_small_is_refused_before_any_work(capsys, monkeypatch):
    import shutil

    vectors()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    line = refused(capsys, "fit", "--observations", "obs.npz", "--out", "run", *SMALL)
    assert "1e-06 GB" in line and "--out" in line and not Path("run").exists()
    line = refused(capsys, "train", "--data", "digits", "--out", "t", "--device", "cpu", "--wandb", "off")
    assert "1e-06 GB" in line and not Path("t").exists()


def test_a_run_needs_space_for_the_rounds_to_come_alone(capsys, monkeypatch):
    """A disk with room for what is left of a fit, or for the rounds that are kept, is enough."""
    import shutil

    vectors()
    fit = ["fit", "--observations", "obs.npz", "--out", "run", *SMALL]
    main([*fit, "--iters", "2"])
    capsys.readouterr()
    round_bytes = 4 * 200 * 3
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 7 * round_bytes))  # one round, and what six take
    assert "GB left" in refused(capsys, *fit, "--iters", "4")
    main([*fit, "--iters", "3"])
    capsys.readouterr()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 9 * round_bytes))
    assert "GB left" in refused(capsys, *fit, "--iters", "7")
    main([*fit, "--iters", "7", "--keep", "1"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["observe", "--data", "obs.npz", "--noise-std", "-1", "--out", "o.npz"], ["--noise-std", "-1"]),
        (["observe", "--data", "obs.npz", "--noise-std", "1", "--out", "o.txt"], ["--out", "o.txt", ".npz"]),
        (["observe", "--data", "no.npz", "--noise-std", "1", "--out", "o.npz"], ["no.npz"]),
        (["observe", "--data", "obs.npz", "--noise-std", "1", "--count", "9999", "--out", "o.npz"], ["9999", "200"]),
        (["observe", "--data", "obs.npz", "--noise-std", "1", "--observer", "mask", "--observer.keep", "2", "--out", "o.npz"], ["keep", "2"]),
        (["sample", "--run", "nowhere"], ["nowhere"]),
        (["sample", "--run", "nowhere", "--count", "0"], ["--count", "0"]),
        (["reconstruct", "--run", "nowhere", "--observations", "obs.npz", "--samples", "1"], ["--samples", "1"]),
        (["reconstruct", "--run", "nowhere", "--observations", "obs.npz"], ["nowhere"]),
        (["paint"], ["paint"]),
    ],
)
def test_other_commands_refuse_bad_input(arguments, words, capsys):
    vectors()
    line = refused(capsys, *arguments)
    assert all(word in line for word in words), line
    assert not Path("o.npz").exists() and not Path("samples.npz").exists()
