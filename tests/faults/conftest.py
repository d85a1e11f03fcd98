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


_seen: list[Seen] = []  # by all tests, whichever process ran them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker("faults")


@pytest.fixture
def table(record_property) -> Iterator[list[Seen]]:
    """Lines that the test adds to the table."""
    lines: list[Seen] = []
    yield lines
    record_property("seen", [[str(cell) for cell in line] for line in lines])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        _seen.extend(Seen(*line) for name, lines in report.user_properties if name == "seen" for line in lines)


@pytest.fixture(scope="session")
def half_done(job_flags, tmp_path_factory) -> Path:
    """A run of 160 of 240 steps, with checkpoints of 80 and 160.  To be copied, not changed."""
    run_dir = tmp_path_factory.mktemp("half_done") / "run"
    environment = os.environ | {"XLA_FLAGS": xla_flags(8)}
    command = [sys.executable, "-m", "launch.train", *job_flags, "--num_steps=160", f"--run_dir={run_dir}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)
    return run_dir


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _seen:
        return
    rows = [Seen("fault", "times", "lost updates", "final bits equal"), *_seen]
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(Seen._fields))]
    terminalreporter.section("faults")
    for row in rows:
        terminalreporter.line(
            "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
