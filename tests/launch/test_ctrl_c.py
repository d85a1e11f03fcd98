"""One Ctrl-C at any moment, from the first second on: never swallowed, one line, no traceback."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.support import cli
from tests.compiling import xla_flags
from tests.conftest import ROOT
from tests.jobs import wait_for
from tests.launch.conftest import steps

NOTHING_SAVED = "launch.train: interrupted\n"
STOPPED = r"stopped by a signal at step (\d+), saved; the same command goes on\n$"


def holds_back(process: int, number: int) -> bool:
    """Whether the program has come to its first line, where it takes signals into its own hands."""
    blocked = re.search(r"^SigBlk:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(blocked and int(blocked[1], 16) >> number - 1 & 1)


def interrupted(arguments: tuple[str, ...], run_dir: Path, moment: float | None) -> None:
    """A run of many steps, interrupted `moment` seconds after its first line; None: when it has saved."""
    endless = (*arguments, "--num_steps=1000000", "--checkpoint_every=10", f"--run_dir={run_dir}")
    command = [sys.executable, "-m", "launch.train", *endless]
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            if moment is None:
                wait_for(lambda: running.poll() is not None or (run_dir.exists() and steps(run_dir)))
            else:
                wait_for(lambda: holds_back(running.pid, signal.SIGINT))
                time.sleep(moment)
            running.send_signal(signal.SIGINT)
            _, said = running.communicate(timeout=300)  # which a signal that is swallowed outlasts
        finally:
            running.kill()
    assert "Traceback" not in said, said
    if running.returncode == cli.INTERRUPTED:
        assert said.endswith(NOTHING_SAVED) and said.count("interrupted") == 1, said
        return
    assert running.returncode == cli.STOPPED, (running.returncode, said)
    stopped = re.search(STOPPED, said)
    assert stopped and said.count("told to stop: saves and ends after ") == 1, said
    assert steps(run_dir)[-1] == int(stopped[1])


@pytest.mark.parametrize("moment", [0.0, 1.0])
def test_a_run_that_is_interrupted_at_any_moment_ends_in_one_line(moment, arguments, tmp_path):
    interrupted(arguments, tmp_path / "run", moment)


@pytest.mark.long
@pytest.mark.parametrize("moment", [*(0.3 * n for n in range(16)), None], ids=str)
def test_a_run_that_is_interrupted_at_each_of_16_moments_ends_in_one_line(moment, arguments, tmp_path):
    interrupted(arguments, tmp_path / "run", moment)
