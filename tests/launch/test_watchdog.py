"""What takes too long ends its process, with the place where it hangs.  Of jobs, see tests/faults."""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.support import cli, watchdog
from launch.support.watchdog import Watchdog, WatchdogFlags
from tests.conftest import ROOT
from tests.jobs import wait_for

HANGING = """
import sys, time
from pathlib import Path
from launch.support.watchdog import Watchdog, WatchdogFlags
watch = Watchdog(WatchdogFlags(10.0, 0.05, 0.5), 3, Path(sys.argv[1]), period=0.02)
steps, pause = int(sys.argv[2]), sys.argv[3] == "pause"
for step in range(steps):
    watch.tick(step)
    time.sleep(0.005)
if pause:
    with watch.pause("evaluating"):
        time.sleep(100)
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("steps", "then", "words"),
    [
        (9, "step", "process 3 hangs: a step after step 8 has taken"),
        (9, "pause", "process 3 hangs: evaluating after step 8 has taken"),
        (2, "step", "process 3 hangs: a step after step 1 has taken"),  # too few steps to know how long one takes
    ],
)
def test_what_takes_too_long_ends_the_process_with_the_stacks_of_its_threads(steps, then, words, tmp_path):
    command = [sys.executable, "-c", HANGING, str(tmp_path), str(steps), then]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == cli.HANGS == 70
    assert words in done.stderr and "all its threads:" in done.stderr
    assert 'File "<string>"' in done.stderr and "watchdog.py" in done.stderr


IMPATIENT = HANGING.replace("watch = ", "from launch.support import watchdog; watchdog.PATIENCE = 0.5; watch = ")


def test_a_file_system_that_hangs_keeps_no_process_from_ending(tmp_path):
    # To open a FIFO that nobody reads, or writes, waits for ever.
    os.mkfifo(tmp_path / "process-3.new")  # its own heartbeat
    os.mkfifo(tmp_path / "process-1.json")  # that of another one
    command = [sys.executable, "-c", IMPATIENT, str(tmp_path), "9", "step"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == cli.HANGS
    assert "process 3 hangs: a step after step 8 has taken" in done.stderr


def test_a_terminal_that_hangs_keeps_no_process_from_ending(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x" * 65536):
            pass
    os.set_blocking(writer, True)
    try:
        command = [sys.executable, "-c", IMPATIENT, str(tmp_path), "9", "step"]
        assert subprocess.run(command, cwd=ROOT, stderr=writer, timeout=300).returncode == cli.HANGS
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("between_looks", "hangs"),
    [([1.0] * 60, True), ([1.0, 1.0, 500.0, 1.0, 500.0] * 8, False), ([1.0, 500.0] + [1.0] * 60, True)],
    ids=["hung", "stopped", "stopped, then hung"],
)
def test_time_in_which_the_whole_process_was_stopped_is_not_time_hung(between_looks, hangs, tmp_path, monkeypatch):
    watch = Watchdog(WatchdogFlags(10.0, 2.0, 50.0), 0, tmp_path, period=1000)
    watch.stop()
    now, gaps, ended = [watchdog.time.monotonic()], iter(between_looks), []
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])

    class Clock:
        def wait(self, period: float) -> bool:
            now[0] += (gap := next(gaps, 0.0))
            return not gap or bool(ended)

    watch._done, watch._end = Clock(), ended.append
    watch._watch(period=1.0)
    assert bool(ended) == hangs
    assert all(waited < 60 for waited in ended)


def test_a_timeout_of_0_is_none(tmp_path):
    watch = Watchdog(WatchdogFlags(pause_timeout=0.0), 0, tmp_path, period=1000)
    assert watch.allowed() == math.inf
    watch.stop()


def test_a_pause_that_gets_on_is_not_too_long_and_is_told_for_as_long_as_it_gets_on(tmp_path, monkeypatch):
    watch = Watchdog(WatchdogFlags(10.0, 2.0, 50.0), 3, tmp_path, period=1000)
    watch.stop()
    now = [watchdog.time.monotonic()]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    beats, ended = iter([40.0] * 5 + [49.0, math.inf]), list[float]()  # seconds after which it gets on, at last never
    next_beat = [next(beats)]

    class Clock:
        def wait(self, period: float) -> bool:
            now[0] += 1
            if now[0] - watch._since >= next_beat[0]:
                assert "waiting" not in watch._words()
                watch.beat()
                assert watch._words()["waiting"] == "starting"
                next_beat[0] = next(beats)
            return bool(ended)

    watch._done, watch._end = Clock(), ended.append
    watch._watch(period=1.0)
    assert next_beat == [math.inf] and 50 < ended[0] < 53


def test_what_gets_on_beside_a_step_neither_lengthens_it_nor_tells_others_to_wait(tmp_path, monkeypatch):
    watch = Watchdog(WatchdogFlags(), 0, tmp_path, period=1000)
    watch.stop()
    now = [watchdog.time.monotonic()]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    watch.tick(1)
    for _ in range(3):  # as a checkpoint that is read back in the background
        now[0] += 4
        watch.beat()
        assert "waiting" not in watch._words()
    watch.tick(2)
    assert list(watch._times) == [12.0]


def test_each_of_many_processes_reads_one_heartbeat_and_the_first_passes_on_that_another_one_waits(tmp_path):
    watch = {number: Watchdog(WatchdogFlags(), number, tmp_path / str(number), period=1000) for number in (0, 1)}
    for one in watch.values():
        one.stop()
        one._directory = tmp_path

    def write(process: int, **words: object) -> None:
        written = {"process": process, "step": 1, "time": watchdog.time.time()} | words
        (tmp_path / f"process-{process}.json").write_text(json.dumps(written))

    write(0)
    write(7, waiting="starting")
    assert watch[0]._sees_others_wait() and not watch[1]._sees_others_wait()
    watch[0]._others_wait = True
    write(0, **watch[0]._words())
    assert watch[1]._sees_others_wait()
    write(7, waiting="starting", time=watchdog.time.time() - 9999)
    assert not watch[0]._sees_others_wait()


def test_heartbeats_of_many_processes_are_at_most_128_a_second_and_come_round_in_a_step():
    for processes in (1, 8, 128, 1024):
        assert processes / max(1.0, watchdog.heartbeat_period(processes)) <= 128
        assert watchdog.SILENT + 3 * watchdog.heartbeat_period(processes) < WatchdogFlags().step_timeout_least


def test_a_process_that_gets_on_is_left_alone_and_leaves_no_heartbeat(tmp_path):
    about = {"status": "step 7/9"}
    watch = Watchdog(WatchdogFlags(), 0, tmp_path / "beats", lambda: about, period=0.01)
    watch.tick(7)
    wait_for((tmp_path / "beats" / "process-0.json").exists)
    wait_for(lambda: '"step": 7' in (tmp_path / "beats" / "process-0.json").read_text())
    assert '"status": "step 7/9"' in (tmp_path / "beats" / "process-0.json").read_text()
    watch.stop()
    assert not (tmp_path / "beats").exists()


def test_the_time_allowed_is_that_of_most_steps_times_the_factor_and_never_less_than_the_least(tmp_path, monkeypatch):
    watch = Watchdog(WatchdogFlags(10.0, 2.0, 500.0), 0, tmp_path, period=1000)
    now = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])

    def step(number: int, seconds: float) -> None:
        now[0] += seconds
        watch.tick(number)

    assert watch.allowed() == 500  # nothing is known yet
    for number in range(20):
        step(number, 1.0)
    assert watch.allowed() == 10
    for number in range(20, 60):
        with watch.pause("evaluating"):
            assert watch.allowed() == 500
            now[0] += 300
        step(number, 0.001)  # what is left of a step after a pause does not count
    step(60, 1.0)
    assert watch.allowed() == 10
    for number in range(61, 160):
        step(number, 0.01)
    assert watch.allowed() == 2
    watch.stop()


def test_processes_that_are_silent_or_behind_are_named(tmp_path):
    for process, step, age in ((0, 9, 0), (1, 9, 60), (2, 4, 0)):
        words = f'{{"process": {process}, "step": {step}, "time": {watchdog.time.time() - age}}}'
        (tmp_path / f"process-{process}.json").write_text(words)
    (tmp_path / "process-7.json").write_text("{")
    assert watchdog.behind(tmp_path, 0) == "; process 1 is silent since 60 s; process 2 is at step 4, others at 9"
    assert watchdog.behind(Path("/nowhere"), 0) == ""
