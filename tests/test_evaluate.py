"""Evaluation: an exact prior passes every figure, a wrong one fails those it should; verdicts, stopping, features, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import covariance, normal
from test_cli import SMALL, here, refused, vectors  # noqa: F401
from torch import Tensor

from emdiff.cli import main
from emdiff.denoise import GaussianDenoiser
from emdiff.em import Walk
from emdiff.errors import UsageError
from emdiff.evaluate import Evaluation, Task, evaluate, likeness, ratios
from emdiff.features import RANDOM, RandomConv, feature_module
from emdiff.metrics import FeatureDistance
from emdiff.observations import Observations
from emdiff.prior import Prior
from emdiff.scale import Scale
from emdiff.verdict import best_iteration, drift, judge, score, scores, should_stop
from observers import Identity

d, N, NOISE = 4, 800, 0.7


def evaluated(factor: float = 1.0, noise: float = NOISE) -> Evaluation:
    """Figures of a Gaussian prior with covariance times factor; the data have covariance S and noise NOISE, said to be `noise`."""
    S = covariance(d).float()
    mean = normal(d, seed=9).float()
    x = GaussianDenoiser.from_covariance(mean, S).sample(N, torch.Generator().manual_seed(5))
    obs = Identity((d,), torch.tensor(NOISE)).simulate(x, torch.Generator().manual_seed(6))
    data = Observations(3 + 2 * obs, Identity((d,), torch.tensor(2 * noise)))
    prior = Prior(GaussianDenoiser.from_covariance(mean, factor * S), Scale(3.0, 2.0), (d,), 0.02, {})  # type: ignore[arg-type]
    walk = Walk(tau_last=0.02, levels=48)
    return evaluate(prior, Task(data, walk, samples=12, prior_samples=400, truth=3 + 2 * x), lambda name, total: lambda done: None)


def test_the_exact_prior_passes_every_figure() -> None:
    found = evaluated()
    f, S = found.figures, covariance(d)
    V = S - S @ torch.linalg.inv(S + NOISE**2 * torch.eye(d, dtype=torch.float64)) @ S
    best = 4 * V.trace().item() / d
    assert abs(f["chi2"] - 1) < 4 * f["chi2_spread"] and f["chi2_datum_std"] == pytest.approx(f["chi2_datum_std_expected"], rel=0.15)
    assert f["error"] == pytest.approx(2 * best, rel=0.1) and f["error_mean"] == pytest.approx((1 + 1 / 12) * best, rel=0.1)
    assert all(f[f"coverage_{round(100 * c)}"] == pytest.approx(c, abs=0.03) for c in (0.5, 0.8, 0.95))
    assert f["coverage_80_weighted"] == pytest.approx(0.8, abs=0.03)
    assert f["sbc_pvalue"] > 0.01 and f["tarp_pvalue"] > 0.01 and f["autocorrelation_time"] == pytest.approx(1, abs=0.1)
    assert f["std_ratio"] == pytest.approx(1, abs=0.05) and 0.4 < f["sliced_wasserstein_ratio"] < 1.6 and 0.3 < f["energy_ratio"] < 1.6
    assert judge(f).level in ("good", "warn") and found.arrays["rank_counts"].sum() == N * d


@pytest.mark.parametrize(
    ("factor", "noise", "words"),
    [
        (4.0, NOISE, "times as far from"),
        (1.0, 1.6 * NOISE, "over-fits the noise"),
        (0.2, NOISE, "over-smooths"),
        (1.0, 0.4 * NOISE, "over-smooths"),
        (0.2, NOISE, "spread of the samples is too"),
    ],
)
def test_a_wrong_prior_or_noise_is_convicted_in_words(factor: float, noise: float, words: str) -> None:
    found = evaluated(factor, noise)
    verdict = judge(found.figures)
    assert verdict.level == "bad" and any(words in reason for reason in verdict.reasons), verdict
    assert min(found.figures["sbc_pvalue"] / 1e-3, 3 / found.figures["energy_ratio"]) < 1
    assert found.figures["error_mean"] > evaluated().figures["error_mean"]


def test_without_truth_no_figure_of_it_is_there_and_the_others_are_the_same() -> None:
    full = evaluated()
    S, data = covariance(d).float(), full
    assert {"error", "coverage_80"} <= set(data.figures)
    prior = Prior(GaussianDenoiser.from_covariance(torch.zeros(d), S), Scale(0.0, 1.0), (d,), 0.02, {})  # type: ignore[arg-type]
    made = Identity((d,), torch.tensor(NOISE))
    task = Task(Observations(made.simulate(normal(60, d).float()), made), Walk(tau_last=0.02, levels=8), samples=4, prior_samples=50)
    blind = evaluate(prior, task, lambda name, total: lambda done: None)
    assert not {"error", "coverage_80", "crps", "std_ratio", "tarp"} & set(blind.figures) and "truth" not in blind.arrays
    assert {"chi2", "energy_ratio", "sliced_wasserstein_ratio", "autocorrelation_time"} <= set(blind.figures)


def test_likeness_of_images_is_the_closed_form() -> None:
    truth = torch.rand(5, 16, 16, generator=torch.Generator().manual_seed(0))
    truth[0, 0, 0], truth[0, 0, 1] = 0, 1
    found = likeness(truth + 0.1, truth, "_mean")
    assert found["psnr_mean"] == pytest.approx(20, abs=0.1) and 0 < found["ssim_mean"] < 1
    assert likeness(truth, truth, "")["ssim"] == pytest.approx(1)


def test_ratios_leave_out_what_cannot_be_divided() -> None:
    assert ratios({"a": 2.0, "b": 1.0, "c": 1.0, "e": math.nan}, {"a": 4.0, "b": 0.0, "d": 1.0, "e": 1.0}) == {"a": 0.5}


def row(k: int, chi2: float, agreement: float = 1.1, **more: float) -> dict[str, float]:
    return {"iter": k, "chi2": chi2, "observation_agreement": agreement, **more}


def rounds(*chi2: float, agreement: float = 1.1) -> list[dict[str, float]]:
    """A history whose prior k has the k-th chi2: that of the samples of round k + 1."""
    return [row(k, c, agreement) for k, c in enumerate([5.0, 1.0, *chi2])]


def test_a_prior_is_scored_by_the_samples_drawn_with_it() -> None:
    history = rounds(0.9, 0.97, 1.02)
    history[2]["observation_agreement"] = 1.5
    assert scores(history) == pytest.approx({1: score(row(0, 0.9)), 2: score(row(0, 0.97, 1.5)), 3: score(row(0, 1.02))})
    assert score({"chi2": 1.02, "observation_agreement": 0.8}) == pytest.approx(math.log(1.02) / 0.02) and score({}) == math.inf


def test_the_last_of_the_good_iterations_is_kept_and_a_fit_stops_three_after_the_best() -> None:
    assert best_iteration(rounds(0.9, 0.97, 1.001, 1.015, 1.05)) == 4, "within 2 % of the best is as good, and later"
    history = rounds(0.9, 0.97, 1.001, 1.03, 1.05)
    assert best_iteration(history) == 3 and not should_stop(history)
    assert should_stop(rounds(0.9, 0.97, 1.001, 1.03, 1.05, 1.02)) and not should_stop(rounds(0.9, 0.97, 1.001, 1.03, 1.05, 1.0))
    assert best_iteration([row(0, 1.0), row(1, 1.0, 3.0), row(2, 1.0, 1.05), row(3, 1.01)]) == 2, "agreement counts"
    assert best_iteration(rounds()) is None and not should_stop(rounds()) and best_iteration(rounds(math.nan)) is None


def test_drift_is_the_slope_of_the_last_rounds() -> None:
    history = [{"iter": 0, "sample_std": 9.0}] + [{"iter": k, "sample_std": (50.0 if k < 3 else 2 + 0.5 * k)} for k in range(1, 8)]
    assert drift(history, "sample_std", 2.0) == pytest.approx(0.25)
    assert math.isnan(drift(history[:3], "sample_std", 1.0))


@pytest.mark.parametrize(
    ("figures", "level", "words"),
    [
        ({"chi2": 1.0, "chi2_spread": 0.001, "sliced_wasserstein_ratio": 1.1}, "good", "in its band"),
        ({"chi2": 0.95, "chi2_spread": 0.001}, "warn", "over-fits the noise: chi2 0.950"),
        ({"chi2": 0.95, "chi2_spread": 0.02}, "good", "in its band"),
        ({"chi2": 1.2, "chi2_spread": 0.001}, "bad", "over-smooths: chi2 1.200"),
        ({"energy_ratio": 1.8, "sliced_wasserstein_ratio": math.nan}, "warn", "1.80 times"),
        ({"energy_ratio": 1.0, "sliced_wasserstein_ratio": 4.0}, "bad", "4.00 times"),
        ({"std_drift": -0.03}, "warn", "-3.0%"),
        ({"solver_residual": 0.4}, "warn", "residual of 0.4"),
        ({"restarted_share": 0.05}, "bad", "5.0%"),
        ({"ess_share": 0.05}, "warn", "5%"),
        ({"coverage_80_weighted": 0.9}, "warn", "too wide"),
        ({"coverage_80_weighted": 0.5}, "bad", "too narrow"),
    ],
)
def test_verdicts_name_the_figure_and_the_remedy(figures: dict[str, float], level: str, words: str) -> None:
    verdict = judge(figures)
    assert verdict.level == level and any(words in reason for reason in verdict.reasons)


class Pixels(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :6] * 2


def test_features_by_name_and_from_a_file(tmp_path: Path) -> None:
    x = torch.rand(40, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(feature_module(RANDOM, x)(x), RandomConv(1)(x))
    file = tmp_path / "pixels.pt"
    torch.jit.script(Pixels()).save(str(file))
    with pytest.raises(UsageError, match="trust:"):
        feature_module(str(file), x)
    module = feature_module(f"trust:{file}", x)
    torch.testing.assert_close(module(x), x.flatten(1)[:, :6] * 2)
    same, other = (FeatureDistance(module, x)(y) for y in (x, x + 0.3))
    assert same.frechet == pytest.approx(0, abs=1e-5) and other.frechet == pytest.approx(6 * 0.36, rel=1e-3) and other.kernel > 10 * abs(same.kernel)
    (tmp_path / "junk.pt").write_bytes(b"not a module")
    torch.jit.script(torch.nn.Conv2d(1, 2, 3)).save(str(tmp_path / "maps.pt"))
    for name, words in (("nowhere.pt", "no such file"), ("junk.pt", "not a TorchScript module"), ("maps.pt", "one vector per image")):
        with pytest.raises(UsageError, match=words):
            feature_module(f"trust:{tmp_path / name}", x)


def test_the_command_writes_figures_and_refuses_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    vectors(n=120)
    main(["fit", "--observations", "obs.npz", "--iters", "2", "--out", "run", *SMALL])
    oracle = "run/round_002/prior.safetensors"
    main(["evaluate", "--run", "run", "--observations", "obs.npz", "--samples", "5", "--prior-samples", "40", "--oracle", oracle])
    found = json.loads(Path("run/evaluation/metrics.json").read_text())
    assert found["iter"] == 2 and found["verdict"]["level"] in ("good", "warn", "bad") and found["best_iteration"] == 1
    assert found["oracle"]["error"] == found["oracle"]["chi2"] == 1.0 and "verdict:" in capsys.readouterr().out
    x, obs = np.load("obs.npz")["x"], np.load("obs.npz")["obs"]
    with np.load("run/evaluation/arrays.npz") as arrays:
        assert arrays["mean"].shape == arrays["std"].shape == (64, 3) and arrays["rank_counts"].sum() == 360
        np.testing.assert_allclose(arrays["residual"], (obs[:64] - arrays["sample"]) / 0.4, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(arrays["truth"], x[:64])
    np.savez("few.npz", x=x[:50])
    vectors("other.npz", obs=obs[:, :2], x=None)
    common = ["evaluate", "--run", "run", "--observations", "obs.npz"]
    Path("runs").rmdir() if Path("runs").exists() else None
    for extra, words in (
        (["--truth", "few.npz"], "(50, 3), expected (120 or more, 3)"),
        (["--truth", "none.npz"], "none.npz"),
        (["--samples", "3"], "--samples is 3"),
        (["--count", "500"], "--count is 500; obs.npz holds 120"),
        (["--oracle", "obs.npz"], "not a prior"),
        (["--run", "nowhere"], "no such run folder"),
        (["--observations", "other.npz"], "shape (2,)"),
    ):
        assert words in refused(capsys, *common, *extra, "--out", "new") and not Path("new").exists()


def test_stop_auto_keeps_the_best_iteration_for_later_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    vectors(n=80)
    chosen = {0: 1.0, 1: 1.0, 2: 0.9, 3: 1.0, 4: 1.1, 5: 1.2, 6: 1.3, 7: 1.4}
    monkeypatch.setattr("emdiff.fit.sample_figures", lambda data, x: {"chi2": chosen[len(list(Path("run").glob("round_*")))], "sample_std": 1.0})
    monkeypatch.setattr("emdiff.fit.prior_figures", lambda data, x, generator: {"observation_agreement": 1.0})
    fit = ["fit", "--observations", "obs.npz", "--iters", "7", "--out", "run", *SMALL]
    main([*fit, "--stop", "auto"])
    assert sorted(p.name for p in Path("run").glob("round_*")) == [f"round_{k:03d}" for k in range(1, 7)]
    assert "round_002/prior.safetensors" in capsys.readouterr().out
    from emdiff.finished import latest_prior

    assert latest_prior(Path("run")).parent.name == "round_002"
    main(fit)
    assert latest_prior(Path("run")).parent.name == "round_007", "never keeps the last"
