"""A page printed to PDF by a Chromium on the PATH, without network."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from emdiff.errors import UsageError
from emdiff.files import write_atomically

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

QUIET = [
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-pdf-header-footer",
]


def find_browser() -> str:
    """A Chromium on the PATH.

    Raises:
        UsageError: if there is none.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise UsageError(
            "--pdf needs Chromium, and none is on the PATH; install it (Debian: apt install chromium), or print report.html to PDF yourself"
        )
    return found


def write_pdf(page: Path, pdf: Path, browser: str) -> Path:
    """Print a page to PDF with a Chromium.

    Raises:
        UsageError: if Chromium fails, or the file cannot be written.
    """

    def write(temporary: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="emdiff-") as folder:
            root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
            printed = Path(folder) / "report.pdf"
            where = [f"--user-data-dir={folder}/profile", f"--print-to-pdf={printed}", page.resolve().as_uri()]
            try:
                done = subprocess.run([browser, *QUIET, *root, *where], capture_output=True, text=True, errors="replace", timeout=180, check=False)
            except subprocess.TimeoutExpired as error:
                raise UsageError(f"{pdf}: {browser} did not print {page} within {error.timeout:.0f} s; print it from a browser yourself") from error
            if not printed.is_file():
                said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
                raise UsageError(f"{pdf}: {browser} did not print {page} ({said[0]}); print it from a browser yourself")
            shutil.copyfile(printed, temporary)

    write_atomically(pdf, write)
    return pdf
