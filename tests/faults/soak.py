"""A job for hours, with a fault every minute and no hand laid on it.

    python -m tests.faults.soak --minutes=120 --processes=1

A line for each fault: what it was and how many seconds of training it cost.  At the end, goodput: the part of all the
time that was not lost in gaps of three times the usual one and more; and, beside it, the updates kept at the median
pace between faults, as a part of all the time, which falls besides when the machine itself grows slower.  Then the same
updates are made once more by one process, undisturbed, and the final arrays are compared.

The text is read slowly, 50 windows a second, so that the cores are as idle as those beside a GPU.
"""

import argparse
import atexit
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from charlstm.run.step_directory import StepDirectory
from launch.support import cli
from tests.compiling import xla_flags
from tests.faults import disturbances
from tests.faults.by_hand import slow_reader
from tests.jobs import ROOT

FAULTS = (
    disturbances.kill_one,
    disturbances.kill_in_a_save,
    disturbances.preempt_one,
    disturbances.halt_one_for_a_while,
    disturbances.stop_one,
    disturbances.flip_a_bit,
    disturbances.flip_a_bit_and_kill,
    disturbances.fill_the_disk,
    disturbances.start_another,
)
LOG_EVERY = 10


class Job:
    """The job's command, started again whenever a pre-emption has ended it; and how far it is, and since when."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._command, self._environment = command, environment
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.highest, self.at = 0, time.monotonic()
        self.gaps: list[float] = []  # seconds between two lines of the log further on than any before
        self.said: list[str] = []
        self.starts, self.statuses, self.ending = 0, list[int](), False
        self._thread.start()

    def _run(self) -> None:
        while not self.ending:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stderr=subprocess.PIPE, text=True, errors="replace"
            )
            assert self._process.stderr is not None
            for line in self._process.stderr:
                self._hear(line)
            self.statuses.append(self._process.wait())
            if self.statuses[-1] != cli.STOPPED:
                return

    def _hear(self, line: str) -> None:
        self.said.append(line)
        self.starts += "[0] training on " in line
        found = re.match(r"\[0\] step (\d+)/", line)
        if found and int(found[1]) > self.highest:
            now = time.monotonic()
            self.gaps.append((now - self.at) * LOG_EVERY / (int(found[1]) - self.highest))
            self.highest, self.at = int(found[1]), now

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lives(self) -> bool:
        return self._thread.is_alive()

    def kill(self) -> None:
        self.ending = True
        self._process.kill()  # its processes die with it

    def end(self) -> None:
        self.ending = True
        self._process.send_signal(signal.SIGTERM)
        self._thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, default=60, help="seconds from one fault to the next")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, small_disk(Path(folder) / "disk"):
        return _soak(Path(folder), chosen)


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A file system of 64 MB at `place`, where this may be mounted; a folder elsewhere, which never is full."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=False).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", place], check=True)


def _soak(folder: Path, chosen: argparse.Namespace) -> int:
    slowed = slow_reader(folder / "slowed", 0.02)
    (folder / "text.txt").write_text("".join(f"line {n * n} of a text\n" for n in range(3000)))
    run_dir = folder / "disk" / "run"
    faults = [fault for fault in FAULTS if fault != disturbances.fill_the_disk or run_dir.parent.is_mount()]
    flags = [
        "--flagfile=configs/tiny.flags", f"--corpus={folder / 'text.txt'}", f"--cache_dir={folder / 'cache'}",
        "--logical_shards=2", "--evaluate_every=0", f"--log_every={LOG_EVERY}", "--checkpoint_every=25",
        "--num_steps=100000000",
    ]  # fmt: skip
    watched = ["--step_timeout_factor=20", "--step_timeout_least=1.5", "--heartbeat_timeout=10"]
    own = [f"--processes={chosen.processes}", "--devices_per_process=1", "--restarts=100000", "--grace=2"]
    command = [sys.executable, "-m", "launch.local", *own, "--", *flags, *watched, f"--run_dir={run_dir}"]
    environment = os.environ | {"XLA_FLAGS": xla_flags(), "PYTHONPATH": f"{slowed}:{ROOT}"}
    random = np.random.default_rng(chosen.seed)
    job = Job(command, environment)
    atexit.register(job.kill)
    while job.highest < 100 and job.lives:
        time.sleep(0.1)
    began, first, begun, count = time.monotonic(), job.highest, len(job.gaps), 0
    cost: dict[str, list[float]] = defaultdict(list)
    while job.lives and time.monotonic() < began + 60 * chosen.minutes:
        time.sleep(max(0.0, began + chosen.every * (count + 1) - time.monotonic()))
        fault, gap = faults[count % len(faults)], len(job.gaps)
        name, fell = fault(job.pid, random, run_dir), time.monotonic()
        count += 1
        while job.lives and time.monotonic() < fell + 15:  # what it costs is seen by then
            time.sleep(0.1)
        usual = statistics.median(job.gaps)
        lost = sum(max(each - usual, 0) for each in job.gaps[gap:] if each > 3 * usual)
        cost[name].append(lost)
        print(f"{(fell - began) / 60:6.1f} min  update {job.highest:7d}  {name}: {lost:.1f} s lost", flush=True)
    lived, seconds, usual = job.lives, time.monotonic() - began, statistics.median(job.gaps) / LOG_EVERY
    all_lost = sum(each - usual * LOG_EVERY for each in job.gaps[begun:] if each > 3 * usual * LOG_EVERY)
    at_usual_pace = (job.highest - first) * usual / seconds
    with contextlib.suppress(ProcessLookupError):
        job.end()
    print(f"{'fault':60} times  median s lost  most")
    for name, each in sorted(cost.items()):
        print(f"{name:60} {len(each):5d}  {statistics.median(each):13.1f}  {max(each):4.1f}")
    print(
        f"{count} faults in {seconds / 60:.1f} min, {job.starts} starts, by themselves: {lived}; goodput "
        f"{1 - all_lost / seconds:.1%} ({all_lost:.0f} s lost); at the usual pace {at_usual_pace:.1%}",
        flush=True,
    )
    equal = lived and _is_as_undisturbed(run_dir, folder / "undisturbed", flags)
    if not equal:
        sys.stdout.writelines(job.said[-60:])
    return 0 if equal else 1


def _is_as_undisturbed(run_dir: Path, undisturbed: Path, flags: list[str]) -> bool:
    checkpoints = run_dir / "checkpoints"
    last = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
    cadence = [f"--num_steps={last}", "--log_every=10000", "--checkpoint_every=0", f"--run_dir={undisturbed}"]
    environment = os.environ | {"XLA_FLAGS": xla_flags(), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "launch.train", *flags, *cadence]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)
    held = [StepDirectory(folder).read(last)["arrays"] for folder in (checkpoints, undisturbed / "checkpoints")]
    equal = held[0] == held[1]
    print(f"after {last} updates the arrays are those of the undisturbed run: {equal}", flush=True)
    return equal


if __name__ == "__main__":
    sys.exit(main())
