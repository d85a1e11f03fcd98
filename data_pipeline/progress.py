"""Shows long work on stderr: progress bars (tqdm) and lines."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from tqdm import tqdm

Progress = Callable[[str, int, int], None]  # (what is being done, how much of it is done, the total or 0 if unknown)

# Without the counts, which are of many kinds: bytes, symbols, windows.
BAR, BAR_WITHOUT_TIME_LEFT = (
    f"{{desc}}{{percentage:3.0f}}%|{{bar}}| {{elapsed}}{left}" for left in (", {remaining} left", "")
)
tqdm.monitor_interval = 0  # no thread that watches the bars


def bar(stream: TextIO | None = None, form: str = BAR) -> Progress:
    """Returns a function that shows progress as a bar on `stream` (stderr) if it is a terminal, and else does nothing.

    A bar starts anew when its total changes, or less is done than before.
    """
    shown: tqdm | None = None

    def show(doing: str, done: int, total: int) -> None:
        nonlocal shown
        if shown is None or done < shown.n or total != (shown.total or 0):
            if shown is not None:
                shown.close()
            # With a height of its own, as a terminal that knows no size of its own would show no bar.
            how = {"bar_format": form} if total else {"unit": "", "unit_scale": True}
            shown = tqdm(desc=doing, total=total or None, file=stream, disable=None, nrows=24, **how)
        shown.set_description(doing, refresh=False)
        shown.update(done - shown.n)
        if 0 < total <= done:
            shown.close()
            shown = None

    return show


@contextlib.contextmanager
def announced(doing: str, seconds: float = 2.0) -> Iterator[None]:
    """Says on stderr what is done in this block, and at its end how long it took, if that is more than `seconds`."""
    began, said = time.monotonic(), threading.Event()

    def say() -> None:
        said.set()
        say_on_stderr(f"{doing} ...")

    timer = threading.Timer(seconds, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if said.is_set():
            say_on_stderr(f"{doing}: {time.monotonic() - began:.1f} s")


def say_on_stderr(line: str) -> None:
    """Prints `line` on stderr if it is still there: work does not end with the terminal it was started on."""
    with contextlib.suppress(OSError, ValueError):
        print(" ".join(line.split()), file=sys.stderr, flush=True)  # names may have line breaks
