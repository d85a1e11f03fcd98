"""Compares runs: a table, the settings that differ, and curves, in the terminal, as a picture or as a page.

    python -m launch.compare runs/*
    python -m launch.compare runs/a runs/b --plot=curves.svg --by=time
    python -m launch.compare runs/* --page=compare.html --follow=30

The runs may go on meanwhile.  What is named and there, but no run, is left out.  Scores are bits per byte if all runs
have them, else bits per character, else per symbol; of runs of characters alone, per character.
The page is one file, which needs neither a server nor the network.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.compare")

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from charlstm.inspect import patterns
from charlstm.report import curves, history, page
from charlstm.report.history import History
from data_pipeline import signals
from data_pipeline.atomic_files import atomic_write, expand_user
from data_pipeline.settings import check_choices, setting
from launch.support import cli, flags

WHERE_WIDE = (
    "symbols",
    "last",
    "parameters",
    "time",
)  # columns that a narrow terminal does without, the first ones first
LONGEST_VALUE = 24  # characters of a setting in the table


@dataclasses.dataclass(frozen=True)
class CompareFlags:
    """The contents and place of the comparison; the runs are named without a flag."""

    by: str = setting("steps", "What the curves are drawn by.", choices=tuple(history.BY))
    plot: str = setting("", "Draw the curves into this file, .svg or .png, instead of the terminal.")
    page: str = setting("", "Write this .html file: table, curves, settings and samples side by side.")
    follow: float = setting(0.0, "Seconds after which --plot and --page are made again, and so on; 0: once.")
    format: str = setting("text", "What is printed: tables and curves, or one json object.", choices=("text", "json"))

    def __post_init__(self) -> None:
        check_choices(self)
        if self.plot and Path(self.plot).suffix not in (".svg", ".png"):
            raise ValueError(f"plot={self.plot} is neither .svg nor .png")
        if not self.follow >= 0:
            raise ValueError(f"follow={self.follow} must be 0 or more")
        if self.follow and not (self.page or self.plot):
            raise ValueError(f"follow={self.follow:g} makes a file again and again: give --page or --plot as well")


def main(argv: Sequence[str]) -> int:
    (chosen,), named = flags.parse_around(argv, __doc__ or "", CompareFlags())
    jax.config.update("jax_platforms", "cpu")  # parameters are only counted here
    for flag in ("page", "plot"):
        if place := getattr(chosen, flag):
            cli.output_file(flag, place)
    folders = [expand_user(name) for name in named]
    if missing := next((name for name, folder in zip(named, folders, strict=True) if not folder.exists()), None):
        raise ValueError(f"{missing} does not exist: name runs that are there")
    # One that is named twice, such as by a link, is there once.
    run_dirs = list({folder.resolve(): folder for folder in folders if (folder / "config.json").is_file()}.values())
    if not run_dirs:
        raise ValueError(f"there is no run in {', '.join(named)}" if named else "name the runs, such as runs/*")
    told, left_out = False, set[Path]()
    while True:
        runs = _readable(run_dirs, left_out)
        value = history.common_figure(runs)
        lacking = _write_files(chosen, runs, value)
        for path in () if told else filter(None, (chosen.page, chosen.plot)):
            again = f", written again every {chosen.follow:g} s until Ctrl-C" if chosen.follow else ""
            signals.say(f"{path}: {math.ceil(expand_user(path).stat().st_size / 1024):,} KB{again}")
        if lacking and not told:
            signals.say(f"{chosen.plot} has boxes for {lacking}, which its font lacks: --plot=NAME.svg has them")
        told = True
        if not chosen.follow:
            break
        time.sleep(chosen.follow)
    if chosen.format == "json":
        print(json.dumps(_fields(runs, value)))
    elif not (chosen.page or chosen.plot):
        print("\n\n".join([*tables(runs, value), _curves(runs, value, chosen.by)]))
    return cli.DONE


def _readable(run_dirs: Sequence[Path], left_out: set[Path]) -> list[History]:
    """Reads the runs that can be read; says why another one is `left_out`, once.  Raises as `history.read` if none can.

    A run that goes away or is damaged does not end the comparison of the others.
    """
    runs, errors = [], dict[Path, ValueError | OSError]()
    for run_dir, name in zip(run_dirs, history.names(run_dirs), strict=True):
        try:
            runs.append(history.read(run_dir, name))
        except (ValueError, OSError) as error:
            errors[run_dir] = error
    if not runs:
        raise next(iter(errors.values()))
    for run_dir, fault in errors.items():
        if run_dir not in left_out:
            signals.say(f"left out: {fault}")
    left_out.update(errors)
    return runs


def _write_files(chosen: CompareFlags, runs: Sequence[History], value: str) -> str:
    """Writes what was asked for; returns the characters that a picture lacks."""
    lacking = ""
    if chosen.page:
        cli.write_output(chosen.page, page.render(runs, value, chosen.by, chosen.follow))
    if chosen.plot.endswith(".png"):
        picture, lacking = curves.png(runs, value, chosen.by)
        with atomic_write(expand_user(chosen.plot)) as file:
            file.write(picture)
    elif chosen.plot:
        cli.write_output(chosen.plot, curves.svg(runs, value, chosen.by))
    return lacking


def tables(runs: Sequence[History], value: str) -> list[str]:
    """The table of runs, and that of the settings that differ, if any do."""
    columns = shutil.get_terminal_size(fallback=(10_000, 24)).columns  # a pipe takes any width
    cells = [page.cells(run, value) for run in runs]
    for left_out in range(len(WHERE_WIDE) + 1):  # as few as the terminal's width asks for
        names = [name for name in cells[0] if name not in WHERE_WIDE[:left_out]]
        table = _aligned([names, *([row[name] for name in names] for row in cells)])
        if len(table.partition("\n")[0]) <= columns:
            break
    found = [f"{value.replace('_', ' ')}\n{table}"]
    if differing := history.differing_settings(runs):
        settings = [["setting", *(run.name for run in runs)]]
        settings += [[name, *(_end_of(str(value)) for value in values)] for name, values in differing.items()]
        found += _blocks(settings, columns)
    return found


def _end_of(value: str) -> str:
    """Returns a value, of a long one its end, which tells paths apart."""
    return value if len(value) <= LONGEST_VALUE else f"…{value[1 - LONGEST_VALUE :]}"


def _blocks(rows: list[list[str]], columns: int) -> list[str]:
    """Returns a table as several below each other, each as wide as the terminal has columns at most, or of one run."""
    head, *runs = zip(*rows, strict=True)
    blocks, taken = [[head]], 0
    for run in runs:
        width = 2 + max(map(patterns.columns, run))
        if len(blocks[-1]) > 1 and max(map(patterns.columns, head)) + taken + width > columns:
            blocks.append([head])
            taken = 0
        blocks[-1].append(run)
        taken += width
    return [_aligned([list(row) for row in zip(*block, strict=True)]) for block in blocks]


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(patterns.columns, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        spaces = [" " * (width - patterns.columns(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [space + cell for cell, space in zip(row[1:], spaces[1:], strict=True)]
        lines.append("  ".join([row[0] + spaces[0], *cells]).rstrip())
    return "\n".join(lines)


def _curves(runs: Sequence[History], value: str, by: str) -> str:
    width = max(20, min(100, shutil.get_terminal_size().columns - 12))
    return curves.in_terminal(runs, value, by, width, color=cli.terminal_colors() > 0)


def _fields(runs: Sequence[History], value: str) -> dict[str, object]:
    differing = history.differing_settings(runs)
    rows = [
        run.row(value) | {"settings": {name: values[number] for name, values in differing.items()}}
        for number, run in enumerate(runs)
    ]
    return {"figure": value, "runs": rows}


if __name__ == "__main__":
    cli.run("launch.compare", main)
