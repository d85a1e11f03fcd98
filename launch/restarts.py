"""When a job whose process has died is started again, and when not."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path

from charlstm.run.step_directory import StepDirectory
from launch import cli

ENDED_WELL = (cli.DONE, cli.STOPPED)
# Started again, the job would end so again.
FINAL = (cli.MISTAKE, cli.DIVERGED, cli.NOT_SAVED, cli.INTERRUPTED)
FUTILE = 2  # deaths in a row at the same checkpoint, after which it is not trusted any more
LONGEST_PAUSE = 60.0  # seconds


class Policy:
    """Starts a job again after a death, at most `limit` times.

    The first time at once.  Where the newest checkpoint is the one of the death before, after a pause that doubles;
    after `FUTILE` such deaths the checkpoint is set aside and the job goes back to the one before; and where that was
    done once and it dies `FUTILE` times again, the job is given up: whatever kills it is not chance.
    """

    def __init__(self, checkpoints: Path, limit: int, pause: float = 1.0) -> None:
        self._files, self._left, self._pause = StepDirectory(checkpoints), limit, pause
        self._deaths, self._newest, self._went_back = 0, self._newest_step(), False

    def after(self, statuses: Sequence[int], told_to_stop: bool) -> tuple[bool, str]:
        """Whether to start again, after the pause there is to be; and the sentence that says why."""
        if all(status in ENDED_WELL for status in statuses):
            return False, "all processes have ended well"
        died = describe(statuses)
        if told_to_stop or any(status in FINAL for status in statuses):
            return False, f"not started again: {died}"
        if not self._left:
            return False, f"not started again, no --restarts are left: {died}"
        newest = self._newest_step()
        progress, self._newest = newest > self._newest, newest
        self._deaths = 1 if progress else self._deaths + 1
        self._went_back &= not progress
        if self._deaths > FUTILE:
            if self._went_back or newest < 0:
                return False, f"given up, {self._deaths} deaths in a row at step {max(newest, 0)}: {died}"
            self._files.quarantine(newest, "abandoned")
            died += f"; checkpoint {newest} is set aside after {self._deaths} deaths in a row"
            self._deaths, self._newest, self._went_back = 1, self._newest_step(), True
        self._left -= 1
        pause = min(self._pause * 2 ** (self._deaths - 2), LONGEST_PAUSE) if self._deaths > 1 else 0.0
        time.sleep(pause)
        return True, f"starting again from step {max(self._newest, 0)} ({self._left} restarts left): {died}"

    def _newest_step(self) -> int:
        return max(self._files.steps(), default=-1)


def describe(statuses: Sequence[int]) -> str:
    """Which processes ended how, those first that did not merely follow another."""
    followers = (*ENDED_WELL, cli.LOST, -signal.SIGABRT)
    order = sorted(range(len(statuses)), key=lambda p: (statuses[p] in followers, p))
    return ", ".join(f"process {p} {_ending(statuses[p])}" for p in order if statuses[p] not in ENDED_WELL)


def status_of_the_job(statuses: Sequence[int]) -> int:
    """The exit status for all: that of the process that did not merely follow another."""
    for status in (*FINAL, cli.STOPPED):
        if status in statuses:
            return status
    return cli.DONE if all(status == cli.DONE for status in statuses) else cli.LOST


def _ending(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
