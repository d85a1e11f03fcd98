"""Runs of launch.train as the parts of a study: what was cut short goes on."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from charlstm.report import history


def train(flags: Sequence[str], run_dir: Path) -> None:
    """Trains a run to its end; of one that is finished already, launch.train sees that it has these flags and text.

    Raises SystemExit, with the status of launch.train, which has said why, where it refuses the run, or that diverges.
    """
    try:
        subprocess.run([sys.executable, "-m", "launch.train", *flags, f"--run_dir={run_dir}"], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.returncode) from None


def is_finished(run_dir: Path) -> bool:
    return (run_dir / "config.json").exists() and history.read(run_dir).state == "finished"
