"""The arithmetic of the benchmarks: proper scores, the peer's sampler on a Gaussian, and when a target counts as reached."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from ablation import last_tenth  # noqa: E402
from bench_fit import Row, minutes, reached  # noqa: E402
from bench_paper import paper_sized  # noqa: E402
from bench_trust import scores  # noqa: E402
from exact import covariance  # noqa: E402
from peer_ddpm import ddpm_sample  # noqa: E402
from residuals import by_value  # noqa: E402
from sureness import error_and_variance  # noqa: E402

from emdiff.denoise import GaussianDenoiser  # noqa: E402
from emdiff.first_samples import deviations  # noqa: E402
from emdiff.observations import Observations  # noqa: E402
from observers import Identity, Mask  # noqa: E402


def test_proper_scores_prefer_the_true_posterior_and_the_error_of_a_sample_does_not() -> None:
    """x ~ N(m, 1), samples N(m, s^2): CRPS (2 (1 + s^2)/pi)^(1/2) - s/pi^(1/2), least at s = 1; error of the mean 1, of a sample 1 + s^2."""
    g, count = torch.Generator().manual_seed(0), 100_000
    m = torch.randn(count, generator=g, dtype=torch.float64)
    truth, noise = m + torch.randn(count, generator=g, dtype=torch.float64), torch.randn(count, 4, generator=g, dtype=torch.float64)
    found = {s: scores(m[:, None] + s * noise, truth) for s in (0.0, 0.5, 1.0, 1.5)}
    for s, f in found.items():
        crps = (2 * (1 + s**2) / torch.pi) ** 0.5 - s / torch.pi**0.5
        assert f["crps"] == pytest.approx(crps, rel=0.01) and f["error_mean"] == pytest.approx(1, rel=0.02)
        assert f["error"] == pytest.approx(1 + s**2, rel=0.02)
    assert min(found, key=lambda s: found[s]["crps"]) == 1.0 and min(found, key=lambda s: found[s]["error"]) == 0.0


def test_the_peer_samples_the_posterior_of_a_gaussian_as_its_steps_grow() -> None:
    """Two of three entries seen; with more iterations than entries the guidance is exact, and the error of DDPM falls with its step."""
    count, S = 4000, covariance(3, 2)
    made = Mask((3,), torch.tensor(0.5, dtype=torch.float64), torch.tensor([[True, True, False]]).expand(count, 3))
    obs = torch.tensor([[0.7, -0.3, 0.0]], dtype=torch.float64).expand(count, 3)
    A = torch.eye(3, dtype=torch.float64)[:2]
    K = S @ A.T @ torch.linalg.inv(A @ S @ A.T + 0.25 * torch.eye(2, dtype=torch.float64))
    V, prior = S - K @ A @ S, GaussianDenoiser.from_covariance(torch.zeros(3, dtype=torch.float64), S)
    lost = []
    for steps in (16, 64, 256):
        x = ddpm_sample(prior, Observations(obs, made), steps, 3, torch.Generator().manual_seed(1), batch=count)
        assert (x.mean(0) - K @ obs[0, :2]).abs().max() < 5 * (V.diagonal().max() / count) ** 0.5
        lost.append(1 - float(torch.cov(x.T).trace() / V.trace()))
    assert lost[0] > lost[1] > abs(lost[2]) and lost[1] == pytest.approx(0.1, abs=0.07)


def test_a_target_counts_only_for_calibrated_rows_where_that_is_asked() -> None:
    low, good = Row(30, 1, 0.010, 1.10, 0.9), Row(90, 2, 0.011, 1.00, 1.0)
    assert reached([low, good], 0.012, True) == good and reached([low, good], 0.012, False) == low
    assert reached([low, good], 0.009, False) is None
    assert [(m["minute"], m["iteration"]) for m in minutes([low, good])] == [(1, 1), (2, 2)]


@pytest.mark.parametrize("count", [200, 3000, 10_000])
def test_the_ablation_measures_deviations_on_all_that_its_start_is_not_shown(count: int) -> None:
    """The last tenth, whatever its size is to that of a batch; with none of it there would be nothing to measure, which is refused."""
    data = Observations(torch.arange(float(count))[:, None], Identity((1,), torch.tensor(0.5)))
    parts = last_tenth(data)
    assert torch.equal(torch.cat([part.obs for part in parts])[:, 0], torch.arange(float(count))[-(count // 10) :])
    with pytest.raises(ValueError, match="did not see"):
        deviations(GaussianDenoiser.from_covariance(torch.zeros(1), torch.ones(1, 1)), [])


def test_error_and_variance_agree_for_an_exact_denoiser_and_show_what_another_passes() -> None:
    """Entry by entry those of a Gaussian's posterior, under unequal levels; a prior too wide by 2 claims the variance of its own."""
    g, S = torch.Generator().manual_seed(0), covariance(3, 2)
    x = torch.randn(200_000, 3, generator=g, dtype=torch.float64) @ torch.linalg.cholesky(S).T
    level = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    V = torch.linalg.inv(torch.linalg.inv(S) + torch.diag(level**-2)).diagonal()
    prior = GaussianDenoiser.from_covariance(torch.zeros(3, dtype=torch.float64), S)
    for found in error_and_variance(prior, x, level.expand(len(x), 3), g):
        torch.testing.assert_close(found.mean(0), V, rtol=0.03, atol=0)
    wide = GaussianDenoiser.from_covariance(torch.zeros(3, dtype=torch.float64), 4 * S)
    claimed = torch.linalg.inv(torch.linalg.inv(4 * S) + torch.diag(level**-2)).diagonal()
    error, passed = error_and_variance(wide, x, level.expand(len(x), 3), g)
    torch.testing.assert_close(passed.mean(0), claimed, rtol=0.03, atol=0)
    assert (error.mean(0) < claimed).all()


def test_residuals_by_observed_value_are_those_of_the_truth_where_samples_are_exact() -> None:
    """x ~ N(.4, .3^2) seen with n = .2: exact samples in every bin as far from the observations as the truth, shrunk ones not."""
    g, count, s, n = torch.Generator().manual_seed(0), 200_000, 0.3, 0.2
    x = 0.4 + s * torch.randn(count, generator=g)
    obs = x + n * torch.randn(count, generator=g)
    k = s**2 / (s**2 + n**2)
    mean, std = 0.4 + k * (obs - 0.4), (k * n**2) ** 0.5
    exact = mean[:, None] + std * torch.randn(count, 2, generator=g)
    rows = [row for row in by_value(obs, x, exact, n) if row["share"] > 0.02]
    assert len(rows) >= 5 and all(row["samples"] == pytest.approx(row["truth"], rel=0.04) for row in rows)
    assert all(row["variance"] == pytest.approx(std**2, rel=0.1) for row in rows)
    shrunk = by_value(obs, x, 0.4 + 0.9 * (exact - 0.4), n)
    found = sum(row["excess"] for row in shrunk)
    whole = float(((0.4 + 0.9 * (exact - 0.4) - obs[:, None]).square().mean() - (x - obs).square().mean()) / n**2)
    assert found == pytest.approx(whole, abs=1e-4) and max(abs(row["excess"]) for row in shrunk) > 0.005


def test_the_configurations_of_the_papers_size_are_found() -> None:
    names = paper_sized()
    assert len(names) == 10 and {"mnist_1x16", "muvb_mnist_1x4", "ffhq256_4x8"} <= set(names) and not any("cpu" in name for name in names)
