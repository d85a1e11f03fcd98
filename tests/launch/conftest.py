"""A run of 40 steps that tests start, copy and spoil."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from charlstm.run import step_directory
from launch import train
from launch.support import cli
from tests.compiling import xla_flags
from tests.conftest import ROOT

TINY = f"--flagfile={ROOT / 'configs' / 'tiny.flags'}"
# With one mask and nothing else that takes long to trace; all of them together are in test_resume.py.
SMALL = (
    "--num_layers=1", "--hidden_size=8", "--embedding_size=4", "--num_steps=40", "--evaluate_every=0",
    *(f"--{name}=0" for name in ("input_dropout", "layer_dropout", "embedding_dropout", "weight_drop", "l2")),
    "--activation_penalty=0", "--activation_change_penalty=0",
)  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A text of 27 steps an epoch, and what is made of it; the files of tests put runs there, by names of their own."""
    path = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(0)
    (path / "text.txt").write_text("".join(random.choice(list("abcdefgh \n"), 7700)))
    (path / "other.txt").write_text("".join(random.choice(list("abcdefgh \n"), 7700)))
    return path


@pytest.fixture(scope="session")
def arguments(folder) -> tuple[str, ...]:
    return (TINY, *SMALL, f"--corpus={folder / 'text.txt'}", f"--cache_dir={folder / 'cache'}")


@pytest.fixture(scope="session")
def trained(folder, arguments) -> Path:
    """A run that nothing disturbed: 40 steps, checkpoints of 20, 30 and 40.  To be copied, not changed."""
    run_dir = folder / "trained"
    assert train.main(["train", *arguments, f"--run_dir={run_dir}"]) == cli.DONE
    return run_dir


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "copied")


def refusal(main, *flags: str) -> str:
    """The one sentence with which `main` refuses."""
    with pytest.raises(ValueError) as caught:
        main(["program", *flags])
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) > 15, sentence
    return sentence


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def process(*command: str, **options) -> subprocess.CompletedProcess:
    """A program in a process of its own, on one device."""
    environment = os.environ | {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False, **options
    )


def steps(run_dir: Path) -> list[int]:
    return step_directory.StepDirectory(run_dir / "checkpoints").steps()


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
