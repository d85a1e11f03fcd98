"""Faults of the processes of a job: each really killed, told to stop, stopped or made to hang."""

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from charlstm.run.step_directory import StepDirectory
from launch.support import cli
from tests.faults.conftest import Seen
from tests.jobs import alive, children, has_saved, job, last_line, wait_for

# On SIGUSR1 the main thread does nothing any more; the other threads, and JAX's heartbeats, go on.
STUCK_ON_A_SIGNAL = """
import signal, time
def stuck(*unused):
    time.sleep(1e6)
signal.signal(signal.SIGUSR1, stuck)
"""


def lost(run_dir: Path, process: int = 0) -> list[int]:
    """At each restart, updates that had been logged (every 10th is) and were made again."""
    said = (run_dir / "log.txt").read_text()
    steps, found = 0, []
    for match in re.finditer(r" step (\d+)/|from the checkpoint of step (\d+)", said):
        if match[1]:
            steps = int(match[1])
        else:
            found.append(max(steps - int(match[2]), 0))
    return found


@pytest.mark.parametrize("processes", [2, 4])
def test_a_process_that_is_killed_at_any_moment_costs_no_bit(processes, job_flags, undisturbed, table, tmp_path):
    run_dir, random, times = tmp_path / "run", np.random.default_rng(processes), 3
    own = (f"--processes={processes}", "--devices_per_process=1", f"--restarts={times}", "--grace=20")
    with job(own, *job_flags, "--log_every=10", "--checkpoint_every=40", f"--run_dir={run_dir}") as running:
        for step in (40, 80, 120):
            wait_for(has_saved(run_dir, step))
            killed = children(running.pid)  # who follow them, at once, are not waited for
            os.kill(killed[random.integers(processes)], signal.SIGKILL)
            wait_for(lambda left=killed: not any(map(alive, left)))
        _, said = running.communicate(timeout=600)
    assert running.returncode == cli.DONE, said
    again = said.count("starting again from step ")
    assert again == times, said
    equal = last_line(run_dir)["state_digest"] == undisturbed["state_digest"]
    table.append(Seen(f"kill -9 of one of {processes} processes", again, str(lost(run_dir)), str(equal)))
    assert equal


@pytest.mark.parametrize("to", ["the job", "one of its processes"])
def test_sigterm_makes_all_processes_save_the_same_step_and_leaves_none(to, job_flags, undisturbed, table, tmp_path):
    run_dir = tmp_path / "run"
    own = ("--processes=2", "--devices_per_process=1")
    with job(own, *job_flags, "--num_steps=100000", f"--run_dir={run_dir}") as running:
        wait_for(has_saved(run_dir, 80))
        left = children(running.pid)
        os.kill(running.pid if to == "the job" else left[1], signal.SIGTERM)
        _, said = running.communicate(timeout=600)
    assert running.returncode == cli.STOPPED, said
    stopped = re.search(r"^\[0\] stopped by a signal at step (\d+), saved", said, re.M)
    assert stopped and StepDirectory(run_dir / "checkpoints").steps()[-1] == int(stopped[1])
    assert not any(map(alive, left))
    table.append(Seen(f"SIGTERM to {to}", 1, "0", "saved by all at one step"))


@pytest.mark.parametrize(
    ("fault", "process"),
    [(signal.SIGSTOP, 1), (signal.SIGSTOP, 0), (signal.SIGUSR1, 1)],
    ids=["stopped", "the first stopped", "alive but stuck"],
)
def test_a_process_that_hangs_is_named_and_the_job_started_again_ends_with_the_same_bits(
    fault, process, job_flags, undisturbed, table, tmp_path
):
    (tmp_path / "sitecustomize.py").write_text(STUCK_ON_A_SIGNAL)
    run_dir = tmp_path / "run"
    own = ("--processes=2", "--devices_per_process=1", "--restarts=3", "--grace=16")  # until then it is the watchdog's
    # JAX itself would notice a stopped process after its own timeout; here it is to be the watchdog.
    watched = ("--heartbeat_timeout=100", "--step_timeout_factor=3", "--step_timeout_least=8", "--pause_timeout=40")
    cadence = ("--checkpoint_every=120", "--log_every=10")  # most likely it is a step that is disturbed
    with job(own, *job_flags, *watched, *cadence, f"--run_dir={run_dir}", python_path=tmp_path) as running:
        wait_for(has_saved(run_dir, 120))
        os.kill(children(running.pid)[process], fault)
        _, said = running.communicate(timeout=600)
    assert running.returncode == cli.DONE, said
    hangs = re.compile(r"process (\d) hangs: (a step|\w+) after step \d+ has taken \d+ s of \d+ s allowed")
    named = {int(process) for process, _ in hangs.findall(said)}
    if fault == signal.SIGSTOP:
        assert named == {1 - process} and f"; process {process} is silent since " in said
    else:
        assert named  # the one that notices first, the stuck one or the one that waits for it, ends both
        stack = [line for line in said.splitlines() if line.startswith("[1]   File ")]
        assert 1 not in named or any("sitecustomize.py" in line and line.endswith(" in stuck") for line in stack)
    assert "starting again from step " in said
    equal = last_line(run_dir)["state_digest"] == undisturbed["state_digest"]
    name = f"number {process} stopped (SIGSTOP)" if fault == signal.SIGSTOP else "alive but stuck"
    table.append(Seen(f"one of 2 processes {name}", 1, str(lost(run_dir)), str(equal)))
    assert equal


def test_a_process_that_is_alone_and_stopped_is_killed_and_started_again(job_flags, undisturbed, table, tmp_path):
    run_dir = tmp_path / "run"
    own = ("--processes=1", "--devices_per_process=1", "--restarts=1", "--grace=2")
    with job(own, *job_flags, "--log_every=10", f"--run_dir={run_dir}") as running:
        wait_for(has_saved(run_dir, 80))
        os.kill(children(running.pid)[0], signal.SIGSTOP)
        _, said = running.communicate(timeout=600)
    assert running.returncode == cli.DONE, said
    assert "process 0 is stopped, and killed" in said and "starting again from step " in said
    equal = last_line(run_dir)["state_digest"] == undisturbed["state_digest"]
    table.append(Seen("the only process stopped (SIGSTOP)", 1, str(lost(run_dir)), str(equal)))
    assert equal
