"""The trials of a study: which one a worker takes, and a trial's run from its settings to its score.

study_dir/journal.log          what was drawn and scored, by Optuna; all workers write it
study_dir/trials/0007/         a run directory like any other
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline import terminal
from data_pipeline.atomic_files import locked
from launch import cli
from launch.local import TRAIN, die_with, passed_on

PARTS = 10  # evaluations of a trial, at equal distances; trials are compared where they have made as many
LOOK_EVERY = 0.5  # seconds


class _Taken(Exception):
    """Another worker has the trial."""


@contextlib.contextmanager
def next_trial(study: Any, study_dir: Path, most: int) -> Iterator[Any | None]:
    """The Optuna trial that this worker is to run, and has alone: one that a worker left when it died, else a new one.

    None where there are `most` trials, and others have what is not finished.
    """
    import optuna

    def refuse() -> None:
        raise _Taken

    with contextlib.ExitStack() as held:

        def take(number: int) -> bool:
            with contextlib.suppress(_Taken):
                held.enter_context(locked(study_dir / f".trial-{number}.lock", refuse))
                return True
            return False

        trial = None
        with locked(study_dir / ".taking.lock", lambda: None):
            states = optuna.trial.TrialState
            for one in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
                # Who had it may have finished it before the lock was free.
                if take(one.number) and study.get_trials(deepcopy=False)[one.number].state == states.RUNNING:
                    trial = optuna.trial.Trial(study, one._trial_id)  # Optuna has no other word for this
                    break
            begun = sum(one.state != states.WAITING for one in study.get_trials(deepcopy=False))
            if trial is None and begun < most and take(begun):
                trial = study.ask()
        yield trial


def run_dir(study_dir: Path, number: int) -> Path:
    return study_dir / "trials" / f"{number:04d}"


def evaluations(directory: Path) -> list[tuple[int, float]]:
    """(step, bits per symbol) of each evaluation of the validation split that a run has made."""
    return [(line["step"], line["bits_per_symbol"]) for line in records(directory) if line["split"] == "valid"]


def records(directory: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics; the last one may be on its way."""
    path = directory / "metrics.jsonl"
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def training_seconds(directory: Path, symbols: int) -> float:
    """Seconds that a run's updates of `symbols` symbols took: of all its starts, and without evaluating and saving."""
    seconds, before = 0.0, 0
    for line in records(directory):
        if line["split"] == "train":
            seconds += (line["step"] - before) * symbols / max(line["symbols_per_second"], 1e-9)
            before = line["step"]
    return seconds


class Ended(NamedTuple):
    """How a trial's process ended."""

    status: int  # as in program.py, or -N for signal N
    told_to_stop: bool  # by a signal to this program
    pruned: bool  # by this program, as the others did better
    last_words: str  # the last line that it said


class Child:
    """A process of launch.train.

    Attributes:
      told_to_stop, killed: by a signal to this program.
    """

    def __init__(self, arguments: Sequence[str], words: Path, out: Any = None) -> None:
        """What it says is added to the file `words`, but for stdout where `out` is a file for that."""
        self.told_to_stop, self.killed, self._words = False, False, words
        words.parent.mkdir(parents=True, exist_ok=True)
        with words.open("ab") as file:
            self._process = subprocess.Popen(
                [*TRAIN, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out or file,
                stderr=file,
                start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on
                preexec_fn=partial(die_with, os.getpid()),
            )

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def wait(self, hopeless: Callable[[], bool] = lambda: False) -> Ended:
        """Waits for its end, which is told to come once `hopeless()`.  Leaves this program where it was `killed`."""
        pruned = False
        with passed_on(self):
            while self._process.poll() is None:
                time.sleep(LOOK_EVERY)
                if not pruned and not self.told_to_stop and hopeless():
                    pruned = True
                    self.send(signal.SIGTERM)
        if self.killed:
            terminal.leave(signal.SIGINT)
        lines = self._words.read_text("utf-8", "replace").splitlines()
        return Ended(self._process.returncode, self.told_to_stop, pruned, lines[-1] if lines else "stopped")


def num_steps_within(seconds: float, arguments: Sequence[str], words: Path) -> int:
    """How many updates of the run that `arguments` describe take `seconds` here: a multiple of PARTS, at least PARTS.

    Raises:
      KeyboardInterrupt: this program was told to stop.
      ValueError: launch.train refuses the arguments.
    """
    answer = words.with_suffix(".json")
    answer.parent.mkdir(parents=True, exist_ok=True)
    with answer.open("wb") as file:
        ended = Child([*arguments, "--dry_run", "--dry_run_format=json"], words, file).wait()
    if ended.told_to_stop:
        raise KeyboardInterrupt
    if ended.status != cli.DONE:
        raise ValueError(f"launch.train refuses the trial: {ended.last_words}")
    per_step = json.loads(answer.read_text("utf-8"))["seconds_per_step"]
    answer.unlink()
    if per_step is None:
        raise ValueError("the trial does not fit in memory: search smaller models or batches")
    return max(1, round(seconds / per_step / PARTS)) * PARTS
