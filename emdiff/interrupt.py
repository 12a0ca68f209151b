"""Stopping when asked to: SIGTERM and SIGINT let the work in hand come to a point from which it can be taken up, for at most GRACE seconds.

Long computations call `check` where they can stop; where something has to be saved first, `asked` says whether to. A second signal stops at once,
and so does the end of the grace, wherever the program is by then: what is on disk is whole at all times.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE = 8.0
"""Seconds from a signal to the end of the process, at most."""

EVERY = float(os.environ.get("EMDIFF_CHECKPOINT_SECONDS", "30"))
"""Seconds between saved states within a round; the environment can ask for others."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_signals: list[int] = []


class Stopped(BaseException):
    """A signal asked the program to end; no error."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def asked() -> int:
    """The signal that asked the program to end; 0 where none did."""
    return _signals[0] if _signals else 0


def check() -> None:
    """End here if a signal asked for it.

    Raises:
        Stopped: naming it.
    """
    if _signals:
        raise Stopped(_signals[0])


@contextmanager
def listening() -> Iterator[None]:
    """Let signals ask instead of kill, in the main thread. Once the `last_work` is done they come too late, and are ignored: its outcome stands."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _last[:] = [lambda: None]
    listen()
    try:
        yield
        before = dict.fromkeys(SIGNALS, signal.SIG_IGN) if _last_work else before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signals.clear()
        _last.clear()


def last_work() -> None:
    """Say that the process ends with what it listens in."""
    _last_work.append(True)


def listen() -> None:
    """Take the signals (back) from a library that has taken them; nothing outside `listening`."""
    if _last and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _handle)


def at_the_end(last: Callable[[], None]) -> None:
    """Call this where the grace is over before the work is; nothing outside `listening`."""
    if _last:
        _last.append(last)


_last: list[Callable[[], None]] = []

_last_work: list[bool] = []


def _handle(number: int, frame: object) -> None:
    if _signals:
        raise Stopped(_signals[0])
    _signals.append(number)
    timer = threading.Timer(GRACE, _end, [number])
    timer.daemon = True
    timer.start()


def _end(number: int) -> None:
    """The grace is over; does nothing if the program has ended the work itself."""
    if _signals:
        for last in _last:
            last()
        print(f"emdiff: stopped by {signal.Signals(number).name} before this piece of work was done; the same command continues", file=sys.stderr)
        sys.stderr.flush()
        os._exit(128 + number)


class Clock:
    """Says when EVERY seconds, or more if asked to wait longer, have passed since it last said so."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def due(self, least: float = 0.0) -> bool:
        """Whether it is time."""
        if time.monotonic() - self.last < max(EVERY, least):
            return False
        self.last = time.monotonic()
        return True
