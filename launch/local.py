"""Runs launch.train as several processes of one job on this machine.

    python -m launch.local --processes=2 --restarts=3 -- --flagfile=configs/large.flags --run_dir=runs/mine

What follows the -- is for launch.train.  On CPUs the processes have --devices_per_process simulated devices each, on
GPUs one GPU each.  What they print comes here with the process's number before each line, and is kept in the run
directory as logs/process-N.txt.  When one process dies the others are ended, and with --restarts the job is started
again from its newest checkpoint.  Ctrl-C and SIGTERM reach all of them; a second Ctrl-C kills them.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.local")

import contextlib
import ctypes
import dataclasses
import functools
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from charlstm.run.log import Lines
from data_pipeline import terminal
from data_pipeline.atomic_files import expand_user
from data_pipeline.settings import setting
from launch import cli, flags, restarts, train

TRAIN = (sys.executable, "-m", "launch.train")


@dataclasses.dataclass(frozen=True)
class LocalFlags:
    """The processes on this machine."""

    processes: int = setting(2, "Processes to start.")
    devices_per_process: int = setting(0, "Simulated CPU devices of each; 0: what there is, of several GPUs one each.")
    restarts: int = setting(0, "How many times the job is started again when a process has died.")
    grace: float = setting(
        30.0, "Seconds that the others have to end by themselves when one has died, and that one may be stopped."
    )

    def __post_init__(self) -> None:
        for name, least in (("processes", 1), ("devices_per_process", 0), ("restarts", 0), ("grace", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


class Processes:
    """The processes of one start of the job, from their start until all have ended.

    Attributes:
      told_to_stop, killed: by a signal to this program.
    """

    def __init__(self, chosen: LocalFlags, arguments: Sequence[str], log_dir: Path) -> None:
        self._chosen, self._log_dir, self.told_to_stop, self.killed = chosen, log_dir, False, False
        self._stopped: dict[int, float] = {}  # since when
        coordinator = f"localhost:{_free_port()}"
        self._started = [self._start(number, coordinator, arguments) for number in range(chosen.processes)]
        self._pumps = [threading.Thread(target=self._pump, args=pair) for pair in enumerate(self._started)]
        for pump in self._pumps:
            pump.start()

    def _start(self, number: int, coordinator: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
        own = [f"--coordinator={coordinator}", f"--num_processes={self._chosen.processes}", f"--process_id={number}"]
        return subprocess.Popen(
            [*TRAIN, *arguments, *own],
            env=os.environ | _devices(number, self._chosen.devices_per_process),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on
            preexec_fn=functools.partial(die_with, os.getpid()),
        )

    def _pump(self, number: int, process: "subprocess.Popen[str]") -> None:
        """Copies what a process says to the terminal and to its file."""
        assert process.stdout is not None
        log = Lines(self._log_dir / f"process-{number}.txt")
        for line in process.stdout:  # to the end, whatever comes: a process whose pipe is full does not get on
            with contextlib.suppress(OSError):  # more is waiting for a full disk than is kept
                log.add(line.rstrip("\n"))
            print(f"[{number}] {line}", end="", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # the disk is still full
            log.close()

    def send(self, number: int) -> None:
        """Sends a signal to every process that lives."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def wait(self) -> list[int]:
        """The exit statuses (-N where signal N killed), once all have ended; one that dies takes the others along."""
        deadline = None
        while None in (statuses := [process.poll() for process in self._started]):
            time.sleep(0.05)
            if deadline is None and any(status not in (None, *restarts.ENDED_WELL) for status in statuses):
                deadline = time.monotonic() + self._chosen.grace
            if deadline is not None and time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            self._end_the_stopped()
        for pump in self._pumps:
            pump.join()
        return [process.returncode for process in self._started]

    def _end_the_stopped(self) -> None:
        """Kills what is stopped (SIGSTOP) for longer than the grace: alone, a process cannot notice that it is."""
        for process in self._started:
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG):
                    self._stopped[process.pid] = time.monotonic()
                if os.waitid(os.P_PID, process.pid, os.WCONTINUED | os.WNOHANG):
                    self._stopped.pop(process.pid, None)
            if time.monotonic() > self._stopped.get(process.pid, math.inf) + self._chosen.grace:
                print(f"process {self._started.index(process)} is stopped, and killed", file=sys.stderr, flush=True)
                del self._stopped[process.pid]
                process.kill()


def main(argv: Sequence[str]) -> int:
    own, arguments = _divided(argv)
    (chosen,), _ = flags.parse(own, __doc__ or "", LocalFlags())
    of_the_run, *_ = train.parse(["train", *arguments])
    if not of_the_run.run_dir:
        raise ValueError("--run_dir is required after the --: name a directory for the run")
    run_dir = expand_user(of_the_run.run_dir)
    log_dir = run_dir / "logs"
    log_dir.mkdir(parents=True, exist_ok=True)
    policy = restarts.Policy(run_dir / "checkpoints", chosen.restarts)
    while True:
        processes = Processes(chosen, arguments, log_dir)
        with passed_on(processes):
            statuses = processes.wait()
        if processes.killed:
            terminal.leave(signal.SIGINT)
        again, sentence = policy.after(statuses, processes.told_to_stop)
        print(sentence, file=sys.stderr, flush=True)
        if not again:
            return restarts.status_of_the_job(statuses)


def _divided(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """This program's own arguments, and those of launch.train."""
    arguments = list(argv)
    if "--" in arguments:
        cut = arguments.index("--")
        return arguments[:cut], arguments[cut + 1 :]
    if {"--help", "--helpshort"} & set(arguments):
        return arguments, []
    raise ValueError(
        "the flags of launch.train are missing: give them after --, as in launch.local --processes=2 -- ..."
    )


def _devices(number: int, count: int) -> dict[str, str]:
    """What the environment of process `number` says of devices."""
    if count:
        given = os.environ.get("XLA_FLAGS", "")
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{given} --xla_force_host_platform_device_count={count}".strip()}
    return {"CUDA_VISIBLE_DEVICES": str(number)} if shutil.which("nvidia-smi") else {}


def _free_port() -> int:
    with socket.socket() as mutable:
        mutable.bind(("localhost", 0))
        return mutable.getsockname()[1]


def die_with(parent: int) -> None:
    """In a child: hears signals, and is killed when `parent`, this program, dies, however that happens (Linux only)."""
    terminal.unblock()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has died before that
        os._exit(cli.LOST)


class Started(Protocol):
    """What was started, and can be told to stop, and killed, by a signal to this program."""

    told_to_stop: bool
    killed: bool

    def send(self, number: int) -> None: ...


@contextlib.contextmanager
def passed_on(processes: Started) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to all processes, as SIGTERM; a second Ctrl-C kills them."""

    def pass_on(number: int) -> None:
        if processes.told_to_stop and number == signal.SIGINT:
            processes.killed = True
            processes.send(signal.SIGKILL)
        else:
            processes.told_to_stop = True
            processes.send(signal.SIGTERM)
            terminal.say("told to stop: what runs finishes its step and is saved; Ctrl-C again kills it")

    with terminal.reacting(pass_on):
        yield


if __name__ == "__main__":
    cli.run("launch.local", main)
