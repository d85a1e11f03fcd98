"""Becomes a command that dies with the program which has started it: `python -IS die_with.py PARENT COMMAND ...`.

A program of its own, since the one that starts it has threads, those of JAX among them: what runs in its fork before
the command may wait for ever for a lock that one of them held.
"""

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux; elsewhere a child that outlives its parent ends by itself, if at all
LOST = 71


def main(parent: int, *command: str) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # the parent's threads block them
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(LOST)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
