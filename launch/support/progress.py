"""Shows how far long work of a program is."""

import sys
import time
from collections.abc import Callable

from charlstm.run.metrics import time_left
from data_pipeline.progress import BAR_WITHOUT_TIME_LEFT, bar


def shown(doing: str) -> Callable[[int, int], None]:
    """Returns a function (done, total) that shows a bar, or without a terminal a line a minute, with the time left."""
    show, left, told = bar(form=BAR_WITHOUT_TIME_LEFT), time_left(), time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told
        now, text = time.monotonic(), doing + left(done, total)
        show(text, done, total)
        if now - told >= 60 and not sys.stderr.isatty():
            told = now
            print(f"{text}: {done:,} of {total:,}", file=sys.stderr)

    return progress
