"""Starts child processes that receive the signals sent to this program, and die with it."""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline import signals
from launch.support import cli

TRAIN = (sys.executable, "-m", "launch.train")


class ChildProcesses:
    """Child processes that receive the signals sent to this program, and die with it.

    Attributes:
      stopped_by: the first signal that was passed on, SIGINT or SIGTERM; None: there was none.
      killed: a second Ctrl-C has killed them.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self.killed = False
        self.started: list[subprocess.Popen] = []

    @property
    def told_to_stop(self) -> bool:
        """True once Ctrl-C or SIGTERM was passed on."""
        return self.stopped_by is not None

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen:
        """Starts a child, in a session of its own: Ctrl-C comes to this program alone, which passes it on."""
        on_start = functools.partial(_die_with, os.getpid())
        self.started.append(subprocess.Popen(command, start_new_session=True, preexec_fn=on_start, **options))
        return self.started[-1]

    def send(self, number: int) -> None:
        """Sends a signal to every child that lives."""
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    @contextlib.contextmanager
    def signals_passed_on(self) -> Iterator[None]:
        """In this block, Ctrl-C and SIGTERM go to all children, as SIGTERM; a second Ctrl-C kills them."""

        def pass_on(number: int) -> None:
            if self.told_to_stop and number == signal.SIGINT:
                self.killed = True
                self.send(signal.SIGKILL)
            else:
                self.stopped_by = self.stopped_by or number
                self.send(signal.SIGTERM)
                signals.say("told to stop: what runs finishes its step and is saved; Ctrl-C again kills it")

        with signals.reacting(pass_on):
            yield


def _die_with(parent: int) -> None:
    """Runs in a child: unblocks signals, and has the kernel kill it when `parent`, this program, dies (Linux only)."""
    signals.unblock()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before the call
        os._exit(cli.LOST)
