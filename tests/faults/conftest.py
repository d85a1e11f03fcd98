"""The suite of faults, `make faults`: real processes killed and stopped; prints a table of what was seen."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.compiling import xla_flags
from tests.jobs import ROOT


class Seen(NamedTuple):
    """A line of the table."""

    fault: str
    times: int | str
    lost_updates: str  # made before the fault and made again after it
    equal: str  # whether the final bits are those of the undisturbed run


class SeenOfStore(NamedTuple):
    """A line of the table on corpora in an object store."""

    fault: str
    times: int | str  # answers that were spoiled, or servers killed
    end: str  # whether the final bits are those of the run from the disk, or how the run ended


HEADS = {
    "faults": Seen("fault", "times", "lost updates", "final bits equal"),
    "remote data": SeenOfStore("fault", "times", "final bits equal to those from the disk"),
}
_seen: dict[str, list[list[str]]] = {name: [] for name in HEADS}  # by all tests, whichever process ran them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker("faults")


@pytest.fixture
def table(record_property) -> Iterator[list[Seen]]:
    """Lines that the test adds to the table."""
    lines: list[Seen] = []
    yield lines
    record_property("faults", [[str(cell) for cell in line] for line in lines])


@pytest.fixture
def store_table(record_property) -> Iterator[list[SeenOfStore]]:
    """Lines that the test adds to the table on object stores."""
    lines: list[SeenOfStore] = []
    yield lines
    record_property("remote data", [[str(cell) for cell in line] for line in lines])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        for name, lines in report.user_properties:
            _seen.get(name, []).extend(lines)


@pytest.fixture(scope="session")
def half_done(job_flags, tmp_path_factory) -> Path:
    """A run of 160 of 240 steps, with checkpoints of 80 and 160.  To be copied, not changed."""
    run_dir = tmp_path_factory.mktemp("half_done") / "run"
    environment = os.environ | {"XLA_FLAGS": xla_flags(8)}
    command = [sys.executable, "-m", "launch.train", *job_flags, "--num_steps=160", f"--run_dir={run_dir}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)
    return run_dir


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, lines in _seen.items():
        if lines:
            rows = [[str(cell) for cell in HEADS[name]], *lines]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            terminalreporter.section(name)
            for row in rows:
                cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                terminalreporter.line("  ".join(cells).rstrip())
