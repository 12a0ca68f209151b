"""A network in training on a GPU replayed as CUDA graphs: its forward and its backward pass are each one launch in place of some hundred.

A small network's kernels take less time than it takes to launch them. A graph holds for one shape of input, that of the first batch; inputs of
another shape, and those of which a derivative is asked, run as they would without. The arithmetic is the same. Whatever capturing raises costs one
line that names the reason, and the training goes on without.

An energy's score is itself a derivative, whose derivative a graph does not hold: energies train as they are.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from emdiff.ahead import PINNING

Warn = Callable[[str], None]


class Replayed(nn.Module):
    """A backbone that is captured when it first sees a batch.

    Args:
        backbone: F(z, c), as in `emdiff.nn`, on a GPU.
        warn: Told, once, why the graph is not used.

    Attributes:
        shapes: Of the inputs that the graph is for; empty before the first batch.
        fast: The graph; None where there is none.
    """

    def __init__(self, backbone: nn.Module, warn: Warn) -> None:
        super().__init__()
        self.backbone, self.warn = backbone, warn
        self.shapes: tuple[torch.Size, ...] = ()
        self.fast: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """F(z, c), shape of z: z (B, *S), c as in `emdiff.nn`."""
        if not torch.is_grad_enabled() or z.requires_grad or c.requires_grad:
            return self.backbone(z, c)
        if not self.shapes:
            self.shapes = (z.shape, c.shape)
            self.fast = self._captured(z, c)
        if self.fast is None or self.shapes != (z.shape, c.shape):
            return self.backbone(z, c)
        return self.fast(z, c)

    def _captured(self, z: Tensor, c: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The graph for inputs like these, in the precision that is in force; None if it cannot be captured."""
        shared = copy.copy(self.backbone)  # its `forward` is replaced, while its weights are those of the original
        precision = torch.get_autocast_dtype("cuda")
        quiet = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
        if quiet is not None:  # capturing leaves gradients to be added on a stream of its own, for which autograd waits as it should
            quiet(False)
        try:
            with PINNING, torch.autocast("cuda", precision, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
                return torch.cuda.make_graphed_callables(shared, (z.clone(), c.clone()))
        except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on without
            self.warn(f"training without CUDA graphs ({first_line(error)})")
            return None


def first_line(error: Exception) -> str:
    r"""The kind of an error and the first line of its message.

    >>> first_line(RuntimeError("no stream\nmore"))
    'RuntimeError: no stream'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def with_backbone(denoiser: nn.Module, backbone: nn.Module) -> nn.Module:
    """A denoiser that shares all with another but the network that it calls its backbone."""
    other = copy.copy(denoiser)
    other._modules = {**denoiser._modules, "backbone": backbone}
    return other


def replayed(denoiser: nn.Module, warn: Warn = lambda line: print(f"note: {line}", file=sys.stderr)) -> nn.Module:
    """A denoiser that shares the weights of another and replays its backbone in training; the same one where that is not on a GPU, has no backbone of
    its own (energies), or has weights that are made anew in every pass (spectral normalisation)."""
    backbone = getattr(denoiser, "backbone", None)
    if backbone is None or next(denoiser.parameters()).device.type != "cuda":
        return denoiser
    if any(nn.utils.parametrize.is_parametrized(module) for module in backbone.modules()):
        return denoiser
    return with_backbone(denoiser, Replayed(backbone, warn))
