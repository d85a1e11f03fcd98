"""What the programs share: a user's mistake is one line on stderr and exit status 2, never a traceback.

Exit statuses:
    0   done
    2   a mistake in flags or files: nothing was changed
    3   training stopped because a loss or a gradient is not finite
    74  the disk is full or fails: training ended, but its last checkpoint or its log could not be written (EX_IOERR)
    75  stopped by Ctrl-C or SIGTERM after saving: the same command goes on (EX_TEMPFAIL)
    130 interrupted where there was nothing to save
"""

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from launch.flags import Help

DONE, MISTAKE, DIVERGED, NOT_SAVED, STOPPED, INTERRUPTED = 0, 2, 3, 74, 75, 130
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def run(name: str, main: Callable[[Sequence[str]], int]) -> None:
    """Runs `main(argv)` and exits with its status, or with the status of what went wrong."""
    _hush_the_background()
    try:
        status = main(sys.argv)
        sys.stdout.flush()
    except Help as help_text:
        print(help_text)
        status = DONE
    except (ValueError, OSError) as error:
        if os.environ.get("CHARLSTM_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError):  # the reader of our output has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = DONE
        else:
            with contextlib.suppress(OSError):  # stderr may be a file on the full disk
                print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
            status = NOT_SAVED if isinstance(error, OSError) and error.errno in _DISK else MISTAKE
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    sys.exit(status)


def _hush_the_background() -> None:
    """What goes wrong where no exception can be raised: in finalizers, and in callbacks of the garbage collector.

    A save that fails is told of in one line; the writes it leaves behind would add a traceback for every array. And a
    Ctrl-C that falls into such a callback would be lost: it is sent again, a moment later.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if isinstance(error, KeyboardInterrupt):
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
        elif not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            show(unraisable)

    sys.unraisablehook = hook
