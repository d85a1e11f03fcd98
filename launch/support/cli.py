"""Runs a program: exit statuses, and errors as one line on stderr instead of a traceback.

Exit statuses:
    0   done
    2   mistake in flags or files: nothing was changed
    3   training diverged: a loss or gradient is not finite
    69  an object store did not answer for --remote_patience (EX_UNAVAILABLE): the same command resumes
    70  the run hung and its watchdog ended it (EX_SOFTWARE)
    71  another process of the job was lost (EX_OSERR): a restarted job resumes from its newest checkpoint
    74  the disk is full or fails: training ended, but its last checkpoint or its log could not be written (EX_IOERR)
    75  stopped by Ctrl-C or SIGTERM after saving: the same command resumes (EX_TEMPFAIL)
    130 interrupted by Ctrl-C with nothing to save, or by a second one before saving had ended; 143: by SIGTERM
"""

import errno
import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from data_pipeline import signals
from data_pipeline.atomic_files import DISK_ERRORS
from data_pipeline.stores import Unreachable
from launch.support.flags import Help

DONE, MISTAKE, DIVERGED, UNREACHABLE, HANGS, LOST, NOT_SAVED, STOPPED, INTERRUPTED = 0, 2, 3, 69, 70, 71, 74, 75, 130


def run(name: str, main: Callable[[Sequence[str]], int]) -> None:
    """Runs `main(argv)` and exits with its status, or with the status of the error that it raised."""
    gc.freeze()  # what was imported is never looked at again
    gc.enable()
    signals.attach(name)
    _hush_the_background()
    try:
        status = _status(name, main)
    except KeyboardInterrupt:
        signals.leave(signal.SIGINT)
    signals.settle(status)
    sys.exit(status)


def _status(name: str, main: Callable[[Sequence[str]], int]) -> int:
    try:
        try:
            status = main(sys.argv)
        except Help as help_text:
            print(help_text)
            status = DONE
        sys.stdout.flush()
        return status
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and signals.has_lost_its_reader(sys.stdout.fileno()):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        out_of_memory = is_out_of_memory(error)
        if os.environ.get("CHARLSTM_TRACEBACK") or (isinstance(error, RuntimeError) and not out_of_memory):
            raise
        return explain(name, error, out_of_memory)


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether the host or a device has run out of memory."""
    if isinstance(error, OSError):  # a full disk is RESOURCE_EXHAUSTED, too
        return error.errno == errno.ENOMEM
    return "out of memory" in str(error).lower() or "RESOURCE_EXHAUSTED" in str(error)


def end_if_out_of_memory(error: RuntimeError) -> None:
    """Exits at once if memory has run out: the threads of a device may be stuck."""
    if is_out_of_memory(error):
        status = explain("launch.train", error, out_of_memory=True)
        sys.stderr.flush()
        os._exit(status)


def explain(name: str, error: Exception, out_of_memory: bool = False) -> int:
    """Prints an error in one line and returns its exit status."""
    sentence = " ".join(str(error).split())
    if out_of_memory:
        sentence = f"out of memory ({sentence[:120]}): lower batch_size, window, hidden_size or num_samples"
    print(f"{name}: {sentence}", file=sys.stderr)
    if isinstance(error, Unreachable):
        return UNREACHABLE
    return NOT_SAVED if isinstance(error, OSError) and error.errno in DISK_ERRORS else MISTAKE


def _hush_the_background() -> None:
    """Silences background writes: a failed save is reported in one line, its writes would add a traceback per array."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        if not closed:
            show(unraisable)

    sys.unraisablehook = hook
