"""Feature modules for Frechet and kernel distances: a named one that needs no weights, or a TorchScript file of the user's.

Distances compare only within one feature module, so its name stands next to every figure.

A TorchScript file is a program: loading it can already run what it holds, with operators that read and write files. No other file that emdiff opens
runs anything, so this one is opened only where its name says that its maker is trusted: trust:FILE.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from emdiff.errors import UsageError

RANDOM = "random-conv-64"
"""Name of the module that is there without a file."""

TRUST = "trust:"
"""What stands before the name of a TorchScript file whose maker the user trusts."""


class RandomConv(nn.Module):
    """Three convolutions with fixed random weights, each followed by a rectifier and a halving, then the mean and std over positions.

    Images (B, C, H, W), as they are, -> (B, 64). Random filters tell texture, sharpness and composition apart, not meaning.

    >>> RandomConv(1)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 64])
    """

    num_features = 64

    def __init__(self, channels: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(64)
        widths = [channels, 16, 32, 32]
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:]):
            conv = nn.Conv2d(a, b, 3, stride=2, padding=1)
            conv.weight.data = torch.randn(conv.weight.shape, generator=draw) * (2 / (9 * a)) ** 0.5
            conv.bias.data.zero_()
            layers += [conv, nn.ReLU()]
        self.body = nn.Sequential(*layers).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 64)."""
        h = self.body(x.float()).flatten(2)
        return torch.cat([h.mean(2), h.std(2, unbiased=False)], dim=1)


class Scripted(nn.Module):
    """A TorchScript module from a file, images (B, C, H, W) -> features (B, num_features)."""

    def __init__(self, module: nn.Module, num_features: int) -> None:
        super().__init__()
        self.module, self.num_features = module, num_features

    def forward(self, x: Tensor) -> Tensor:
        """Features of images, as they are."""
        return self.module(x.float())


def feature_module(name: str, example: Tensor) -> nn.Module:
    """A feature module by name or file.

    Args:
        name: RANDOM, or TRUST and the path of a TorchScript file.
        example: Images (n, C, H, W) it has to take.

    Raises:
        UsageError: if the file is missing, is not trusted, is not TorchScript, or does not map images to one vector each.
    """
    if name == RANDOM:
        return RandomConv(example.shape[1])
    file = Path(name.removeprefix(TRUST))
    if not file.is_file():
        raise UsageError(f"--features {name}: there is no such file; give {TRUST}FILE, a TorchScript file, or {RANDOM}")
    if not name.startswith(TRUST):
        raise UsageError(f"--features {name}: a TorchScript file is a program; if you trust its maker, say {TRUST}{name}")
    try:
        module = torch.jit.load(str(file), map_location="cpu").eval()
        with torch.no_grad():
            out = module(example[:2].float())
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--features {name}: not a TorchScript module that takes images {tuple(example.shape[1:])} ({_last(error)})") from error
    if not (isinstance(out, Tensor) and out.ndim == 2 and len(out) == min(2, len(example))):
        raise UsageError(f"--features {name}: it has to return one vector per image, shape (B, F); it returned {getattr(out, 'shape', type(out))}")
    return Scripted(module, out.shape[1])


def _last(error: Exception) -> str:
    return [line for line in str(error).splitlines() if line.strip()][-1].strip()
