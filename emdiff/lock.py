"""One process per run folder: a file RUN/lock says whose it is.

    {"pid": 4711, "host": "node7", "began": 1.7e9, "birth": 123456}

The owner renews the file's time stamp while it works, so its age tells whether it lives. A lock whose process is gone, on this host, is taken
over, and that is said; of a process on another host nothing can be known, so its lock is left to the user. `birth` is the start time of the
process in ticks since boot, which tells it from a later one with the same number.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emdiff.errors import UsageError
from emdiff.reading import read_json

RENEW = 5.0
"""Seconds after which the owner renews its time stamp, at most as often."""


class Lock:
    """The lock of a folder, held until `release`.

    Args:
        folder: An existing folder.
        say: Told in one line where a dead process's lock is taken over.

    Raises:
        UsageError: if another process holds it; names the process, its host, since when, and its last sign of life.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        self.path, self.renewed = folder / "lock", time.monotonic()
        with (folder / ".lock.guard").open("a") as guard:  # held for a moment: of two that find a dead owner, one takes over
            fcntl.flock(guard, fcntl.LOCK_EX)
            owner = self._owner()
            if owner is not None:
                self._refuse_or_take_over(owner, say)
            self.path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "began": time.time(), "birth": birth(os.getpid())}))

    def _owner(self) -> dict[str, Any] | None:
        """What the file says; None where there is none or it was cut short by a full disk."""
        if self.path.is_symlink() or not self.path.is_file() or not self.path.stat().st_size:
            self.path.unlink(missing_ok=True)
            return None
        return read_json(self.path)

    def _refuse_or_take_over(self, owner: dict[str, Any], say: Callable[[str], None]) -> None:
        pid, host = owner.get("pid"), owner.get("host")
        who = f"process {pid} on {host}"
        silent = time.time() - self.path.stat().st_mtime
        if host == socket.gethostname() and isinstance(pid, int) and (birth(pid) is None or birth(pid) != owner.get("birth")):
            say(f"note: {self.path} was left by {who}, which is no longer there ({duration(silent)} without a sign of life); taken over")
            return
        began = owner.get("began")
        since = duration(time.time() - began) if isinstance(began, (int, float)) else "an unknown time"
        elsewhere = "" if host == socket.gethostname() else f"; if that process is dead, remove {self.path}"
        raise UsageError(
            f"{self.path.parent}: {who} has been working on this run for {since}, its last sign of life was {duration(silent)} ago; "
            f"wait for it, stop it, or give another --out{elsewhere}"
        )

    def renew(self) -> None:
        """Give a sign of life."""
        if time.monotonic() - self.renewed > RENEW:
            self.renewed = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Let others have the folder."""
        self.path.unlink(missing_ok=True)


def birth(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since boot; 0 where the system does not say, None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        state, start = (text.rpartition(")")[2].split()[i] for i in (0, 19))
        return None if state in "ZX" else int(start)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, IndexError):
        return 0
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (OSError, OverflowError):
        return 0
    return 0


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(7.2), duration(130), duration(7300)
    ('7 s', '2 min', '2.0 h')
    """
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
