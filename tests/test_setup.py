"""scripts/setup, which ./scripts/test and ./scripts/demo begin with."""

import os
import shutil
import subprocess
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def test_a_disk_without_room_is_told_before_any_work(tmp_path: Path) -> None:
    """The space is what `df -P` says of the folder; there is no .venv then, nor a part of one."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / "setup", tmp_path / "scripts")
    shutil.copy(SCRIPTS / "test", tmp_path / "scripts")
    (tmp_path / "bin").mkdir()
    df = tmp_path / "bin" / "df"
    df.write_text("#!/bin/sh\necho Filesystem Blocks Used Available Capacity Mounted\necho /dev/a 9000000 8000000 1100000 89% /\n")
    df.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run([tmp_path / "scripts" / "test"], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 2 and "1 GB are free in" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists()
