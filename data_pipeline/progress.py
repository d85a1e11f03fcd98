"""What is shown of long work: a progress bar in one line, and lines."""

import contextlib
import sys
import time
from typing import TextIO

from data_pipeline.atomic_files import Progress

WIDTH = 30


def bar(stream: TextIO | None = None) -> Progress:
    """A function that shows how far something is, on `stream` (stderr): a bar on a terminal, otherwise nothing.

    Its arguments are what is being done, how much of it is done and how much there is (0: nobody knows).
    """
    out = stream or sys.stderr
    shown = ("", 0.0)  # what, and when

    def show(doing: str, done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if doing == shown[0] and done < total and now - shown[1] < 0.1:
            return
        shown = (doing, now)
        filled = WIDTH * done // total if total else 0
        share = f" {100 * done // total:3d}% [{'=' * filled}{' ' * (WIDTH - filled)}]" if total else " ..."
        out.write(f"\r{doing}{share}\033[K" + ("\n" if total and done >= total else ""))
        out.flush()

    return show if out and out.isatty() else lambda doing, done, total: None


def say_on_stderr(line: str) -> None:
    """Prints `line` on stderr, while there is one: work does not end with the terminal it was started on."""
    with contextlib.suppress(OSError, ValueError):
        print(" ".join(line.split()), file=sys.stderr, flush=True)  # names may have line breaks
