"""Work for the disk that goes on while a GPU works: a thread writes arrays and sums them while the next training runs, and is waited for where its
outcome is needed. On a CPU, which has nothing else to write with, it is done at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Behind:
    """Pieces of work, done one after another.

    Args:
        going_on: Whether this process goes on meanwhile.

    >>> done, later = [], Behind(True)
    >>> later(lambda: done.append(1)), later.settle(), done
    (None, None, [1])
    """

    def __init__(self, going_on: bool) -> None:
        self.pool = ThreadPoolExecutor(1, "behind") if going_on else None
        self.due: list[Future[None]] = []

    def __call__(self, work: Callable[[], None]) -> None:
        """Do it, or begin to."""
        if self.pool is None:
            work()
        else:
            self.due.append(self.pool.submit(work))

    def settle(self) -> None:
        """Wait until all is done.

        Raises:
            Exception: What the first piece that failed raised.
        """
        due, self.due = self.due, []
        for future in due:
            future.result()

    def close(self) -> None:
        """Wait for the piece in hand and drop the rest."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
