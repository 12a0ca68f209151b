r"""Linear operators of deepinv (https://deepinv.github.io) as observers: forward is `physics.A`, adjoint `physics.A_adjoint`.

A physics keeps the parameters that it was last given, so what it computes depends on who called it before. Here it is a copy of its own, and the
parameters that are declared per datum are passed with every call; a batch sees the parameters of its rows. Noise models of deepinv are not used: the
observer has the noise.

In a file of yours, for `--observer file.py:Seen`:

    import deepinv
    from observers.physics import wrap

    Seen = wrap(deepinv.physics.Inpainting((1, 28, 28)), (1, 28, 28), parameters=("mask",))

Source: DeepInverse: A Python package for solving imaging inverse problems with deep learning (Tachella et al. 2025).
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

from observers.base import Observer
from observers.noise import Noise

ERROR = 1e-3
"""Largest relative error of a physics' adjoint, in single precision."""


class Physics(Observer):
    """A deepinv operator; its subclasses are made by `wrap`."""

    name: ClassVar[str] = "physics"
    physics: Any
    seen_as: ClassVar[tuple[int, ...]] = ()
    made: ClassVar[tuple[int, ...]] = ()
    place: tuple[torch.device, torch.dtype] = (torch.device("cpu"), torch.float32)

    def __init__(self, shape: tuple[int, ...], noise: Noise | Tensor, **parameters: Tensor) -> None:
        if tuple(shape) != self.seen_as and (1, *shape) != self.seen_as:
            raise ValueError(f"observer '{self.name}' was made for x of shape {self.seen_as}, not {tuple(shape)}")
        super().__init__(shape, noise, **{key: value if value.is_floating_point() else value.float() for key, value in parameters.items()})

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """O, what the physics made of one datum."""
        return self.made

    def forward(self, x: Tensor) -> Tensor:
        """physics.A, from (B, *S) to (B, *O)."""
        return self._placed(x).A(x.reshape(len(x), *self.seen_as), **self._parameters())

    def adjoint(self, w: Tensor) -> Tensor:
        """physics.A_adjoint, from (B, *O) to (B, *S)."""
        return self._placed(w).A_adjoint(w, **self._parameters()).reshape(len(w), *self.shape)

    def _placed(self, like: Tensor) -> Any:
        """The physics where the data are, in their precision; a copy of its own where it has to move."""
        if self.place != (like.device, like.dtype):
            self.physics, self.place = copy.deepcopy(self.physics).to(device=like.device, dtype=like.dtype), (like.device, like.dtype)
        return self.physics

    def _parameters(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.array_names}

    @classmethod
    def example(cls, shape: tuple[int, ...], count: int, generator: torch.Generator) -> Observer:
        """With the parameters that the physics was made with."""
        return cls(cls.seen_as, torch.tensor(0.5), **{name: getattr(cls.physics, name) for name in cls.array_names})

    @classmethod
    def infer_shape(cls, obs_shape: tuple[int, ...], parameters: dict) -> tuple[int, ...]:
        """What the physics was made for."""
        return cls.seen_as


def wrap(physics: Any, shape: tuple[int, ...], parameters: tuple[str, ...] = ()) -> type[Physics]:
    """An observer class for a linear physics.

    Args:
        physics: A `deepinv.physics.LinearPhysics`.
        shape: Shape of x as the physics takes it, usually (C, H, W).
        parameters: Names of parameters that `physics.A` takes and that are given for each datum or for all, as arrays (N or 1, ...): the observer's
            arrays, under the same keys in files. The others stay as the physics has them.

    Returns:
        A class; its observers are made as `cls(shape, noise, mask=...)`.

    Raises:
        ValueError: The physics is not linear, takes no such parameter, makes lists or complex numbers, or has an adjoint that is none.
    """
    from deepinv.physics import LinearPhysics

    name = type(physics).__name__
    if not isinstance(physics, LinearPhysics):
        raise ValueError(f"deepinv physics '{name}' is not a LinearPhysics, and emdiff observes linearly; only linear ones can be wrapped")
    known = [key for key, p in inspect.signature(physics.A).parameters.items() if p.kind != p.VAR_KEYWORD][1:]
    for key in parameters:
        if key not in known or not isinstance(getattr(physics, key, None), Tensor):
            raise ValueError(f"deepinv physics '{name}' takes no tensor '{key}', it takes {', '.join(known) or 'none'}; give it one when you make it")
    own = copy.deepcopy(physics)
    fixed = {key: getattr(own, key) for key in parameters}
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=draw)
    try:
        seen = own.A(x, **fixed)
        if not isinstance(seen, Tensor) or seen.is_complex() or len(seen) != len(x):
            kind = "complex numbers" if isinstance(seen, Tensor) and seen.is_complex() else "something else than one real tensor per datum"
            raise ValueError(f"deepinv physics '{name}' makes {kind}, which is not supported; several tensors are a `stack` of observers")
        w = torch.randn(seen.shape, generator=draw)
        back = own.A_adjoint(w, **fixed)
    except (TypeError, RuntimeError, AttributeError) as error:  # RuntimeError has NotImplementedError, which may come without a word
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"deepinv physics '{name}' cannot be used on x of shape {tuple(shape)}: {why}") from error
    gap = float(((seen * w).sum() - (x * back).sum()).abs() / (seen.norm() * w.norm()).clamp(min=1e-30)) if back.shape == x.shape else float("inf")
    if not gap <= ERROR:
        raise ValueError(f"deepinv physics '{name}': its A_adjoint is not the adjoint of A (relative error {gap:.3g}, at most {ERROR:g})")
    members = {"name": name.lower(), "array_names": tuple(parameters), "physics": own, "seen_as": tuple(shape), "made": tuple(seen.shape[1:])}
    return type(name, (Physics,), {**members, "__doc__": f"deepinv's {name} as an observer.", "__module__": __name__})
