"""What the programs share: a user's mistake is one line on stderr and exit status 2, never a traceback.

Exit statuses:
    0   done
    2   a mistake in flags or files: nothing was changed
    3   training stopped because a loss or a gradient is not finite
    70  the run hung, and its watchdog ended it (EX_SOFTWARE)
    71  another process of the job was lost (EX_OSERR): the job, started again, goes on from its newest checkpoint
    74  the disk is full or fails: training ended, but its last checkpoint or its log could not be written (EX_IOERR)
    75  stopped by Ctrl-C or SIGTERM after saving: the same command goes on (EX_TEMPFAIL)
    130 interrupted by Ctrl-C where there was nothing to save; 143: by SIGTERM
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from data_pipeline.files import DISK_ERRORS
from launch.flags import Help

DONE, MISTAKE, DIVERGED, HANGS, LOST, NOT_SAVED, STOPPED, INTERRUPTED = 0, 2, 3, 70, 71, 74, 75, 130
AGAIN = 1.0  # seconds


def run(name: str, main: Callable[[Sequence[str]], int]) -> None:
    """Runs `main(argv)` and exits with its status, or with the status of what went wrong."""
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()  # None where they were closed
    _hush_the_background()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as for what a script started in the background
            signal.signal(number, interrupt)
    try:
        sys.exit(_status(name, main))
    except KeyboardInterrupt as interrupted:
        signal.setitimer(signal.ITIMER_REAL, 0)
        number = interrupted.args[0] if interrupted.args else signal.SIGINT
        with contextlib.suppress(OSError):
            print(f"{name}: {'terminated' if number == signal.SIGTERM else 'interrupted'}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        # Not by Python's own way out: it takes libraries down that may be in the midst of compiling, and crashes.
        os._exit(128 + number)


def interrupt(number: int, frame: FrameType | None) -> None:
    """The handler of Ctrl-C and SIGTERM: raises KeyboardInterrupt(number), again and again until `run` has it.

    One that falls into a finalizer, or into a callback of a library, is swallowed there.
    """
    signal.signal(signal.SIGALRM, lambda *_: interrupt(number, None))
    signal.setitimer(signal.ITIMER_REAL, AGAIN)
    raise KeyboardInterrupt(number)


def _status(name: str, main: Callable[[Sequence[str]], int]) -> int:
    try:
        try:
            status = main(sys.argv)
        except Help as help_text:
            print(help_text)
            status = DONE
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (ValueError, OSError, RuntimeError) as error:
        out_of_memory = is_out_of_memory(error)
        if os.environ.get("CHARLSTM_TRACEBACK") or (isinstance(error, RuntimeError) and not out_of_memory):
            raise
        return explain(name, error, out_of_memory)


def is_out_of_memory(error: Exception) -> bool:
    return "out of memory" in str(error).lower() or "RESOURCE_EXHAUSTED" in str(error)


def explain(name: str, error: Exception, out_of_memory: bool = False) -> int:
    """Says in one line what went wrong, and gives the exit status for it."""
    sentence = " ".join(str(error).split())
    if out_of_memory:
        sentence = f"out of memory ({sentence[:120]}): lower batch_size, window, hidden_size or num_samples"
    with contextlib.suppress(OSError):  # stderr may be a file on the full disk
        print(f"{name}: {sentence}", file=sys.stderr)
    return NOT_SAVED if isinstance(error, OSError) and error.errno in DISK_ERRORS else MISTAKE


def _nowhere() -> Any:
    return open(os.devnull, "w", encoding="utf-8")


def _hush_the_background() -> None:
    """A save that fails is told of in one line; the writes it leaves behind would add a traceback for every array."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        if not closed and not isinstance(error, KeyboardInterrupt):  # which comes again
            show(unraisable)

    sys.unraisablehook = hook
