"""Looking inside: a page of 4,000 characters and 1,024 units, made, and opened in Chromium; units ranked on a split.

    python -m benchmarks.inside [--quick] [--megabytes=5] [--rounds=5]

The weights are as drawn: what is timed does not depend on what they know.  Ready is when the page says so, from the
moment at which it is opened; switched is when the next unit has been drawn, two frames included.  Without Chromium,
or pytest, with which it is driven, the page is only made.
"""

import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import charlstm as cl
from benchmarks import rows as rows_lib
from benchmarks.rows import Rows
from charlstm.api import Model
from charlstm.inspect import inspection, page
from charlstm.model import language_model
from data_pipeline.vocabulary import Vocabulary

SWITCH = """new Promise(done => {
  const began = performance.now();
  document.querySelector('.next').click();
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
})"""
WORDS = "the unit that (knows) when a line = 'is long'; # and so on\n    return [x, y]\n"
SWITCHES = 9  # in a round


def run(rows: Rows, quick: bool, megabytes: float, rounds: int) -> None:
    """Adds a row for the page, one for what a browser does with it, and one for the ranking."""
    length, width, megabytes, rounds = (400, 32, 0.02, 2) if quick else (4000, 512, megabytes, rounds)
    text = (WORDS * (1 + int(megabytes * 1e6) // len(WORDS)))[: int(megabytes * 1e6)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inside.html"
        model = _model(width)
        for lookback in (24, 0):
            seconds = []
            for _ in range(2):  # the first compiles
                began = time.monotonic()
                made = page.render(
                    [inspection.inspect(model, text[: length * 3], "run", length=length, lookback=lookback)]
                )
                seconds.append(time.monotonic() - began)
            if lookback:
                path.write_text(made)
            megabytes_of_page = round(len(made.encode()) / 1e6, 3)
            first, again = (round(value, 2) for value in seconds)
            rows.add(characters=length, units=2 * width, saliency=lookback, megabytes=megabytes_of_page,
                     seconds=first, seconds_again=again)  # fmt: skip
        with _browser(Path(folder)) as opened:
            if opened is not None:
                rows.add(characters=length, units=2 * width, **_in_browser(opened, path, rounds))
    small = _model(32 if quick else 256)
    cl.inspect.units_for(small, text[:100_000], r"\([^)]*")  # compiles
    cpu, began = time.process_time(), time.monotonic()
    cl.inspect.units_for(small, text, r"\([^)]*")
    seconds_of_find, cpu = time.monotonic() - began, time.process_time() - cpu
    rows.add(find_megabytes=megabytes, layers=2, width=small.config.model.widths[0],
             seconds=round(seconds_of_find, 1), cpu_seconds=round(cpu, 1))  # fmt: skip


def _model(width: int) -> Model:
    config, vocabulary = cl.Config(num_layers=2, hidden_size=width), Vocabulary("bytes")
    return Model(config, vocabulary, language_model.init(config.model, vocabulary.size, jax.random.key(0)), 0)


@contextlib.contextmanager
def _browser(folder: Path) -> Iterator[Any]:
    """A browser, or None where there is none."""
    if importlib.util.find_spec("pytest"):
        from tests import browser

        if browser.EXECUTABLE:
            with browser.chromium(folder) as opened:
                yield opened
                return
    yield None


def _in_browser(opened: Any, path: Path, rounds: int) -> dict[str, Any]:
    ready, switched = [], []
    for _ in range(rounds):
        began = time.monotonic()
        opened.open(path)
        ready.append(time.monotonic() - began)
        switched += [opened.run(SWITCH) for _ in range(SWITCHES)]
    assert not opened.errors, opened.errors
    ready_in, switched_in = rows_lib.spread(ready), rows_lib.spread(switched)
    return {
        "ready_seconds": ready_in.median,
        "ready_quartiles": ready_in.quartiles,
        "switch_milliseconds": switched_in.median,
        "switch_quartiles": switched_in.quartiles,
    }


if __name__ == "__main__":
    rows_lib.main("inside", run, megabytes=5.0, rounds=5)
