"""Features for Frechet distances on MNIST: the 64 units before the last layer of a small classifier trained on the 60,000 clean digits.

Distances in these features compare only with one another. The classifier is trained once (half a minute) and kept in runs/.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F


class Features(nn.Module):
    """Images (B, 1, 28, 28) -> (B, 64)."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        conv = [nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 128, 3, 1, 1), nn.ReLU()]
        self.body = nn.Sequential(*conv, nn.Flatten(), nn.Linear(128 * 49, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images; torchmetrics hands them over as 0..255."""
        return self.body(x.float() / 255 if x.dtype == torch.uint8 else x)


def mnist_features(x: Tensor, labels: Tensor, folder: Path = Path("runs"), epochs: int = 3) -> Features:
    """Train the classifier on clean digits x (N, 28, 28) in [0, 1], or load it."""
    torch.manual_seed(0)
    net, file = Features(), folder / f"mnist_features_{len(x)}_{epochs}.safetensors"
    if file.is_file():
        net.load_state_dict(load_file(file))
        return net.eval()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(128):
            loss = F.cross_entropy(net.head(net.body(x[index, None])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), file)
    return net.eval()
