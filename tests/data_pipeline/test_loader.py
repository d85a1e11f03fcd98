"""The loader: windows read ahead in threads are the plan's windows, from any step on."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from data_pipeline.batch import Batch
from data_pipeline.loader import WindowSource, open_windows
from data_pipeline.streams import StreamPlan
from tests.conftest import ROOT
from tests.data_pipeline.test_streams import Text, on_disk


class Counted(Text):
    """A split that counts its readings."""

    def __init__(self, ids):
        super().__init__(ids)
        self.readings = 0
        self._lock = threading.Lock()

    def read(self, start, stop):
        with self._lock:
            self.readings += 1
        time.sleep(0.01)  # lets the other thread in
        return super().read(start, stop)


def random_text(length, kind=Text):
    return kind(np.random.default_rng(7).integers(0, 5, length).astype(np.uint8))


def equal(one, other):
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


# 3 epochs of 13 windows in a run of their own; 2 epochs of 41 windows in runs of 16, 16 and 9
PLANS = [StreamPlan(6 * 10 * 13 + 5, 6, 10, seed=1), StreamPlan(2 * 1024 * 41 + 99, 2, 1024, seed=1)]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("threads", "read_ahead"), [(1, 1), (1, 8), (2, 5)])
def test_windows_read_ahead_are_the_windows_of_the_plan_in_order(plan, threads, read_ahead):
    text, rows = random_text(plan.symbols), range(1, plan.batch_size)
    with open_windows(text, plan, rows=rows, separator=(2,), threads=threads, read_ahead=read_ahead) as windows:
        for step in range(2 * plan.steps_per_epoch + 3):
            assert windows.position == step
            batch = next(windows)
            assert isinstance(batch, Batch)
            assert equal(batch, plan.read(text, step, rows, separator=(2,)))


@pytest.mark.parametrize("plan", PLANS)
def test_opened_at_any_step_the_windows_are_those_read_from_the_start_on(plan):
    text, rows = random_text(plan.symbols), range(plan.batch_size)
    last = plan.steps_per_epoch + 2
    with open_windows(text, plan, rows=rows) as windows:
        all_windows = [next(windows) for _ in range(last + 3)]
    for start in range(last):
        with open_windows(text, plan, rows=rows, start_step=np.int32(start)) as windows:
            assert all(equal(next(windows), all_windows[step]) for step in range(start, start + 3))
            assert windows.position == start + 3


@pytest.mark.parametrize("start", [2**31 - 1, 2**32, 10**12, 2**63 - 3])
def test_a_far_step_is_the_step_asked_for(start):
    plan = PLANS[0]
    text, rows = random_text(plan.symbols), range(plan.batch_size)
    with open_windows(text, plan, rows=rows, start_step=start) as windows:
        for step in (start, start + 1):
            assert equal(next(windows), plan.read(text, step, rows))


@pytest.mark.parametrize("start", [-1, 2**63 - 1, 2**64])
def test_a_step_that_cannot_be_counted_to_is_refused_and_not_taken_round_the_circle(start):
    with pytest.raises(ValueError, match=f"step {start} is not between 0 and"):
        open_windows(random_text(PLANS[0].symbols), PLANS[0], rows=range(6), start_step=start)


@pytest.mark.parametrize("threads", [1, 2])
def test_each_stream_is_read_in_runs_of_many_windows_and_each_run_once(threads):
    plan = StreamPlan(2 * 1024 * 41, 2, 1024, rotate=False)
    text = random_text(plan.symbols, Counted)
    with open_windows(text, plan, rows=range(2), threads=threads, read_ahead=4) as windows:
        for _ in range(41 - 4):  # the window handed out and four ahead: the end of the epoch
            next(windows)
    # runs of 16, 16 and 9 windows for each of two streams; the very last symbol's target is at the circle's start
    assert text.readings in (6, 7)


def test_a_thread_that_comes_late_for_the_run_before_the_newest_still_finds_it():
    plan = StreamPlan(2 * 1024 * 41, 2, 1024)
    text = random_text(plan.symbols, Counted)
    source = WindowSource(text, plan, range(2))
    source[15], source[16]
    readings = text.readings
    source[15], source[16]
    assert text.readings == readings


def test_a_batch_shares_no_memory_with_the_next():
    plan = PLANS[0]
    text = random_text(plan.symbols)
    source = WindowSource(text, plan, range(6))
    for step in range(plan.steps_per_epoch):
        for array in source[step]:
            array[...] = 1
    assert all(equal(source[s], plan.read(text, s, range(6))) for s in range(plan.steps_per_epoch))


class Torn(Text):
    """A split whose second half cannot be read."""

    def read(self, start, stop):
        if start >= len(self) // 2:
            raise ValueError("train-00001.bin is torn")
        return super().read(start, stop)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_the_reader_reaches_the_consumer_and_no_window_is_skipped_after_it(threads):
    plan = StreamPlan(4 * 2**14, 1, 2**14, rotate=False)
    with open_windows(Torn(np.zeros(4 * 2**14, np.uint8)), plan, rows=range(1), threads=threads) as windows:
        next(windows)
        next(windows)
        for message in ("train-00001.bin is torn", "closed"):
            with pytest.raises(ValueError, match=message):
                next(windows)
            assert windows.position == 2


def test_a_flipped_bit_in_a_shard_is_an_error_that_names_the_shard_once_its_window_is_due(tmp_path):
    ids = np.random.default_rng(7).integers(0, 256, 2**17)
    split = on_disk(tmp_path, ids, shard_symbols=2**16, block_bytes=2**10)
    shard = tmp_path / "train-00001.ids"
    content = bytearray(shard.read_bytes())
    content[2**15] ^= 8
    shard.write_bytes(content)
    plan = StreamPlan(2**17, 1, 2**14, rotate=False)  # window 6 begins with the flipped bit
    with open_windows(split, plan, rows=range(1)) as windows:
        for _ in range(5):
            next(windows)
        # window 5 ends with the target of its last input: the flipped symbol
        with pytest.raises(ValueError, match=r"train-00001\.ids is damaged"):
            next(windows)
        assert windows.position == 5


PROGRAM = """
import sys
import numpy as np
from data_pipeline.loader import open_windows
from data_pipeline.streams import StreamPlan
assert not {"jax", "grain"} & set(sys.modules), "importing the loader must not import JAX"
from tests.data_pipeline.test_loader import Torn
plan = StreamPlan(2**16, 1, 64, rotate=False)
windows = open_windows(Torn(np.zeros(2**16, np.uint8)), plan, rows=range(1), threads=2)
"""


@pytest.mark.parametrize(
    ("ending", "status", "last_line"),
    [
        ("with windows: next(windows); sys.exit(2)", 2, ""),
        ("next(windows); 1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("for _ in windows: pass", 1, "ValueError: train-00001.bin is torn"),
    ],
)
def test_a_program_that_ends_with_windows_read_ahead_ends_at_once_and_adds_no_noise(
    tmp_path, ending, status, last_line
):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM + ending)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    assert "ignored" not in done.stderr and done.stderr.count("Traceback") == (1 if last_line else 0)
    assert last_line in done.stderr.splitlines() if last_line else done.stderr == ""
