"""The Slurm recipe, submitted as it is to a real Slurm of two nodes on this machine."""

import os
import subprocess
import sys

import pytest

from charlstm.run.step_directory import StepDirectory
from launch.support import cli
from tests.compiling import xla_flags
from tests.conftest import ROOT
from tests.jobs import last_line
from tests.slurm.conftest import wait_for

pytestmark = pytest.mark.faults  # minutes, and a Slurm of its own: `make faults`

STEPS = 1000


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("job")
    (folder / "text.txt").write_text("".join(f"line {n * n} of a text\n" for n in range(330)))
    return (
        "--flagfile=configs/tiny.flags", f"--corpus={folder / 'text.txt'}", f"--cache_dir={folder / 'cache'}",
        "--logical_shards=2", "--evaluate_every=0", "--log_every=100", "--checkpoint_every=100", f"--num_steps={STEPS}",
    )  # fmt: skip


def test_a_job_that_is_pre_empted_requeues_itself_and_ends_with_the_bits_of_an_undisturbed_one(
    cluster, flags, tmp_path
):
    run_dir, log = tmp_path / "run", tmp_path / "log.txt"
    job = cluster.submit(log, *flags, f"--run_dir={run_dir}")
    wait_for(StepDirectory(run_dir / "checkpoints").steps, log)
    cluster.run("scancel", "--signal=TERM", job)  # to the steps alone, as pre-emption does
    wait_for(lambda: int(cluster.of_job(job)["Restarts"]) == 1, log)

    undisturbed = tmp_path / "undisturbed"
    environment = os.environ | {"XLA_FLAGS": xla_flags(2)}
    command = [sys.executable, "-m", "launch.train", *flags, f"--run_dir={undisturbed}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)

    ending, said = cluster.ending(job, log), log.read_text()
    assert (ending["JobState"], ending["Restarts"], ending["ExitCode"]) == ("COMPLETED", "1", "0:0"), said
    assert said.count("training on 2 x cpu in 2 processes") == 2
    assert f"status {cli.STOPPED}: requeued, as 0 times before" in said
    assert last_line(run_dir)["state_digest"] == last_line(undisturbed)["state_digest"]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> str:
    """In the place of Python: the first task ends with $STATUS, and the other a little later."""
    path = tmp_path_factory.mktemp("stand_in") / "python"
    path.write_text("#!/bin/sh\nsleep 0.$((SLURM_PROCID * 3))\nexit $STATUS\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("status", [cli.DONE, cli.MISTAKE, cli.DIVERGED, cli.NOT_SAVED])
def test_what_would_end_so_again_is_not_requeued(status, cluster, stand_in, tmp_path):
    log = tmp_path / "log.txt"
    ending = cluster.ending(cluster.submit(log, PYTHON=stand_in, STATUS=str(status)), log)
    assert (ending["JobState"], ending["ExitCode"]) == ("FAILED" if status else "COMPLETED", f"{status}:0")
    assert ending["Restarts"] == "0"


@pytest.mark.parametrize("status", [cli.LOST, cli.IN_USE])
def test_deaths_and_the_lock_of_a_dead_node_are_requeued_but_not_for_ever(status, cluster, stand_in, tmp_path):
    log = tmp_path / "log.txt"
    job = cluster.submit(log, PYTHON=stand_in, STATUS=str(status), MAX_RESTARTS="1")
    ending, said = cluster.ending(job, log), log.read_text()
    assert (ending["JobState"], ending["ExitCode"], ending["Restarts"]) == ("FAILED", f"{status}:0", "1"), said
    assert f"status {status}: requeued, as 0 times before" in said
    assert f"status {status} after 1 requeues: not requeued again" in said
