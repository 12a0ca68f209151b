"""Streams of randomness: every use has its own, derived from the user's seed and the name of the use.

Two uses of one seed must not share numbers: walks that re-drew the very noise of the observations would be wrong without a sign of it.
"""

from __future__ import annotations

import hashlib

import torch


def stream_seed(seed: int, *names: str | int) -> int:
    """A 62-bit seed from the user's seed and the names of a use, the same on every machine.

    >>> stream_seed(0, "observe") == stream_seed(0, "observe"), stream_seed(0, "observe") == stream_seed(0, "fit")
    (True, False)
    """
    text = "/".join(map(str, ("emdiff", seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def stream(seed: int, *names: str | int, device: str = "cpu") -> torch.Generator:
    """The generator of a use, on a device."""
    return torch.Generator(device).manual_seed(stream_seed(seed, *names))
