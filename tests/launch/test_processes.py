"""Several processes as one job: the bits of one process, and every decision made alike."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from charlstm import file_manifest
from launch import program
from tests.conftest import ROOT

CHILD = """
import os, signal, sys
import jax
address, number = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, 2, number)
from charlstm.metrics import Meter
from launch import program, train
add = Meter.add
def add_and_disturb(self, step, metrics):
    add(self, step, metrics)
    if {disturbance}:
        os.kill(os.getpid(), signal.SIGTERM)
Meter.add = add_and_disturb
program.run("launch.train", lambda argv: train.main(argv[:1] + argv[3:]))
"""


def flags(run_dir: Path, cache: Path) -> list[str]:
    # With documents and drawn resets: what is a formula of the global row must be so in every process.  400 steps, as
    # a process may hear only after a second that the other one was told to stop.
    return [f"--run_dir={run_dir}", "--flagfile=configs/tiny.flags", "--corpus=WORKSPACE.md", f"--cache_dir={cache}",
            "--reset_state=document", r"--document_separator=\n", "--num_steps=400", "--log_every=80",
            "--evaluate_every=200", "--checkpoint_every=200"]  # fmt: skip


def environment(devices: int) -> dict[str, str]:
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PYTHONPATH": str(ROOT)}


def two_processes(arguments: list[str], disturbance: str = "False") -> list[tuple[int, str]]:
    """Status and stderr of each of two processes of one device, which are one job."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", CHILD.format(disturbance=disturbance), address]
    started = [
        subprocess.Popen(
            [*command, str(number), *arguments], cwd=ROOT, env=environment(1), stderr=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    try:
        return [(p.returncode, err) for p in started for _, err in [p.communicate(timeout=300)]]
    finally:
        for process in started:
            process.kill()


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def of_one_process(cache, tmp_path_factory) -> Path:
    """A run of one process with two devices."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    command = [sys.executable, "-m", "launch.train", *flags(run_dir, cache)]
    subprocess.run(command, cwd=ROOT, env=environment(2), check=True, capture_output=True, timeout=300)
    return run_dir


def test_two_processes_read_and_compute_what_one_process_does_to_the_bit(of_one_process, cache, tmp_path):
    (status, first), (other_status, other) = two_processes(flags(tmp_path / "run", cache))
    assert (status, other_status) == (program.DONE, program.DONE), first + other
    assert "training on 2 x cpu in 2 processes" in first
    assert metrics(tmp_path / "run")[-1]["state_digest"] == metrics(of_one_process)[-1]["state_digest"]
    figures = [[line["bits_per_character"] for line in metrics(run)] for run in (tmp_path / "run", of_one_process)]
    assert figures[0] == figures[1]
    assert other == "", "the first process alone writes on the terminal"


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_the_run_goes_on_in_one_process(
    of_one_process, cache, tmp_path
):
    run_dir = tmp_path / "run"
    stopped = two_processes(flags(run_dir, cache), disturbance="number == 1 and step == 17")
    assert [status for status, _ in stopped] == [program.STOPPED] * 2, stopped
    # The other process hears of it within a second or so; then both save the same step.
    said = re.search(r"stopped by a signal at step (\d+), saved; the same command goes on\n$", stopped[0][1])
    assert said and 17 < int(said[1]) < 400, stopped
    assert file_manifest.StepDirectory(run_dir / "checkpoints").steps()[-1] == int(said[1])
    command = [sys.executable, "-m", "launch.train", *flags(run_dir, cache)]
    subprocess.run(command, cwd=ROOT, env=environment(2), check=True, capture_output=True, timeout=300)
    assert metrics(run_dir)[-1]["state_digest"] == metrics(of_one_process)[-1]["state_digest"]
