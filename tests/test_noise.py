r"""Noise of every kind against its dense covariance; counts and unknown levels against what is known exactly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from exact import covariance, normal, uniform
from torch import Tensor

from emdiff.data import Observations
from emdiff.denoise import GaussianDenoiser
from emdiff.gaussian import condition, em_iteration
from emdiff.guidance import PosteriorDenoiser
from emdiff.metrics import residual_chi2
from emdiff.noise import first_noise, updated_level, with_counts
from observers import Identity, Mask, Projection
from observers.noise import Diagonal, Noise, Poisson
from observers.noises import NOISE_KEYS, noise_of

N, O, o = 4, (2, 3), 6


def spectrum(lead: int) -> Tensor:
    """Powers that are equal at opposite frequencies."""
    S = 0.2 + uniform(lead, *O)
    return (S + S.flip((1, 2)).roll((1, 1), (1, 2))) / 2


KINDS = {
    "diagonal": lambda lead: {"noise_std": 0.3 + uniform(lead, *O)},
    "full": lambda lead: {"noise_cov": torch.stack([covariance(o, seed) for seed in range(lead)])},
    "low rank": lambda lead: {"noise_std": 0.3 + uniform(lead, *O), "noise_factor": normal(lead, o, 2)},
    "fourier": lambda lead: {"noise_spectrum": spectrum(lead)},
    "counts": lambda lead: {"noise_gain": 0.5 + uniform(lead), "noise_std": 0.1 * uniform(lead, *O)},
}
SEEN = {"all": torch.ones(1, *O, dtype=torch.bool), "some": uniform(N, *O, seed=5) < 0.6}
kinds = pytest.mark.parametrize("kind, lead, seen", [c for c in itertools.product(KINDS, (1, N), SEEN) if c[0] != "fourier" or c[2] == "all"])


def dense(noise: Noise, seen: Tensor) -> Tensor:
    """C on what was seen, 0 elsewhere, (N, o, o), from the definition of each kind."""
    t = {key: value.expand(N, *value.shape[1:]) if value.ndim else value for key, value in noise.tensors().items()}
    if "noise_cov" in t:
        C = t["noise_cov"]
    elif "noise_factor" in t:
        C = torch.diag_embed(t["noise_std"].flatten(1) ** 2) + t["noise_factor"] @ t["noise_factor"].mT
    elif "noise_spectrum" in t:
        U = torch.fft.fft2(torch.eye(o, dtype=torch.complex128).reshape(o, *O), norm="ortho").reshape(o, o).T
        C = (U.conj().T @ (t["noise_spectrum"].flatten(1)[..., None] * U)).real
    else:
        C = torch.diag_embed(noise.std(O).expand(N, *O).flatten(1) ** 2)
    flat = seen.expand(N, *O).flatten(1).double()
    return C * flat[:, :, None] * flat[:, None, :]


@kinds
def test_products_roots_and_deviations_are_those_of_the_dense_covariance(kind: str, lead: int, seen: str) -> None:
    noise, mask = noise_of(KINDS[kind](lead)), SEEN[seen]
    noise.check(O)
    C, w = dense(noise, mask), torch.where(mask, normal(N, *O), 0.0)
    torch.testing.assert_close(torch.where(mask, noise.product(w, mask), 0.0).flatten(1), torch.einsum("nij,nj->ni", C, w.flatten(1)))
    torch.testing.assert_close((noise.std(O).expand(N, *O) * mask).flatten(1), C.diagonal(dim1=1, dim2=2).sqrt())
    columns = [torch.where(mask, noise.colour(e.reshape(1, *O).expand(N, *O), mask), 0.0).flatten(1) for e in torch.eye(o, dtype=torch.float64)]
    R = torch.stack(columns, -1)
    hidden = (~mask).expand(N, *O).flatten(1)
    R = torch.where(hidden[:, None, :], 0.0, R)
    torch.testing.assert_close(R @ R.mT, C, atol=1e-10, rtol=1e-8)
    white = noise.whiten(w, mask)
    torch.testing.assert_close(white.square().flatten(1).sum(1), torch.einsum("ni,nij,nj->n", w.flatten(1), torch.linalg.pinv(C), w.flatten(1)))
    assert not bool(white[~mask.expand(N, *O)].any())


@kinds
def test_rows_and_scales_of_noise(kind: str, lead: int, seen: str) -> None:
    noise, mask = noise_of(KINDS[kind](lead)), SEEN[seen]
    made = Mask(O, noise, mask) if seen == "some" else Identity(O, noise)
    w, pick = normal(N, *O), torch.tensor([2, 0])
    torch.testing.assert_close(made.rows(pick).cov(w[pick]), made.cov(w)[pick])
    torch.testing.assert_close(made.rows(pick).whiten(w[pick]), made.whiten(w)[pick])
    half = noise.scaled(0.25, O)
    torch.testing.assert_close(dense(half, mask), dense(noise, mask) / 16)
    assert set(noise.tensors()) <= set(NOISE_KEYS)


@pytest.mark.parametrize("kind", ["full", "low rank", "fourier", "diagonal"])
def test_guidance_and_the_gaussian_start_use_the_whole_covariance(kind: str) -> None:
    """Against the dense posterior of x ~ N(mean, S) given obs = P x + n."""
    P = Projection((5,), noise_of(flat(kind)), normal(N, o, 5))
    prior = GaussianDenoiser.from_covariance(normal(5, seed=7), covariance(5))
    obs, y, sigma = normal(N, o, seed=3), normal(N, 1, 5, seed=4), torch.tensor([0.8], dtype=torch.float64)
    C = torch.stack([P.cov(e.expand(N, o)) for e in torch.eye(o, dtype=torch.float64)], -1)
    S = prior.covariance()
    V = S - S @ torch.linalg.solve(S + 0.64 * torch.eye(5), S)
    xhat = prior.xhat(y, sigma)
    A = P.matrix
    gain = V @ A.mT @ torch.linalg.inv(C + A @ V @ A.mT)
    expected = xhat + torch.einsum("ndo,no->nd", gain, obs - P.forward(xhat))
    got = PosteriorDenoiser(prior, P, obs, "cg", 60, 1e-12).xhat(y, sigma)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    gain = S @ A.mT @ torch.linalg.inv(C + A @ S @ A.mT)
    expected = prior.mean + torch.einsum("ndo,no->nd", gain, obs - P.forward(prior.mean.expand(N, 5)))
    torch.testing.assert_close(condition(prior, P, obs, torch.Generator().manual_seed(0)).xhat, expected, rtol=1e-4, atol=1e-4)


def flat(kind: str) -> dict[str, Tensor]:
    """The tensors of a kind for observations of shape (o,)."""
    if kind == "fourier":
        S = 0.2 + uniform(N, o)
        return {"noise_spectrum": (S + S.flip(1).roll(1, 1)) / 2}
    return {key: value.flatten(1) if key == "noise_std" else value for key, value in KINDS[kind](N).items()}


@kinds
def test_chi2_of_the_truth_is_one_whatever_the_noise(kind: str, lead: int, seen: str) -> None:
    if kind == "counts":
        return
    noise, mask = noise_of(KINDS[kind](lead)), SEEN[seen]
    made, many = Mask(O, noise, mask.expand(len(mask), *O)), torch.arange(N).repeat(1500)
    made = made.rows(many) if made.count else made
    x = normal(len(many), *O)
    data = Observations(made.simulate(x, torch.Generator().manual_seed(1)), made)
    chi2, dim = residual_chi2(data, x), mask.expand(N, *O).flatten(1).sum(1)
    assert float(chi2.mean()) == pytest.approx(1, abs=5 * math.sqrt(float((2 / dim).mean()) / len(many)))


def test_counts_have_the_mean_and_variance_of_their_law() -> None:
    g, s, x = 0.5, 0.2, torch.full((20000, 2), 3.0, dtype=torch.float64)
    made = Identity((2,), Poisson(torch.tensor(g, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)))
    obs = made.simulate(x, torch.Generator().manual_seed(0))
    assert float(obs.mean()) == pytest.approx(3.0, abs=0.03) and float(obs.var()) == pytest.approx(g * 3 + s**2, rel=0.03)
    told = with_counts(Observations(obs, made), x).rows(slice(0, 5)).observer
    torch.testing.assert_close(told.std(), torch.full((5, 2), math.sqrt(g * 3 + s**2), dtype=torch.float64))
    alone = with_counts(Observations(obs, made), None).rows(slice(0, 500)).observer
    assert float(alone.std().mean()) == pytest.approx(math.sqrt(g * 3 + s**2), rel=0.1)


def test_noise_that_is_none_is_refused_with_its_value() -> None:
    bad = covariance(o)[None].clone()
    bad[0, 0, 0] = -1
    odd = torch.ones(1, *O)
    odd[0, 0, 1] = 2
    cases = [
        ({"noise_cov": bad}, "not symmetric and positive definite"),
        ({"noise_cov": torch.eye(3)[None]}, r"noise_cov has shape \(1, 3, 3\), expected \(N or 1, 6, 6\)"),
        ({"noise_spectrum": odd}, "differs between opposite frequencies"),
        ({"noise_spectrum": -torch.ones(1, *O)}, "noise_spectrum holds -1"),
        ({"noise_gain": torch.tensor(0.0)}, "noise_gain holds 0"),
        ({"noise_gain": torch.tensor(1.0), "noise_std": torch.tensor(-1.0)}, "noise_std holds -1"),
        ({"noise_std": torch.tensor(1.0), "noise_factor": torch.ones(1, 5, 2)}, r"noise_factor has shape \(1, 5, 2\)"),
    ]
    for tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            Identity(O, noise_of(tensors))
    with pytest.raises(ValueError, match="given by noise_cov and noise_std"):
        noise_of({"noise_cov": bad, "noise_std": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="noise_spectrum .* every entry"):
        Mask(O, noise_of({"noise_spectrum": spectrum(1)}), SEEN["some"])


def test_correlated_noise_is_no_measurement() -> None:
    assert Identity(O, noise_of(KINDS["full"](1))).as_measurement(normal(N, *O)) is None
    assert Identity(O, Diagonal(torch.tensor(0.5))).as_measurement(normal(N, *O)) is not None


@pytest.mark.parametrize("hidden", [0.0, 0.4])
def test_em_recovers_an_unknown_level_on_a_gaussian_of_low_rank(hidden: float) -> None:
    """x fills 3 of 12 directions, so the prior cannot absorb the noise: a start that is half wrong ends within 3 % of the truth."""
    count, d, n = 4000, 12, 0.4
    W = normal(d, 3)
    x = normal(count, 3, seed=1) @ W.T
    seen = uniform(count, d, seed=2) >= hidden
    at = lambda level: Mask((d,), torch.tensor(level, dtype=torch.float64), seen)
    obs = at(n).simulate(x, torch.Generator().manual_seed(9))
    assert first_noise(Observations(obs, at(1.0))) == pytest.approx(n, rel=0.06 if not hidden else 1.5)
    level, prior = 1.5 * n, GaussianDenoiser.from_covariance(torch.zeros(d, dtype=torch.float64), W @ W.T)
    for k in range(6):
        data = Observations(obs, at(level))
        draws = condition(prior, data.observer, obs, torch.Generator().manual_seed(k)).x
        tau = 0.3
        y = draws + tau * torch.empty_like(draws).normal_(generator=torch.Generator().manual_seed(50 + k))
        complete = updated_level(data, draws, 0.0, torch.Generator().manual_seed(0))
        assert updated_level(data, y, tau, torch.Generator().manual_seed(0)) == pytest.approx(complete, rel=0.03), "a measurement serves as well"
        level, moved = complete, em_iteration(prior, data, 3)
        values, vectors = torch.linalg.eigh(moved.covariance())
        prior = GaussianDenoiser.from_covariance(moved.mean, (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T)
    assert level == pytest.approx(n, rel=0.03)
