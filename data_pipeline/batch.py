"""What the data pipeline hands to the model."""

from typing import Any, NamedTuple

# The ids of the symbols that end a document, one after the other; none where documents are not told apart.
Separator = tuple[int, ...]


class Batch(NamedTuple):
    """One window of every stream: arrays `[B, T]`, or this process's rows of them; T is the window's own length.

    Target `[b, t]` is the symbol that follows input `[b, t]` in the text, and input `[b, 0]` of a window is target
    `[b, T-1]` of the window before, wherever the stream goes on.
    """

    inputs: Any  # [B, T] symbol ids, uint8 / uint16 / uint32 as on disk
    targets: Any  # [B, T] likewise
    reset: Any  # [B, T] bool: zero the stream's state before symbol t is read


def ends_separator(ids: Any, separator: Separator) -> Any:
    """Whether each symbol is the last one of an occurrence of `separator`, bool `[..., n]`.

    Occurrences may overlap: of three newlines the second and the third end one of two.  So the answer depends on the
    len(separator) symbols up to this one, and not on where the reading began.

    Args:
      ids: array of numpy or JAX `[..., k + n]`: the n symbols, and before them the k = `looks_back(separator)` symbols
        that precede them in the text, -1 where there are none.
    """
    first = ids[..., looks_back(separator) :]
    found = first != first if not separator else True
    for place, symbol in enumerate(separator):
        found = found & (ids[..., place : place + first.shape[-1]] == symbol)
    return found


def looks_back(separator: Separator) -> int:
    """How many symbols before one say, with it, whether an occurrence of `separator` ends there."""
    return max(0, len(separator) - 1)


def rows_of_process(rows: int, index: int, count: int) -> range:
    """The rows of a global batch of `rows` that process `index` of `count` reads: neighbours, equally many for each."""
    assert rows % count == 0 and 0 <= index < count, (rows, index, count)
    return range(rows * index // count, rows * (index + 1) // count)
