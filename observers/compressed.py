r"""Compressed sensing: obs = P x + n with a random matrix P (m, d) that is drawn anew from its seed whenever it is needed, so none is stored.

    gaussian    P_ij ~ N(0, 1/m)
    signs       P_ij = +-1/sqrt(m)
    hadamard    P = sqrt(d'/m) R H D: random signs D, the orthonormal Walsh-Hadamard transform H of length d', the power of two at or above d, and m
                random rows R without repetition; d' log d' operations instead of m d

Random numbers are a hash of (seed, row, column), the finaliser of SplitMix64: the same on every device and in every batch.

Sources: Near-optimal signal recovery from random projections (Candes & Tao 2006); Fast and efficient compressive sensing using structurally random
matrices (Do et al. 2012); Fast splittable pseudorandom number generators (Steele, Lea & Flood 2014).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from observers.base import Observer, expect
from observers.noise import Noise

KINDS = ("gaussian", "signs", "hadamard")

ENTRIES = 2**24
"""Entries of dense matrices that are held at once."""


class Compressed(Observer):
    """x, flattened to d entries, is seen through m random functionals. O = (m,).

    Args:
        shape: S, the shape of x.
        noise: As in `Observer`.
        seeds: Of each datum's matrix, integers, shape (N or 1,); kept as int64.
        rows: m, at least 1; with kind `hadamard` at most the power of two at or above d.
        kind: `gaussian`, `signs` or `hadamard`.

    >>> A = Compressed((3, 4), torch.tensor(0.5), torch.tensor([7, 8]), rows=5)
    >>> A.forward(torch.ones(2, 3, 4)).shape
    torch.Size([2, 5])
    """

    name: ClassVar[str] = "compressed"
    array_names: ClassVar[tuple[str, ...]] = ("seeds",)
    option_names: ClassVar[tuple[str, ...]] = ("rows", "kind")

    def __init__(self, shape: tuple[int, ...], noise: Noise | Tensor, seeds: Tensor, rows: int = 1, kind: str = "hadamard") -> None:
        expect("seeds", seeds, ())
        if kind not in KINDS:
            raise ValueError(f"kind is '{kind}', expected one of: {', '.join(KINDS)}")
        self.length = 1 << (math.prod(shape) - 1).bit_length()
        if int(rows) < 1 or (kind == "hadamard" and int(rows) > self.length):
            raise ValueError(f"rows is {rows}, expected 1 to {self.length} for x {tuple(shape)}")
        self.seeds, self.m, self.kind = seeds.long(), int(rows), kind
        super().__init__(shape, noise)

    def options(self) -> dict[str, str | int | float]:
        """rows and kind."""
        return {"rows": self.m, "kind": self.kind}

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """O = (m,)."""
        return (self.m,)

    def forward(self, x: Tensor) -> Tensor:
        """P x, from (B, *S) to (B, m)."""
        flat = x.flatten(1)
        if self.kind == "hadamard":
            mixed = hadamard(torch.nn.functional.pad(flat * self._signs(x), (0, self.length - flat.shape[1])))
            return mixed.gather(1, self._chosen().expand(len(x), -1)) * math.sqrt(self.length / self.m)
        return self._product(flat, "bmd,bd->bm")

    def adjoint(self, w: Tensor) -> Tensor:
        """P^T w, from (B, m) to (B, *S)."""
        if self.kind == "hadamard":
            spread = w.new_zeros(len(w), self.length).scatter(1, self._chosen().expand(len(w), -1), w * math.sqrt(self.length / self.m))
            return (hadamard(spread)[:, : math.prod(self.shape)] * self._signs(w)).reshape(-1, *self.shape)
        return self._product(w, "bmd,bm->bd").reshape(-1, *self.shape)

    def _product(self, vectors: Tensor, rule: str) -> Tensor:
        """A product with dense matrices, a few data at a time."""
        if len(self.seeds) == 1:
            return torch.einsum(rule, self._matrix(self.seeds, vectors).expand(len(vectors), -1, -1), vectors)
        step = max(1, ENTRIES // (self.m * math.prod(self.shape)))
        parts = [torch.einsum(rule, self._matrix(seed, v), v) for seed, v in zip(self.seeds.split(step), vectors.split(step))]
        return torch.cat(parts)

    def _matrix(self, seed: Tensor, like: Tensor) -> Tensor:
        """P of some seeds (b,), shape (b, m, d)."""
        m, d = self.m, math.prod(self.shape)
        u = uniform(seed, m * d).reshape(-1, m, d)
        if self.kind == "signs":
            return torch.where(u < 0.5, -1.0, 1.0).to(like.dtype) / math.sqrt(m)
        return (math.sqrt(2) * torch.erfinv(2 * u - 1) / math.sqrt(m)).to(like.dtype)

    def _signs(self, like: Tensor) -> Tensor:
        """D, shape (N or 1, d)."""
        return torch.where(uniform(self.seeds, math.prod(self.shape)) < 0.5, -1.0, 1.0).to(like.dtype)

    def _chosen(self) -> Tensor:
        """Rows of H that are kept, (N or 1, m): those of the m smallest of d' random numbers."""
        return uniform(self.seeds ^ 0x5BD1E995, self.length).argsort(1)[:, : self.m]

    @classmethod
    def infer_shape(cls, obs_shape: tuple[int, ...], parameters: dict) -> tuple[int, ...]:
        """Not known from O."""
        return ()


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of (B, d'), d' a power of two; its own transpose and inverse."""
    B, d = x.shape
    half = 1
    while half < d:
        a, b = x.reshape(B, d // (2 * half), 2, half).unbind(2)
        x = torch.stack([a + b, a - b], dim=2).reshape(B, d)
        half *= 2
    return x / math.sqrt(d)


def uniform(seed: Tensor, count: int) -> Tensor:
    """Numbers in (0, 1), float64, a hash of each seed (N,) and of 0..count-1, shape (N, count)."""
    z = seed[:, None] * _signed(0xD1342543DE82EF95) + torch.arange(1, count + 1, device=seed.device) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift(z, 31)
    return (_shift(z, 11).double() + 0.5) / 2**53


def _signed(value: int) -> int:
    """A 64-bit constant as the signed integer of the same bits; products wrap around."""
    return value - 2**64 if value >= 2**63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
