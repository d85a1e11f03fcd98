"""A real Slurm of two nodes on this machine."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.compiling import xla_flags
from tests.conftest import ROOT

SCRIPT = Path(__file__).parent / "cluster.sh"
NODES = ("--nodes=2", "--gres=none", "--ntasks-per-node=1", "--cpus-per-task=1")  # what the recipe says of CPUs
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "unshare", "nsenter", "ip")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def wait_for(what: Callable[[], object], log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        said = log.read_text() if log.exists() else "nothing"
        assert time.monotonic() < deadline, f"it has not come to that; the job said:\n{said}"
        time.sleep(0.2)


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
