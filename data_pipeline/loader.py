"""Reads the windows of a stream plan ahead of the training step.  The only file that knows grain.

grain is imported by `open_windows`, not by this module, because it imports JAX.
"""

import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipeline.batch import Batch, Separator
from data_pipeline.streams import StreamPlan
from data_pipeline.symbols import Runs, Symbols


class WindowSource:
    """A sequence whose element i is window i of `rows`, a pure function of i; thread-safe.

    Windows are cut from runs of many symbols of every stream, read at once; the two newest runs are kept.
    """

    def __init__(self, split: Symbols, plan: StreamPlan, rows: range, separator: Separator = ()) -> None:
        self._plan, self._rows, self._separator = plan, rows, separator
        self._runs: Runs[int, Batch] = Runs(split, len(rows), self._read)  # by first step
        self._run_windows = min(max(1, self._runs.symbols // plan.window), plan.period)

    def __len__(self) -> int:
        return sys.maxsize  # no length could be larger

    def __getitem__(self, step: int) -> Batch:
        """Returns the window of `step`: new arrays [rows, its length]."""
        first = step - step % self._plan.period % self._run_windows
        run = self._runs.get(first, first + self._in_run(first))
        start, stop = (self._plan.length(first, last) for last in (step, step + 1))
        return Batch(*(np.copy(array[:, start:stop]) for array in run))

    def close(self) -> None:
        """Ends the reading ahead."""
        self._runs.close()

    def _in_run(self, step: int) -> int:
        """Returns the number of windows of the run that begins with `step`: fewer at the end of a period."""
        return min(self._run_windows, self._plan.period - step % self._plan.period)

    def _read(self, split: Symbols, first: int) -> Batch:
        """Returns the run that begins with step `first`: arrays [rows, symbols]."""
        windows = self._in_run(first)
        return self._plan.read(split, first, self._rows, windows=windows, separator=self._separator)


class Windows:
    """An endless iterator of batches, and a context manager that stops its threads.

    `position` is the step whose window comes next, regardless of read-ahead: the training step, the one integer that
    resuming needs.
    """

    def __init__(self, iterator: Any, position: int, close: Callable[[], None] = lambda: None) -> None:
        self._iterator, self._close = iterator, close
        self.position = position

    def __iter__(self) -> "Windows":
        return self

    def __next__(self) -> Batch:
        """Returns the window of step `position`: arrays [rows, T].

        Raises:
          ValueError: a block of the corpus does not match its checksum, or the windows were closed.
          Unreachable: the object store of the corpus does not answer.
        """
        try:
            batch = next(self._iterator)
        except BaseException:  # also Ctrl-C: grain has dropped this window, and would give the next one in its place
            self.close()
            raise
        self.position += 1
        return batch

    def close(self) -> None:
        """Stops reading ahead.  Closing twice does nothing."""
        self._close()
        self._iterator.close()

    def __enter__(self) -> "Windows":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_windows(
    split: Symbols,
    plan: StreamPlan,
    *,
    rows: range,
    start_step: int = 0,
    separator: Separator = (),
    threads: int = 1,
    read_ahead: int = 8,
) -> Windows:
    """Opens the windows of `rows` from step `start_step` on, read ahead by background threads.

    Args:
      split: the N symbols of `plan`; thread-safe.
      plan: which symbols each stream reads at each step.
      rows: the streams of this process (`batch.rows_of_process`).
      start_step: the first step; a late one costs no more than 0.
      separator: ids of the symbols that end a document.
      threads: number of reading threads, one or two.
      read_ahead: most windows held ready.

    Raises:
      ValueError: `start_step` is negative or too large.
    """
    import grain

    start_step = operator.index(start_step)
    source = WindowSource(split, plan, rows, separator)
    if not 0 <= start_step < len(source):  # grain would take it modulo the length
        raise ValueError(f"step {start_step} is not between 0 and {len(source)}: continue from another checkpoint")
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=read_ahead)
    iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return Windows(iterator, start_step, source.close)
