"""Ends a run that hangs, with a report of where it hangs.

A process that is stopped, or alive but stuck, blocks all others in a collective for ever: JAX detects dead ones only.
So one thread of every process watches its steps.  Another thread writes a heartbeat every second (of 1,024 processes,
every 8 seconds), from which a person, or the watchdog of another process, sees its progress; it is a thread of its own
as it may hang with the file system.
"""

import contextlib
import dataclasses
import faulthandler
import json
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from charlstm.run.services import HEARTBEATS, PATIENCE, heartbeat, remove_heartbeat, write_heartbeat
from data_pipeline.settings import setting
from launch.support import cli

SILENT = 5.0  # seconds, or 3 heartbeats, without one, after which a process is reported as silent
BEATS = 128  # a second, of all processes together: each is two changes in one directory of a shared file system
LONGEST_PERIOD = 8.0  # seconds between heartbeats: that one waits must come round within the time that a step may take
STARVED = 1.0  # seconds by which a thread may be late on a busy machine
KNOWN = 5  # steps that must be timed before one can count as too long


@dataclasses.dataclass(frozen=True)
class WatchdogFlags:
    """The watchdog, which ends a hanging run with exit status 70."""

    step_timeout_factor: float = setting(
        30.0, "Abort if a step takes longer than max(this x the median step, --step_timeout_least); 0 disables."
    )
    step_timeout_least: float = setting(
        120.0, "Seconds that any step may take, also on a machine that does other work."
    )
    pause_timeout: float = setting(
        1800.0, "Seconds that compiling, restoring, evaluating or saving may take; 0: no limit."
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) >= 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be 0 or more")


class Watchdog:
    """Watches one process, from its start until `stop`.

    Attributes:
      step: the last that the run has come to the end of.
    """

    def __init__(
        self,
        chosen: WatchdogFlags,
        process: int,
        directory: Path,
        about: Callable[[], dict[str, Any]] = dict,
        period: float = 1.0,
        processes: int = 1,
    ) -> None:
        """Starts the threads.

        Args:
          directory: where the heartbeats of all processes are, `process-N.json`.
          about: gives what a heartbeat says of the run, besides its step; called by another thread.  While it has the
            field "waiting", for what this process or another one waits that is no fault of the run, no time counts.
          period: seconds between two looks, and between two heartbeats.
          processes: of the job; of more than `BEATS`, heartbeats come less often.
        """
        self._about, self._chosen, self._process, self._directory = about, chosen, process, directory
        self.step, self._times, self._since, self._pause = 0, deque[float](maxlen=99), time.monotonic(), "starting"
        self._done, self._others_wait, self._got_on = threading.Event(), False, -math.inf
        between = max(period, heartbeat_period(processes))
        self._silent = max(SILENT, 3 * between)
        directory.mkdir(parents=True, exist_ok=True)
        self._beating = threading.Thread(target=self._beat, args=(between,), name="heartbeat", daemon=True)
        self._watching = threading.Thread(target=self._watch, args=(period,), name="watchdog", daemon=True)
        self._beating.start()
        self._watching.start()

    def tick(self, step: int) -> None:
        """Records that `step` has ended."""
        now = time.monotonic()
        if not self._pause:
            self._times.append(now - self._since)
        self.step, self._since, self._pause = step, now, ""

    @contextlib.contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """Watches the block under --pause_timeout, as `doing`, instead of as a step."""
        self._since, self._pause = time.monotonic(), doing
        yield
        self._since = time.monotonic()

    def beat(self) -> None:
        """Records that a pause, which may last, gets on: its time begins anew, here and where others wait for it.

        A step goes by its own time: a checkpoint that is read back in the background says nothing of it.
        """
        if self._pause:
            self._since = self._got_on = time.monotonic()

    @property
    def doing(self) -> str:
        """Returns a description of the current activity."""
        return self._pause or "a step"

    def stop(self) -> None:
        """Stops the threads and removes the heartbeat of this process."""
        self._done.set()
        self._watching.join()
        self._beating.join(PATIENCE)
        if self._beating.is_alive():  # the file system hangs
            return
        remove_heartbeat(self._directory, self._process)

    def allowed(self) -> float:
        """Returns the seconds that the current activity may take."""
        if self._pause or len(self._times) < KNOWN:
            return self._chosen.pause_timeout or math.inf
        return max(self._chosen.step_timeout_least, self._chosen.step_timeout_factor * statistics.median(self._times))

    def _watch(self, period: float) -> None:
        """Checks the time of the current activity.  Touches no file, so that it cannot hang with the file system."""
        looked = time.monotonic()
        while not self._done.wait(period):
            now, before = time.monotonic(), looked
            looked = now
            if now - before > 2 * period + STARVED:
                # The whole process was stopped (Ctrl-Z, SIGSTOP), this thread included: the run does not hang.
                self._since = min(self._since + now - before, now)
            elif self._others_wait or "waiting" in self._about():
                self._since = min(self._since + now - before, now)
            waited = now - self._since
            if self._chosen.step_timeout_factor and waited > self.allowed():
                self._end(waited)

    def _beat(self, period: float) -> None:
        while not self._done.wait(period):
            with contextlib.suppress(OSError):  # a full disk stops no run
                write_heartbeat(self._directory, self._process, self._words())
                self._others_wait = time.monotonic() - self._since > SILENT and self._sees_others_wait()

    def _sees_others_wait(self) -> bool:
        """True if the heartbeat of another process says that it waits, or gets on.

        The first process reads them all, and its own heartbeat passes it on: each of many reads one file, not all.
        """
        beats = _heartbeats([heartbeat(self._directory, 0)] if self._process else _all(self._directory))
        told = (words for p, (words, age) in beats.items() if p != self._process and age < self._silent)
        return any("waiting" in words or "others_wait" in words for words in told)

    def _words(self) -> dict[str, Any]:
        words = {"step": self.step, **self._about()}
        if time.monotonic() - self._got_on < SILENT:
            words["waiting"] = self.doing
        if self._process == 0 and self._others_wait:
            words["others_wait"] = True
        return words

    def _end(self, waited: float) -> None:
        """Reports what hangs, and where in the program, and exits: nothing can be saved any more."""
        try:
            said = threading.Thread(target=self._say, args=(waited, _stacks()), name="last words", daemon=True)
            said.start()
            said.join(2 * PATIENCE)  # the terminal may hang as well
        finally:
            os._exit(cli.HANGS)

    def _say(self, waited: float, stacks: str) -> None:
        others = [""]
        look = threading.Thread(
            target=lambda: others.append(behind(self._directory, self._process, self._silent)),
            name="others",
            daemon=True,
        )
        look.start()
        look.join(PATIENCE)  # the file system may hang
        print(
            f"process {self._process} hangs: {self.doing} after step {self.step} has taken {waited:.0f} s of "
            f"{self.allowed():.0f} s allowed{others[-1]}; all its threads:\n{stacks}",
            file=sys.stderr,
            flush=True,
        )


def heartbeat_period(processes: int) -> float:
    """Returns the seconds that must be between the heartbeats of each of so many processes."""
    return min(processes / BEATS, LONGEST_PERIOD)


def _stacks() -> str:
    """Returns the stacks of all threads, by way of a pipe: faulthandler itself would wait for a stopped terminal."""
    out, into = os.pipe()
    os.set_blocking(into, False)
    faulthandler.dump_traceback(into, all_threads=True)
    os.close(into)
    with open(out, encoding="utf-8", errors="replace") as text:
        return text.read()


def behind(directory: Path, own: int, silent: float = SILENT) -> str:
    """Describes the other processes that are silent, or behind the others, by their heartbeats."""
    beats = {p: (int(words["step"]), age) for p, (words, age) in _heartbeats(_all(directory)).items()}
    mute = [f"process {p} is silent since {age:.0f} s" for p, (_, age) in beats.items() if p != own and age > silent]
    most = max((step for step, _ in beats.values()), default=0)
    late = [f"process {p} is at step {step}, others at {most}" for p, (step, _) in beats.items() if step < most]
    return "".join(f"; {words}" for words in mute + late)


def _heartbeats(paths: Iterable[Path]) -> dict[int, tuple[dict[str, Any], float]]:
    """Returns the heartbeats in these files, by process, and their ages in seconds."""
    beats = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            words = json.loads(path.read_text())
            beats[int(words["process"])] = (words | {"step": int(words["step"])}, time.time() - float(words["time"]))
    return beats


def _all(directory: Path) -> list[Path]:
    return sorted(directory.glob("process-*.json"))


def words_of_first(run_dir: Path) -> dict[str, Any]:
    """Returns the heartbeat of the first process of the run in `run_dir`; {} where none lives."""
    return _heartbeats([heartbeat(run_dir / HEARTBEATS, 0)]).get(0, ({}, 0.0))[0]
