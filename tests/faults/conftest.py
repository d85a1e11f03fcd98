"""The suite of faults, `make faults`: real processes killed and stopped; prints a table of what was seen."""

from typing import NamedTuple

import pytest


class Seen(NamedTuple):
    """A line of the table."""

    fault: str
    times: int
    lost_updates: str  # made before the fault and made again after it
    equal: str  # whether the final bits are those of the undisturbed run


_table: list[Seen] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker("faults")


@pytest.fixture
def table() -> list[Seen]:
    return _table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _table:
        return
    rows = [Seen("fault", "times", "lost updates", "final bits equal"), *_table]  # type: ignore[arg-type]
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(Seen._fields))]
    terminalreporter.section("faults")
    for row in rows:
        terminalreporter.line(
            "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
