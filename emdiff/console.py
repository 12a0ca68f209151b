"""Progress bars that name the phase and the time left."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm import tqdm


class Bars:
    """One bar after the other, on standard error."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def phase(self, name: str, total: int) -> Callable[..., None]:
        """A new bar; returns its update (done, loss)."""
        self.close()
        layout = "{desc:<36} {percentage:3.0f}% |{bar:24}| {elapsed}<{remaining}{postfix}"
        self.bar = bar = tqdm(total=total, desc=name, bar_format=layout, leave=False, mininterval=0.5, file=sys.stderr)

        def update(done: int, loss: float | None = None) -> None:
            if loss is not None:
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update(done - bar.n)

        return update

    def close(self) -> None:
        """End the current bar."""
        if self.bar is not None:
            self.bar.close()
