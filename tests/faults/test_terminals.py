"""Terminals that go away, Ctrl-C at any moment, a file system that hangs, and a run that is stopped for a while."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from launch.support import cli
from tests.compiling import xla_flags
from tests.faults.conftest import Seen
from tests.faults.test_processes import lost
from tests.jobs import ROOT, children, has_saved, last_line, wait_for
from tests.launch.test_ctrl_c import interrupted

ONE_DEVICE = {"XLA_FLAGS": xla_flags(1)}


@pytest.mark.parametrize("gone", ["2>&1 | head -3", "2>/dev/full"])
def test_a_job_whose_terminal_is_gone_starts_a_killed_process_again_and_ends_with_the_same_bits(
    gone, job_flags, undisturbed, table, tmp_path
):
    run_dir = tmp_path / "run"
    own = ("--processes=2", "--devices_per_process=1", "--restarts=1", "--grace=20")
    flags = (*own, "--", *job_flags, "--log_every=1", "--checkpoint_every=80", f"--run_dir={run_dir}")
    script = f'"$@" {gone}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", script, "bash", sys.executable, "-m", "launch.local", *flags]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": xla_flags()}, stdout=subprocess.DEVNULL
    ) as running:
        try:
            wait_for(has_saved(run_dir, 80))
            (job,) = (pid for pid in children(running.pid) if "launch.local" in command_line(pid))
            os.kill(children(job)[1], signal.SIGKILL)
            assert running.wait(timeout=600) == cli.DONE
        finally:
            running.kill()
    equal = last_line(run_dir)["state_digest"] == undisturbed["state_digest"]
    said = (run_dir / "logs" / "process-0.txt").read_text()
    assert said.count("\nstep ") >= 240 and "finished: 240 steps" in said
    table.append(Seen(f"kill -9 of one of 2 processes of `launch.local {gone}`", 1, str(lost(run_dir)), str(equal)))
    assert equal


def command_line(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()


def test_ctrl_c_in_each_of_the_first_seconds_is_answered(job_flags, table, tmp_path):
    moments = [0.3 * n for n in range(16)]
    for number, moment in enumerate(moments):
        interrupted(job_flags, tmp_path / str(number), moment)
    table.append(Seen("Ctrl-C 0 to 4.5 s after the start", len(moments), "0", "130, or 75 where it was saved"))


@pytest.mark.parametrize("hanging", [("process-0.new",), ("process-0.new", "process-1.json")])
def test_a_run_that_hangs_with_its_file_system_ends(hanging, job_flags, table, tmp_path):
    # To open a FIFO that nobody reads waits for ever; here it is the heartbeat, and the main thread in its text.
    run_dir = tmp_path / "run"
    (run_dir / "heartbeats").mkdir(parents=True)
    for name in hanging:
        os.mkfifo(run_dir / "heartbeats" / name)
    (tmp_path / "sitecustomize.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *unused: time.sleep(1e6))\n"
    )
    watched = ("--step_timeout_factor=3", "--step_timeout_least=4", "--num_steps=1000000", f"--run_dir={run_dir}")
    # So far apart that one save is whole before the next begins: in a save it may take its time.
    watched += ("--checkpoint_every=400",)
    environment = os.environ | ONE_DEVICE | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "launch.train", *job_flags, *watched]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            wait_for(has_saved(run_dir, 400))
            running.send_signal(signal.SIGUSR1)
            _, said = running.communicate(timeout=300)
        finally:
            running.kill()
    assert running.returncode == cli.HANGS, said
    assert re.search(r"^process 0 hangs: .* all its threads:$", said, re.MULTILINE), said
    table.append(Seen("a run that hangs, and its file system too", 1, "", "ended by its watchdog, status 70"))


def test_a_run_that_is_stopped_for_longer_than_its_timeout_goes_on(job_flags, undisturbed, table, tmp_path):
    run_dir = tmp_path / "run"
    watched = ("--step_timeout_factor=3", "--step_timeout_least=5", "--pause_timeout=60", f"--run_dir={run_dir}")
    command = [sys.executable, "-m", "launch.train", *job_flags, *watched]
    environment = os.environ | {"XLA_FLAGS": xla_flags(8)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            wait_for(has_saved(run_dir, 80))
            assert running.poll() is None
            running.send_signal(signal.SIGSTOP)
            time.sleep(15)
            running.send_signal(signal.SIGCONT)
            _, said = running.communicate(timeout=600)
        finally:
            running.kill()
    assert running.returncode == cli.DONE, said
    equal = last_line(run_dir)["state_digest"] == undisturbed["state_digest"]
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 240
    table.append(Seen("a run stopped (SIGSTOP) for 3 timeouts, and continued", 1, "0", str(equal)))
    assert equal
