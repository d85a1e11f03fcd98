"""Runs and jobs of several processes, for tests that start and disturb them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from charlstm.run.step_directory import StepDirectory
from tests.compiling import xla_flags

ROOT = Path(__file__).resolve().parent.parent

STEPS = 240


@contextlib.contextmanager
def job(
    own: tuple[str, ...], *flags: str, python_path: Path | str = ROOT, stderr: int = subprocess.PIPE
) -> Iterator[subprocess.Popen]:
    """launch.local, started; killed at the end if it has not ended."""
    command = [sys.executable, "-m", "launch.local", *own, "--", *flags]
    environment = os.environ | {"PYTHONPATH": str(python_path), "XLA_FLAGS": xla_flags()}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=stderr, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


def children(pid: int) -> list[int]:
    """The processes of the job, in the order in which they were started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(what: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it has not come to that"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may end between the opening and the reading
        return False


def has_saved(run_dir: Path, step: int) -> Callable[[], bool]:
    """Whether a checkpoint of that step or a later one is there: its own may be deleted before anyone looks."""
    return lambda: max(StepDirectory(run_dir / "checkpoints").steps(), default=-1) >= step


def last_line(run_dir: Path) -> dict:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
