"""What a benchmark says: a line of json for each row as it comes, and tables of all of them at the end."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple, TypeVar

Key = TypeVar("Key")
Given = TypeVar("Given")


class Rows:
    """The rows of one benchmark; where they are `measured`, with the machine's load average beside them."""

    def __init__(self, benchmark: str, measured: bool = True) -> None:
        self._benchmark, self._measured, self._rows = benchmark, measured, list[dict[str, Any]]()

    def add(self, **fields: Any) -> None:
        """Prints a row."""
        load = {"load": round(os.getloadavg()[0], 1)} if self._measured else {}  # of the last minute
        row = {"benchmark": self._benchmark, **fields, **load}
        print(json.dumps(row), flush=True)
        self._rows.append(row)

    def tables(self) -> None:
        """Prints all rows as Markdown, those that have the same fields in one table."""
        kinds = dict.fromkeys(tuple(row) for row in self._rows)
        for kind in kinds:
            print(f"\n| {' | '.join(kind[1:])} |\n|{'---|' * len(kind[1:])}")
            for row in self._rows:
                if tuple(row) == kind:
                    print(f"| {' | '.join(_cell(row[name]) for name in kind[1:])} |")


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " to ".join(_cell(v) for v in value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"  # 1.814 bits
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


class Spread(NamedTuple):
    """A figure that was measured several times."""

    median: float
    quartiles: tuple[float, float]


def spread(values: Sequence[float]) -> Spread:
    """The median of `values` and the two quartiles around it."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return Spread(float(f"{median(values):.4g}"), (float(f"{low:.4g}"), float(f"{high:.4g}")))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times as fast we are, given both sides' seconds in every round: of the ratios within a round."""
    return spread([their / our for our, their in zip(ours, theirs, strict=True)])


def compared(symbols: int, seconds: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """The fields of a contestant that makes `symbols` in `seconds`, of every round, and how it compares with ours."""
    speed, ratio = spread([symbols / s for s in seconds]), ratios(ours, seconds)
    return {
        "characters_per_second": speed.median,
        "quartiles": speed.quartiles,
        "ours_is_faster_by": ratio.median,
        "ratio_quartiles": ratio.quartiles,
    }


def alternate(timed: Mapping[Key, Callable[[], Given]], rounds: int) -> dict[Key, list[Given]]:
    """Calls all of `timed` in turn, A B C A B C, in `rounds` rounds: what they gave, by name."""
    given: dict[Key, list[Given]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, call in timed.items():
            given[name].append(call())
    return given


def main(benchmark: str, run: Callable[..., str | None], **options: Any) -> None:
    """Runs a benchmark from the command line: --quick, and an argument for each of `options`, given their defaults.

    Raises SystemExit, status 1, where `run` returns what has failed: that is the last line, after the tables.
    """
    parser = argparse.ArgumentParser(f"python -m benchmarks.{benchmark}")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: shows that it works")
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    rows = Rows(benchmark)
    failure = run(rows, **vars(parser.parse_args()))
    rows.tables()
    if failure:
        print(failure)
        raise SystemExit(1)
