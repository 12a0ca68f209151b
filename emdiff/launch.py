"""`emdiff fit --devices N`: N processes on this machine for one fit. Signals are passed on to all; when one dies, all end.

The process that was started does not compute: it starts the others, each with its place in the environment, as torchrun says it (RANK, LOCAL_RANK,
WORLD_SIZE, LOCAL_WORLD_SIZE), and the name of a file where they meet. They hold the reading end of a pipe, whose other end closes when the first
process is gone, however it ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from emdiff.errors import LOST
from emdiff.interrupt import GRACE, SIGNALS

MEET = "EMDIFF_MEET"
"""Names the file where processes of one machine meet."""

PARENT = "EMDIFF_PARENT"
"""Names the file descriptor that closes when the process that started them is gone."""

PATIENCE = GRACE + 4
"""Seconds from a signal to the end by force."""


def launched() -> bool:
    """Whether this process was started as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(count: int, command: list[str]) -> int:
    """Run a command in several processes; returns the exit status.

    0 if all ended so; 128 + n after signal n; else that of the process that failed first, 128 + n where signal n killed it.
    """
    heard: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: heard.append(number)) for number in SIGNALS}
    end, ours = os.pipe()
    with tempfile.TemporaryDirectory(prefix="emdiff-") as folder:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(count):
                processes.append(_start(rank, count, command, Path(folder) / "meet", end))
            return _attend(processes, heard)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            os.close(end)
            os.close(ours)
            for number, handler in before.items():
                signal.signal(number, handler)


def _start(rank: int, count: int, command: list[str], meet: Path, end: int) -> subprocess.Popen[bytes]:
    """One process; in a session of its own, so that the terminal's signals reach it once, from here."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, MEET: meet, PARENT: end}
    local = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    environment = {**local, **os.environ, **{name: str(value) for name, value in place.items()}}
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[end], start_new_session=True)


def _attend(processes: list[subprocess.Popen[bytes]], heard: list[int]) -> int:
    """Wait for all; see to it that none is left when one has failed, or when a signal came."""
    passed, failed, deadline = 0, None, float("inf")
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        if heard[passed:]:
            _send(processes, heard[passed] if not passed else signal.SIGKILL)
            passed, deadline = passed + 1, time.monotonic() + PATIENCE
        if failed is None and (failed := _failed(processes)) is not None and not passed:
            _tell(failed, processes)
            _send(processes, signal.SIGTERM)
            deadline = time.monotonic() + PATIENCE
        if time.monotonic() > deadline:
            _send(processes, signal.SIGKILL)
    failed = _failed(processes) if failed is None else failed
    if failed is None:
        return 0
    return 128 + heard[0] if heard else _status(processes[failed])


def _failed(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """A process that ended otherwise than well; rather one that did not only miss another one."""
    ended = [i for i, process in enumerate(processes) if process.poll()]
    return min(ended, key=lambda i: _status(processes[i]) == LOST) if ended else None


def _status(process: subprocess.Popen[bytes]) -> int:
    """Its exit status, 128 + n if signal n killed it."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _tell(failed: int, processes: list[subprocess.Popen[bytes]]) -> None:
    """Say which process ended and how, unless it could say that itself."""
    code = processes[failed].returncode
    if code in (2, 3, LOST):
        return
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    which = f"process {failed + 1} of {len(processes)} (pid {processes[failed].pid})"
    print(f"emdiff: {which} {how}; the others are ended, the same command continues", file=sys.stderr, flush=True)


def _send(processes: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        process.send_signal(number)  # nothing where it has ended


def follow_parent() -> None:
    """Ask this process to end (SIGTERM) when the one that started it is gone; nothing where it was not started by `launch`."""
    if PARENT in os.environ:
        threading.Thread(target=_follow, args=[int(os.environ.pop(PARENT))], daemon=True).start()


def _follow(end: int) -> None:
    os.read(end, 1)
    os.kill(os.getpid(), signal.SIGTERM)
