"""A held-out split as pieces that are scored side by side.

The split of N symbols is cut into pieces of P symbols; each is warmed by reading up to `burn_in` symbols before it,
from zero state. Pieces depend on the split, P and the burn-in alone, so the score does not depend on how many are
read at a time, in windows of what length, or on how many devices. Symbol 0 of the split has nothing before it and is
in no batch: whoever adds up the score charges it log2(V) bits.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from data_pipeline.batch import Batch, Separator, ends_separator, looks_back
from data_pipeline.streams import Symbols


@dataclasses.dataclass(frozen=True)
class PiecePlan:
    """Which symbol is scored where: formulas alone."""

    symbols: int  # N
    piece: int  # P: symbols scored in a row of a batch
    burn_in: int  # symbols read before them
    batch_size: int  # B: pieces side by side
    window: int  # T

    def __post_init__(self) -> None:
        if self.symbols < 2:
            raise ValueError(f"a split of {self.symbols} symbols cannot be scored: it needs at least 2")

    @property
    def pieces(self) -> int:
        return -(-self.symbols // self.piece)

    @property
    def warm_up(self) -> int:
        """Symbols before a piece that are read; a single piece has none before it."""
        return self.burn_in if self.pieces > 1 else 0

    @property
    def windows(self) -> int:
        """Windows of one batch of pieces."""
        return -(-(self.warm_up + min(self.piece, self.symbols)) // self.window)

    @property
    def groups(self) -> int:
        return -(-self.pieces // self.batch_size)


def read_pieces(
    split: Symbols, plan: PiecePlan, rows: range, separator: Separator = ()
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Every window of every group of pieces, as (batch, scored): rows `rows` of them.

    The recurrent state is carried from window to window; `reset` says where it starts anew.  `scored` is bool `[B, T]`:
    over a whole split it is true exactly once for each target position 1 .. N-1.
    """
    for group in range(plan.groups):
        pieces = [group * plan.batch_size + row for row in rows]
        for index in range(plan.windows):
            yield _window(split, plan, pieces, index * plan.window, separator)


def _window(
    split: Symbols, plan: PiecePlan, pieces: list[int], start: int, separator: Separator
) -> tuple[Batch, np.ndarray]:
    T, N = plan.window, plan.symbols
    before = 1 + looks_back(separator)
    text = np.full((len(pieces), before + T), -1, np.int64)  # symbol ids; positions outside of the split stay -1
    first_target = np.array(pieces, np.int64) * plan.piece - plan.warm_up + start
    for row, first in enumerate(first_target):
        earliest = int(first) - before
        low, high = max(earliest, 0), min(int(first) + T, N)
        if low < high:
            text[row, low - earliest : high - earliest] = split.read(low, high)
    target = first_target[:, None] + np.arange(T)  # [B, T] positions of the targets; the input is the one before
    begin = np.array(pieces, np.int64)[:, None] * plan.piece
    scored = (target >= np.maximum(begin, 1)) & (target < np.minimum(begin + plan.piece, N))
    reset = target <= 1  # symbol 0 is the first that is ever read
    if start == 0:
        reset[:, 0] = True
    reset |= ends_separator(text[:, :-1], separator)
    ids = np.maximum(text[:, before - 1 :], 0).astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], reset), scored
