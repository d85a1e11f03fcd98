"""The score of a text: its bits, and what they are divided by."""

from typing import NamedTuple

FIGURES = ("bits_per_symbol", "bits_per_character", "bits_per_byte")


class Score(NamedTuple):
    """The bits of a text, a sum, and what it is divided by, once."""

    bits: float
    symbols: int
    characters: int | None  # Unicode code points of the same text; None where they are not known, or it is not UTF-8
    bytes: int | None  # of the same text as it lay on disk; None where they are not known
    unknown: int = 0  # symbols that are not in the vocabulary

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
