"""Runs launch.train as a child process, for a trial of a study."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from data_pipeline import signals
from data_pipeline.progress import bar
from launch.support import cli
from launch.support.child_processes import TRAIN, ChildProcesses
from launch.support.watchdog import words_of_first

PARTS = 10  # evaluations of a trial, at equal distances; trials are compared after equally many
LOOK_EVERY = 0.5  # seconds between two looks at a trial


def evaluations(directory: Path) -> dict[int, float]:
    """Returns step -> bits per symbol of the evaluations that a run has made of its validation split."""
    return {line["step"]: line["bits_per_symbol"] for line in _records(directory) if line["split"] == "valid"}


def is_whole(directory: Path) -> bool:
    """Returns whether a run has ended with all its updates, or by --stop_after."""
    return any("state_digest" in line for line in _records(directory)[-1:])


def _records(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []  # the last one may be half written
    return [json.loads(line) for line in lines]


class Ended(NamedTuple):
    """End of launch.train: `status` as in cli.py, or -N for signal N; `last_words`, the last line it wrote."""

    status: int
    stopped_by: int | None  # the signal to this program that stopped it
    pruned: bool  # by this program
    last_words: str


def run_child(
    arguments: Sequence[str],
    log: Path,
    stdout: Any = None,
    hopeless: Callable[[], bool] = lambda: False,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Ended:
    """Runs launch.train as a child process, and stops it once `hopeless()`; adds its output to `log`, or `stdout`.

    Args:
      environment: variables that the child has besides those of this process.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    children, pruned = ChildProcesses(), False
    with log.open("ab") as file, children.signals_passed_on():
        own = {"env": os.environ | environment, "stdin": subprocess.DEVNULL}
        child = children.start([*TRAIN, *arguments], stdout=stdout or file, stderr=file, **own)
        while child.poll() is None:
            time.sleep(LOOK_EVERY)
            if not pruned and not children.told_to_stop and hopeless():
                pruned = True
                children.send(signal.SIGTERM)
    if children.killed:
        signals.leave(signal.SIGINT)
    lines = log.read_text("utf-8", "replace").splitlines()
    return Ended(child.returncode, children.stopped_by, pruned, lines[-1] if lines else "stopped")


def following(doing: str, run_dir: Path, num_steps: int) -> Callable[[], bool]:
    """Returns a function for `run_child` that shows on a terminal how far the run is, and the time left."""
    show = bar()

    def look() -> bool:
        if step := words_of_first(run_dir).get("step", 0):
            show(doing, step, num_steps)
        return False

    return look


def num_steps_within(
    seconds: float, arguments: Sequence[str], log: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> int:
    """Returns how many updates take `seconds` here, by a dry run: a multiple of PARTS.

    Ends this program if it is told to stop.  Raises ValueError if launch.train refuses the arguments.
    """
    answer = log.with_suffix(".json")
    answer.parent.mkdir(parents=True, exist_ok=True)
    with answer.open("wb") as file:
        ended = run_child([*arguments, "--dry_run", "--dry_run_format=json"], log, file, environment=environment)
    if ended.stopped_by:
        signals.leave(ended.stopped_by)
    if ended.status != cli.DONE:
        raise ValueError(f"launch.train refuses the trial: {ended.last_words}")
    per_step = json.loads(answer.read_text("utf-8"))["seconds_per_step"]
    answer.unlink()
    if per_step is None:
        raise ValueError("the trial does not fit in memory: search smaller models or batches")
    return max(1, round(seconds / per_step / PARTS)) * PARTS
