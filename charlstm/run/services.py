"""Services around a training loop: none here; a program watches its run, reports on it and may stop it."""

import contextlib
import enum
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charlstm.run.log import Copy
from charlstm.run.memory import End

if TYPE_CHECKING:
    from charlstm.run.loop import Training
    from charlstm.run.start import Run


class Outcome(enum.Enum):
    """The ways in which a run ends, unless it diverges."""

    FINISHED = "finished"
    STOPPED = "stopped, saved"
    NOT_SAVED = "not saved"


class Services:
    """The quiet services of a run in a notebook; `launch.support.services` has those of a program.

    Attributes:
      end: called with the error of a device that failed while others may wait for it; None: the error is raised.
    """

    end: End = None

    @contextlib.contextmanager
    def opened(self, run_dir: Path) -> Iterator[None]:
        """Surrounds the run from before its directory is written until all is closed."""
        yield

    @contextlib.contextmanager
    def watching(self, training: "Training") -> Iterator[None]:
        """Surrounds the updates."""
        yield

    def copy_of(self, run: "Run") -> Copy | None:
        """Returns what metrics.jsonl and samples.jsonl of `run` are copied to, if anything."""
        return None

    def stop_requested(self) -> bool:
        """Returns True if this process was asked to save and stop."""
        return False

    def tick(self, step: int) -> None:
        """Is told that the run has come to the end of `step`."""

    def beat(self) -> None:
        """Is told, again and again, that a pause which may last gets on."""

    def ended(self, outcome: Outcome) -> None:
        """Is told how the run ended, when all is saved."""

    def pause(self, doing: str) -> AbstractContextManager[None]:
        """Surrounds what is no step: compiling, evaluating, saving, rolling back."""
        return contextlib.nullcontext()


class InterruptibleServices(Services):
    """Turns an interrupt of the main thread into a stop that is saved."""

    def __init__(self) -> None:
        self._interrupted = False

    @contextlib.contextmanager
    def watching(self, training: "Training") -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, number: int, frame: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        print("interrupted: saves and returns; a second interrupt ends it at once, unsaved", file=sys.stderr)

    def stop_requested(self) -> bool:
        return self._interrupted
