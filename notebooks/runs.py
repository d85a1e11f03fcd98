"""Runs the project's programs for the notebooks, and reads what they measured.

CHARLSTM_SHORT=1     in the environment makes every run tiny: the notebooks are tried then, and say nothing
CHARLSTM_RUNS=DIR    where the runs live; runs/notebooks by default
"""

import atexit
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from charlstm.config.model import ModelConfig
from charlstm.model import language_model

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path(os.environ.get("CHARLSTM_RUNS") or ROOT / "runs" / "notebooks")
SHORT = os.environ.get("CHARLSTM_SHORT") == "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the models are small
os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that are started from a notebook's folder


def short(full, tiny):
    """`full`, or `tiny` where every run is to be tiny."""
    return tiny if SHORT else full


def flags(**settings) -> list[str]:
    """Settings as the programs' flags."""
    return [f"--{'' if value else 'no'}{name}" if isinstance(value, bool) else f"--{name}={value}"
            for name, value in settings.items()]  # fmt: skip


def program(name: str, *arguments: str) -> str:
    """What `python -m NAME ARGUMENTS` prints on stdout, run within this process, which has started JAX already."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        status = importlib.import_module(name).main([name, *arguments])
    assert status == 0, f"{name} ended with status {status}"
    return printed.getvalue()


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory."""

    directory: Path

    @property
    def config(self) -> dict:
        return json.loads((self.directory / "config.json").read_text("utf-8"))

    def records(self, split: str) -> list[dict]:
        """The lines of metrics.jsonl of a split."""
        lines = (self.directory / "metrics.jsonl").read_text("utf-8").splitlines()
        return [record for record in map(json.loads, lines) if record["split"] == split]

    def curve(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(symbols read, bits per symbol) at each record of a split."""
        streams, records = self.config["streams"], self.records(split)
        steps = np.array([record["step"] for record in records])
        bits = np.array([record["bits_per_symbol"] for record in records])
        return steps * streams["batch_size"] * streams["window"], bits

    @property
    def final(self) -> float:
        """Bits per symbol on the validation split at the end."""
        return self.records("valid")[-1]["bits_per_symbol"]

    @property
    def pace(self) -> float:
        """Symbols a second between two records, of the fastest: when other programs left the processor alone."""
        return max(record["symbols_per_second"] for record in self.records("train"))


def stored(directory: Path) -> str:
    """URL of a copy of a corpus in an S3 server that lives as long as this process; its path where there is none."""
    from tests.data_pipeline import servers

    if servers.weed() is None or importlib.util.find_spec("obstore") is None:
        return str(directory)
    from data_pipeline.build.upload import upload

    held = contextlib.ExitStack()
    atexit.register(held.close)
    folder = Path(held.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
    os.environ |= servers.s3_environment(held.enter_context(servers.seaweedfs(folder)))
    upload(directory, "s3://bucket/corpus")
    return "s3://bucket/corpus"


def parameters(config: ModelConfig, vocabulary_size: int) -> int:
    """How many a model has; nothing is computed."""
    shapes = jax.eval_shape(lambda: language_model.init(config, vocabulary_size, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def started(module: str, devices: int = 1, **settings) -> subprocess.Popen:
    """A program in a process of its own, on so many simulated devices."""
    xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", module, *flags(**settings)]
    return subprocess.Popen(
        command, env=os.environ | {"XLA_FLAGS": xla_flags}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def ended(process: subprocess.Popen) -> None:
    """Waits for the end of a process.  Raises RuntimeError with its last words where it failed."""
    words = process.communicate()[1].decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"ended with status {process.returncode}: {words[-1000:]}")


def train(name: str, **settings) -> Run:
    """`launch.train` in RUNS/name; where that run stands already it goes on, or is found finished."""
    run = Run(RUNS / name)
    ended(started("launch.train", run_dir=run.directory, **settings))
    return run
