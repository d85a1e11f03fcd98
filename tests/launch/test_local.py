"""Several processes of one job on this machine: started together, ended together, started again, and none left over."""

import io
import os
import re
import select
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from charlstm.run.services import HEARTBEATS, write_heartbeat
from charlstm.run.step_directory import StepDirectory
from launch import local, train
from launch.support import child_processes, cli
from launch.support.flags import Help
from tests.jobs import ROOT, STEPS, alive, children, has_saved, job, last_line, wait_for
from tests.launch.conftest import SMALL, process, refusal


def assert_same_end(one: dict, other: dict) -> None:
    """The state and the validation score have the same bits."""
    for name in ("split", "state_digest", "bits_per_symbol"):
        assert one[name] == other[name], name
    assert one["split"] == "valid"


@pytest.mark.long
def test_processes_and_devices_redrawn_at_every_restart_end_with_the_same_bits(job_flags, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    for processes, devices, until in ((2, 2, 60), (4, 1, 120), (2, 4, STEPS)):
        own = (f"--processes={processes}", f"--devices_per_process={devices}")
        with job(own, *job_flags, f"--run_dir={run_dir}", f"--num_steps={until}") as running:
            _, said = running.communicate(timeout=300)
        assert running.returncode == cli.DONE, said
        assert f"[0] training on {processes * devices} x cpu in {processes} process" in said
    assert_same_end(last_line(run_dir), undisturbed)
    # Each process has its own log, and what the first has to say the others do not repeat.
    assert "finished" in (run_dir / "logs" / "process-0.txt").read_text()
    assert "finished" not in (run_dir / "logs" / "process-3.txt").read_text()


def test_a_process_that_is_killed_takes_the_other_along_and_the_job_started_again_ends_with_the_same_bits(
    job_flags, tmp_path
):
    run_dir, flags = tmp_path / "run", (*job_flags, *SMALL, f"--num_steps={STEPS}", "--checkpoint_every=40")
    assert train.main(["train", *flags, f"--run_dir={tmp_path / 'alone'}"]) == cli.DONE
    own = ("--processes=2", "--devices_per_process=1", "--restarts=1", "--grace=20")
    with job(own, *flags, f"--run_dir={run_dir}") as running:
        wait_for(has_saved(run_dir, 40))
        os.kill(children(running.pid)[1], signal.SIGKILL)
        _, said = running.communicate(timeout=300)
    assert running.returncode == cli.DONE, said
    again = re.search(
        r"^starting again from step (\d+) \(0 restarts left\): process (\d) was killed by SIGKILL", said, re.M
    )
    assert again and int(again[1]) in range(40, STEPS, 40), said
    assert "[Gloo]" not in said and "[Gloo]" in (run_dir / "logs" / "process-0.txt").read_text()
    assert_same_end(last_line(run_dir), last_line(tmp_path / "alone"))


@pytest.mark.long
def test_without_restarts_the_job_ends_with_the_status_of_a_lost_process(job_flags, tmp_path):
    with job(("--processes=2", "--devices_per_process=1"), *job_flags, f"--run_dir={tmp_path / 'run'}") as running:
        wait_for(has_saved(tmp_path / "run", 80))
        left = children(running.pid)
        os.kill(left[1], signal.SIGKILL)
        _, said = running.communicate(timeout=300)
    assert running.returncode == cli.LOST
    ending = said.splitlines()[-1]
    assert ending.startswith("not started again, no --restarts are left: process 1 was killed by SIGKILL, process 0 ")
    assert not any(map(alive, left))


def test_no_process_outlives_a_job_that_is_killed(job_flags, tmp_path):
    endless = (*job_flags, f"--run_dir={tmp_path / 'run'}", "--num_steps=100000")
    with job(("--processes=2", "--devices_per_process=1"), *endless) as running:
        wait_for(lambda: len(children(running.pid)) == 2)
        left = children(running.pid)
        running.kill()
        wait_for(lambda: not any(map(alive, left)))  # which fails where they live on


# A program that has blocked signals, as ours do, and starts one that knows nothing of it.
PARENT = """
import signal, sys, time
from launch.support.child_processes import ChildProcesses
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
print(ChildProcesses().start((sys.executable, "-c", "import time; time.sleep(1000)")).pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("to", ["the parent", "the child"])
def test_a_child_dies_with_its_parent_and_is_reached_by_signals_that_the_parent_has_blocked(to):
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            wait_for(lambda: "die_with" not in Path(f"/proc/{child}/cmdline").read_text())
            if to == "the parent":
                parent.kill()
            else:
                os.kill(child, signal.SIGTERM)
            wait_for(lambda: not alive(child), seconds=30)
        finally:
            parent.kill()
            if alive(child):
                os.kill(child, signal.SIGKILL)


def test_a_process_whose_job_is_gone_before_it_begins_does_not_begin():
    gone = [*child_processes.DIE_WITH, "0", sys.executable, "-c", "print('begun')"]
    ended = subprocess.run(gone, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (cli.LOST, "", "")


@pytest.mark.parametrize(
    ("own", "rest", "sentence"),
    [
        (("--processes=2",), (), "the flags of launch.train are missing: give them after --"),
        (("--processes=0",), ("--", "--run_dir=x"), "processes=0 must be at least 1"),
        (("--proceses=2",), ("--", "--run_dir=x"), "did you mean processes?"),
        (("--processes=2",), ("--", "--num_stepss=3"), "did you mean num_steps?"),
        (("--processes=2",), ("--", "--num_steps=3"), "--run_dir is required"),
    ],
)
def test_a_mistake_is_refused_before_any_process_is_started(own, rest, sentence):
    assert sentence in refusal(local.main, *own, *rest)


@pytest.mark.parametrize("flag", ["--help", "-help", "-h", "--helpshort", "--helpfull", "-?"])
def test_any_way_to_ask_for_help_gets_it_without_the_flags_of_the_run(flag):
    with pytest.raises(Help, match="--processes"):
        local.main(["local", flag])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_job_that_is_told_to_stop_before_it_trains_ends_as_one_process_does(number, status, job_flags, tmp_path):
    with job(("--processes=2", "--devices_per_process=1"), *job_flags, f"--run_dir={tmp_path / 'run'}") as running:
        wait_for(lambda: len(children(running.pid)) == 2)
        running.send_signal(number)
        _, said = running.communicate(timeout=300)
    assert running.returncode == status, said


def test_a_terminal_shows_the_live_line_of_the_first_process_as_wide_as_it_is(arguments, tmp_path):
    terminal, inside = os.openpty()
    termios.tcsetwinsize(inside, (24, 30))
    # No line of the log has a step.
    unlogged = (f"--{name}=1000000" for name in ("num_steps", "log_every", "checkpoint_every"))
    shown = b""

    def live_lines() -> list[str]:
        nonlocal shown
        while select.select([terminal], [], [], 0)[0]:
            shown += os.read(terminal, 1 << 16)
        return re.findall(r"\r\033\[K(step [^\r\n]*)(?=\r)", shown.decode())

    own = ("--processes=1", "--devices_per_process=1")
    with job(own, *arguments, *unlogged, f"--run_dir={tmp_path / 'run'}", stderr=inside) as running:
        wait_for(lambda: len(set(live_lines())) > 1 or running.poll() is not None)
        assert running.poll() is None, shown.decode()
    steps = [int(line.removeprefix("step ").partition("/1000000  epoch ")[0]) for line in live_lines()]
    assert 0 < steps[0] < steps[-1] and steps == sorted(steps)
    assert all(len(line) < 30 for line in live_lines())
    os.close(terminal)
    os.close(inside)


@pytest.fixture
def instead(monkeypatch):
    """Has the jobs of this process run a program instead of launch.train."""

    def of(program: str) -> None:
        monkeypatch.setattr(local, "TRAIN", (sys.executable, "-c", program))

    return of


def test_the_live_line_that_a_killed_process_has_left_is_not_shown_of_the_next_one(instead, tmp_path):
    instead("import time; time.sleep(1000)")
    started = local.Job(local.LocalFlags(processes=1), [], tmp_path / "logs")
    try:
        (directory := tmp_path / HEARTBEATS).mkdir()
        for pid, line in ((os.getpid(), ""), (started.started[0].pid, "step 20/40")):
            write_heartbeat(directory, 0, {"step": 20, "status": "step 20/40", "pid": pid})
            assert started.live_line() == line
    finally:
        started.send(signal.SIGKILL)
        assert started.wait() == [-signal.SIGKILL]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_said_of_a_restart_is_written_over_the_live_line(instead, tmp_path, monkeypatch):
    instead("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    own = ("--processes=1", "--devices_per_process=1", "--restarts=1")
    assert local.main(["local", *own, "--", "--corpus=python", f"--run_dir={tmp_path}"]) == cli.LOST
    lines = terminal.getvalue().split("\n")
    for line, words in zip(lines, ("starting again from step 0 ", "not started again, no ", ""), strict=True):
        assert line.startswith(words and f"\r\033[K{words}"), lines


def test_what_a_process_refuses_the_job_refuses_once_and_is_not_started_again(job_flags, tmp_path):
    run = (*job_flags, f"--run_dir={tmp_path / 'run'}", "--batch_size=17")
    done = process(sys.executable, "-m", "launch.local", "--processes=2", "--restarts=5", "--", *run)
    assert done.returncode == cli.MISTAKE
    assert "[0] launch.train: batch_size=17 cannot be split over 2 devices: use 16 or 18" in done.stderr
    assert "starting again" not in done.stderr


@pytest.mark.parametrize(
    ("given", "processes", "found"),
    [
        (None, 2, ["0", "1"]),
        ("3,5", 2, ["3", "5"]),
        ("5, 3,4", 2, ["5", "3"]),
        ("GPU-8932f937-d72c,MIG-4b5c", 2, ["GPU-8932f937-d72c", "MIG-4b5c"]),
        (None, 4, "this machine has 3: start fewer"),
        ("6", 2, "processes=2 need a GPU each, and CUDA_VISIBLE_DEVICES=6 has 1: start fewer"),
        ("1,-1,2", 2, "CUDA_VISIBLE_DEVICES=1,-1,2 has 1: start fewer"),
        ("", 1, "CUDA_VISIBLE_DEVICES= has 0: start fewer"),
    ],
)
def test_each_process_gets_one_of_the_gpus_that_are_given(given, processes, found, tmp_path, monkeypatch):
    listing = "".join(f"GPU {number}: H200 (UUID: GPU-{number})\n  MIG 1g Device 0\n" for number in range(3))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{listing}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    chosen = local.LocalFlags(processes=processes)
    if isinstance(found, str):
        run = ("--corpus=python", f"--run_dir={tmp_path / 'run'}")
        sentence = refusal(local.main, f"--processes={processes}", "--", *run)
        assert found in sentence
    else:
        assert local._devices(chosen) == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in found]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert local._devices(chosen) == [{}] * processes


# Of a job whose processes say more than a pipe holds; the first start dies, the second diverges.
TALKATIVE = """
import os, signal, sys
for n in range(10_000):
    print("line", n, file=sys.stderr)
print("whole", file=sys.stderr, flush=True)
run_dir = next(argument.partition("=")[2] for argument in sys.argv if argument.startswith("--run_dir="))
if "--process_id=1" in sys.argv:
    sys.exit(71)
if os.path.exists(mark := os.path.join(run_dir, "mark")):
    sys.exit(3)
open(mark, "w").close()
os.kill(os.getpid(), signal.SIGKILL)
"""
OF_THE_TALKATIVE = """
import sys
from launch import local
from launch.support import cli
local.TRAIN = (sys.executable, "-c", sys.argv.pop(1))
cli.run("launch.local", local.main)
"""


@pytest.mark.parametrize("gone", ["2>/dev/full", "2> >(head -3 >/dev/null)"])
def test_a_terminal_that_goes_away_or_fails_changes_neither_the_job_nor_its_logs_nor_the_status(gone, tmp_path):
    flags = ("--processes=2", "--restarts=1", "--", "--corpus=python", f"--run_dir={tmp_path}")
    done = process("bash", "-c", f'"$0" -c "$@" {gone}', sys.executable, OF_THE_TALKATIVE, TALKATIVE, *flags)
    assert (done.returncode, done.stdout, done.stderr) == (cli.DIVERGED, "", "")
    for number in range(2):
        lines = (tmp_path / "logs" / f"process-{number}.txt").read_text().splitlines()
        assert len(lines) == 2 * 10_001 and lines[10_000] == lines[-1] == "whole"


# When a job is started again.


def died(policy: local.RestartPolicy) -> tuple[bool, str]:
    return policy.decide([-signal.SIGKILL, cli.LOST], told_to_stop=False)


def test_a_job_that_dies_at_the_same_step_goes_back_one_checkpoint_and_is_then_given_up(tmp_path):
    for step in (10, 20):
        (tmp_path / str(step)).mkdir()
    policy = local.RestartPolicy(tmp_path, limit=100, pause=0)
    assert all(died(policy)[0] for _ in range(local.MAX_DEATHS_AT_A_CHECKPOINT))
    again, sentence = died(policy)
    assert again and "checkpoint 20 is set aside" in sentence and "starting again from step 10" in sentence
    assert StepDirectory(tmp_path).steps() == [10]
    assert died(policy)[0]
    again, sentence = died(policy)
    assert not again and sentence.startswith("given up, 3 deaths in a row at step 10: process 0 was killed by SIGKILL")


def test_progress_between_deaths_is_no_crash_loop(tmp_path):
    policy = local.RestartPolicy(tmp_path, limit=20, pause=0)
    for step in range(20):
        (tmp_path / str(step)).mkdir()
        assert died(policy)[0]
    assert len(StepDirectory(tmp_path).steps()) == 20
    again, sentence = died(policy)
    assert not again and "no --restarts are left" in sentence


@pytest.mark.parametrize("status", local.FINAL)
def test_what_would_end_so_again_is_not_started_again(status, tmp_path):
    policy = local.RestartPolicy(tmp_path, limit=20, pause=0)
    assert policy.decide([cli.LOST, status], told_to_stop=False)[0] is False
    assert local.job_status([cli.LOST, status]) == status


def test_a_job_that_was_told_to_stop_is_not_started_again(tmp_path):
    policy = local.RestartPolicy(tmp_path, limit=20, pause=0)
    assert policy.decide([-signal.SIGKILL, cli.LOST], told_to_stop=True)[0] is False
    assert policy.decide([cli.STOPPED] * 2, told_to_stop=True) == (False, "all processes have ended well")
    assert local.job_status([cli.STOPPED] * 2) == cli.STOPPED


@pytest.mark.parametrize(
    ("statuses", "stopped_by", "status"),
    [
        ([143, -15], signal.SIGTERM, 143),
        ([143, 143], signal.SIGINT, 130),
        ([cli.LOST, 143], signal.SIGTERM, 143),
        ([143, cli.STOPPED], signal.SIGTERM, cli.STOPPED),
        ([-9, 143], signal.SIGTERM, cli.LOST),
        ([cli.LOST, cli.LOST], signal.SIGTERM, cli.LOST),
        ([143, 143], None, cli.LOST),
    ],
)
def test_a_job_that_had_nothing_to_save_has_the_status_of_the_signal_that_came(statuses, stopped_by, status):
    assert local.job_status(statuses, stopped_by) == status
