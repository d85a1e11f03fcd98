"""Runs launch.train as several processes of one job on this machine.

    python -m launch.local --processes=2 --restarts=3 -- --flagfile=configs/large.flags --run_dir=runs/mine

Arguments after the -- are those of launch.train.  On CPUs the processes have --devices_per_process simulated devices
each, on GPUs one GPU each, of those in CUDA_VISIBLE_DEVICES if that is set.  Their output is printed here with the
number of the process before each line, and kept in the run directory as logs/process-N.txt.  When one process dies the
others are ended, and with --restarts the job is restarted from its newest checkpoint.  Ctrl-C and SIGTERM are passed on
to all; a second Ctrl-C kills them.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.local")

import contextlib
import dataclasses
import itertools
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from charlstm.run.log import Lines
from charlstm.run.step_directory import StepDirectory
from data_pipeline import signals
from data_pipeline.atomic_files import expand_user
from data_pipeline.settings import setting
from launch.support import cli, flags, train_flags
from launch.support.child_processes import TRAIN, ChildProcesses
from launch.support.watchdog import words_of_first

ENDED_WELL = (cli.DONE, cli.STOPPED)
# A restarted job would end in the same way.
FINAL = (cli.MISTAKE, cli.DIVERGED, cli.UNREACHABLE, cli.IN_USE, cli.NOT_SAVED, cli.INTERRUPTED)
FOLLOWERS = (cli.LOST, -signal.SIGABRT)  # of processes that another one has taken along
TERMINATED = (128 + signal.SIGTERM, -signal.SIGTERM)  # by the signal that is passed on
MAX_DEATHS_AT_A_CHECKPOINT = 2  # consecutive deaths at the same checkpoint, after which it is no longer trusted
LONGEST_PAUSE = 60.0  # seconds
NOISE = ("[Gloo]", "preemption_notifier.cc")  # lines that say that all is well; the logs have them


@dataclasses.dataclass(frozen=True)
class LocalFlags:
    """The processes on this machine."""

    processes: int = setting(2, "Processes to start.")
    devices_per_process: int = setting(
        0, "Simulated CPU devices of each process; 0: the devices that exist, one GPU per process."
    )
    restarts: int = setting(0, "How many times the job is restarted after the death of a process.")
    grace: float = setting(
        30.0, "Seconds until the others are killed when one has died, and until a stopped process is killed."
    )

    def __post_init__(self) -> None:
        for name, least in (("processes", 1), ("devices_per_process", 0), ("restarts", 0), ("grace", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


class Job(ChildProcesses):
    """The processes of one start of the job, from their start until all have ended."""

    def __init__(self, chosen: LocalFlags, arguments: Sequence[str], log_dir: Path) -> None:
        super().__init__()
        self._chosen, self._log_dir = chosen, log_dir
        self._stopped: dict[int, float] = {}  # pid -> since when
        self._pumps = list[threading.Thread]()
        coordinator, devices = f"127.0.0.1:{_free_port()}", _devices(chosen)
        for number in range(chosen.processes):
            own = [f"--coordinator={coordinator}", f"--num_processes={chosen.processes}", f"--process_id={number}"]
            process = self.start(
                [*TRAIN, *arguments, *own],
                env=os.environ | devices[number],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            self._pumps.append(threading.Thread(target=self._pump, args=(number, process)))
            self._pumps[-1].start()

    def _pump(self, number: int, process: subprocess.Popen) -> None:
        """Copies the output of a process to the terminal and to its file."""
        assert process.stdout is not None
        log = Lines(self._log_dir / f"process-{number}.txt")
        for line in process.stdout:  # to the end, whatever comes: a process whose pipe is full is blocked
            with contextlib.suppress(OSError):  # more is waiting for a full disk than is kept
                log.add(line.rstrip("\n"))
            if not any(word in line for word in NOISE):
                signals.say(f"[{number}] {line.rstrip()}")
        process.stdout.close()
        with contextlib.suppress(OSError):  # the disk is still full
            log.close()

    def wait(self) -> list[int]:
        """Waits for all; returns their exit statuses, -N for signal N.  If one dies, the others are ended."""
        deadline, shown = None, time.monotonic()
        while None in (statuses := [process.poll() for process in self.started]):
            time.sleep(0.05)
            if sys.stderr.isatty() and time.monotonic() > shown + 1:
                shown = time.monotonic()
                signals.show(self.live_line())
            if deadline is None and any(status not in (None, *ENDED_WELL) for status in statuses):
                deadline = time.monotonic() + self._chosen.grace
            if deadline is not None and time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            self._end_the_stopped()
        for pump in self._pumps:
            pump.join()
        return [process.returncode for process in self.started]

    def live_line(self) -> str:
        """Returns the live line of the first process; "" until there is one: that of a killed process may lie there."""
        words = words_of_first(self._log_dir.parent)
        return words.get("status", "") if words.get("pid") == self.started[0].pid else ""

    def _end_the_stopped(self) -> None:
        """Kills processes stopped (SIGSTOP) for longer than --grace: a process cannot notice that it is stopped."""
        if not hasattr(os, "waitid"):  # on a Mac, before Python 3.13
            return
        for process in self.started:
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG):
                    self._stopped[process.pid] = time.monotonic()
                if os.waitid(os.P_PID, process.pid, os.WCONTINUED | os.WNOHANG):
                    self._stopped.pop(process.pid, None)
            if time.monotonic() > self._stopped.get(process.pid, math.inf) + self._chosen.grace:
                signals.say(f"process {self.started.index(process)} is stopped, and killed")
                del self._stopped[process.pid]
                process.kill()


class RestartPolicy:
    """Decides whether a job is restarted after a death, at most `limit` times.

    The first restart is immediate.  If there is no newer checkpoint than at the last death, restarts wait, twice as
    long each time.  After more than `MAX_DEATHS_AT_A_CHECKPOINT` such deaths the checkpoint is quarantined and the job
    goes back to the one before; if it then dies as often again, the job is given up: the cause is not chance.
    """

    def __init__(self, checkpoints: Path, limit: int, pause: float = 1.0) -> None:
        self._files, self._left, self._pause = StepDirectory(checkpoints), limit, pause
        self._deaths, self._newest, self._went_back = 0, self._newest_step(), False

    def decide(self, statuses: Sequence[int], told_to_stop: bool) -> tuple[bool, str]:
        """Returns, after the pause before a restart, whether to restart, and a sentence with the reason."""
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
        if self._deaths > MAX_DEATHS_AT_A_CHECKPOINT:
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
    """Returns how each process ended; those that ended only because another one did come last."""
    order = sorted(range(len(statuses)), key=lambda p: (statuses[p] in (*ENDED_WELL, *FOLLOWERS), p))
    return ", ".join(f"process {p} {_ending(statuses[p])}" for p in order if statuses[p] not in ENDED_WELL)


def job_status(statuses: Sequence[int], stopped_by: int | None = None) -> int:
    """Returns the exit status of the job: that of the process that was not only taken along by another.

    Of a job that was told to stop by a signal when it had nothing to save, that of the signal.
    """
    for status in (*FINAL, cli.STOPPED):
        if status in statuses:
            return status
    others = [status for status in statuses if status not in FOLLOWERS]
    if stopped_by and others and all(status in TERMINATED for status in others):
        return 128 + stopped_by
    return cli.DONE if all(status == cli.DONE for status in statuses) else cli.LOST


def _ending(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def main(argv: Sequence[str]) -> int:
    own, arguments = _divided(argv)
    (chosen,), _ = flags.parse(own, __doc__ or "", LocalFlags())
    of_the_run, *_ = train_flags.parse_for_run(["train", *arguments])
    if not of_the_run.run_dir:
        raise ValueError("--run_dir is required after the --: name a directory for the run")
    run_dir = expand_user(of_the_run.run_dir)
    log_dir = run_dir / "logs"
    log_dir.mkdir(parents=True, exist_ok=True)
    policy = RestartPolicy(run_dir / "checkpoints", chosen.restarts)
    while True:
        job = Job(chosen, arguments, log_dir)
        with job.signals_passed_on():
            statuses = job.wait()
        if job.killed:
            signals.leave(signal.SIGINT)
        again, sentence = policy.decide(statuses, job.told_to_stop)
        signals.say(sentence)
        if not again:
            return job_status(statuses, job.stopped_by)


def _divided(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits `argv` at the -- into the arguments of this program and those of launch.train."""
    arguments = list(argv)
    if "--" in arguments:
        cut = arguments.index("--")
        return arguments[:cut], arguments[cut + 1 :]
    if flags.HELP & set(arguments):
        return arguments, []
    raise ValueError(
        "the flags of launch.train are missing: give them after --, as in launch.local --processes=2 -- ..."
    )


def _devices(chosen: LocalFlags) -> list[dict[str, str]]:
    """Returns, for each process, the environment variables that choose its devices.

    Raises:
      ValueError: there are fewer GPUs than processes.
    """
    if count := chosen.devices_per_process:
        given = os.environ.get("XLA_FLAGS", "")
        simulated = f"{given} --xla_force_host_platform_device_count={count}".strip()
        return [{"JAX_PLATFORMS": "cpu", "XLA_FLAGS": simulated}] * chosen.processes
    gpus, where = _gpus()
    if gpus is None:
        return [{}] * chosen.processes
    if len(gpus) < chosen.processes:
        raise ValueError(
            f"processes={chosen.processes} need a GPU each, and {where} has {len(gpus)}: start fewer, or give "
            "--devices_per_process=1 for simulated CPU devices"
        )
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[: chosen.processes]]


def _gpus() -> tuple[list[str] | None, str]:
    """Returns the GPUs that may be used, by index or UUID, and who names them; None if this machine has none."""
    if not shutil.which("nvidia-smi") or os.environ.get("JAX_PLATFORMS") == "cpu":
        return None, ""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus = [word.strip() for word in given.split(",")]
        # As CUDA reads it: what comes behind the first word that names nothing is not visible.
        named = itertools.takewhile(lambda word: word and not word.startswith("-") and word != "NoDevFiles", gpus)
        return list(named), f"CUDA_VISIBLE_DEVICES={given}"
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number in range(len(re.findall("^GPU ", listed, re.M)))], "this machine"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    cli.run("launch.local", main)
