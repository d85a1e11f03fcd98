"""Sequences of symbols, and reading them in runs: few large readings instead of many small ones."""

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

RUN_SYMBOLS = 2**14  # symbols of a stream per read
RUN_TOTAL = 2**24  # most symbols of all rows per read (unless a single window has more)
REMOTE_RUN_SYMBOLS = 2**20  # of a stream per read of an object store
READ_AHEAD_BYTES = 2**28  # of an object store, ids of all rows of two runs: the one in use, and the next
KEPT = 64  # blocks of a split that are in memory at least

Places = Sequence[tuple[int, np.ndarray]]  # positions, and arrays to be filled with the symbols from there on
Key = TypeVar("Key", bound=Hashable)
Run = TypeVar("Run")


class Symbols(Protocol):
    """A split of a corpus."""

    @property
    def dtype(self) -> np.dtype: ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int, /) -> np.ndarray: ...


@runtime_checkable
class StoredSymbols(Symbols, Protocol):
    """A split that may lie in an object store (`is_remote`), where many places are read side by side."""

    @property
    def is_remote(self) -> bool: ...

    def keep_blocks(self, count: int, /) -> None: ...

    def read_many(self, places: Places, /) -> None: ...

    def separate(self) -> "StoredSymbols": ...

    def close(self) -> None: ...


def read_places(split: Symbols, places: Places) -> None:
    """Fills each array with the symbols from its position on."""
    if isinstance(split, StoredSymbols):
        split.read_many(places)
    else:
        for start, out in places:
            out[:] = split.read(start, start + len(out))


class Runs(Generic[Key, Run]):
    """Runs by key, of which the two newest are kept; thread-safe.

    Of an object store, a run is read while the one before it is used.
    """

    def __init__(self, split: Symbols, rows: int, read: Callable[[Symbols, Key], Run]) -> None:
        """Reads nothing yet.

        Args:
          rows: number of places of `split` that a run has symbols of.
          read: reads a run.
        """
        self._split, self._read = split, read
        self._reader = None
        if isinstance(split, StoredSymbols):
            split.keep_blocks(max(KEPT, rows))  # a reading begins in the block in which the one before it ended
        # Symbols of each row that are best read at once.
        self.symbols = max(1, min(RUN_SYMBOLS, RUN_TOTAL // rows))
        if isinstance(split, StoredSymbols) and split.is_remote:
            self._split = split.separate()
            self.symbols = max(1, min(REMOTE_RUN_SYMBOLS, READ_AHEAD_BYTES // (2 * rows * split.dtype.itemsize)))
            self._reader = ThreadPoolExecutor(1, "run")
        self._runs: dict[Key, Future[Run]] = {}  # oldest first
        self._lock = threading.Lock()

    def get(self, key: Key, following: Key | None) -> Run:
        """Returns the run of `key`; begins to read `following`, if any, of an object store.  Raises as `read`."""
        with self._lock:  # two threads never read the same run
            run = self._begun(key)
            if self._reader is not None and following is not None:
                self._begun(following)
        return run.result()

    def close(self) -> None:
        """Ends the reading ahead."""
        if self._reader is not None and isinstance(self._split, StoredSymbols):
            self._reader.shutdown(wait=False, cancel_futures=True)
            self._split.close()

    def _begun(self, key: Key) -> "Future[Run]":
        if key not in self._runs:
            while len(self._runs) > 1:
                del self._runs[next(iter(self._runs))]
            if self._reader is not None:
                run = self._reader.submit(self._read, self._split, key)
            else:
                run = Future()
                run.set_result(self._read(self._split, key))
            self._runs[key] = run
        return self._runs[key]
