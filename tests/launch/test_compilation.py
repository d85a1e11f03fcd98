"""What was compiled once is there at the next start, and what a full disk or a kill left of it does no harm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.jobs import last_line


def started(run_dir: Path, home: Path, arguments: tuple[str, ...]) -> tuple[dict[str, int], str]:
    """A run of four steps of somebody who lives in `home`: the sizes of the compiled programs, and what was said."""
    own = {name: value for name, value in os.environ.items() if "_CACHE_" not in name}  # not what the tests share
    environment = own | {"XLA_FLAGS": "", "HOME": str(home)}
    command = [sys.executable, "-m", "launch.train", *arguments, "--num_steps=4", f"--run_dir={run_dir}"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    files = (home / ".cache" / "charlstm" / "compiled").glob("*/*-cache")
    return {path.name: path.stat().st_size for path in files}, ended.stderr


@pytest.mark.long
def test_a_second_start_compiles_nothing_and_torn_programs_are_compiled_again_in_silence(arguments, tmp_path):
    first, _ = started(tmp_path / "first", tmp_path, arguments)
    assert any(name.startswith("jit_local_step-") for name in first)
    assert started(tmp_path / "second", tmp_path, arguments)[0] == first
    for path in (tmp_path / ".cache" / "charlstm" / "compiled").glob("*/jit_*-cache"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if len(content) % 2 else content[:-40] + bytes(40))
    _, said = started(tmp_path / "third", tmp_path, arguments)
    assert "persistent" not in said and "Warning" not in said, said
    digests = {last_line(tmp_path / name)["state_digest"] for name in ("first", "second", "third")}
    assert len(digests) == 1


def test_a_home_that_cannot_be_written_stops_nothing(arguments, tmp_path):
    (tmp_path / ".cache").write_text("a file, not a directory")
    assert started(tmp_path / "run", tmp_path, arguments)[0] == {}
    assert last_line(tmp_path / "run")["step"] == 4
