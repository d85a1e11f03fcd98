"""What is done to a running job: real signals to real processes, real bits of real files."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from charlstm.run.step_directory import StepDirectory
from launch.support import cli
from tests.jobs import ROOT, children

OF_THE_JOB = ("coordinator", "num_processes", "process_id")


def kill_one(job: int, random: np.random.Generator, run_dir: Path) -> str:
    """kill -9 of one of the processes of a job."""
    return _signalled(job, random, signal.SIGKILL, "kill -9 of a process")


def kill_in_a_save(job: int, random: np.random.Generator, run_dir: Path) -> str:
    """kill -9 while a checkpoint is being written."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not any((run_dir / "checkpoints").glob("*.saving*")):
        time.sleep(0.001)
    return _signalled(job, random, signal.SIGKILL, "kill -9 in a save")


def preempt_one(job: int, random: np.random.Generator, run_dir: Path) -> str:
    """SIGTERM to one process: all are to save and end."""
    return _signalled(job, random, signal.SIGTERM, "SIGTERM to a process")


def halt_one_for_a_while(job: int, random: np.random.Generator, run_dir: Path) -> str:
    """A process that does nothing for a second, and then goes on."""
    number = int(random.integers(len(children(job))))
    with contextlib.suppress(ProcessLookupError, IndexError):
        process = children(job)[number]
        os.kill(process, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(process, signal.SIGCONT)
    return "a process halted for a second"


def stop_one(job: int, random: np.random.Generator, run_dir: Path) -> str:
    """A process that never does anything again: the watchdogs are to notice."""
    return _signalled(job, random, signal.SIGSTOP, "a process stopped")


def flip_a_bit(job: int, random: np.random.Generator, run_dir: Path) -> str:
    """One bit of one file of the newest checkpoint; it shows at the next restart."""
    flip_a_bit_of_the_newest(random, run_dir / "checkpoints")
    return "a bit of the newest checkpoint flipped"


def flip_a_bit_and_kill(job: int, random: np.random.Generator, run_dir: Path) -> str:
    flip_a_bit_of_the_newest(random, run_dir / "checkpoints")
    return _signalled(job, random, signal.SIGKILL, "a bit of the newest checkpoint flipped, and kill -9")


def fill_the_disk(job: int, random: np.random.Generator, run_dir: Path) -> str:
    """No room for four seconds where the run lives, which is to be a small file system of its own."""
    ballast = run_dir.parent / "ballast"
    try:
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
        time.sleep(4.0)
    finally:
        ballast.unlink()
    return "the disk full for 4 seconds"


def start_another(job: int, random: np.random.Generator, run_dir: Path) -> str:
    """The same run started once more beside the job; it is to be refused."""
    command = Path(f"/proc/{children(job)[0]}/cmdline").read_text().split("\0")
    flags = [flag for flag in command if flag.startswith("--") and flag[2:].partition("=")[0] not in OF_THE_JOB]
    again = [sys.executable, "-m", "launch.train", *flags]
    ended = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == cli.MISTAKE and " is in use by process " in ended.stderr, ended.stderr
    return "another job started in its run directory"


def flip_a_bit_of_the_newest(random: np.random.Generator, checkpoints: Path) -> str:
    """Returns which file; "" where there is no checkpoint, or the run has just removed it."""
    steps = StepDirectory(checkpoints).steps()
    if len(steps) < 2:  # with the only one damaged there is, rightly, nothing to go on from
        return ""
    with contextlib.suppress(FileNotFoundError):
        files = sorted(path for path in (checkpoints / str(steps[-1])).rglob("*") if path.is_file())
        path = files[random.integers(len(files))]
        with open(path, "r+b") as file:
            place = int(random.integers(path.stat().st_size))
            file.seek(place)
            byte = file.read(1)[0] ^ 1 << int(random.integers(8))
            file.seek(place)
            file.write(bytes([byte]))
        return str(path.relative_to(checkpoints))
    return ""


def _signalled(job: int, random: np.random.Generator, number: int, what: str) -> str:
    with contextlib.suppress(ProcessLookupError, IndexError):
        os.kill(children(job)[random.integers(len(children(job)))], number)
    return what
