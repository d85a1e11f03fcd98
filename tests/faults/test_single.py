"""kill -9 of a run of one process, again and again, at moments that nobody chose."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from launch.support import cli
from tests.compiling import xla_flags
from tests.faults.conftest import Seen
from tests.faults.test_processes import lost
from tests.jobs import ROOT, last_line

TIMES = 12
LIFE = 40  # lines of ten steps each, at most


@pytest.fixture
def command(job_flags):
    # More steps than 12 lives make, and a save every 50, of which the first takes a second or two.
    cadence = ("--num_steps=5000", "--log_every=10", "--checkpoint_every=50", "--keep_checkpoints=2")
    return [sys.executable, "-m", "launch.train", *job_flags, *cadence]


def test_killed_at_random_moments_it_comes_up_by_itself_and_ends_with_the_same_bits(command, table, tmp_path):
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    straight, killed, random = tmp_path / "straight", tmp_path / "killed", np.random.default_rng(0)
    how = {"cwd": ROOT, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run([*command, f"--run_dir={straight}"], timeout=600, check=False, **how)
    assert done.returncode == cli.DONE, done.stderr
    while_saving = 0
    for _ in range(TIMES):
        with subprocess.Popen([*command, f"--run_dir={killed}"], **how) as running:
            # Most lives are counted in steps, on a fast machine and a slow one; some end while the program starts.
            steps = iter(lambda: re.search(r"^step \d+/", running.stderr.readline()) is not None, None)
            for _ in range(random.integers(1, LIFE) * (random.random() > 0.1)):
                while not next(steps):
                    pass
            time.sleep(random.uniform(0.0, 0.1))
            assert running.poll() is None
            running.send_signal(signal.SIGKILL)
        while_saving += bool(list((killed / "checkpoints").glob("*.saving*")))
    done = subprocess.run([*command, f"--run_dir={killed}"], timeout=600, check=False, **how)
    assert done.returncode == cli.DONE, done.stderr
    again = lost(killed)
    equal = last_line(killed)["state_digest"] == last_line(straight)["state_digest"]
    fault = f"kill -9 of a run of one process ({while_saving} times in a save)"
    table.append(Seen(fault, TIMES, f"median {np.median(again):.0f}, at most {max(again)}", str(equal)))
    assert equal
    assert while_saving, "no kill fell into a save"
