"""`emdiff train` as a user meets it, what its priors can be used for, and the shipped configurations."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from emdiff import plan
from emdiff.cli import main
from emdiff.datasets import Dataset, open_dataset
from emdiff.errors import UsageError
from emdiff.finished import latest_prior
from emdiff.prior import Prior, build_network, load_prior
from emdiff.scale import Scale
from emdiff.train_plan import choose_model, disk_bytes, held_out_count, levels_of, make_train_plan

SMALL = ["--train.steps", "12", "--train.batch", "32", "--train.rounds", "2", "--pictures", "4", "--wandb", "off", "--device", "cpu"]
CONFIGS = sorted(p for p in (Path(__file__).parents[1] / "configs").glob("*.yaml") if "train:" in p.read_text() and "model:" in p.read_text())


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, with 120 small vectors and noisy copies of them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = (5 + rng.standard_normal((120, 3))).astype("float32")
    np.savez("clean.npz", x=x)
    np.savez("obs.npz", obs=x + 0.3 * rng.standard_normal(x.shape).astype("float32"), observer="identity", noise_std=0.3, x=x)
    return tmp_path


def refused(capsys, *arguments):
    """The one line with which a command ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("emdiff: "), lines
    return lines[-1]


def weights(path):
    return {name: value.clone() for name, value in load_prior(Path(path)).denoiser.state_dict().items()}


def test_a_prior_trained_on_clean_data_serves_every_command(capsys):
    main(["train", "--data", "clean.npz", "--out", "t", "--walk.levels", "6", *SMALL])
    main(["sample", "--run", "t", "--count", "3", "--levels", "4", "--device", "cpu"])
    main(["sample", "--run", "t", "--chain", "true", "--steps", "30", "--every", "3", "--keep", "4", "--warm_start", "true", "--out", "chain.npz",
          "--device", "cpu"])  # fmt: skip
    main(["reconstruct", "--run", "t", "--observations", "obs.npz", "--samples", "2", "--device", "cpu"])
    main(["denoise", "--run", "t", "--observations", "obs.npz", "--flow", "true", "--steps", "3", "--device", "cpu"])
    short = ["--train.steps", "5", "--walk.levels", "4", "--wandb", "off", "--device", "cpu"]
    main(["fit", "--observations", "obs.npz", "--init-prior", "t/prior.safetensors", "--iters", "1", "--out", "f", *short])
    main(["evaluate", "--run", "f", "--observations", "obs.npz", "--oracle", "t/prior.safetensors", "--samples", "4", "--count", "10",
          "--prior-samples", "4", "--device", "cpu"])  # fmt: skip
    with np.load("chain.npz") as chain, np.load("denoised.npz") as denoised:
        assert len(chain["x"]) <= 4 and (np.diff(chain["step"]) == np.diff(chain["step"])[0]).all()
        assert denoised["attractor"].shape == (120, 3) and np.isfinite(denoised["x"]).all()
    figures = json.loads(Path("chain.json").read_text())
    assert figures["jumps"] == 10 and {"restarts", "stuck", "autocorrelation_time"} <= figures.keys()
    assert json.loads(Path("f/start/metrics.json").read_text())["start"] == "prior"
    assert yaml.safe_load(Path("f/config.yaml").read_text())["init_prior"] == "t/prior.safetensors"
    assert "oracle" in capsys.readouterr().out


def test_fit_starts_from_the_prior_it_was_given():
    """The first samples are posterior samples under that prior, and round 1 trains its weights on, in the prior's own scale."""
    main(["train", "--data", "clean.npz", "--out", "t", *SMALL])
    main(["fit", "--observations", "obs.npz", "--init-prior", "t/prior.safetensors", "--iters", "1", "--out", "f", "--train.steps", "1",
          "--train.rate", "1e-8", "--walk.levels", "4", "--wandb", "off", "--device", "cpu"])  # fmt: skip
    before, after = weights("t/prior.safetensors"), weights("f/round_001/prior.safetensors")
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)
    assert load_prior(Path("f/round_001/prior.safetensors")).scale == load_prior(Path("t/prior.safetensors")).scale


def test_masks_want_a_prior_that_sees_them(capsys, monkeypatch):
    """A U-Net shown one level per datum is refused as run, oracle and start where entries are missing; one trained with masks serves."""
    monkeypatch.setattr(plan, "Plan", functools.partial(plan.Plan, prior_samples=8))
    x = np.random.default_rng(1).standard_normal((40, 8, 8)).astype("float32")
    np.savez("images.npz", x=x)
    main(["observe", "--data", "images.npz", "--observer", "mask", "--observer.keep", "0.5", "--noise-std", "0.2", "--out", "masked.npz"])
    main(["observe", "--data", "images.npz", "--observer", "identity", "--noise-std", "0.2", "--out", "noisy.npz"])
    model = ["--model.widths", "[8, 8]", "--walk.levels", "4"]
    main(["train", "--data", "images.npz", "--out", "plain", *SMALL, *model])
    main(["train", "--data", "images.npz", "--out", "masks", *SMALL, *model, "--model.masks", "true"])
    assert "entry by entry in half of the data" in capsys.readouterr().out
    few = ["--samples", "4", "--count", "10", "--prior-samples", "4", "--device", "cpu"]
    fit = ["--iters", "1", "--train.steps", "2", "--train.start-steps", "2", "--walk.levels", "4", "--wandb", "off", "--device", "cpu"]
    for command in (
        ["reconstruct", "--run", "plain", "--observations", "masked.npz"],
        ["evaluate", "--run", "plain", "--observations", "masked.npz", *few],
        ["evaluate", "--run", "masks", "--observations", "masked.npz", "--oracle", "plain/prior.safetensors", *few],
        ["fit", "--observations", "masked.npz", "--init-prior", "plain/prior.safetensors", *fit],
    ):
        assert "plain" in (line := refused(capsys, *command)) and "--model.masks true" in line
    main(["reconstruct", "--run", "plain", "--observations", "noisy.npz", "--samples", "2", "--device", "cpu"])
    main(["fit", "--observations", "masked.npz", "--init-prior", "masks/prior.safetensors", "--out", "f", *fit])
    made = {name: load_prior(Path(name)).network for name in ("plain/prior.safetensors", "masks/prior.safetensors", "f/round_001/prior.safetensors")}
    assert [bool(network.get("maps") and network.get("gain")) for network in made.values()] == [False, True, True]
    main(["fit", "--observations", "noisy.npz", "--guidance", "cg", "--walk.iterations", "1", "--out", "c", *fit])
    assert not load_prior(Path("c/round_001/prior.safetensors")).network["gain"]  # products with V are taken of a network without gains
    main(["evaluate", "--run", "f", "--observations", "masked.npz", "--oracle", "masks/prior.safetensors", *few])
    assert "--model.sigma" in refused(capsys, "train", "--data", "images.npz", "--model.masks", "true", "--model.sigma", "[1.0]")


@pytest.mark.parametrize("kind", ["mem", "muvb"])
def test_an_energy_is_a_prior_for_fit_with_second_derivatives(kind):
    """Through projections, guided by conjugate gradients on products with V, and trained on in the M-step; finite to the end."""
    model = ["--model.parametrisation", kind, "--model.metaencoder", "true", "--model.width", "0.1", "--model.latent", "2"]
    main(["train", "--data", "clean.npz", "--out", "t", *SMALL, "--train.steps", "100", *model])
    main(["observe", "--data", "clean.npz", "--observer", "projection", "--noise-std", "0.3", "--count", "40", "--out", "p.npz"])
    main(["fit", "--observations", "p.npz", "--init-prior", "t/prior.safetensors", "--iters", "2", "--out", "f", "--train.steps", "2",
          "--walk.levels", "3", "--walk.pool", "0", "--wandb", "off", "--device", "cpu"])  # fmt: skip
    assert load_prior(Path("f/round_002/prior.safetensors")).network["kind"] == kind
    figures = json.loads(Path("f/round_002/metrics.json").read_text())
    assert 0 < figures["chi2"] < 100 and figures["solver_iterations"] > 0 and figures["restarted"] == 0


def killed_in_round_two(monkeypatch, command):
    """Run a training whose second round is interrupted when it begins to train."""
    import emdiff.train as module

    honest, calls = module.train, []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", killed)
        with pytest.raises(SystemExit):
            main(command)


@pytest.mark.parametrize("extra", [[], ["--train.optimizer", "sgd", "--model.spectral_norm", "true"],
                                   ["--model.parametrisation", "muvb", "--model.width", "0.1", "--model.latent", "2"]])  # fmt: skip
def test_an_interrupted_training_ends_at_the_same_weights(extra, monkeypatch):
    """Killed in the middle of its second round, and continued by the same command: bit for bit the weights of one that was not."""
    main(["train", "--data", "clean.npz", "--out", "whole", *SMALL, *extra])
    killed_in_round_two(monkeypatch, ["train", "--data", "clean.npz", "--out", "parts", *SMALL, *extra])
    main(["train", "--data", "clean.npz", "--out", "parts", *SMALL, *extra])
    a, b = weights("whole/prior.safetensors"), weights("parts/prior.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    clocks = dict.fromkeys(("seconds", "seconds_train", "images_per_second"), 0)
    rows = [[json.loads(line) | clocks for line in Path(run, "metrics.jsonl").read_text().splitlines()] for run in ("whole", "parts")]
    assert rows[0] == rows[1] and [row["iter"] for row in rows[0]] == [0, 1, 2]


def test_held_out_data_choose_the_round_that_is_kept(capsys):
    """30 images of noise, which a network can only learn by heart: their loss falls to the end, that of those set aside rises after a few rounds."""
    rng = np.random.default_rng(1)
    np.savez("noise.npz", x=rng.standard_normal((40, 8, 8)).astype("float32"))
    learn = ["--train.steps", "600", "--train.batch", "30", "--train.rounds", "6", "--pictures", "0", "--wandb", "off", "--device", "cpu"]
    learn += ["--model.network", "mlp", "--model.sigma", "[0.3]"]
    main(["train", "--data", "noise.npz", "--out", "t", "--held_out", "10", *learn])
    rows = [json.loads(line) for line in Path("t/metrics.jsonl").read_text().splitlines()][1:]
    held = [row["held_out_loss"] for row in rows]
    best = 1 + int(np.argmin(held))
    assert rows[-1]["image_loss"] < 0.8 * rows[0]["image_loss"] and held[-1] > 1.01 * min(held) and best < 6
    kept, last = weights("t/prior.safetensors"), weights("t/round_006/prior.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in weights(f"t/round_{best:03d}/prior.safetensors").items())
    assert any(not torch.equal(kept[name], last[name]) for name in kept) and latest_prior(Path("t")).parent.name == f"round_{best:03d}"
    assert f"least after round {best}" in capsys.readouterr().out
    Path("t/best.json").unlink()  # as a training leaves it that is killed before it writes this file
    main(["train", "--data", "noise.npz", "--out", "t", "--held_out", "10", *learn])
    assert latest_prior(Path("t")).parent.name == f"round_{best:03d}"
    main(["train", "--data", "noise.npz", "--out", "few", "--held_out", "10", "--keep", "1", *learn])
    assert sorted(p.parent.name for p in Path("few").glob("round_*/prior.safetensors")) == sorted({f"round_{best:03d}", "round_006"})
    assert Path("few/metrics.jsonl").read_text().count("held_out_loss") == 6 and not Path("few/figures/data_004.png").exists()
    main(["train", "--data", "noise.npz", "--out", "all", "--held_out", "0", *learn, "--train.steps", "60"])
    assert "held_out_loss" not in Path("all/metrics.jsonl").read_text() and latest_prior(Path("all")).parent.name == "round_006"
    assert "0 to 38" in refused(capsys, "train", "--data", "noise.npz", "--out", "u", "--held_out", "39", *learn)


def test_the_held_out_loss_is_a_mean_over_data_and_looks(monkeypatch):
    """7 data in batches of 3, each looked at 20 times: the mean of what the loss gives, whatever the last batch holds."""
    import emdiff.train as module

    x = np.arange(7, dtype="float32")[:, None] ** 2
    seen = []
    monkeypatch.setattr(module, "loss_of", lambda *_: lambda denoiser, stored, generator: (seen.append(len(stored)), stored.mean())[1])
    plan = module.TrainPlan({}, 0.1, batch=3)
    data = module.Standardised(Dataset("squares", 7, (1,), x.__getitem__, ""), Scale(0.0, 1.0))
    assert module.held_out_loss(Prior(None, Scale(0.0, 1.0), (1,), 0.1, {}), data, plan) == pytest.approx(13.0)
    assert sum(seen) == 140 and seen[-1] == 2


def test_how_many_data_are_held_out():
    assert [held_out_count(None, n) for n in (10, 1797, 60_000)] == [0, 89, 1000] and held_out_count(0, 50) == 0 and held_out_count(48, 50) == 48
    for wanted in (-1, 49):
        with pytest.raises(UsageError, match="0 to 48"):
            held_out_count(wanted, 50)


def test_a_training_says_how_much_of_the_disk_it_takes(monkeypatch):
    """What is asked for covers what lies there, and grows with every round by a prior; a training that was stopped has its best round so far."""
    asked = []
    monkeypatch.setattr("emdiff.commands_prior.disk_bytes", lambda *given: asked.append((given, disk_bytes(*given))) or 0)
    main(["train", "--data", "digits", "--out", "t", "--held_out", "200", *SMALL])
    (plan, shape, rounds), total = asked[0]
    prior = Path("t/prior.safetensors").stat().st_size
    assert rounds == 2 and disk_bytes(plan, shape, 12) - total == pytest.approx(10 * prior, rel=0.05)
    assert total > sum(path.stat().st_size for path in Path("t").rglob("*.safetensors"))
    killed_in_round_two(monkeypatch, ["train", "--data", "digits", "--out", "stopped", "--held_out", "200", *SMALL])
    assert json.loads(Path("stopped/best.json").read_text()) == {"iter": 1}


def test_a_prior_of_fixed_levels_is_walked_and_refused_for_posteriors(capsys):
    model = ["--model.parametrisation", "mem", "--model.sigma", "[1.0, 2.0]", "--model.measurements", "2", "--model.metaencoder", "true"]
    main(["train", "--data", "clean.npz", "--out", "t", *SMALL, *model, "--train.objective", "mdsm"])
    assert "next: emdiff sample" in (said := capsys.readouterr().out) and "--init-prior" not in said
    main(["sample", "--run", "t", "--count", "3", "--steps", "20", "--device", "cpu"])
    main(["sample", "--run", "t", "--chain", "true", "--steps", "20", "--every", "5", "--device", "cpu"])
    with np.load("samples.npz") as file:
        assert np.isfinite(file["x"]).all()
    for command in (
        ["reconstruct", "--run", "t", "--observations", "obs.npz"],
        ["fit", "--observations", "obs.npz", "--init-prior", "t/prior.safetensors"],
    ):
        assert "one set of levels" in refused(capsys, *command)
    assert "its own levels" in refused(capsys, "sample", "--run", "t", "--chain", "true", "--sigma", "1.0", "--steps", "100")
    assert "coarser levels" in refused(capsys, "sample", "--run", "t", "--chain", "true", "--warm_start", "true", "--steps", "100")


def test_a_prior_without_its_run_is_sampled_and_denoises(capsys):
    """A file that came from elsewhere does what its run does, where a prior is all that is needed."""
    main(["train", "--data", "clean.npz", "--out", "t", *SMALL])
    assert yaml.safe_load(Path("t/config.yaml").read_text())["held_out"] == 6  # of 120, where nothing was said
    assert "emdiff fit --init-prior t/prior.safetensors" in capsys.readouterr().out
    shutil.copy("t/prior.safetensors", "alone.safetensors")
    made = {}
    for run in ("t", "alone.safetensors"):
        main(["sample", "--run", run, "--count", "3", "--levels", "4", "--out", "s.npz", "--device", "cpu"])
        main(["sample", "--run", run, "--chain", "true", "--steps", "20", "--every", "5", "--out", "c.npz", "--device", "cpu"])
        main(["denoise", "--run", run, "--observations", "obs.npz", "--out", "d.npz", "--device", "cpu"])
        made[run] = [np.load(file)["x"] for file in ("s.npz", "c.npz", "d.npz")]
    assert all(np.array_equal(a, b) for a, b in zip(*made.values()))
    for command in ("reconstruct", "evaluate"):
        assert "needs the run folder" in refused(capsys, command, "--run", "alone.safetensors", "--observations", "obs.npz")
    assert "no such run folder" in refused(capsys, "sample", "--run", "none.safetensors")
    file = Path("t/round_002/prior.safetensors")
    file.write_bytes(Path("t/round_001/prior.safetensors").read_bytes())
    assert "changed or is damaged" in refused(capsys, "sample", "--run", str(file))


@pytest.mark.parametrize(
    "arguments,word",
    [
        (["--train.objective", "softmax"], "--model.sigma"),
        (["--model.measurements", "4"], "--model.sigma"),
        (["--model.sigma", "[1.0, 2.0]", "--model.measurements", "3"], "2 levels"),
        (["--model.network", "u2net"], "mlp"),
        (["--model.network", "resnet"], "resnet"),
        (["--model.metaencoder", "true"], "mem"),
        (["--model.sigma", "[-1.0]"], "--model.sigma is -1"),
        (["--flips", "true"], "--flips"),
        (["--train.steps", "0"], "--train.steps"),
        (["--count", "500"], "--count"),
        (["--train.rate", "0"], "--train.rate"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(arguments, word, capsys):
    assert word in refused(capsys, "train", "--data", "clean.npz", "--out", "t", "--wandb", "off", *arguments)
    assert not Path("t").exists()


def test_other_bad_input_is_refused(capsys):
    main(["train", "--data", "clean.npz", "--out", "t", *SMALL])
    np.savez("constant.npz", x=np.ones((9, 3), "float32"))
    np.savez("wide.npz", obs=np.random.default_rng(0).standard_normal((9, 4)).astype("float32"), observer="identity", noise_std=0.1)
    assert "another --out" in refused(capsys, "train", "--data", "clean.npz", "--out", "t", *SMALL, "--seed", "1")
    assert "other observations" in refused(capsys, "train", "--data", "obs.npz", "--out", "t", *SMALL)
    assert "nothing to learn" in refused(capsys, "train", "--data", "constant.npz", "--out", "u", "--wandb", "off")
    assert "shape (3,)" in refused(capsys, "fit", "--observations", "wide.npz", "--init-prior", "t/prior.safetensors")
    assert "--walk.tau-last" in refused(capsys, "fit", "--observations", "obs.npz", "--init-prior", "t/prior.safetensors", "--walk.tau-last", "0.01")
    assert "no prior" in refused(capsys, "fit", "--observations", "obs.npz", "--init-prior", "none.safetensors")
    assert "no jump" in refused(capsys, "sample", "--run", "t", "--chain", "true", "--steps", "5")
    assert "trained down to" in refused(capsys, "sample", "--run", "t", "--chain", "true", "--sigma", "0.01", "--steps", "500")
    assert "--rate" in refused(capsys, "denoise", "--run", "t", "--observations", "obs.npz", "--rate", "2")


def test_levels_are_in_the_units_of_the_data():
    model = {"sigma": [0.25], "measurements": 2}
    assert levels_of(model, Scale(0.0, 0.5)) == [0.5, 0.5] and levels_of({"sigma": None, "measurements": 1}, Scale(0.0, 0.5)) is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_makes_a_plan_and_a_network(path):
    """Built without memory, in the shape of its data; and its comment says how to run it and what to expect."""
    shapes = {"mnist": ((28, 28), 0.3081), "muvb": ((28, 28), 0.3081), "cifar": ((3, 32, 32), 0.25), "ffhq": ((3, 256, 256), 0.28)}
    shape, std = next(value for name, value in shapes.items() if path.stem.startswith(name))
    from dataclasses import asdict

    from emdiff.settings import ModelSettings, ObjectiveSettings, WalkSettings

    given = yaml.safe_load(path.read_text())
    config = {"flips": given.get("flips", False), "pictures": given.get("pictures", 64), "seed": 0, "held_out": None, "walk": asdict(WalkSettings()),
              "model": asdict(ModelSettings(**given["model"])), "train": asdict(ObjectiveSettings(**given["train"]))}  # fmt: skip
    data = open_dataset("digits")
    data = type(data)("fake", 60_000, shape, data.rows, "")
    plan = make_train_plan(config, data, Scale(0.5, std), "cpu")
    with torch.device("meta"):
        denoiser = build_network(shape, **{**plan.network, **({"spectral": False} if "spectral" in plan.network else {})})
    count = sum(p.numel() for p in denoiser.parameters())
    assert (count < 3e6) == path.stem.endswith("_cpu") and "Paper:" in path.read_text() and "--config configs/" + path.name in path.read_text()


def test_the_configuration_of_a_run_starts_it_again():
    main(["train", "--data", "clean.npz", "--out", "t", *SMALL])
    before = weights("t/prior.safetensors")
    main(["train", "--config", "t/config.yaml", "--out", "again"])
    after = weights("again/prior.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_unknown_networks_are_refused():
    with pytest.raises(UsageError):
        choose_model({"parametrisation": "muvb", "network": "unet", "metaencoder": False, "width": 1.0}, (8, 8), None)
