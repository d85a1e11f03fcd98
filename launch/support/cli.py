"""Runs a program: exit statuses, and errors as one line on stderr instead of a traceback.

Exit statuses:
    0   done
    1   an error that was not foreseen: a traceback
    2   mistake in flags or files: nothing was changed
    3   training diverged: a loss, a gradient, a parameter or a score is not finite, or devices differ
    69  an object store (for --remote_patience) or Dask did not answer (EX_UNAVAILABLE): the same command resumes
    70  the run hung and its watchdog ended it (EX_SOFTWARE)
    71  another process of the job was lost, or one of a preparation (EX_OSERR): the same command goes on
    73  another machine has the run directory, and may be dead (EX_CANTCREAT): the same command, later, resumes
    74  the disk is full or fails: training ended, but its last checkpoint or its log could not be written (EX_IOERR)
    75  stopped by Ctrl-C, SIGTERM or --max_failed_saves after saving: the same command resumes (EX_TEMPFAIL)
    130 interrupted by Ctrl-C with nothing to save, or by a second one before saving had ended; 143: by SIGTERM
"""

import errno
import gc
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from data_pipeline import signals
from data_pipeline.atomic_files import DISK_ERRORS, InUse, Unreachable, atomic_write, expand_user
from launch.support.flags import Help

DONE, MISTAKE, DIVERGED, UNREACHABLE, HANGS, LOST, IN_USE, NOT_SAVED, STOPPED = 0, 2, 3, 69, 70, 71, 73, 74, 75
INTERRUPTED = 130
STATUS: dict[int | None, int] = {Unreachable.errno: UNREACHABLE, InUse.errno: IN_USE}
# What passes: a process that prepares was killed, Dask is away.
PASSING: dict[type[Exception], int] = {ChildProcessError: LOST, ConnectionError: UNREACHABLE}


def run(name: str, main: Callable[[Sequence[str]], int]) -> None:
    """Runs `main(argv)` and exits with its status, or with the status of the error that it raised."""
    gc.freeze()  # what was imported is never looked at again
    gc.enable()
    signals.attach(name)
    if sys.stdout.errors == "strict":  # a name that is not UTF-8, or that the terminal lacks, must not lose a result
        set_errors(sys.stdout, "backslashreplace")
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
    sentence = " ".join((_of_a_file(error) or str(error)).split())
    if out_of_memory:
        sentence = f"out of memory ({sentence[:120]}): lower batch_size, window, hidden_size or num_samples"
    print(f"{name}: {sentence}", file=sys.stderr)
    number = getattr(error, "errno", None)  # of another process's error, too
    return STATUS.get(number, NOT_SAVED if number in DISK_ERRORS else PASSING.get(type(error), MISTAKE))


def _of_a_file(error: Exception) -> str:
    """Returns what the system says of a file, and the remedy; "" if the error is another one."""
    if not isinstance(error, OSError) or not error.errno or not error.strerror:
        return ""
    remedy = "make room there, or name another place" if error.errno in DISK_ERRORS else "name another place"
    if error.errno in (errno.EACCES, errno.EPERM):
        remedy = "change who may use it, or name another place"
    name = f"{os.fsdecode(error.filename)} cannot be used " if isinstance(error.filename, str | bytes) else ""
    return f"{name}({error.strerror}): {remedy}" if name else error.strerror


def read_file(flag: str, name: str) -> bytes:
    """Returns what a file has that a flag names.  Raises ValueError where it cannot be read."""
    path = expand_user(name)
    if path.is_dir():
        raise ValueError(f"{flag}={name} is a directory: name one of its files")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{flag}={name} cannot be read: {error.strerror}") from None


def output_file(flag: str, name: str) -> Path:
    """Returns the path of a file that will be written at the end.  Raises ValueError where it cannot be."""
    path = expand_user(name)
    if path.is_dir():
        raise ValueError(f"{flag}={name} is a directory: name a file")
    if not path.parent.is_dir():
        raise ValueError(f"{flag}={name} cannot be written: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{flag}={name} cannot be written: {path.parent} takes no files of yours")
    return path


def write_output(name: str, text: str) -> None:
    """Writes a file of UTF-8, whole or not at all."""
    with atomic_write(expand_user(name)) as file:
        file.write(text.encode("utf-8", "replace"))


def set_errors(stream: TextIO, errors: str) -> None:
    """Sets what becomes of characters, or bytes, for which the encoding of a stream has nothing."""
    if isinstance(stream, io.TextIOWrapper):  # a test or a notebook has others
        stream.reconfigure(errors=errors)


def terminal_colors() -> int:
    """Returns how many colors stdout has: 0 where it is no terminal, or says that it has none or is to have none."""
    term = os.environ.get("TERM", "dumb")
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or term in ("dumb", "linux", "vt100"):
        return 0
    return 1 << 24 if os.environ.get("COLORTERM") in ("truecolor", "24bit") else 256


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
