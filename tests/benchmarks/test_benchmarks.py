"""The quick form of every benchmark gives its rows."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def quick(benchmark: str) -> list[dict]:
    """The rows of `python -m benchmarks.BENCHMARK --quick`, which ends with a table of them."""
    # Not with the suite's strict promotion, which is for our own modules.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_NUMPY_")}
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--quick"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert all(row["benchmark"] == benchmark for row in rows)
    assert sum(line.startswith("| ") for line in lines) > len(rows)
    return rows


@pytest.fixture
def peers() -> None:
    for library in ("torch", "flax", "haiku", "optax"):
        pytest.importorskip(library, reason="the peers are not installed: make bench has its own environment")


def test_a_train_step_is_timed_beside_its_peers(peers):
    rows = quick("train_step")
    assert [row["contestant"] for row in rows] == ["ours", "PyTorch", "flax", "haiku", "textbook twin"]
    for row in rows:
        assert row["characters_per_second"] > 0 and row["megabytes"] > 1
        assert 0 < row["of_matrix_rate"] < 2
        low, high = row["ratio_quartiles"]
        assert 0 < low <= row["ours_is_faster_by"] <= high
    assert rows[0]["ours_is_faster_by"] == 1
