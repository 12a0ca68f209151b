"""The cases of real_work.py: clean data, the instruments they are seen through, and their noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from real_galaxies import SIDE, galaxies, telescope
from torch import Tensor

from emdiff.streams import stream
from observers import Compose, Observer, Stack
from observers.instruments import blur, downsample, fourier, mask, mixed

MARGIN = 2
"""Rows and columns cut off each side of a digit, nearly all 0: 24 x 24 pixels are left."""

THREE = mixed(mask(keep=0.5), mixed(blur(sigma=1.0, vary=0.3, boundary="reflect"), downsample(factor=2), share=0.5), share=1 / 3)
"""A mask, a blur with a PSF per datum, or a grid half as fine: each for a third of the data."""

THREE_NOISE = (0.1, 0.05, 0.02)
"""Its noise std, instrument by instrument."""


class Case(NamedTuple):
    """What is observed, and how.

    Attributes:
        data: "digits" or "galaxies".
        draw: (S, N, generator) -> the observer of N data.
        fused: Whether an observation is one more measurement of x, so that guidance is exact.
    """

    data: str
    draw: Callable[[tuple[int, ...], int, torch.Generator], Observer]
    fused: bool = False


def three_instruments(shape: tuple[int, ...], count: int, generator: torch.Generator) -> Observer:
    """Each datum seen by one of three instruments with noise levels of their own."""
    drawn = THREE.draw(shape, count, 1.0, generator)
    return drawn.with_noise(torch.cat([torch.full((1, size), n) for size, n in zip(_sizes(drawn), THREE_NOISE)], dim=1))


def _sizes(observer: Observer) -> list[int]:
    """Lengths of an observation by each instrument of a `mixed` one, in order."""
    if isinstance(observer, Compose) and isinstance(observer.parts[0], Stack):
        return [size for part in observer.parts[0].parts for size in _sizes(part)]
    return [int(np.prod(observer.obs_shape))]


CASES = {
    "galaxies": Case("galaxies", lambda shape, count, generator: telescope(count, generator)),
    "mask50": Case("digits", lambda *how: mask(keep=0.5).draw(*how[:2], 0.1, how[2]), fused=True),
    "mask75": Case("digits", lambda *how: mask(keep=0.25).draw(*how[:2], 0.1, how[2]), fused=True),
    "blur": Case("digits", lambda *how: blur(sigma=2.0, size=9, boundary="reflect").draw(*how[:2], 0.02, how[2])),
    "downsample": Case("digits", lambda *how: downsample(factor=4).draw(*how[:2], 0.02, how[2])),
    "fourier4": Case("digits", lambda *how: fourier(acceleration=4.0).draw(*how[:2], 0.05, how[2])),
    "fourier8": Case("digits", lambda *how: fourier(acceleration=8.0).draw(*how[:2], 0.05, how[2])),
    "mixed": Case("digits", three_instruments),
}


def observed_data(kind: str, path: Path, count: int, draw: torch.Generator) -> Tensor:
    """Clean data behind the observations (count, *S)."""
    return galaxies(count, draw) if kind == "galaxies" else _digits(path, 0, count)


def fresh_data(kind: str, path: Path, count: int, fresh: int, seed: int) -> Tensor:
    """Clean data of the same law (fresh, *S), which only figures see: other galaxies, or the digits after the first `count`."""
    return galaxies(fresh, stream(seed, "fresh galaxies")) if kind == "galaxies" else _digits(path, count, fresh)


def _digits(path: Path, first: int, count: int) -> Tensor:
    """Training digits of MNIST in [0, 1] without their margins, (count, *S)."""
    with np.load(path) as file:
        x = torch.from_numpy(file["train_images"][first : first + count]).float() / 255
    return x[:, MARGIN:-MARGIN, MARGIN:-MARGIN]


SHAPE = (SIDE, SIDE)
"""Of all data."""


def naive(observer: Observer, obs: Tensor) -> Tensor:
    """The observation as an image (B, *S): itself, or where O is not S its adjoint, scaled for each datum so that A of it fits best; that is the
    pseudo-inverse where A At is a multiple of the identity, as for averages of blocks."""
    if observer.obs_shape == observer.shape:
        return obs
    x = observer.adjoint(obs)
    seen = observer.forward(x)
    inner = lambda a, b: (a * b).flatten(1).sum(1)  # noqa: E731
    return x * (inner(seen, obs) / inner(seen, seen).clamp(min=1e-12)).reshape(-1, *[1] * (x.ndim - 1))
