"""Clocks that jump and a process that is slower than the rest: no decision hangs on them, and no bit."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from launch.support import cli
from tests.faults.by_hand import processes, slow_reader, statuses, whole_steps
from tests.faults.conftest import Seen
from tests.jobs import has_saved, last_line, wait_for

# Each time somebody asks for the time it is an hour earlier, a day later or right; what time has gone by stays right.
JUMPING_CLOCK = """
import itertools, time
def jumping(clock, second):
    jumps = itertools.cycle((0, -3600 * second, 86400 * second, -86400 * second))
    return lambda: clock() + next(jumps)
time.time, time.time_ns = jumping(time.time, 1), jumping(time.time_ns, 1_000_000_000)
"""
CADENCE = ("--checkpoint_every=20", "--log_every=10")


@pytest.fixture
def run_dir(half_done, tmp_path) -> Path:
    return shutil.copytree(half_done, tmp_path / "run")


def test_a_clock_of_one_process_that_jumps_by_hours_and_days_changes_no_decision_and_no_bit(
    run_dir, job_flags, undisturbed, table, tmp_path
):
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(JUMPING_CLOCK)
    flags = (*job_flags, *CADENCE, f"--run_dir={run_dir}")
    with processes(flags, tmp_path, python_path={0: tmp_path / "clock"}) as running:
        ended = statuses(running)
    said = "".join((tmp_path / f"{number}.txt").read_text() for number in (0, 1))
    assert ended == [cli.DONE] * 2, said
    assert "hangs: " not in said and "was not saved" not in said
    equal = last_line(run_dir)["state_digest"] == undisturbed["state_digest"]
    table.append(Seen("the clock of one of 2 processes jumps by an hour and a day", 1, "0", str(equal)))
    assert equal and whole_steps(run_dir) == [200, 220, 240]


def test_a_process_that_reads_slowly_stops_at_the_step_of_the_others_and_changes_no_bit(
    run_dir, job_flags, undisturbed, table, tmp_path
):
    slowly = {1: slow_reader(tmp_path / "slowly", 0.1)}
    flags = (*job_flags, *CADENCE, f"--run_dir={run_dir}")
    with processes(flags, tmp_path, python_path=slowly) as running:
        wait_for(has_saved(run_dir, 180))
        os.kill(running[0].pid, signal.SIGTERM)
        ended = statuses(running)
    said = (tmp_path / "0.txt").read_text()
    assert ended == [cli.STOPPED] * 2, said
    stopped = whole_steps(run_dir)[-1]
    assert 180 <= stopped < 240 and f"stopped by a signal at step {stopped}, saved" in said
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    waits = [line["input_wait_of_processes"] for line in lines if "input_wait_of_processes" in line]
    assert waits[-1]["process"] == 1 and waits[-1]["max"] > waits[-1]["min"]
    with processes(flags, tmp_path, 1) as running:
        ended = statuses(running)
    assert ended == [cli.DONE], (tmp_path / "0.txt").read_text()
    equal = last_line(run_dir)["state_digest"] == undisturbed["state_digest"]
    table.append(Seen("one of 2 processes 100 ms late at every step", 1, "0", str(equal)))
    assert equal
