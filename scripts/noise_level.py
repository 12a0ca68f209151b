r"""What `--noise-std auto` starts from, over the truth: MNIST digits through four operators, three noise levels.

python scripts/noise_level.py [--data mnist.npz]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from emdiff.data import Observations
from emdiff.noise import first_noise
from emdiff.observations import read_data
from observers.instruments import Recipe, blur, downsample, identity, mask

OPERATORS: dict[str, Recipe] = {"identity": identity(), "75 % missing": mask(keep=0.25), "blur": blur(sigma=2.0), "downsample 4": downsample(4)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="/work/shared/data/mnist.npz")
    x = read_data(Path(parser.parse_args().data), 3000)
    print("| operator | n | 1,000 data | 3,000 data |\n|---|---|---|---|")
    for name, recipe in OPERATORS.items():
        for n in (0.5, 0.1, 0.02):
            found = []
            for count in (1000, 3000):
                generator = torch.Generator().manual_seed(1)
                observer = recipe.draw(tuple(x.shape[1:]), count, n, generator)
                found.append(first_noise(Observations(observer.simulate(x[:count], generator), observer)) / n)
            print(f"| {name} | {n:g} | {found[0]:.3f} | {found[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
