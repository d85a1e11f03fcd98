"""Runs of launch.train as the parts of a study: what is finished is skipped, what was cut short goes on."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from charlstm.report import history


def train(flags: Sequence[str], run_dir: Path) -> None:
    """Trains what is not finished.  Raises subprocess.CalledProcessError where a run is refused or diverges."""
    if not is_finished(run_dir):
        subprocess.run([sys.executable, "-m", "launch.train", *flags, f"--run_dir={run_dir}"], check=True)


def is_finished(run_dir: Path) -> bool:
    return (run_dir / "config.json").exists() and history.read(run_dir).state == "finished"
