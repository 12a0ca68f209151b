r"""Matrix-free linear algebra on batches: every datum of a batch has its own system, its own steps and its own stopping.

    cg       A x = b for symmetric positive definite A, by conjugate gradients (Hestenes & Stiefel 1952)
    gmres    A x = b for any invertible A, by minimal residuals over a Krylov space (Saad & Schultz 1986)
    lanczos_sqrt   A^(1/2) b for symmetric positive semi-definite A (Golub & Van Loan, Matrix Computations, ch. 10)

A is a function of a batch (B, *S). Inner products are per datum, so a batch of one gives what a batch of N gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
Image = Callable[[Tensor], tuple[Tensor, Tensor]]

FEW = 0.25
"""Share of a batch below which it pays to make another product for that share alone: a product costs about what a forward pass does, and a smaller
batch needs a forward pass of its own."""


class Solve(NamedTuple):
    """The result of an iterative solve.

    Attributes:
        x: The solution, shape (B, *S).
        residual: |b - A x| / |b| per datum, shape (B,); 0 where b = 0. Recursive for CG, of the least-squares problem for GMRES.
        iterations: Products with A that each datum used, shape (B,), int.
        image: The image of x, shape of the product's second output; None where no product was needed.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor
    image: Tensor | None = None


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per datum, shape (B, 1, ..., 1), to broadcast against (B, *S)."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def _safe(numerator: Tensor, denominator: Tensor, where: Tensor) -> Tensor:
    """numerator / denominator, 0 outside `where`."""
    return torch.where(where, numerator / torch.where(where, denominator, 1.0), 0.0)


def cg(
    product: Image,
    b: Tensor,
    iterations: int,
    tolerance: float | Tensor = 1e-4,
    start: Tensor | None = None,
    restrict: Callable[[Tensor], Image] | None = None,
) -> Solve:
    """Conjugate gradients from x = 0, with a linear image of the solution carried along.

    The caller often needs V At x next to x, and has V At p at hand for each direction p from computing A p. The image of x is then summed
    by the recurrence of x and costs no product of its own.

    A guess at the solution is taken as the first direction, not as the first x: the step along it is then the best there is, so that a guess of
    another length, or a poor one, does no harm, and it costs one product like any other direction, where x = start would cost one for its
    residual alone. The directions after it are made conjugate to it as well as to the last.

    A datum whose p^T A p is not positive (a learned Jacobian is not quite symmetric) or whose residual is below tolerance stops where
    it is; the others go on, alone once they are few. The products end when all have stopped; on a GPU, where asking would make the host wait,
    after all iterations.

    Args:
        product: p (B, *O) -> (A p, image of p), the image of any shape (B, *S).
        b: Right-hand side (B, *O).
        iterations: Most products with A.
        tolerance: Stop a datum at |r| <= tolerance |b|; a number or one per datum, shape (B,).
        start: First directions (B, *O), b where None; a datum whose guess is 0 starts from b.
        restrict: Makes the product for some of the data, given their indices; used where at most FEW of the data still need one. None: all go on.

    Returns:
        Solve with image; its residual is that of the recurrence, which in exact arithmetic is the true one.
    """
    norm = dot(b, b)
    stop = norm * _column(tolerance, b) ** 2
    x, r, used, alive = torch.zeros_like(b), b, torch.zeros(b.shape[0], dtype=torch.long, device=b.device), norm > stop
    p = b if start is None else torch.where(dot(start, start) > 0, start, b)
    image, past, rows, wholes = None, [], torch.arange(len(b), device=b.device), []
    for _ in range(iterations):
        if _ended(alive):
            break
        if restrict is not None and image is not None and _few(alive):
            some = alive.flatten().nonzero()[:, 0]
            wholes.append((some, x, r, used, image))
            x, r, p, used, alive, stop, image, rows = (a[some] for a in (x, r, p, used, alive, stop, image, rows))
            past, product = [tuple(a[some] for a in direction) for direction in past], restrict(rows)
        Ap, image_p = product(p)
        curvature = dot(p, Ap)
        used = used + alive.flatten()
        alive = alive & (curvature > 0)
        step = _safe(dot(r, p), curvature, alive)
        x, r = x + step * p, r - step * Ap
        image_step = _column(step, image_p) * image_p
        image = image_step if image is None else image + image_step
        alive = alive & (dot(r, r) > stop)
        past = [*past[: start is not None], (p, Ap, curvature)]
        p = r - sum(_safe(dot(r, Aq), c, alive) * q for q, Aq, c in past)
    for some, *whole in reversed(wholes):
        x, r, used, image = (a.index_copy(0, some, part) for a, part in zip(whole, (x, r, used, image)))
    return Solve(x, _safe(dot(r, r), norm, norm > 0).sqrt().flatten(), used, image)


def _few(alive: Tensor) -> bool:
    """Whether at most FEW of the data need another product; on a GPU never, as for `_ended`."""
    return alive.device.type == "cpu" and int(alive.sum()) <= FEW * len(alive)


def _column(a: float | Tensor, like: Tensor) -> float | Tensor:
    """A value per datum (B,) with the axes of `like`; a number as it is."""
    return a.reshape(-1, *[1] * (like.ndim - 1)) if isinstance(a, Tensor) else a


def _ended(alive: Tensor) -> bool:
    """Whether no datum needs another product; on a GPU, where asking would make the host wait, never."""
    return alive.device.type == "cpu" and not bool(alive.any())


def gmres(
    product: Image,
    b: Tensor,
    iterations: int,
    tolerance: float | Tensor = 1e-4,
    start: Tensor | None = None,
    restrict: Callable[[Tensor], Image] | None = None,
) -> Solve:
    """GMRES from x = 0 without restarts, for systems that are not symmetric; arguments and result as for `cg`, but start and restrict are not used.

    The basis is orthogonalised twice. A datum is done at its tolerance or when its Krylov space is exhausted: its basis ends there, while those of
    the others grow. Memory: iterations + 1 vectors.
    """
    batch = b.shape[0]
    beta = dot(b, b).sqrt()
    images: list[Tensor] = []
    H = b.new_zeros(batch, iterations + 1, iterations)
    alive = (beta > 0).flatten() & (torch.as_tensor(tolerance, device=b.device) < 1.0)
    basis = [_safe(b, beta.expand_as(b), _column(alive, b).expand_as(b))]
    used, residual = torch.zeros(batch, dtype=torch.long, device=b.device), (beta > 0).flatten().to(b.dtype)
    for j in range(iterations):
        if _ended(alive):
            break
        w, image = product(basis[j])
        images.append(image)
        size = dot(w, w).sqrt()
        for _ in range(2):
            for i, q in enumerate(basis):
                h = dot(q, w)
                H[:, i, j] += h.flatten()
                w = w - h * q
        h = dot(w, w).sqrt()
        h = torch.where(h > 1e-6 * size, h, 0.0)
        H[:, j + 1, j] = h.flatten()
        z, residual = _least_squares(H[:, : j + 2, : j + 1], beta)
        used, alive = used + alive, alive & (h > 0).flatten() & (residual > tolerance)
        basis.append(_safe(w, h.expand_as(w), _column(alive, w).expand_as(w)))
    if not images:
        return Solve(torch.zeros_like(b), residual, used)
    x = sum(_column(z[:, j], b) * basis[j] for j in range(len(images)))
    image = sum(_column(z[:, j], im) * im for j, im in enumerate(images))
    return Solve(x, residual, used, image)


def _least_squares(H: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """argmin |beta e_1 - H z| per datum, and the residual over beta; H (B, j + 2, j + 1), beta (B, 1, ...)."""
    rhs = torch.zeros_like(H[:, :, 0])
    rhs[:, 0] = beta.flatten()
    z = (torch.linalg.pinv(H, rtol=1e-6) @ rhs[..., None])[..., 0]
    gap = (rhs - (H @ z[..., None])[..., 0]).norm(dim=1)
    return z, _safe(gap, beta.flatten(), beta.flatten() > 0)


SOLVERS = {"cg": cg, "gmres": gmres}


def lanczos_sqrt(product: Product, b: Tensor, iterations: int) -> Tensor:
    """A^(1/2) b by projection of A on the Krylov space of b; negative eigenvalues of the projection count as 0.

    With b ~ N(0, I) the result has covariance A, up to the error of the projection, which is exact once iterations reaches the number of
    distinct eigenvalues.

    Args:
        product: A on a batch, (B, *S) -> (B, *S), symmetric positive semi-definite.
        b: Vectors (B, *S).
        iterations: Products with A, at least 1.

    Returns:
        A^(1/2) b, shape (B, *S).
    """
    norm = dot(b, b).sqrt()
    basis = [_safe(b, norm.expand_as(b), (norm > 0).expand_as(b))]
    T = b.new_zeros(b.shape[0], iterations, iterations)
    for j in range(iterations):
        w = product(basis[j])
        size = dot(w, w).sqrt()
        T[:, j, j] = dot(basis[j], w).flatten()
        for _ in range(2):
            for q in basis:
                w = w - dot(q, w) * q
        beta = dot(w, w).sqrt()
        beta = torch.where(beta > 1e-6 * size, beta, 0.0)
        if j + 1 < iterations:
            T[:, j, j + 1] = T[:, j + 1, j] = beta.flatten()
            basis.append(_safe(w, beta.expand_as(w), (beta > 0).expand_as(w)))
    s, U = torch.linalg.eigh(T)
    coefficients = (U * s.clamp(min=0).sqrt()[:, None, :]) @ U[:, 0, :, None]
    stacked = torch.stack([q.flatten(1) for q in basis], dim=1)
    return norm * torch.einsum("bj,bjd->bd", coefficients[..., 0], stacked).reshape(b.shape)
