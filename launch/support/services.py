"""The services of a training program: signals, the watchdog and the port for Prometheus."""

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from charlstm import distributed
from charlstm.run.loop import Outcome, Training
from charlstm.run.services import HEARTBEATS, Services
from charlstm.run.start import Run
from data_pipeline import signals
from launch.support import cli, prometheus
from launch.support.event_files import EventFiles, TensorboardFlags
from launch.support.prometheus import MonitorFlags
from launch.support.watchdog import Watchdog, WatchdogFlags

STATUS = {Outcome.FINISHED: cli.DONE, Outcome.STOPPED: cli.STOPPED, Outcome.NOT_SAVED: cli.NOT_SAVED}


class ProgramServices(Services):
    """Ends a run that hangs, saves and stops one that gets Ctrl-C or SIGTERM, and tells a monitor what it measures."""

    def __init__(
        self,
        watchdog_flags: WatchdogFlags,
        monitor_flags: MonitorFlags,
        tensorboard_flags: TensorboardFlags | None = None,
    ) -> None:
        self._watchdog_flags, self._monitor_flags = watchdog_flags, monitor_flags
        self._has_event_files = bool(tensorboard_flags and tensorboard_flags.tensorboard)
        self._training: Training | None = None
        self._signals: list[int] = []
        self.end = cli.end_if_out_of_memory

    @contextlib.contextmanager
    def opened(self, run_dir: Path) -> Iterator[None]:
        """Raises ValueError where the port cannot be had."""
        self._run_dir = run_dir
        with prometheus.of_this_process(self._monitor_flags, self.figures):
            self._watchdog = Watchdog(
                self._watchdog_flags,
                distributed.process_number(),
                run_dir / HEARTBEATS,
                self.about,
                processes=distributed.number_of_processes(),
            )
            try:
                yield
            finally:
                self._watchdog.stop()

    @contextlib.contextmanager
    def watching(self, training: Training) -> Iterator[None]:
        """Handles signals.  After the first, the run saves and ends; Ctrl-C after that ends it at once, unsaved.

        In a job of several processes, JAX catches SIGTERM and tells the others; so Ctrl-C is turned into SIGTERM.
        """
        self._training = training
        with signals.reacting(self.signalled):
            yield

    def copy_of(self, run: Run) -> EventFiles | None:
        """Returns the event files of `run`, with --tensorboard."""
        there = run.run_dir / "tensorboard"
        return EventFiles(there, run.config, signals.say) if self._has_event_files else None

    def signalled(self, number: int) -> None:
        """Takes a signal."""
        if self._signals and number == signal.SIGINT:
            signals.say(f"not saved: {self._unsaved()} are lost")
            signals.leave(number)
        self._signals.append(number)
        if distributed.is_one_of_several():
            os.kill(os.getpid(), signal.SIGTERM)
        if len(self._signals) == 1:
            doing = self._watchdog.doing
            how = "evaluates no further, saves and ends" if doing == "evaluating" else f"saves and ends after {doing}"
            signals.say(f"told to stop: {how}; a second Ctrl-C ends it at once and loses {self._unsaved()}")

    def _unsaved(self) -> str:
        """Says what is lost if the run ends now, without a look at the disk, which may hang."""
        newest = self._training.checkpoints.newest if self._training else None
        return "all steps" if newest is None else f"the steps after step {newest}"

    def stop_requested(self) -> bool:
        return bool(self._signals)

    def tick(self, step: int) -> None:
        self._watchdog.tick(step)

    def beat(self) -> None:
        self._watchdog.beat()

    def ended(self, outcome: Outcome) -> None:
        signals.settle(STATUS[outcome])

    def pause(self, doing: str) -> AbstractContextManager[None]:
        return self._watchdog.pause(doing)

    def about(self) -> dict[str, Any]:
        """Fields of a heartbeat besides the step."""
        if self._training is None:
            return {}
        run = self._training.run
        fields = {"num_steps": run.config.training.num_steps, "status": self._training.metrics.status()}
        waiting = run.corpus.waiting()
        return fields | ({"waiting": waiting} if waiting else {})

    def figures(self) -> dict[str, float | None]:
        """Values for the monitor, by the names in `prometheus.METRICS`."""
        if (training := self._training) is None:
            return {}
        return {
            "step": self._watchdog.step,
            **prometheus.of_records(training.metrics.records),
            "checkpoint_age_seconds": prometheus.checkpoint_age(self._run_dir / "checkpoints"),
            "checkpoint_failures_in_a_row": training.checkpoints.failed_saves,
            "devices": training.run.mesh.size,
            "processes": distributed.number_of_processes(),
            "rollbacks_total": training.rollbacks,
            "skipped_updates_total": training.metrics.skipped,
            "recurrent_state_rows_reset_total": training.metrics.state_resets,
        }
