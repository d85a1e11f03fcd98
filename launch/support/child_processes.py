"""Starts child processes that receive the signals sent to this program, and die with it."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline import signals

TRAIN = (sys.executable, "-m", "launch.train")
DIE_WITH = (sys.executable, "-IS", str(Path(__file__).with_name("die_with.py")))


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
        whole = [*DIE_WITH, str(os.getpid()), *command]
        self.started.append(subprocess.Popen(whole, start_new_session=True, **options))
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
