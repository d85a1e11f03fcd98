"""What the data pipeline hands to the model."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """One window of every stream: arrays `[B, T]`, or this process's rows of them; T is the window's own length.

    Target `[b, t]` is the symbol that follows input `[b, t]` in the text, and input `[b, 0]` of a window is target
    `[b, T-1]` of the window before, wherever the stream goes on.
    """

    inputs: Any  # [B, T] symbol ids, uint8 / uint16 / uint32 as on disk
    targets: Any  # [B, T] likewise
    reset: Any  # [B, T] bool: zero the stream's state before symbol t is read


def rows_of_process(rows: int, index: int, count: int) -> range:
    """The rows of a global batch of `rows` that process `index` of `count` reads: neighbours, equally many for each."""
    assert rows % count == 0 and 0 <= index < count, (rows, index, count)
    return range(rows * index // count, rows * (index + 1) // count)
