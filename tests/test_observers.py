r"""The contract of every observer: At is the adjoint of A, each datum is treated alone, and a measurement is the right one.

A new observer joins by a line in `ARRAYS`. All statements are against the dense matrix of A, built from basis vectors, in float64.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from observers import REGISTRY, Observer, build
from observers.recipes import Recipe, identity, mask, projection

N, S, d = 5, (2, 3), 6


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frequencies(lead: int, H: int, W: int) -> Tensor:
    return uniform(lead, H, W) < 0.6


IMAGE = (2, 5, 4)
SHAPES: dict[str, tuple[int, ...]] = {
    "blur": (2, 4, 3),
    "blur, reflect": (5, 4),
    "blur, zero": (4, 5),
    "blur, replicate": (6,),
    "downsample": (2, 3, 5),
    "downsample, sample": (5, 3),
    "fourier": (2, 3, 4),
    "fourier, real": (4, 3),
    "multicoil": (1, 4, 3),
    "multicoil, centred": (2, 3, 3),
    "radon": (4, 3),
    "radon, channels": (2, 3, 3),
}
ARRAYS: dict[str, Callable[[int], dict[str, Any]]] = {
    "identity": lambda lead: {},
    "mask": lambda lead: {"mask": uniform(lead, *S) < 0.6},
    "projection": lambda lead: {"matrix": normal(lead, 4, d)},
    "blur": lambda lead: {"psf": normal(lead, 3, 2)},
    "blur, reflect": lambda lead: {"psf": normal(lead, 3, 5), "boundary": "reflect"},
    "blur, zero": lambda lead: {"psf": normal(lead, 5, 3), "boundary": "zero"},
    "blur, replicate": lambda lead: {"psf": normal(lead, 4), "boundary": "replicate"},
    "downsample": lambda lead: {"factor": 2},
    "downsample, sample": lambda lead: {"factor": 3, "way": "sample"},
    "fourier": lambda lead: {"mask": frequencies(lead, 3, 4)},
    "fourier, real": lambda lead: {"mask": frequencies(lead, 4, 3), "centred": 1},
    "multicoil": lambda lead: {"mask": frequencies(lead, 4, 3), "sensitivities": normal(1, 2, 2, 4, 3)},
    "multicoil, centred": lambda lead: {"mask": frequencies(1, 3, 3), "sensitivities": normal(lead, 2, 2, 3, 3), "centred": 1},
    "radon": lambda lead: {"angles": normal(lead, 3)},
    "radon, channels": lambda lead: {"angles": normal(lead, 2), "detectors": 3},
    "compressed": lambda lead: {"seeds": 7 + torch.arange(lead), "rows": 4},
    "compressed, gaussian": lambda lead: {"seeds": 7 + torch.arange(lead), "rows": 3, "kind": "gaussian"},
    "compressed, signs": lambda lead: {"seeds": 7 + torch.arange(lead), "rows": 5, "kind": "signs"},
    "compose": lambda lead: {"0.observer": "blur", "0.psf": normal(lead, 2, 2), "1.observer": "mask", "1.mask": uniform(1, *S) < 0.6},
    "stack": lambda lead: {"0.observer": "mask", "0.mask": uniform(lead, *S) < 0.6, "1.observer": "projection", "1.matrix": normal(1, 2, d)},
    "stack, diagonal": lambda lead: {"0.observer": "mask", "0.mask": uniform(lead, *S) < 0.6, "1.observer": "identity"},
}
"""Parameters by the name of the observer, and what is special after a comma; the case of every built-in observer."""

NOISE: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "one": lambda O: torch.tensor(0.7, dtype=torch.float64),
    "shared entries": lambda O: 0.3 + uniform(1, *O),
    "per datum": lambda O: 0.3 + uniform(N),
    "per datum and first axis": lambda O: 0.3 + uniform(N, O[0]),
    "per datum and entry": lambda O: 0.3 + uniform(N, *O),
}
CASES = [*itertools.product(("identity", "mask", "projection"), (1, N), NOISE), *((name, N, "per datum and entry") for name in ARRAYS)]
CASES += [(name, 1, "shared entries") for name in ARRAYS]
MAY_SEE_NOTHING = ("fourier, real", "radon", "radon, channels", "multicoil")
"""Observers that may count entries that A makes 0: imaginary parts of real images, detectors beside the image."""

every = pytest.mark.parametrize("name, lead, noise", list(dict.fromkeys(CASES)))


def make(name: str, lead: int, noise: str) -> Observer:
    kind, shape = name.split(",")[0], SHAPES.get(name, S)
    O = build(kind, shape, ARRAYS[name](lead), torch.tensor(0.7, dtype=torch.float64)).obs_shape
    return build(kind, shape, ARRAYS[name](lead), NOISE[noise](O))


def dense(observer: Observer) -> Tensor:
    """A as matrices (N, o, d), column by column."""
    shape = observer.shape
    columns = [observer.forward(e.reshape(1, *shape).expand(N, *shape)) for e in torch.eye(math.prod(shape), dtype=torch.float64)]
    return torch.stack([column.flatten(1) for column in columns], -1)


def dense_std(observer: Observer) -> Tensor:
    """The standard deviation of each entry (N, o), looked up entry by entry."""
    std = torch.empty(N, *observer.obs_shape, dtype=torch.float64)
    for index in itertools.product(range(N), *map(range, observer.obs_shape)):
        value = observer.noise_std
        for i in index[: observer.noise_std.ndim]:
            value = value[i if len(value) > 1 else 0]
        std[index] = value
    return std.flatten(1)


def test_every_registered_observer_is_under_contract() -> None:
    assert {name.split(",")[0] for name in ARRAYS} == set(REGISTRY)
    for name, parameters in ARRAYS.items():
        observer = make(name, 1, "one")
        assert observer.name == name.split(",")[0] and REGISTRY[observer.name] is type(observer)
        again = build(observer.name, observer.shape, {**observer.arrays(), **observer.options()}, observer.noise)
        x = normal(N, *observer.shape)
        assert set(parameters(1)) <= {*observer.arrays(), *observer.options()} and torch.equal(again.forward(x), observer.forward(x))


@every
def test_at_is_the_adjoint_of_a(name: str, lead: int, noise: str) -> None:
    observer = make(name, lead, noise)
    x, w = normal(N, *observer.shape), normal(N, *observer.obs_shape, seed=1)
    Ax, Atw = observer.forward(x), observer.adjoint(w)
    assert Ax.shape == w.shape and Atw.shape == x.shape
    torch.testing.assert_close((Ax * w).flatten(1).sum(1), (x * Atw).flatten(1).sum(1))


@every
def test_a_is_linear_and_applies_to_each_datum_alone(name: str, lead: int, noise: str) -> None:
    observer = make(name, lead, noise)
    x, other, A = normal(N, *observer.shape), normal(N, *observer.shape, seed=1), dense(observer)
    torch.testing.assert_close(observer.forward(x).flatten(1), torch.einsum("nod,nd->no", A, x.flatten(1)))
    torch.testing.assert_close(observer.forward(x - 0.7 * other), observer.forward(x) - 0.7 * observer.forward(other))


@every
def test_rows_are_the_observer_of_those_data(name: str, lead: int, noise: str) -> None:
    observer = make(name, lead, noise)
    x, obs = normal(N, *observer.shape), normal(N, *observer.obs_shape, seed=1)
    std = dense_std(observer).reshape(obs.shape)
    for index in (torch.tensor([3]), torch.tensor([4, 0, 4]), slice(1, 4)):
        part = observer.rows(index)
        torch.testing.assert_close(part.forward(x[index]), observer.forward(x)[index], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part.adjoint(obs[index]), observer.adjoint(obs)[index], rtol=1e-12, atol=1e-12)
        assert torch.equal(part.std().expand(obs[index].shape), std[index])
        assert torch.equal(part.observed().expand(obs[index].shape), observer.observed().expand(obs.shape)[index])


@every
def test_rows_leave_shared_tensors_where_they_are(name: str, lead: int, noise: str) -> None:
    observer = make(name, lead, noise)
    part = observer.rows(torch.tensor([3, 1]))
    tensors, restricted = ({**o.arrays(), **o.noise.tensors()} for o in (observer, part))
    assert observer.count == (N if any(t.ndim and len(t) == N for t in tensors.values()) else None)
    for key, tensor in tensors.items():
        per_datum = tensor.ndim > 0 and len(tensor) == N
        assert restricted[key].shape == ((2, *tensor.shape[1:]) if per_datum else tensor.shape)
        assert per_datum or restricted[key].data_ptr() == tensor.data_ptr()


@every
def test_cov_is_the_square_of_the_noise_std(name: str, lead: int, noise: str) -> None:
    observer = make(name, lead, noise)
    w = normal(N, *observer.obs_shape, seed=1)
    torch.testing.assert_close(observer.cov(w).flatten(1), dense_std(observer) ** 2 * w.flatten(1))


@every
def test_an_observation_that_is_a_measurement_is_generalised_least_squares(name: str, lead: int, noise: str) -> None:
    observer = make(name, lead, noise)
    A, weight = dense(observer), dense_std(observer) ** -2
    obs = normal(N, *observer.obs_shape, seed=2)
    precision = A.mT @ (weight[..., None] * A)
    diagonal = precision.diagonal(dim1=1, dim2=2)
    measurement = observer.as_measurement(obs)
    if measurement is None:
        assert (precision - torch.diag_embed(diagonal)).abs().max() > 0.01, "a diagonal observer should say so"
        return
    z, sigma = measurement
    assert sigma.shape[0] in (1, N) and sigma.shape[1:] == observer.shape
    expected = torch.einsum("nde,ne->nd", torch.linalg.pinv(precision), torch.einsum("nod,no->nd", A, weight * obs.flatten(1)))
    torch.testing.assert_close(z.flatten(1), expected)
    torch.testing.assert_close(sigma.expand(N, *observer.shape).flatten(1), torch.where(diagonal > 0, diagonal.rsqrt(), math.inf))


@every
def test_observed_entries_are_the_non_zero_rows_of_a(name: str, lead: int, noise: str) -> None:
    observer = make(name, lead, noise)
    observed = observer.observed()
    assert observed.dtype == torch.bool and observed.ndim == 1 + len(observer.obs_shape)
    expected = (dense(observer).abs() > 1e-12).any(-1)
    got = observed.expand(N, *observer.obs_shape).flatten(1)
    assert bool((got | ~expected).all()), "what carries information must count as observed"
    assert torch.equal(got, expected) or name in MAY_SEE_NOTHING


@every
def test_simulated_noise_has_the_stated_std(name: str, lead: int, noise: str) -> None:
    observer, copies, index = make(name, lead, noise), 4000, torch.arange(N).repeat(4000)
    x, many = normal(N, *observer.shape)[index], observer.rows(index)
    obs = many.simulate(x, torch.Generator().manual_seed(3))
    assert torch.equal(obs, many.simulate(x, torch.Generator().manual_seed(3)))
    seen = observer.observed().expand(N, *observer.obs_shape).flatten(1)
    residual = (obs - many.forward(x)).reshape(copies, N, -1)
    assert residual[:, ~seen].abs().sum() == 0 and obs.reshape(copies, N, -1)[:, ~seen].abs().sum() == 0
    units = (residual / dense_std(observer))[:, seen]
    assert (units.mean(0).abs() < 5 / math.sqrt(copies)).all()
    assert ((units.square().mean(0) - 1).abs() < 5 * math.sqrt(2 / copies)).all()


@every
def test_without_zeroes_rows_of_a_and_keeps_the_noise(name: str, lead: int, noise: str) -> None:
    observer = make(name, lead, noise)
    missing = uniform(N, *observer.obs_shape) < 0.3
    less = observer.without(missing)
    torch.testing.assert_close(dense(less), torch.where(missing.flatten(1)[..., None], 0.0, dense(observer)))
    assert not bool((less.observed() & missing).any())
    assert torch.equal(dense_std(less), dense_std(observer))


@every
def test_to_changes_the_dtype_of_floating_point_tensors_only(name: str, lead: int, noise: str) -> None:
    observer = make(name, lead, noise)
    x = normal(N, *observer.shape)
    single = observer.to("cpu", torch.float32)
    torch.testing.assert_close(single.forward(x.float()).double(), observer.forward(x), rtol=1e-5, atol=1e-5)
    assert single.simulate(x.float()).dtype == torch.float32 and observer.noise_std.dtype == torch.float64
    assert all(t.dtype != torch.float64 and (t.dtype == torch.bool) == (key.split(".")[-1] == "mask") for key, t in single.arrays().items())


def test_each_observer_is_the_matrix_it_claims_to_be() -> None:
    eye = torch.eye(d, dtype=torch.float64).expand(N, d, d)
    assert torch.equal(dense(make("identity", 1, "one")), eye)
    assert torch.equal(dense(make("mask", N, "one")), eye * ARRAYS["mask"](N)["mask"].reshape(N, d, 1))
    assert torch.equal(dense(make("projection", N, "one")), ARRAYS["projection"](N)["matrix"])


def refused(*fragments: str, name: str, noise_std: float | Tensor = 0.7, **arrays: Tensor) -> None:
    with pytest.raises(ValueError) as error:
        build(name, S, arrays, torch.as_tensor(noise_std))
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)


def test_build_names_what_does_not_fit_and_both_shapes() -> None:
    refused("'blurr'", "identity, mask, multicoil, projection", name="blurr")
    refused("'mask'", "needs an array 'mask'", name="mask")
    refused("'identity'", "no array 'mask'", name="identity", mask=torch.ones(1, *S))
    refused("mask has shape (5, 3, 3)", "(N or 1, 2, 3)", name="mask", mask=torch.ones(5, 3, 3))
    refused("mask holds 0.5", name="mask", mask=torch.full((1, *S), 0.5))
    refused("mask holds nan", name="mask", mask=torch.full((1, *S), math.nan))
    refused("matrix has shape (5, 4, 5)", "(N or 1, any, 6)", name="projection", matrix=torch.ones(5, 4, 5))
    refused("matrix holds NaN", name="projection", matrix=torch.full((1, 4, 6), math.nan))
    refused("noise_std has shape (5, 3)", "(N or 1, 2, 3)", name="identity", noise_std=torch.ones(5, 3))
    refused("noise_std has shape (1, 2, 3, 1)", "(N or 1, 2, 3)", name="identity", noise_std=torch.ones(1, 2, 3, 1))
    refused("mask (5, 2, 3)", "noise_std (4,)", name="mask", mask=torch.ones(5, *S), noise_std=torch.ones(4))
    for bad in (0.0, -0.7, math.nan, math.inf):
        refused(f"noise_std holds {bad:g}", name="identity", noise_std=torch.tensor([0.7, bad]))


RECIPES: list[Recipe] = [identity(), mask(keep=0.3), mask(keep=0.3, shared=True), projection(), projection(rows=3, shared=True)]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipes_draw_the_observer_of_their_name_again_and_again(recipe: Recipe) -> None:
    first, again, other = (recipe.draw(S, 50, 0.7, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.name == type(recipe).__name__ and first.shape == S and first.noise_std.item() == pytest.approx(0.7)
    lead = 1 if getattr(recipe, "shared", False) else 50
    for key, array in first.arrays().items():
        assert len(array) == lead and torch.equal(array, again.arrays()[key]) and not torch.equal(array, other.arrays()[key])
    assert first.simulate(torch.zeros(50, *S)).dtype == torch.float32


def test_a_mask_keeps_the_stated_fraction_and_a_projection_has_orthonormal_rows() -> None:
    seen = mask(keep=0.3).draw(S, 4000, 0.7, torch.Generator().manual_seed(0)).arrays()["mask"]
    assert ((seen.double().mean(0) - 0.3).abs() < 5 * math.sqrt(0.21 / 4000)).all(), "every entry alike"
    assert mask(keep=1.0).draw(S, 3, 0.7, torch.Generator()).observed().all()
    P = projection(rows=3).draw(S, 4000, 0.7, torch.Generator().manual_seed(0)).arrays()["matrix"]
    torch.testing.assert_close(P @ P.mT, torch.eye(3).expand(4000, 3, 3), rtol=0, atol=1e-5)
    assert (P.mean(0).abs() < 5 / math.sqrt(4000 * d)).all(), "no direction and no sign is preferred"
    torch.testing.assert_close((P.mT @ P).mean(0), torch.eye(d) / 2, rtol=0, atol=0.04)


def test_recipes_refuse_what_is_out_of_range() -> None:
    for keep in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"keep is {keep}, expected a fraction above 0 and at most 1"):
            mask(keep=keep)
    with pytest.raises(ValueError, match="rows is 0, expected at least 1"):
        projection(rows=0)
    with pytest.raises(ValueError, match=r"rows is 7, expected at most 6, .* \(2, 3\)"):
        projection(rows=7).draw(S, 2, 0.7, torch.Generator())


def test_recipes_are_listed_without_importing_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sys, observers.recipes; assert 'torch' not in sys.modules"], check=True)
