"""A network run through torch.compile where no gradient is asked, and as it is elsewhere: for walks and samples, never for training.

On a GPU the compiled network replays CUDA graphs, which need batches of one size; on a CPU each new size would cost another compilation. So the
first batch's size is kept, smaller ones are padded to it, and larger ones run uncompiled. Whatever torch.compile raises, at the first call or
later, ends the attempt with one line that names the reason, and the network runs as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from emdiff.graphs import first_line, with_backbone
from emdiff.mdae import MDAE
from emdiff.prior import Prior

Warn = Callable[[str], None]


class Compiled(nn.Module):
    """A backbone and its compiled form.

    Args:
        backbone: F(z, c), as in `emdiff.nn`.
        device: "cpu" or "cuda".
        warn: Told, once, why the compiled form is not used.

    Attributes:
        fast: The compiled form; None once it has failed.
    """

    def __init__(self, backbone: nn.Module, device: str, warn: Warn) -> None:
        super().__init__()
        self.backbone, self.warn, self.rows = backbone, warn, 0
        self.fast: Callable[[Tensor, Tensor], Tensor] | None = None
        try:
            self.fast = torch.compile(backbone, dynamic=False, mode="reduce-overhead" if device == "cuda" else None)
        except Exception as error:  # noqa: BLE001 - whatever it is, the network runs without
            self._give_up(error)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """F(z, c), shape of z."""
        self.rows = self.rows or len(z)
        if self.fast is None or len(z) > self.rows or (torch.is_grad_enabled() and z.requires_grad):
            return self.backbone(z, c)
        try:
            return self.fast(self._padded(z), self._padded(c) if len(c) > 1 else c)[: len(z)].clone()
        except Exception as error:  # noqa: BLE001
            self._give_up(error)
            return self.backbone(z, c)

    def _padded(self, a: Tensor) -> Tensor:
        """a with zeros after its rows, up to the size that was compiled."""
        return a if len(a) == self.rows else torch.cat([a, a.new_zeros(self.rows - len(a), *a.shape[1:])])

    def _give_up(self, error: Exception) -> None:
        self.fast = None
        self.warn(f"--compile: torch.compile failed, going on without ({first_line(error)})")


def compiled(denoiser: MDAE, device: str, warn: Warn = lambda line: print(f"warning: {line}", file=sys.stderr)) -> MDAE:
    """A denoiser that shares the weights of another and runs its backbone compiled; for inference alone."""
    return with_backbone(denoiser, Compiled(denoiser.backbone, device, warn))


def for_sampling(prior: Prior, device: str, compile: bool) -> Prior:
    """The prior to sample with: itself, or one with a compiled network."""
    return prior._replace(denoiser=compiled(prior.denoiser, device)) if compile else prior
