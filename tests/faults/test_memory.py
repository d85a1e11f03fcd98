"""Memory that runs out on two devices: refused from the compiled sizes; where it runs out all the same, ended soon."""

import os
import re
import subprocess
import sys
import time

import pytest

from launch.support import cli
from tests.compiling import xla_flags
from tests.faults.conftest import Seen
from tests.jobs import ROOT

TIMES = 5
SOON = 20.0  # seconds from the first step on; XLA aborts after 60
# Leaves memory for the temporary arrays of one of two devices, when the update has been compiled.
TOO_LITTLE = """
import resource
from charlstm.run import memory
from launch import train
from launch.support import cli

def leave_too_little(update, mesh):
    most = memory._of_file("/proc/self/status", "VmSize:") + 3 * update.held + 3 * update.temporary // 2
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return ""

memory.too_much, memory.close = lambda *_: "", leave_too_little
cli.run("launch.train", train.main)
"""


@pytest.fixture
def flags(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text of many words, 12345 lines of it\n" * 3000)
    return (
        f"--corpus={text}", f"--cache_dir={tmp_path / 'cache'}", "--batch_size=64", "--evaluate_every=0",
        "--checkpoint_every=0", "--num_steps=50", "--log_every=1",
    )  # fmt: skip


HOW = {
    "cwd": ROOT,
    "env": os.environ | {"XLA_FLAGS": xla_flags(2), "PYTHONPATH": str(ROOT)},
    "stdout": subprocess.DEVNULL,
    "stderr": subprocess.PIPE,
    "text": True,
}


def test_what_does_not_fit_under_ulimit_is_refused_before_the_run_is_made(flags, tmp_path, table):
    large = ("--num_layers=4", "--hidden_size=1024", "--window=1000", f"--run_dir={tmp_path / 'run'}")
    command = ["bash", "-c", 'ulimit -v 9000000; exec "$0" -m launch.train "$@"', sys.executable, *flags, *large]
    for _ in range(TIMES):
        done = subprocess.run(command, timeout=600, check=False, **HOW)
        # That the text is being prepared is said before, the first time.
        refusal = re.search(
            r"^launch\.train: an update takes .* left of address space \(ulimit -v\): lower one of.*\n\Z",
            done.stderr,
            re.M,
        )
        assert done.returncode == cli.MISTAKE and refusal, done.stderr
        assert not (tmp_path / "run").exists()
    table.append(Seen("an update of two devices that does not fit (ulimit -v)", TIMES, "-", "refused, nothing made"))


def test_a_device_that_has_no_memory_for_a_step_ends_the_run_soon(flags, tmp_path, table):
    middling, took = ("--num_layers=1", "--hidden_size=512", "--window=500"), []
    for number in range(TIMES):
        command = [sys.executable, "-c", TOO_LITTLE, *flags, *middling, f"--run_dir={tmp_path / str(number)}"]
        with subprocess.Popen(command, **HOW) as running:
            said, began = [], time.monotonic()
            for line in running.stderr:
                if "training on 2 x cpu" in line:
                    began = time.monotonic()
                said.append(line)
            took.append(time.monotonic() - began)
        assert running.returncode == cli.MISTAKE, said
        assert said[-1].startswith("launch.train: out of memory (") and "Traceback" not in "".join(said), said
    assert max(took) < SOON
    seen = f"ended after {max(took):.1f} s at most"
    table.append(Seen("no memory for a step on one of two devices", TIMES, "-", seen))
