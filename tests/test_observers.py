r"""The contract of every observer: At is the adjoint of A, each datum is treated alone, and a measurement is the right one.

A new observer joins by a line in `ARRAYS`. All statements are against the dense matrix of A, built from basis vectors, in float64.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable

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


ARRAYS: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "identity": lambda lead: {},
    "mask": lambda lead: {"mask": uniform(lead, *S) < 0.6},
    "projection": lambda lead: {"matrix": normal(lead, 4, d)},
}
NOISE: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "one": lambda O: torch.tensor(0.7, dtype=torch.float64),
    "shared entries": lambda O: 0.3 + uniform(1, *O),
    "per datum": lambda O: 0.3 + uniform(N),
    "per datum and first axis": lambda O: 0.3 + uniform(N, O[0]),
    "per datum and entry": lambda O: 0.3 + uniform(N, *O),
}
every = pytest.mark.parametrize("name, lead, noise", list(itertools.product(ARRAYS, (1, N), NOISE)))


def make(name: str, lead: int, noise: str) -> Observer:
    O = build(name, S, ARRAYS[name](lead), torch.tensor(0.7, dtype=torch.float64)).obs_shape
    return build(name, S, ARRAYS[name](lead), NOISE[noise](O))


def dense(observer: Observer) -> Tensor:
    """A as matrices (N, o, d), column by column."""
    columns = [observer.forward(e.reshape(1, *S).expand(N, *S)) for e in torch.eye(d, dtype=torch.float64)]
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
    assert set(ARRAYS) == set(REGISTRY)
    assert all(REGISTRY[name].name == name and set(ARRAYS[name](1)) == set(REGISTRY[name].array_names) for name in REGISTRY)


@every
def test_at_is_the_adjoint_of_a(name: str, lead: int, noise: str) -> None:
    observer = make(name, lead, noise)
    x, w = normal(N, *S), normal(N, *observer.obs_shape, seed=1)
    Ax, Atw = observer.forward(x), observer.adjoint(w)
    assert Ax.shape == w.shape and Atw.shape == x.shape
    torch.testing.assert_close((Ax * w).flatten(1).sum(1), (x * Atw).flatten(1).sum(1))


@every
def test_a_is_linear_and_applies_to_each_datum_alone(name: str, lead: int, noise: str) -> None:
    observer = make(name, lead, noise)
    x, other, A = normal(N, *S), normal(N, *S, seed=1), dense(observer)
    torch.testing.assert_close(observer.forward(x).flatten(1), torch.einsum("nod,nd->no", A, x.flatten(1)))
    torch.testing.assert_close(observer.forward(x - 0.7 * other), observer.forward(x) - 0.7 * observer.forward(other))


@every
def test_rows_are_the_observer_of_those_data(name: str, lead: int, noise: str) -> None:
    observer = make(name, lead, noise)
    x, obs = normal(N, *S), normal(N, *observer.obs_shape, seed=1)
    std = dense_std(observer).reshape(obs.shape)
    for index in (torch.tensor([3]), torch.tensor([4, 0, 4]), slice(1, 4)):
        part = observer.rows(index)
        assert torch.equal(part.forward(x[index]), observer.forward(x)[index])
        assert torch.equal(part.adjoint(obs[index]), observer.adjoint(obs)[index])
        assert torch.equal(part.std().expand(obs[index].shape), std[index])
        assert torch.equal(part.observed().expand(obs[index].shape), observer.observed().expand(obs.shape)[index])


@every
def test_rows_leave_shared_tensors_where_they_are(name: str, lead: int, noise: str) -> None:
    observer = make(name, lead, noise)
    part = observer.rows(torch.tensor([3, 1]))
    tensors, restricted = ({**o.arrays(), "noise_std": o.noise_std} for o in (observer, part))
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
        assert (precision - torch.diag_embed(diagonal)).abs().max() > 0.1, "a diagonal observer should say so"
        return
    z, sigma = measurement
    assert sigma.shape[0] in (1, N) and sigma.shape[1:] == S
    expected = torch.einsum("nde,ne->nd", torch.linalg.pinv(precision), torch.einsum("nod,no->nd", A, weight * obs.flatten(1)))
    torch.testing.assert_close(z.flatten(1), expected)
    torch.testing.assert_close(sigma.expand(N, *S).flatten(1), torch.where(diagonal > 0, diagonal.rsqrt(), math.inf))


@every
def test_observed_entries_are_the_non_zero_rows_of_a(name: str, lead: int, noise: str) -> None:
    observer = make(name, lead, noise)
    observed = observer.observed()
    assert observed.dtype == torch.bool and observed.ndim == 1 + len(observer.obs_shape)
    assert torch.equal(observed.expand(N, *observer.obs_shape).flatten(1), (dense(observer) != 0).any(-1))


@every
def test_simulated_noise_has_the_stated_std(name: str, lead: int, noise: str) -> None:
    observer, copies, index = make(name, lead, noise), 4000, torch.arange(N).repeat(4000)
    x, many = normal(N, *S)[index], observer.rows(index)
    obs = many.simulate(x, torch.Generator().manual_seed(3))
    assert torch.equal(obs, many.simulate(x, torch.Generator().manual_seed(3)))
    seen = (dense(observer) != 0).any(-1)
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
    assert torch.equal(dense_std(less), dense_std(observer))


@every
def test_to_changes_the_dtype_of_floating_point_tensors_only(name: str, lead: int, noise: str) -> None:
    observer, x = make(name, lead, noise), normal(N, *S)
    single = observer.to("cpu", torch.float32)
    torch.testing.assert_close(single.forward(x.float()).double(), observer.forward(x), rtol=1e-5, atol=1e-5)
    assert single.simulate(x.float()).dtype == torch.float32 and observer.noise_std.dtype == torch.float64
    assert all(t.dtype != torch.float64 and (t.dtype == torch.bool) == (key == "mask") for key, t in single.arrays().items())


def test_each_observer_is_the_matrix_it_claims_to_be() -> None:
    eye = torch.eye(d, dtype=torch.float64).expand(N, d, d)
    assert torch.equal(dense(make("identity", 1, "one")), eye)
    assert torch.equal(dense(make("mask", N, "one")), eye * ARRAYS["mask"](N)["mask"].reshape(N, d, 1))
    assert torch.equal(dense(make("projection", N, "one")), ARRAYS["projection"](N)["matrix"])


def test_an_observer_that_cannot_drop_entries_says_so() -> None:
    with pytest.raises(ValueError, match="observer identity cannot do without single entries"):
        Observer.without(make("identity", 1, "one"), torch.zeros(N, *S, dtype=torch.bool))


def refused(*fragments: str, name: str, noise_std: float | Tensor = 0.7, **arrays: Tensor) -> None:
    with pytest.raises(ValueError) as error:
        build(name, S, arrays, torch.as_tensor(noise_std))
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)


def test_build_names_what_does_not_fit_and_both_shapes() -> None:
    refused("'blur'", "identity, mask, projection", name="blur")
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
