r"""Solvers against dense algebra, on batches whose systems differ from datum to datum."""

from __future__ import annotations

import pytest
import torch
from exact import normal
from torch import Tensor

from emdiff.linalg import SOLVERS, cg, gmres, lanczos_sqrt

B, S, d = 5, (2, 3), 6
CONDITION = torch.tensor([1.0, 3.0, 1e2, 1e3, 1e4], dtype=torch.float64)


def systems(seed: int = 0) -> Tensor:
    """Symmetric positive definite (B, d, d), of the condition numbers above and of different scales."""
    Q, _ = torch.linalg.qr(normal(B, d, d, seed=seed))
    s = CONDITION[:, None] ** torch.linspace(0, 1, d, dtype=torch.float64)
    return Q @ torch.diag_embed(s * torch.tensor([1.0, 1e3, 1.0, 1e-3, 1.0], dtype=torch.float64)[:, None]) @ Q.mT


def times(A: Tensor, p: Tensor) -> Tensor:
    return torch.einsum("bij,bj->bi", A, p.flatten(1)).reshape(p.shape)


def products(A: Tensor, C: Tensor):
    """p -> (A p, C p)."""
    return lambda p: (times(A, p), torch.einsum("boj,bj->bo", C, p.flatten(1)))


def nonsymmetric() -> Tensor:
    """Well-conditioned, with a large antisymmetric part."""
    return torch.eye(d, dtype=torch.float64) + 0.4 * normal(B, d, d, seed=3)


C = normal(B, 4, d, seed=1)
b = normal(B, *S, seed=2)
both = pytest.mark.parametrize("name", SOLVERS)


def true_residual(A: Tensor, x: Tensor, rhs: Tensor) -> Tensor:
    return (rhs - times(A, x)).flatten(1).norm(dim=1) / rhs.flatten(1).norm(dim=1)


@both
def test_the_solution_and_its_carried_image_are_the_dense_ones(name: str) -> None:
    A = systems()
    solve = SOLVERS[name](products(A, C), b, {"cg": 60, "gmres": d}[name], 1e-12)
    x = torch.linalg.solve(A, b.flatten(1))
    torch.testing.assert_close(solve.x.flatten(1), x, rtol=1e-7, atol=1e-7 * float(x.abs().max()))
    torch.testing.assert_close(solve.image, torch.einsum("boj,bj->bo", C, solve.x.flatten(1)))
    assert (solve.residual < 1e-9).all()


def test_gmres_solves_what_is_not_symmetric_and_cg_cannot() -> None:
    A = nonsymmetric()
    solve = gmres(products(A, C), b, d)
    torch.testing.assert_close(solve.x.flatten(1), torch.linalg.solve(A, b.flatten(1)))
    torch.testing.assert_close(solve.image, torch.einsum("boj,bj->bo", C, solve.x.flatten(1)))
    assert (true_residual(A, cg(products(A, C), b, d, 1e-12).x, b) > 1e-3).any()


@both
@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_the_reported_residual_is_the_true_one(name: str, iterations: int) -> None:
    A = systems()
    solve = SOLVERS[name](products(A, C), b, iterations, 1e-12)
    torch.testing.assert_close(solve.residual, true_residual(A, solve.x, b), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_cg_minimises_the_energy_norm_and_gmres_the_residual_over_the_krylov_space(iterations: int) -> None:
    A, flat = systems(), b.flatten(1)
    for solver, matrices in ((cg, systems()), (gmres, nonsymmetric())):
        powers = [flat]
        for _ in range(iterations - 1):
            powers.append(times(matrices, powers[-1]))
        K, _ = torch.linalg.qr(torch.stack(powers, -1))
        if solver is cg:
            z = torch.linalg.solve(K.mT @ A @ K, torch.einsum("bdk,bd->bk", K, flat))
        else:
            z = torch.linalg.lstsq(matrices @ K, flat[..., None]).solution[..., 0]
        rows = slice(1, B)  # the first datum of `systems` is solved after one step, and its Krylov space has one dimension
        got = solver(products(matrices, C), b, iterations, 1e-12).x.flatten(1)
        torch.testing.assert_close(got[rows], torch.einsum("bdk,bk->bd", K, z)[rows], rtol=1e-6, atol=1e-9)


@both
def test_a_batch_of_one_gives_what_a_batch_of_n_gives(name: str) -> None:
    A = systems()
    whole = SOLVERS[name](products(A, C), b, 4, 1e-3)
    for i in range(B):
        one = SOLVERS[name](products(A[i : i + 1], C[i : i + 1]), b[i : i + 1], 4, 1e-3)
        torch.testing.assert_close(one.x[0], whole.x[i])
        torch.testing.assert_close(one.image[0], whole.image[i])
        torch.testing.assert_close(one.residual[0], whole.residual[i], rtol=1e-6, atol=1e-10)
        assert one.iterations[0] == whole.iterations[i]


@both
def test_a_zero_right_hand_side_has_the_zero_solution_at_no_cost(name: str) -> None:
    rhs = b.clone()
    rhs[2] = 0
    solve = SOLVERS[name](products(systems(), C), rhs, 4, 1e-12)
    assert (solve.x[2] == 0).all() and (solve.image[2] == 0).all() and solve.residual[2] == 0 and solve.iterations[2] == 0
    rest = SOLVERS[name](products(systems(), C), b, 4, 1e-12)
    for i in (0, 1, 3, 4):
        torch.testing.assert_close(solve.x[i], rest.x[i])


@both
def test_the_count_of_products_is_the_number_of_distinct_eigenvalues(name: str) -> None:
    Q, _ = torch.linalg.qr(normal(3, d, d, seed=5))
    s = torch.tensor([[2, 2, 2, 2, 2, 2], [1, 1, 1, 5, 5, 5], [1, 1, 3, 3, 5, 5]], dtype=torch.float64)
    A = Q @ torch.diag_embed(s) @ Q.mT
    solve = SOLVERS[name](products(A, C[:3]), b[:3], d, 1e-8)
    assert solve.iterations.tolist() == [1, 2, 3]
    torch.testing.assert_close(solve.x.flatten(1), torch.linalg.solve(A, b[:3].flatten(1)))


@both
def test_each_datum_stops_at_its_own_tolerance(name: str) -> None:
    """The first datum's system is the identity, the last one's is ill-conditioned."""
    solve = SOLVERS[name](products(systems(), C), b, d, 0.2)
    assert (solve.residual <= 0.2).all()
    assert solve.iterations[0] == 1 and solve.iterations[1] < d


def test_a_datum_of_non_positive_curvature_stops_and_leaves_the_others_alone() -> None:
    good, A = systems(), systems()
    A[1] = -A[1]
    A[3] = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -0.5], dtype=torch.float64))
    solve, expected = cg(products(A, C), b, 60, 1e-12), cg(products(good, C), b, 60, 1e-12)
    for i in (0, 2, 4):
        torch.testing.assert_close(solve.x[i], expected.x[i])
    assert (solve.x[1] == 0).all() and solve.residual[1] == 1 and solve.iterations[1] == 1
    assert solve.x.isfinite().all() and solve.image.isfinite().all() and solve.iterations[3] < 60
    torch.testing.assert_close(solve.residual, true_residual(A, solve.x, b), rtol=1e-6, atol=1e-9)


def root(A: Tensor) -> Tensor:
    s, Q = torch.linalg.eigh(A)
    return Q @ torch.diag_embed(s.clamp(min=0).sqrt()) @ Q.mT


def test_lanczos_gives_the_dense_square_root() -> None:
    A = systems()
    expected = times(root(A), b)
    got = lanczos_sqrt(lambda p: times(A, p), b, d)
    assert ((got - expected).flatten(1).norm(dim=1) < 1e-7 * expected.flatten(1).norm(dim=1)).all()


def test_lanczos_needs_as_many_products_as_there_are_distinct_eigenvalues() -> None:
    Q, _ = torch.linalg.qr(normal(2, d, d, seed=5))
    A = Q @ torch.diag_embed(torch.tensor([[0, 0, 0, 4, 4, 9], [2, 2, 2, 2, 2, 2]], dtype=torch.float64)) @ Q.mT
    for iterations in (3, d):
        torch.testing.assert_close(lanczos_sqrt(lambda p: times(A, p), b[:2], iterations), times(root(A), b[:2]))


def test_lanczos_draws_have_covariance_a() -> None:
    A = systems()[3].expand(d, d, d)
    columns = lanczos_sqrt(lambda p: times(A, p), torch.eye(d, dtype=torch.float64), d)
    torch.testing.assert_close(columns.T @ columns, A[0], rtol=1e-8, atol=1e-10)


def test_lanczos_of_zero_is_zero_and_data_do_not_mix() -> None:
    A, rhs = systems(), b.clone()
    rhs[0] = 0
    whole = lanczos_sqrt(lambda p: times(A, p), rhs, 3)
    assert (whole[0] == 0).all()
    for i in range(1, B):
        torch.testing.assert_close(lanczos_sqrt(lambda p, i=i: times(A[i : i + 1], p), rhs[i : i + 1], 3)[0], whole[i])


def test_a_guess_in_the_direction_of_the_solution_takes_one_product_whatever_its_length() -> None:
    A = systems()
    x = torch.linalg.solve(A, b.flatten(1)).reshape(b.shape)
    for length in (1.0, -0.01, 300.0):
        solve = cg(products(A, C), b, 8, 1e-9, length * x)
        torch.testing.assert_close(solve.x, x, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(solve.image, torch.einsum("boj,bj->bo", C, x.flatten(1)), rtol=1e-6, atol=1e-9)
        assert solve.iterations.tolist() == [1] * B


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_cg_with_a_guess_minimises_the_energy_norm_over_the_span_of_its_directions(iterations: int) -> None:
    """The guess p0, then the residual after it and its powers: A-projections of the solution onto span(p0, r1, A r1 - ...)."""
    A, guess = systems(), normal(B, *S, seed=6)
    seen = []

    def recorded(p: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(p.flatten(1))
        return products(A, C)(p)

    got = cg(recorded, b, iterations, 1e-12, guess).x.flatten(1)
    torch.testing.assert_close(seen[0], guess.flatten(1))
    rows = slice(1, B)  # the first datum's system is the identity: it is solved after two directions
    P, A, got, rhs = torch.stack(seen, -1)[rows], A[rows], got[rows], b.flatten(1)[rows]
    conjugate = torch.einsum("bdi,bde,bej->bij", P, A, P)
    scale = conjugate.diagonal(dim1=1, dim2=2).sqrt()
    torch.testing.assert_close(
        conjugate / scale[:, :, None] / scale[:, None, :], torch.eye(iterations, dtype=P.dtype).expand(B - 1, -1, -1), atol=1e-8, rtol=0
    )
    best = torch.einsum("bdk,bk->bd", P, torch.einsum("bdk,bd->bk", P, rhs) / conjugate.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(got, best, rtol=1e-6, atol=1e-9)


def test_a_guess_of_zero_is_none() -> None:
    A, guess = systems(), normal(B, *S, seed=6)
    guess[::2] = 0
    mixed, plain, guessed = (cg(products(A, C), b, 3, 1e-12, start) for start in (guess, None, normal(B, *S, seed=6)))
    torch.testing.assert_close(mixed.x[::2], plain.x[::2], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(mixed.x[1::2], guessed.x[1::2])


@both
def test_a_tolerance_per_datum_stops_each_at_its_own_and_one_above_1_needs_no_product(name: str) -> None:
    tolerance = torch.tensor([2.0, 0.5, 0.1, 1e-2, 1e-3], dtype=torch.float64)
    solve = SOLVERS[name](products(systems(), C), b, 40 if name == "cg" else d, tolerance)
    assert (solve.residual <= tolerance).all() and solve.iterations[0] == 0 and (solve.x[0] == 0).all()
    for i in range(B):
        one = SOLVERS[name](products(systems()[i : i + 1], C[i : i + 1]), b[i : i + 1], 40 if name == "cg" else d, tolerance[i : i + 1])
        torch.testing.assert_close(one.x[0], solve.x[i])
        assert one.iterations[0] == solve.iterations[i]
    none = SOLVERS[name](products(systems(), C), b, 4, 2.0)
    assert none.image is None and (none.x == 0).all() and (none.residual == 1).all()


@pytest.mark.parametrize("guess", [None, normal(B, *S, seed=6)], ids=["no guess", "guess"])
def test_few_data_go_on_alone_and_end_where_they_would_have(guess: Tensor | None) -> None:
    """The last datum needs many iterations, the others one or none: its products are made for it alone, and nothing else changes."""
    A, sizes = systems(), []
    tolerance = torch.tensor([2.0, 2.0, 2.0, 2.0, 1e-10], dtype=torch.float64)

    def restrict(index: Tensor):
        part = products(A[index], C[index])
        return lambda p: sizes.append(len(p)) or part(p)

    whole = cg(products(A, C), b, 5, tolerance, guess)
    some = cg(products(A, C), b, 5, tolerance, guess, restrict)
    assert sizes == [1] * 4
    for got, expected in zip(some, whole):
        torch.testing.assert_close(got, expected)
