"""The score of a text: its bits, and what they are divided by."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

FIGURES = ("bits_per_symbol", "bits_per_character", "bits_per_byte")


class Score(NamedTuple):
    """The bits of a text, a sum, and what it is divided by, once."""

    bits: float
    symbols: float  # whole numbers, except in `mixed` scores
    characters: float | None  # Unicode code points of the same text; None where they are not known, or it is not UTF-8
    bytes: float | None  # of the same text as it lay on disk; None where they are not known
    unknown: float = 0  # symbols that are not in the vocabulary

    @property
    def bits_per_symbol(self) -> float:
        return self.bits / self.symbols

    @property
    def bits_per_character(self) -> float | None:
        return self.bits / self.characters if self.characters else None

    @property
    def bits_per_byte(self) -> float | None:
        """None where symbols are unknown: they stand for any number of bytes, which the model does not tell."""
        return self.bits / self.bytes if self.bytes and not self.unknown else None

    def figures(self) -> dict[str, float | None]:
        """The three, as they are named wherever they are written; None where one does not apply."""
        return {name: getattr(self, name) for name in FIGURES}

    def in_words(self, kind: str) -> str:
        """The score in words: first the figure of the vocabulary's own symbols, then the other one if it differs."""
        named = {"byte": self.bits_per_byte, "character": self.bits_per_character}
        first, other = ("byte", "character") if kind == "bytes" else ("character", "byte")
        words = f"{self.bits_per_symbol:.4f} bits per {first}"
        if named[other] not in (None, self.bits_per_symbol):
            words += f" ({named[other]:.4f} per {other})"
        return words + (f", {100 * self.unknown / self.symbols:.2g}% of the symbols unknown" if self.unknown else "")


def mixed(scores: Mapping[str, Score], percent: Mapping[str, float]) -> Score:
    """Returns the score of a text as long as those scored, in which each has its share of the symbols.

    Args:
      scores: name -> score.
      percent: name -> share, of any sum.  Of a single score the result is that score.
    """
    if len(scores) == 1:
        return next(iter(scores.values()))
    if not any(percent[name] for name in scores):  # those in the text come without a score
        percent = dict.fromkeys(scores, 1.0)
    whole, symbols = sum(percent[name] for name in scores), sum(score.symbols for score in scores.values())
    part = [percent[name] / whole * symbols / score.symbols for name, score in scores.items()]

    def total(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(p * value for p, value in zip(part, known, strict=True)) if len(known) == len(part) else None

    bits, _, characters, length, unknown = map(total, zip(*scores.values(), strict=True))
    return Score(bits or 0.0, symbols, characters, length, unknown or 0.0)
