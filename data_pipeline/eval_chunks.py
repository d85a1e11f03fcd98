"""Cuts a held-out split into chunks that are scored side by side.

The split of N symbols is cut into chunks of P symbols; each is warmed by reading up to `burn_in` symbols before it,
from zero state. Chunks depend on the split, P and the burn-in alone, so the score does not depend on the batch size,
the length of windows or the number of devices. Symbol 0 of the split has no context and is in no batch: the caller that
sums up the score charges it log2(V) bits.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from data_pipeline.batch import Batch, Separator, ends_separator, looks_back
from data_pipeline.streams import Symbols


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
    for group in range(plan.groups):
        chunks = [group * plan.batch_size + row for row in rows]
        for index in range(plan.windows):
            yield _window(split, plan, chunks, index * plan.window, separator)


def _window(
    split: Symbols, plan: ChunkPlan, chunks: list[int], start: int, separator: Separator
) -> tuple[Batch, np.ndarray]:
    T, N = plan.window, plan.symbols
    before = 1 + looks_back(separator)
    text = np.full((len(chunks), before + T), -1, np.int64)  # symbol ids; positions outside of the split stay -1
    begin = np.array([plan.position(number) for number in chunks], np.int64)[:, None]
    first_target = begin[:, 0] - plan.warm_up + start
    for row, first in enumerate(first_target):
        earliest = int(first) - before
        low, high = max(earliest, 0), min(int(first) + T, N)
        if low < high:
            text[row, low - earliest : high - earliest] = split.read(low, high)
    target = first_target[:, None] + np.arange(T)  # [B, T] positions of the targets; the input is the one before
    scored = (target >= np.maximum(begin, 1)) & (target < np.minimum(begin + plan.chunk, N))
    reset = target <= 1  # symbol 0 is the first that is ever read
    if start == 0:
        reset[:, 0] = True
    reset |= ends_separator(text[:, :-1], separator)
    ids = np.maximum(text[:, before - 1 :], 0).astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], reset), scored
