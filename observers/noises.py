r"""Every kind of noise, and the one that the tensors of a file describe."""

from __future__ import annotations

import torch
from torch import Tensor

from observers.correlated import Fourier, Full, LowRank
from observers.noise import Diagonal, Noise, Poisson

NOISES: tuple[type[Noise], ...] = (Full, LowRank, Fourier, Poisson, Diagonal)
"""Every kind, those with a key of their own first."""

NOISE_KEYS = tuple(sorted({name for kind in NOISES for name in kind.tensor_names}))
"""Keys of noise in files."""


def noise_of(tensors: dict[str, Tensor]) -> Noise:
    """The noise that tensors of a file describe.

    Args:
        tensors: By the keys of NOISE_KEYS.

    Raises:
        ValueError: Keys that do not go together, or none.

    >>> type(noise_of({"noise_std": torch.tensor(0.1), "noise_factor": torch.ones(1, 3, 1)})).__name__
    'LowRank'
    """
    if "noise_gain" in tensors:
        tensors = {"noise_std": torch.zeros(()), **tensors}
    for kind in NOISES:
        if set(kind.tensor_names) == set(tensors):
            return kind(**tensors)
    known = "; ".join(" and ".join(kind.tensor_names) for kind in NOISES)
    raise ValueError(f"the noise is given by {' and '.join(sorted(tensors)) or 'nothing'}, expected one of: {known}")
