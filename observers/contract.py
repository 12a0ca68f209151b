r"""The contract of every observer, measured: what the algorithms rely on and cannot see for themselves.

    adjoint      |<A x, w> - <x, At w>| / (|A x| |w|)                                             for random x, w
    linearity    |A(x - a z) - (A x - a A z)| / (|A x| + |A z|), and the same of At; so A 0 = 0
    batch        a batch of N equals N batches of one, `rows` picks those data, in any order: |difference| / |A x|

Beyond these: shapes, dtype and device of results are those of the input, the input is left as it was, and a second call gives the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from observers.base import Observer

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative error, by the precision that the observer computes in."""


class Findings(NamedTuple):
    """What a check found.

    Attributes:
        adjoint_error: As above, the worst over data; NaN where it could not be measured.
        linearity_error: Likewise, of A and At.
        batch_error: Likewise, of A and At.
        seconds_forward: Of A on the whole batch, the median of three.
        seconds_adjoint: Of At.
        dtype: "float64", or "float32" where the observer fails in double precision.
        failures: One sentence for each clause that is broken; none where the observer passes.
    """

    adjoint_error: float
    linearity_error: float
    batch_error: float
    seconds_forward: float
    seconds_adjoint: float
    dtype: str
    failures: list[str]

    @property
    def ok(self) -> bool:
        """Whether the contract holds."""
        return not self.failures


def check(observer: Observer, count: int = 8, seed: int = 0, device: str = "cpu") -> Findings:
    """Check an observer.

    Args:
        observer: Of `count` data, or shared.
        count: Size of the batch, at least 2.
        seed: Of x and w.
        device: Where to compute.

    Returns:
        Findings; an observer that raises has broken the contract.

    >>> from observers.identity import Identity
    >>> check(Identity((3,), torch.tensor(0.5))).ok
    True
    """
    found = _check(observer.to(device, torch.float64), count, seed, torch.float64, device)
    return found if found.ok else max(found, _check(observer.to(device, torch.float32), count, seed, torch.float32, device), key=lambda f: f.ok)


def _check(observer: Observer, count: int, seed: int, dtype: torch.dtype, device: str) -> Findings:
    draws = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(count, *shape, generator=draws, dtype=dtype).to(device)
    x, z, w, v = draw(*observer.shape), draw(*observer.shape), draw(*observer.obs_shape), draw(*observer.obs_shape)
    values, failures = [float("nan")] * 5, []
    try:
        copies = x.clone(), w.clone()
        Ax, Atw = observer.forward(x), observer.adjoint(w)
        failures = [name for name, given, copy in (("forward", x, copies[0]), ("adjoint", w, copies[1])) if not torch.equal(given, copy)]
        failures = [f"{name} changes its input" for name in failures]
        failures += _results("forward", Ax, w, observer.forward(x)) + _results("adjoint", Atw, x, observer.adjoint(w))
        if not failures:
            values = [
                _largest(_dot(Ax, w) - _dot(x, Atw), _norm(Ax) * _norm(w)),
                max(_linearity(observer.forward, x, z), _linearity(observer.adjoint, w, v)),
                max(_batch(observer, "forward", x, Ax), _batch(observer, "adjoint", w, Atw)),
                _seconds(lambda: observer.forward(x), device),
                _seconds(lambda: observer.adjoint(w), device),
            ]
    except Exception as error:  # a user's code may raise anything
        failures.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'without a message'}")
    says = {
        "adjoint": "adjoint is not the adjoint of forward: <A x, w> and <x, At w> differ",
        "linearity": "forward or adjoint is not linear, or adds a constant",
        "batch": "a datum's result depends on the other data of its batch, or `rows` does not pick its parameters",
    }
    measured = [] if failures else list(zip(says.items(), values))
    for (name, sentence), value in measured:
        if not value <= TOLERANCE[dtype]:
            failures.append(f"{sentence} ({name}_error {value:.3g}, at most {TOLERANCE[dtype]:g})")
    return Findings(*values, str(dtype).removeprefix("torch."), failures)


def _results(name: str, result: Tensor, like: Tensor, repeated: Tensor) -> list[str]:
    """What is wrong with a result by itself."""
    if tuple(result.shape) != tuple(like.shape):
        return [f"{name} returns shape {tuple(result.shape)}, expected {tuple(like.shape)}"]
    if result.dtype != like.dtype:
        return [f"{name} returns {result.dtype} of {like.dtype}"]
    if result.device != like.device:
        return [f"{name} returns a tensor on {result.device}, its input is on {like.device}"]
    if not bool(result.isfinite().all()):
        return [f"{name} returns values that are not finite"]
    return [] if torch.equal(result, repeated) else [f"{name} gives another result when it is called again"]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _norm(a: Tensor) -> Tensor:
    return a.flatten(1).norm(dim=1)


def _largest(error: Tensor, unit: Tensor) -> float:
    """The largest |error| / unit over data; 0 where both are 0."""
    return float((error.abs() / unit.clamp(min=1e-30)).max())


def _linearity(apply: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    Aa, Ab = apply(a), apply(b)
    unit = _norm(Aa) + _norm(Ab)
    constant = _largest(_norm(apply(torch.zeros_like(a))), unit)
    return max(_largest(_norm(apply(a - 0.7 * b) - Aa + 0.7 * Ab), unit), constant)


def _batch(observer: Observer, method: str, given: Tensor, whole: Tensor) -> float:
    """Batches of one, and a few data in another order, one of them twice."""
    picks = [torch.tensor([i], device=given.device) for i in range(len(given))] + [torch.tensor([len(given) - 1, 0, 0], device=given.device)]
    worst = 0.0
    for index in picks:
        part = getattr(observer.rows(index), method)(given[index])
        if part.shape != whole[index].shape:
            return float("inf")
        worst = max(worst, _largest(_norm(part - whole[index]), _norm(whole[index])))
    return worst


def _seconds(call: Callable[[], Tensor], device: str) -> float:
    """The median time of three calls."""
    times = []
    for _ in range(3):
        clock = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - clock)
    return sorted(times)[1]
