r"""Diagnostics of one long chain of jumps, in memory that does not grow with its length.

| figure | what | a healthy chain |
|---|---|---|
| classes | share of jumps that a classifier gives to each class, and in WINDOWS windows over time | all visited, in every window |
| longest stay | most consecutive jumps in one class | short against the chain |
| autocorrelation | of PROJECTIONS random projections at lags 1..LAGS jumps; its integrated time, 1 + 2 sum rho until rho first turns negative | few
jumps |
| moved | mean squared change from jump to jump over twice the variance of all jumps; 1 for independent jumps | near 1 |
| stuck | stretches of STUCK jumps in which every one moved less than STILL | 0 |
| restarts | times the chain diverged and was set back (chain) | 0 |

What is kept: a gallery of at most `keep` jumps, evenly spaced, of which every second is dropped when it is full; counts in windows that are merged
in pairs likewise;
running sums. The initial positive sequence is Geyer's (1992), on single lags.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PROJECTIONS, LAGS, WINDOWS = 16, 64, 64
STUCK, STILL = 20, 1e-3


class Thinned:
    """At most `keep` items of a stream, evenly spaced: every stride-th; when full, every second is dropped and the stride doubles."""

    def __init__(self, keep: int) -> None:
        self.keep, self.stride, self.seen = keep, 1, 0
        self.items: list[Any] = []

    def add(self, item: Any) -> None:
        """Offer the next item."""
        if self.seen % self.stride == 0:
            if len(self.items) == self.keep:
                self.items, self.stride = self.items[::2], 2 * self.stride
            if self.seen % self.stride == 0:
                self.items.append(item)
        self.seen += 1


class Windows:
    """Counts of classes in at most `most` windows of equal length over time; neighbours are merged, and the length doubles, when these are full."""

    def __init__(self, classes: int, most: int = WINDOWS) -> None:
        self.counts, self.length, self.seen, self.used = torch.zeros(most, classes, dtype=torch.long), 1, 0, 0

    def add(self, label: int) -> None:
        """Count one jump."""
        if self.seen == self.length * len(self.counts):
            merged = self.counts[0::2] + self.counts[1::2]
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.length *= 2
        place = self.seen // self.length
        self.counts[place, label] += 1
        self.seen, self.used = self.seen + 1, place + 1

    def table(self) -> Tensor:
        """Counts (windows used, classes)."""
        return self.counts[: self.used]


class Autocorrelation:
    """Running autocorrelation of vectors (P,) at lags 0..LAGS, averaged over the entries."""

    def __init__(self, size: int, lags: int = LAGS) -> None:
        self.past: deque[Tensor] = deque(maxlen=lags + 1)
        self.products, self.pairs = torch.zeros(lags + 1, size, dtype=torch.float64), torch.zeros(lags + 1, dtype=torch.float64)
        self.sum, self.count = torch.zeros(size, dtype=torch.float64), 0

    def add(self, value: Tensor) -> None:
        """Count the next value (P,)."""
        self.past.appendleft(value.double())
        stacked = torch.stack(tuple(self.past))
        self.products[: len(stacked)] += stacked * value.double()
        self.pairs[: len(stacked)] += 1
        self.sum, self.count = self.sum + value.double(), self.count + 1

    def rho(self) -> Tensor:
        """Autocorrelation at lags 0..LAGS that have been seen, shape (L,)."""
        seen = int((self.pairs > 0).sum())
        centred = self.products[:seen] / self.pairs[:seen, None] - (self.sum / max(self.count, 1)).square()
        centred = centred.mean(1)
        return centred / centred[0].clamp(min=1e-30)

    def time(self) -> float:
        """Integrated autocorrelation time, in items, at least 1."""
        rho = self.rho()[1:]
        negative = (rho <= 0).nonzero()
        end = int(negative[0]) if len(negative) else len(rho)
        return 1 + 2 * float(rho[:end].sum())


class ChainFigures:
    """What is known of a chain so far.

    Args:
        shape: S.
        keep: Most jumps in the gallery.
        classify: Jump (1, *S) -> class probabilities (1, classes), or None.
        classes: Number of classes.
    """

    def __init__(self, shape: tuple[int, ...], keep: int = 1024, classify: Callable[[Tensor], Tensor] | None = None, classes: int = 10) -> None:
        self.gallery, self.classify = Thinned(keep), classify
        self.windows = Windows(classes) if classify else None
        d = torch.Size(shape).numel()
        self.directions = torch.randn(d, PROJECTIONS, generator=torch.Generator().manual_seed(0)) / d**0.5
        self.correlation = Autocorrelation(PROJECTIONS)
        self.last: Tensor | None = None
        self.label, self.stay, self.longest, self.changes = -1, 0, 0, 0
        self.still, self.stuck, self.restarts, self.moves, self.jumps = 0, 0, 0, 0.0, 0
        self.sum, self.squares = torch.zeros(d, dtype=torch.float64), 0.0

    def add(self, x: Tensor, step: int, restarted: bool = False) -> None:
        """Count a jump x (S) after `step` steps."""
        flat = x.flatten().double()
        self.gallery.add((step, x.clone()))
        self.correlation.add(x.flatten() @ self.directions)
        self.jumps += 1
        self.sum, self.squares = self.sum + flat, self.squares + float(flat.square().sum())
        self.restarts += restarted
        if self.last is not None:
            self._moved(float((flat - self.last).square().sum()))
        self.last = flat
        if self.classify is not None:
            self._classified(int(self.classify(x[None]).argmax()))

    def _moved(self, change: float) -> None:
        self.moves += change
        self.still = self.still + 1 if change < STILL * 2 * self.variance() else 0
        self.stuck += self.still > 0 and self.still % STUCK == 0

    def _classified(self, label: int) -> None:
        self.windows.add(label)
        self.changes += self.label >= 0 and label != self.label
        self.stay = self.stay + 1 if label == self.label else 1
        self.label, self.longest = label, max(self.longest, self.stay)

    def variance(self) -> float:
        """Variance of the jumps so far, summed over the entries."""
        return max(self.squares / max(self.jumps, 1) - float((self.sum / max(self.jumps, 1)).square().sum()), 1e-30)

    def figures(self) -> dict[str, Any]:
        """All figures, as plain values."""
        found: dict[str, Any] = {
            "jumps": self.jumps,
            "restarts": self.restarts,
            "stuck": self.stuck,
            "moved": self.moves / max(self.jumps - 1, 1) / (2 * self.variance()),
            "autocorrelation_time": self.correlation.time(),
            "autocorrelation": [round(float(r), 4) for r in self.correlation.rho()],
        }
        if self.windows is not None:
            table = self.windows.table()
            found |= {
                "classes": table.sum(0).tolist(),
                "classes_visited": int((table.sum(0) > 0).sum()),
                "class_changes": self.changes,
                "longest_stay": self.longest,
                "window_jumps": self.windows.length,
                "classes_by_window": table.tolist(),
            }
        return found
