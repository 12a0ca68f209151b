"""A small classifier of MNIST digits that ships with emdiff: which class a chain visits. Trained by scripts/train_classifier.py, which prints
its accuracy.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "mnist_classifier.safetensors"

MEAN = (0.10, 0.16)
"""Digits in [0, 1] have a mean within these; a prior of 28 x 28 data with another mean is of something else."""


class DigitClassifier(nn.Module):
    """Digits (B, 28, 28) in [0, 1] -> log odds (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        conv = lambda a, b, s: [nn.Conv2d(a, b, 3, s, 1), nn.ReLU()]
        self.body = nn.Sequential(*conv(1, 16, 2), *conv(16, 32, 2), *conv(32, 32, 1), *conv(32, 32, 2), nn.Flatten())
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Log odds (B, 10)."""
        return self.head(self.body(x.reshape(-1, 1, 28, 28)))


def digit_classifier(shape: tuple[int, ...], mean: float) -> DigitClassifier | None:
    """The bundled classifier, or None where the data are not digits.

    Args:
        shape: S of the data.
        mean: Of the data.
    """
    if tuple(shape) not in ((28, 28), (1, 28, 28)) or not MEAN[0] < mean < MEAN[1]:
        return None
    net = DigitClassifier()
    net.load_state_dict(load_file(WEIGHTS))
    return net.eval().requires_grad_(False)
