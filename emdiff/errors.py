"""What a user can mend."""

from __future__ import annotations

import os


class UsageError(Exception):
    """Bad input: a file, a value or a combination of options that the user can correct.

    The message is one line that names the file or option, the value found there, and what to do instead. The command line prints it
    without a traceback and exits with status 2; any other exception is a defect of the program. Names and values may come from hostile files:
    what a terminal would act on is shown as an escape, and the middle of what is very long is left out.

    >>> str(UsageError("data.npz: noise_std is 0; pass --noise-std with a positive standard deviation"))
    'data.npz: noise_std is 0; pass --noise-std with a positive standard deviation'
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class FitFailed(Exception):
    """A fit that cannot go on, for a reason that lies in the numbers and not in the input: status 3, one line, and a run folder that is whole."""


LOST = 4
"""Exit status of a process that has lost another one of its fit."""


class Lost(Exception):
    """Another process of this fit is gone: status LOST; the same command continues. Without a message where somebody else says so."""


def printable(text: str, most: int = 1000) -> str:
    r"""Text as it may be shown: one line, escapes for what a terminal would act on, the middle of what is long left out.

    >>> printable("a\x1b[2J\nb"), printable("x" * 4000 + "end")[-5:]
    ('a\\x1b[2J\\nb', 'xxend')
    """
    text = text if len(text) <= most else f"{text[: 2 * most // 3]} ... {text[-most // 3 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """What went wrong, on one line: the system's own words where it has some."""
    errno = getattr(error, "errno", None)
    return os.strerror(errno) if errno else " ".join(str(error).split()) or type(error).__name__
