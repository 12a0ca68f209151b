"""The command line, run as a user would, in a process of its own whose time and memory are told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import NamedTuple


class Cost(NamedTuple):
    """Wall time in seconds, and the process's peak memory in GB."""

    seconds: float
    peak_gb: float


def command(*arguments: str) -> Cost:
    """Run emdiff; its output goes to stderr.

    Raises:
        SystemExit: if it fails.
    """
    clock = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "emdiff.cli", *arguments], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"emdiff {' '.join(arguments)} failed")
    return Cost(time.perf_counter() - clock, usage.ru_maxrss / 1e6)
