"""The batch: what the data pipeline hands to the model."""

from typing import Any, NamedTuple

# The ids of the symbols that end a document, in order; empty if documents are not separated.
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
    """Returns whether each symbol is the last one of an occurrence of `separator`, bool `[..., n]`.

    Occurrences may overlap: of three newlines, the second and the third end one of two.  So the result depends on the
    len(separator) symbols up to this one, and not on where reading started.

    Args:
      ids: NumPy or JAX array `[..., k + n]`: the n symbols, after the k = `looks_back(separator)` symbols that precede
        them in the text, -1 beyond its start.
    """
    first = ids[..., looks_back(separator) :]
    found = first != first if not separator else True
    for place, symbol in enumerate(separator):
        found = found & (ids[..., place : place + first.shape[-1]] == symbol)
    return found


def looks_back(separator: Separator) -> int:
    """Returns the number of preceding symbols needed to decide whether an occurrence of `separator` ends at one."""
    return max(0, len(separator) - 1)


def rows_of_process(rows: int, index: int, count: int) -> range:
    """Returns the rows of a global batch of `rows` that process `index` of `count` reads: contiguous, equally many."""
    assert rows % count == 0 and 0 <= index < count, (rows, index, count)
    return range(rows * index // count, rows * (index + 1) // count)
