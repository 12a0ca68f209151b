"""`emdiff observe`: test data, clean data seen through drawn operators with drawn noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from emdiff.data import Observations
from emdiff.errors import UsageError
from emdiff.observations import open_data, write_parts
from emdiff.rows import BLOCK, spans
from emdiff.streams import stream
from observers import Observer
from observers.noise import Noise, Poisson
from observers.noise_recipes import NoiseRecipe
from observers.noises import noise_of
from observers.recipes import Recipe


def observe_command(data: Path, recipe: Recipe, noise: NoiseRecipe, noise_std: float, count: int | None, out: Path, seed: int) -> None:
    """`emdiff observe`: in parts, each with operators and noise of its own from one stream; what all data share is that of the first part."""
    x, generator = open_data(data, count), stream(seed, "observe")
    shape, name = tuple(x.shape[1:]), ""

    def parts() -> Iterator[tuple[Observations, Tensor]]:
        nonlocal name
        whole: Observer | None = None
        shared: dict[str, Tensor] = {}
        for span in spans(len(x), math.prod(shape), len(x), BLOCK // 4):
            clean = x[span]
            drawn = whole or recipe.draw(shape, len(clean), noise_std or 1.0, generator)
            law = noise.draw(drawn.obs_shape, len(clean), noise_std, generator).tensors()
            if not span.start:
                whole, name = drawn if drawn.count is None else None, drawn.name
                shared = {key: array for key, array in {**drawn.arrays(), **law}.items() if not array.ndim or len(array) != len(clean)}
            elif whole is None:
                kept = {key: shared.get(key, array) for key, array in drawn.arrays().items()}
                drawn = type(drawn).assemble(shape, drawn.noise, {**kept, **drawn.options()})
            drawn = with_law(drawn, noise_of({key: shared.get(key, array) for key, array in law.items()}))
            check_counts(drawn, clean)
            yield Observations(drawn.simulate(clean, generator), drawn), clean

    write_parts(out, len(x), parts())
    kind = type(noise).__name__
    print(f"{len(x)} observations of shape {shape} through {name}, noise_std {noise_std:g}{'' if kind == 'level' else f', {kind}'} -> {out}")
    print(f"next: emdiff fit --observations {out}")


def with_law(observer: Observer, noise: Noise) -> Observer:
    """An observer with a noise that was drawn for it.

    Raises:
        UsageError: if the noise needs every entry of obs, and the observer does not see all.
    """
    if noise.complete and not bool(observer.observed().all()):
        raise UsageError(f"--noise stationary is for observers that see every entry of obs, and {observer.name} does not; use low_rank or another")
    noise.check(observer.obs_shape)
    return observer.with_noise(noise)


def check_counts(observer: Observer, x: Tensor) -> None:
    """Refuse counts of negative light.

    Raises:
        UsageError: naming the least A x.
    """
    if not isinstance(observer.noise, Poisson):
        return
    mean = observer.forward(x)
    if float(mean.min()) < -1e-4 * float(mean.abs().max()):
        raise UsageError(f"--noise counts needs A x of 0 or more, and {observer.name} makes {float(mean.min()):.4g} of these data; use other noise")
