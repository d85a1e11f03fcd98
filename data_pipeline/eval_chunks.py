"""Cuts a held-out split into chunks that are scored side by side.

The split of N symbols is cut into chunks of P symbols; each is warmed by reading up to `burn_in` symbols before it,
from zero state. Chunks depend on the split, P and the burn-in alone, so the score does not depend on the batch size,
the length of windows or the number of devices. Symbol 0 of the split has no context and is in no batch: the caller that
sums up the score charges it log2(V) bits.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from data_pipeline.batch import Batch, Separator, ends_separator, looks_back
from data_pipeline.symbols import Runs, Symbols, read_places


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """Position of every scored symbol: formulas of the split and the settings alone."""

    symbols: int  # N
    chunk: int  # P: symbols scored in a row of a batch
    burn_in: int  # symbols read before them
    batch_size: int  # B: chunks side by side
    window: int  # T
    most: int = 0  # symbols that may be scored, in whole chunks, evenly spaced and the first among them; 0: all

    def __post_init__(self) -> None:
        if self.symbols < 2:
            raise ValueError(f"a split of {self.symbols} symbols cannot be scored: it needs at least 2")

    @property
    def all_chunks(self) -> int:
        return -(-self.symbols // self.chunk)

    @property
    def chunks(self) -> int:
        """Number of chunks that are scored."""
        return (
            min(self.all_chunks, max(1, self.most // self.chunk)) if 0 < self.most < self.symbols else self.all_chunks
        )

    def position(self, number: int) -> int:
        """Position in the split of the first symbol of the scored chunk `number`; past its end where there is none."""
        beyond = max(0, number - self.chunks)
        return ((number - beyond) * self.all_chunks // self.chunks + beyond) * self.chunk

    @property
    def scored(self) -> int:
        """Number of symbols that are scored."""
        return self.symbols if self.chunks == self.all_chunks else self.chunks * self.chunk

    @property
    def warm_up(self) -> int:
        """Number of symbols read before a chunk; a single chunk has none before it."""
        return self.burn_in if self.all_chunks > 1 else 0

    @property
    def windows(self) -> int:
        """Number of windows of one batch of chunks."""
        return -(-(self.warm_up + min(self.chunk, self.symbols)) // self.window)

    @property
    def groups(self) -> int:
        return -(-self.chunks // self.batch_size)


def read_chunks(
    split: Symbols, plan: ChunkPlan, rows: range, separator: Separator = ()
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields every window of every group of chunks, rows `rows` of it, as (batch, scored).

    The recurrent state is carried from window to window, except where `reset` is true.  `scored`, bool `[B, T]`, is
    true exactly once over a whole split for each target position 1 .. N-1, or for those of the chunks that are scored.
    """
    before = 1 + looks_back(separator)
    runs: Runs[tuple[int, int], np.ndarray] = Runs(
        split, len(rows), lambda split, run: _read_run(split, plan, rows, before, *run, windows)
    )
    windows = min(max(1, runs.symbols // plan.window), plan.windows)
    try:
        keys = [(group, first) for group in range(plan.groups) for first in range(0, plan.windows, windows)]
        for (group, first), following in itertools.zip_longest(keys, keys[1:]):
            text = runs.get((group, first), following)
            for index in range(first, min(first + windows, plan.windows)):
                start = (index - first) * plan.window
                yield _window(text[:, start : start + before + plan.window], plan, group, rows, index, separator)
    finally:
        runs.close()


def _read_run(
    split: Symbols, plan: ChunkPlan, rows: range, before: int, group: int, first: int, windows: int
) -> np.ndarray:
    """Returns the symbols of `windows` windows from `first` on and `before` earlier ones, int32; -1 if outside."""
    length, N = before + min(windows, plan.windows - first) * plan.window, plan.symbols
    text = np.full((len(rows), length), -1, np.int32)
    places, parts = [], []
    for row, earliest in enumerate(_first_targets(plan, group, rows, first) - before):
        low, high = max(int(earliest), 0), min(int(earliest) + length, N)
        if low < high:
            places.append((low, np.empty(high - low, split.dtype)))
            parts.append((row, slice(low - int(earliest), high - int(earliest))))
    read_places(split, places)
    for (row, part), (_, ids) in zip(parts, places, strict=True):
        text[row, part] = ids
    return text


def _begins(plan: ChunkPlan, group: int, rows: range) -> np.ndarray:
    """Returns the positions `[rows]` at which the chunks of a group begin."""
    return np.array([plan.position(group * plan.batch_size + row) for row in rows], np.int64)


def _first_targets(plan: ChunkPlan, group: int, rows: range, index: int) -> np.ndarray:
    """Returns the positions `[rows]` of the first targets of a window."""
    return _begins(plan, group, rows) - plan.warm_up + index * plan.window


def _window(
    text: np.ndarray, plan: ChunkPlan, group: int, rows: range, index: int, separator: Separator
) -> tuple[Batch, np.ndarray]:
    """Returns window `index` of the chunks of `rows`, of which `text` has the symbols and those before it."""
    T, N = plan.window, plan.symbols
    begin = _begins(plan, group, rows)[:, None]
    target = _first_targets(plan, group, rows, index)[:, None] + np.arange(T)  # [B, T]; the input is the one before
    scored = (target >= np.maximum(begin, 1)) & (target < np.minimum(begin + plan.chunk, N))
    reset = target <= 1  # symbol 0 is the first that is ever read
    if index == 0:
        reset[:, 0] = True
    reset |= ends_separator(text[:, :-1], separator)
    ids = np.maximum(text[:, looks_back(separator) :], 0).astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], reset), scored
