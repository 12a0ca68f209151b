"""Train the classifier that emdiff bundles (emdiff/mnist_classifier.safetensors) on MNIST's 60,000 training digits; prints its accuracy on the
10,000 test digits.

python scripts/train_classifier.py --data ../shared/data/mnist.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from emdiff.classifier import WEIGHTS, DigitClassifier


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    with np.load(args.data) as file:
        x, labels, x_test, labels_test = (torch.from_numpy(file[k]) for k in ("train_images", "train_labels", "test_images", "test_labels"))
    x, x_test, labels, labels_test = x / 255, x_test / 255, labels.long(), labels_test.long()
    torch.manual_seed(0)
    net, batch = DigitClassifier(), 128
    steps = args.epochs * len(x) // batch
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for step in range(steps):
        index = torch.randint(len(x), (batch,))
        shift = torch.randint(-2, 3, (2,)).tolist()
        loss = F.cross_entropy(net(torch.roll(x[index], shift, (1, 2))), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"step {step} of {steps}, loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        accuracy = float((net.eval()(x_test).argmax(1) == labels_test).float().mean())
    save_file(net.state_dict(), args.out)
    print(f"accuracy on {len(x_test)} test digits {accuracy:.4f}; {args.out} ({args.out.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
