"""Cuts a text into splits.  Positions are in symbols."""

import math
from fractions import Fraction
from typing import NamedTuple

from data_pipeline.settings import CorpusSettings, parse_columns

Span = tuple[int, int]  # (start, stop)


def cut(symbols: int, settings: CorpusSettings) -> dict[str, list[Span]]:
    """Returns the spans of each split of a text of `symbols` symbols; leaves out empty splits.

    `contiguous`: train, valid, test, one span each.  `columns:BxT`: the text is cut down to a multiple of B * T, as B
    columns of equally many windows of T symbols; each column's first windows are train, the next ones valid, the last
    ones test (as in char-rnn's CharSplitLMMinibatchLoader.lua, whose B streams are these columns).

    Raises:
      ValueError: nothing is left for the training split.
    """
    columns, window = (1, 1) if settings.split == "contiguous" else parse_columns(settings.split)
    windows = symbols // (columns * window)
    parts = _divide(windows, settings.valid_fraction, settings.test_fraction)
    if not parts[0]:
        raise ValueError(
            f"the text has {symbols} symbols, too few for a training split with split={settings.split}, "
            f"valid_fraction={settings.valid_fraction} and test_fraction={settings.test_fraction}"
        )
    splits, first = {}, 0
    for name, part in zip(("train", "valid", "test"), parts, strict=True):
        if part:
            starts = [(column * windows + first) * window for column in range(columns)]
            splits[name] = [(start, start + part * window) for start in starts]
        first += part
    return splits


class HashSplit(NamedTuple):
    """A split by documents: equal documents are in one split, wherever they are and whatever else there is."""

    valid: int  # of the 2^64 hashes, those below are of the validation split
    test: int  # and below that, of the test split

    @classmethod
    def of(cls, settings: CorpusSettings) -> "HashSplit":
        valid, test = Fraction(repr(settings.valid_fraction)), Fraction(repr(settings.test_fraction))
        return cls(math.floor(valid * 2**64), math.floor((valid + test) * 2**64))

    def split_of(self, digest: bytes) -> str:
        """Returns the split of the document with this sha256."""
        position = int.from_bytes(digest[:8], "big")
        return "valid" if position < self.valid else "test" if position < self.test else "train"


def _divide(total: int, valid: float, test: float) -> tuple[int, int, int]:
    """Divides `total` windows into (train, valid, test): train rounded down, valid rounded down, test the rest.

    Without a test split, the rest is valid.  The fractions are taken as the decimals they were written as: in binary,
    100 * (1 - 0.9) is less than 10, and a window would be lost.
    """
    valid_part, test_part = Fraction(repr(valid)), Fraction(repr(test))
    train = math.floor(total * (1 - valid_part - test_part))
    held_out = math.floor(total * valid_part) if test_part else total - train
    return train, held_out, total - train - held_out


def shard_spans(spans: list[Span], shard_symbols: int) -> list[list[Span]]:
    """Returns the spans of each shard of a split: `spans` in order, cut after every `shard_symbols` symbols."""
    shards: list[list[Span]] = [[]]
    room = shard_symbols
    for start, stop in spans:
        while start < stop:
            if not room:
                shards.append([])
                room = shard_symbols
            taken = min(room, stop - start)
            shards[-1].append((start, start + taken))
            start, room = start + taken, room - taken
    return shards
