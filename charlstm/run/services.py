"""Services around a training loop: none here; a program watches its run, reports on it and may stop it."""

import contextlib
import enum
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charlstm import distributed
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


HEARTBEATS = "heartbeats"  # the directory of a run that has them
PERIOD = 1.0  # seconds between two
PATIENCE = 5.0  # seconds to wait, at the end, for an operation that may hang


def heartbeat(directory: Path, process: int) -> Path:
    """Returns the file of a process."""
    return directory / f"process-{process}.json"


def write_heartbeat(directory: Path, process: int, words: Mapping[str, Any]) -> None:
    """Writes by what others see that a process lives: who it is, the time, and `words`, the step among them."""
    path = heartbeat(directory, process)
    beside = path.with_suffix(".new")
    who = {"process": process, "host": platform.node(), "pid": os.getpid(), "time": time.time()}
    beside.write_text(json.dumps(who | dict(words)) + "\n")
    os.replace(beside, path)  # a reader must find it whole, but it need not survive a loss of power


def remove_heartbeat(directory: Path, process: int) -> None:
    """Removes that of a process which ends, and the directory after the last one."""
    with contextlib.suppress(OSError):
        heartbeat(directory, process).unlink(missing_ok=True)
        directory.rmdir()


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
    """Turns an interrupt of the main thread into a stop that is saved, and shows others that the run goes on."""

    def __init__(self) -> None:
        self._interrupted, self._step = False, 0

    @contextlib.contextmanager
    def opened(self, run_dir: Path) -> Iterator[None]:
        directory, process, ended = run_dir / HEARTBEATS, distributed.process_number(), threading.Event()

        def beat() -> None:
            with contextlib.suppress(OSError):  # a full disk stops no run
                directory.mkdir(parents=True, exist_ok=True)
                write_heartbeat(directory, process, {"step": self._step})

        def go_on() -> None:
            while not ended.wait(PERIOD):
                beat()

        beat()
        beating = threading.Thread(target=go_on, name="heartbeat", daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join(PATIENCE)
            if not beating.is_alive():  # else the file system hangs
                remove_heartbeat(directory, process)

    def tick(self, step: int) -> None:
        self._step = step

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
