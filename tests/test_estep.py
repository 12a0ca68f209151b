r"""The E-step's cost and its benchmark: bfloat16 leaves the figures where they are, the peers' samplers are what they are said to be."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from exact import covariance, normal, observer
from torch import Tensor

from emdiff.commands import walk_under
from emdiff.data import Observations
from emdiff.denoise import GaussianDenoiser
from emdiff.em import Draws, Walk, e_step
from emdiff.guidance import PosteriorDenoiser
from emdiff.mdae import MDAE
from emdiff.metrics import residual_chi2
from emdiff.nn import UNet
from emdiff.pairs import PairLoss
from emdiff.posterior import run_walk
from emdiff.prior import Prior, build_network, choose_network
from emdiff.scale import Scale
from emdiff.training import train
from observers import Identity, Mask

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

B, d = 40, 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images() -> tuple[MDAE, Tensor]:
    """A U-Net with maps trained for moments on smooth 8 x 8 images of variance 1."""
    x = torch.nn.functional.avg_pool2d(torch.randn(600, 1, 12, 12, generator=generator(1)), 5, stride=1)[:, 0]
    x = x / x.std()
    seen = torch.rand(x.shape, generator=generator(2)) < 0.5
    torch.manual_seed(0)
    denoiser = MDAE(UNet((8, 8), widths=(16, 32), patch=1, maps=True, gain=True), spread=0.5)
    maps = torch.where(seen, 0.3, math.inf)
    return train(denoiser, PairLoss(Draws(x, x, 0.0), 0.1, maps), len(x), 250, rate=3e-3).denoiser, x


@pytest.mark.parametrize("kind, guidance", [("noise", "fused"), ("mask", "fused"), ("noise", "cg")])
def test_posterior_figures_do_not_move_with_bfloat16(images, kind: str, guidance: str) -> None:
    """Same network, same draws, walks in bfloat16 and in float32: error, chi2 and std of samples agree within 2 %."""
    denoiser, x = images
    seen = torch.rand(x.shape, generator=generator(3)) < 0.5
    made = Identity((8, 8), torch.tensor(0.7)) if kind == "noise" else Mask((8, 8), torch.tensor(0.3), seen)
    data = Observations(made.simulate(x, generator(4)), made)
    walk = Walk(guidance, math.inf if guidance == "fused" else 20.0, levels=16, batch=300)
    figures = []
    for bf16 in (False, True):
        denoiser.bf16 = bf16
        sample = e_step(denoiser, data, torch.zeros_like(x), walk, generator(5)).x
        figures.append(torch.stack([(sample - x).square().mean(), residual_chi2(data, sample).mean(), sample.std()]))
    denoiser.bf16 = False
    assert 0.05 < figures[0][0] < 0.6 and not torch.equal(*figures)
    torch.testing.assert_close(figures[1], figures[0], rtol=0.02, atol=0)


def test_a_run_is_sampled_with_the_guidance_it_was_fitted_with(tmp_path: Path) -> None:
    mask, projection = (Observations(torch.zeros(2, *made.obs_shape), made) for made in (observer("mask", 2, (d,)), observer("projection", 2, (d,))))
    cases = [("gmres", mask, "gmres"), ("cg", mask, "cg"), ("gmres", projection, "gmres"), ("fused", mask, "fused"), ("fused", projection, "cg")]
    for asked, data, expected in cases:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"guidance": asked, "walk": {"tau_first": None, "levels": 7}}))
        walk = run_walk(tmp_path, data, "cpu")
        assert (walk.guidance, walk.levels) == (expected, 7)


def gaussian() -> tuple[GaussianDenoiser, Observations]:
    prior = GaussianDenoiser.from_covariance(normal(d, seed=7), covariance(d))
    made = observer("mask", B, (d,)).with_noise(torch.tensor(0.4, dtype=torch.float64))
    return prior, Observations(made.simulate(prior.sample(B, generator(8)), generator(9)), made)


def test_the_peers_guided_jump_is_moment_matching() -> None:
    """With as many iterations as entries, both solve the system, theirs to its relative residual of 1e-3; with one, both take the same step."""
    from estep_peers import guided_jump

    prior, data = gaussian()
    y = normal(B, d, seed=10)
    autograd = _Autograd(prior)
    for iterations in (1, d + 2):
        ours = PosteriorDenoiser(prior, data.observer, data.obs, "cg", iterations, 1e-12).xhat(y[:, None], torch.tensor([0.8], dtype=torch.float64))
        torch.testing.assert_close(guided_jump(autograd, data, y, 0.8, iterations), ours, rtol=0, atol=1e-6 if iterations == 1 else 2e-3)


class _Autograd(torch.nn.Module):
    def __init__(self, inner: GaussianDenoiser) -> None:
        super().__init__()
        self.xhat = inner.xhat


def test_the_peers_samplers_draw_from_a_gaussian_posterior() -> None:
    """Solved to the end, with many steps: the mean over seeds is the posterior mean, to Monte Carlo error."""
    from estep_peers import ddpm, mmps

    prior, data = gaussian()
    copies = 400
    one = data.rows(torch.zeros(copies, dtype=torch.long))
    A = torch.diag(data.observer.mask[0].double())
    S = prior.covariance()
    K = S @ A @ torch.linalg.pinv(A @ S @ A + 0.16 * A)
    mean, V = prior.mean + K @ (data.obs[0] - A @ prior.mean), S - K @ A @ S
    samples = {"ddpm": ddpm(_Autograd(prior), one, d, generator(11), 20.0, 0.02, 64).double()}
    if _has_azula():
        torch.set_default_dtype(torch.float64)
        try:
            samples["azula"] = mmps(_Autograd(prior), one, d, 12, steps=256)
        finally:
            torch.set_default_dtype(torch.float32)
    for name, x in samples.items():
        error = (x.mean(0) - mean).abs() / (V.diagonal() / copies).sqrt()
        assert (error < 5).all(), name
        assert ((x.var(0) / V.diagonal()).log().abs() < 0.35).all(), name


def _has_azula() -> bool:
    try:
        import azula  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_ratio_is_to_the_cheapest_budget_that_is_as_good() -> None:
    from bench_estep import ratios, worst

    make = lambda seconds, error, chi2: {"seconds": seconds, "error": error, "chi2": chi2, "chi2_se": 0.01}
    mine = {"a": make(1.0, 0.2, 1.0), "b": make(2.0, 0.1, 1.05), "c": make(3.0, 0.1, 0.98), "d": make(4.0, 0.05, 1.0)}
    found = ratios(mine, {"p": make(10.0, 0.1, 1.0), "q": make(8.0, 0.1, 0.985), "r": make(8.0, 0.3, 1.2)})
    assert [found[name]["budget"] for name in "pqr"] == ["d", "c", "a"]
    assert worst(found) == pytest.approx(0.4)
    assert worst(ratios(mine, {"p": make(10.0, 0.01, 1.0), "r": make(8.0, 0.3, 1.2)})) is None


@pytest.mark.parametrize("guidance, gain, iterations", [("cg", True, 1), ("gmres", True, 1), ("cg", False, 3), ("fused", True, 3)])
def test_solves_on_networks_with_gains_take_one_iteration_and_it_is_said(guidance: str, gain: bool, iterations: int, capsys) -> None:
    data = Observations(torch.zeros(2, 8, 8), Identity((8, 8), torch.tensor(0.5)))
    network = choose_network((8, 8), gain=gain)
    prior = Prior(build_network((8, 8), **network), Scale(0.0, 1.0), (8, 8), 0.1, network)
    walk = walk_under(prior, Walk(guidance, 20.0), data, Path("run"))
    assert walk == Walk(guidance, 20.0)._replace(iterations=iterations)
    assert ("gains" in capsys.readouterr().out) == (iterations == 1)
