"""What Linux alone has is not needed: macOS has no posix_fadvise, no affinity, no waitid before Python 3.13."""

import os
import subprocess
import sys

from launch.support import cli
from tests.jobs import ROOT

LACKING = ("posix_fadvise", "posix_fallocate", "waitid", "sched_getaffinity", "sched_setaffinity", "pidfd_open")
# Imported by every Python of the job at its start.
TAKEN_AWAY = f"""
import os
for name in {LACKING}:
    if hasattr(os, name):
        delattr(os, name)
"""


def test_a_job_trains_without_what_only_linux_has(job_flags, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(TAKEN_AWAY)
    own = ("--processes=1", "--devices_per_process=2")
    flags = (*job_flags, "--num_steps=6", f"--run_dir={tmp_path / 'run'}")
    command = [sys.executable, "-m", "launch.local", *own, "--", *flags]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == cli.DONE, done.stderr
    assert "finished: 6 steps" in done.stderr
