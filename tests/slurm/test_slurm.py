"""The Slurm recipe, submitted as it is to a real Slurm of two nodes on this machine."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from charlstm.run.step_directory import StepDirectory
from launch import cli
from tests.compiling import xla_flags
from tests.conftest import ROOT
from tests.jobs import last_line

pytestmark = pytest.mark.faults  # minutes, and a Slurm of its own: `make faults`

STEPS = 1000
SCRIPT = Path(__file__).parent / "cluster.sh"
NODES = ("--nodes=2", "--gres=none", "--ntasks-per-node=1", "--cpus-per-task=1")  # what the recipe says of CPUs
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "unshare", "nsenter", "ip")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """A Slurm that is up, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def run(self, *command: str, **environment: str) -> str:
        """What the command prints."""
        done = subprocess.run(
            [SCRIPT, "run", self.directory, *command],
            cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, log: Path, *flags: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """Submits the recipe; the number of the job."""
        own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(), "PYTHON": sys.executable} | environment
        recipe = ROOT / "launch" / "slurm" / "train.sbatch"
        return self.run("sbatch", "--parsable", f"--output={log}", *NODES, *options, str(recipe), *flags, **own).strip()

    def of_job(self, job: str) -> dict[str, str]:
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ending(self, job: str, log: Path) -> dict[str, str]:
        """What Slurm says of a job that has ended."""
        wait_for(lambda: self.of_job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"), log)
        return self.of_job(job)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    missing = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if missing:
        pytest.skip(f"there is no {missing[0]}: apt-get install slurm-wlm munge iproute2")
    if os.geteuid() != 0:
        pytest.skip("only root can start a Slurm")
    if subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no namespaces of one's own")
    directory = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([SCRIPT, "up", directory], check=True, timeout=60)
        yield Cluster(directory)
    finally:
        subprocess.run([SCRIPT, "down", directory], check=True, timeout=60)


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("job")
    (folder / "text.txt").write_text("".join(f"line {n * n} of a text\n" for n in range(330)))
    return (
        "--flagfile=configs/tiny.flags", f"--corpus={folder / 'text.txt'}", f"--cache_dir={folder / 'cache'}",
        "--logical_shards=2", "--evaluate_every=0", "--log_every=100", "--checkpoint_every=100", f"--num_steps={STEPS}",
    )  # fmt: skip


def wait_for(what: Callable[[], object], log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        said = log.read_text() if log.exists() else "nothing"
        assert time.monotonic() < deadline, f"it has not come to that; the job said:\n{said}"
        time.sleep(0.2)


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


def test_deaths_are_requeued_but_not_for_ever(cluster, stand_in, tmp_path):
    log = tmp_path / "log.txt"
    job = cluster.submit(log, PYTHON=stand_in, STATUS=str(cli.LOST), MAX_RESTARTS="1")
    ending, said = cluster.ending(job, log), log.read_text()
    assert (ending["JobState"], ending["ExitCode"], ending["Restarts"]) == ("FAILED", f"{cli.LOST}:0", "1"), said
    assert f"status {cli.LOST}: requeued, as 0 times before" in said
    assert f"status {cli.LOST} after 1 requeues: not requeued again" in said
