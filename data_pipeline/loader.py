"""Reads the windows of a stream plan ahead of the training step.  The only file that knows grain.

grain is imported by `open_windows`, not by this module, because it imports JAX.
"""

import operator
import sys
import threading
from typing import Any

import numpy as np

from data_pipeline.batch import Batch, Separator
from data_pipeline.streams import StreamPlan, Symbols

RUN_SYMBOLS = 2**14  # symbols of a stream per read: a few large reads cost far less than one per window
RUN_TOTAL = 2**24  # most symbols of all rows per read (unless a single window has more)


class WindowSource:
    """A sequence whose element i is window i of `rows`, a pure function of i; thread-safe.

    Windows are cut from runs of up to 16 Ki symbols of every stream, read at once; the two newest runs are kept.
    """

    def __init__(self, split: Symbols, plan: StreamPlan, rows: range, separator: Separator = ()) -> None:
        self._split, self._plan, self._rows, self._separator = split, plan, rows, separator
        symbols = min(RUN_SYMBOLS, RUN_TOTAL // len(rows))
        self._run_windows = min(max(1, symbols // plan.window), plan.period)
        self._runs: dict[int, Batch] = {}  # by first step, oldest first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sys.maxsize  # no length could be larger

    def __getitem__(self, step: int) -> Batch:
        """Returns the window of `step`: new arrays [rows, its length]."""
        first = step - step % self._plan.period % self._run_windows
        run = self._run(first)
        start, stop = (self._plan.length(first, last) for last in (step, step + 1))
        return Batch(*(np.copy(array[:, start:stop]) for array in run))

    def _run(self, first: int) -> Batch:
        """Returns the run that begins with step `first`: arrays [rows, symbols], shorter at the end of a period."""
        with self._lock:  # held while reading, so that two threads never read the same run
            if first not in self._runs:
                left = self._plan.period - first % self._plan.period
                run = self._plan.read(
                    self._split,
                    first,
                    self._rows,
                    windows=min(self._run_windows, left),
                    separator=self._separator,
                )
                while len(self._runs) > 1:
                    del self._runs[next(iter(self._runs))]
                self._runs[first] = run
            return self._runs[first]


class Windows:
    """An endless iterator of batches, and a context manager that stops its threads.

    `position` is the step whose window comes next, regardless of read-ahead: the training step, the one integer that
    resuming needs.
    """

    def __init__(self, iterator: Any, position: int) -> None:
        self._iterator = iterator
        self.position = position

    def __iter__(self) -> "Windows":
        return self

    def __next__(self) -> Batch:
        """Returns the window of step `position`: arrays [rows, T].

        Raises:
          ValueError: a block of the corpus does not match its checksum, or the windows were closed.
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
    return Windows(iterator, start_step)
