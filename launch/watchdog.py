"""A run that does not get on ends loudly, and says where it hangs.

A process that is stopped, or alive but stuck, keeps all the others waiting in a collective for ever: JAX notices only
those that are dead.  So a thread of every process watches its steps.  Every second it also writes a heartbeat, by which
a person, or the watchdog of another process, sees how far this one is.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.settings import setting
from launch import program

SILENT = 5.0  # seconds without a heartbeat after which a process is called silent
KNOWN = 5  # steps whose time must be known before one can be called long


@dataclasses.dataclass(frozen=True)
class WatchdogFlags:
    """The watchdog, which ends a run that hangs (exit status 70)."""

    step_timeout_factor: float = setting(
        30.0, "A step that takes this many times as long as most, and --step_timeout_least, hangs; 0: no watchdog."
    )
    step_timeout_least: float = setting(30.0, "Seconds that a step may always take.")
    pause_timeout: float = setting(1800.0, "Seconds that compiling, restoring, evaluating or saving may take.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) >= 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be 0 or more")


class Watchdog:
    """Watches one process, from its start until `stop`.

    Attributes:
      step: the last that the run has come to the end of.
      about: what a heartbeat says of the run, besides its step; called by the watchdog's thread.
    """

    def __init__(self, chosen: WatchdogFlags, process: int, directory: Path, period: float = 1.0) -> None:
        """Starts the thread.

        Args:
          directory: where the heartbeats of all processes are, `process-N.json`.
          period: seconds between two looks.
        """
        self.about: Callable[[], dict[str, Any]] = dict
        self._chosen, self._process, self._directory = chosen, process, directory
        self.step, self._times, self._since, self._paused = 0, deque[float](maxlen=99), time.monotonic(), True
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(period,), name="watchdog", daemon=True)
        directory.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def beat(self, step: int) -> None:
        """The run has come to the end of `step`."""
        now = time.monotonic()
        if not self._paused:
            self._times.append(now - self._since)
        self.step, self._since, self._paused = step, now, False

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done in this block is no step."""
        self._since, self._paused = time.monotonic(), True
        yield
        self._since = time.monotonic()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            _heartbeat(self._directory, self._process).unlink(missing_ok=True)
            self._directory.rmdir()  # the last one

    def allowed(self) -> float:
        """Seconds that what is being done now may take."""
        if self._paused or len(self._times) < KNOWN:
            return self._chosen.pause_timeout
        return max(self._chosen.step_timeout_least, self._chosen.step_timeout_factor * statistics.median(self._times))

    def _watch(self, period: float) -> None:
        while not self._done.wait(period):
            with contextlib.suppress(OSError):  # a full disk stops no run
                self._write_heartbeat()
            waited = time.monotonic() - self._since
            if self._chosen.step_timeout_factor and waited > self.allowed():
                self._end(waited)

    def _write_heartbeat(self) -> None:
        path = _heartbeat(self._directory, self._process)
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(self._words()) + "\n")
        os.replace(beside, path)  # for whom it is written it must be whole, but it need not survive a loss of power

    def _words(self) -> dict[str, Any]:
        return {"process": self._process, "host": platform.node(), "pid": os.getpid(), "time": time.time(),
                "step": self.step, **self.about()}  # fmt: skip

    def _end(self, waited: float) -> None:
        """Says what hangs, and where in the program, and ends the process: nothing of it can be saved any more."""
        what = "a pause" if self._paused else "a step"
        print(
            f"process {self._process} hangs: {what} after step {self.step} has taken {waited:.0f} s of "
            f"{self.allowed():.0f} s allowed{behind(self._directory, self._process)}; all its threads:",
            file=sys.stderr,
        )
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        os._exit(program.HANGS)


def behind(directory: Path, own: int) -> str:
    """Which other processes are silent, or behind all others, by their heartbeats."""
    beats = {}
    for path in sorted(directory.glob("process-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            words = json.loads(path.read_text())
            beats[int(words["process"])] = (int(words["step"]), time.time() - float(words["time"]))
    silent = [f"process {p} is silent since {age:.0f} s" for p, (_, age) in beats.items() if p != own and age > SILENT]
    most = max((step for step, _ in beats.values()), default=0)
    late = [f"process {p} is at step {step}, others at {most}" for p, (step, _) in beats.items() if step < most]
    return "".join(f"; {words}" for words in silent + late)


def _heartbeat(directory: Path, process: int) -> Path:
    return directory / f"process-{process}.json"
