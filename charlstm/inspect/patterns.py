"""Patterns of a text, regular expressions or those with a name: they tell which symbols are inside."""

import re
import unicodedata
from collections.abc import Callable, Mapping

import numpy as np

from data_pipeline.vocabulary import Vocabulary

Pattern = Callable[[str], np.ndarray]  # text -> bool [characters]


def symbols_of(vocabulary: Vocabulary, ids: np.ndarray) -> tuple[str, np.ndarray]:
    """Decodes symbols: the text, and how many symbols each of its characters is, `[characters]`.

    A byte that is not UTF-8 is a character of its own, a lone surrogate; an unknown character is U+FFFD.
    """
    if vocabulary.kind != "bytes":
        text = vocabulary.decode(ids)
        return text, np.ones(len(text), int)
    text = vocabulary.decode_bytes(ids).decode("utf-8", "surrogateescape")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    is_escaped = (codes >= 0xDC80) & (codes <= 0xDCFF)
    return text, np.where(is_escaped, 1, 1 + (codes >= 0x80) + (codes >= 0x800).astype(int) + (codes >= 0x10000))


def visible(character: str) -> str:
    """Returns what is drawn for a character: itself, or a sign for one that cannot be seen or that changes others."""
    code = ord(character)
    if character in "\n\t" or code < 0x20:
        return {"\n": "↵", "\t": "→"}.get(character, chr(0x2400 + code))
    if 0xDC80 <= code <= 0xDCFF:
        return f"⟦{code - 0xDC00:02X}⟧"
    category = unicodedata.category(character)
    if category[0] == "M":
        return "◌" + character
    return character if category[0] != "C" and category not in ("Zl", "Zp") else f"⟦{code:04X}⟧"


def columns(shown: str) -> int:
    """Returns how many columns of a terminal a text takes: a wide character two, one that combines none."""
    spacing = [character for character in shown if unicodedata.category(character) not in ("Mn", "Me")]
    return len(spacing) + sum(unicodedata.east_asian_width(character) in ("W", "F") for character in spacing)


def expression(pattern: str) -> Pattern:
    """Returns the pattern of a regular expression: True inside its matches.

    Raises:
      ValueError: it is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None

    def label(text: str) -> np.ndarray:
        found = np.zeros(len(text), bool)
        for match in compiled.finditer(text):
            found[match.start() : match.end()] = True
        return found

    return label


def expression_or_between(pattern: str, opener: str, closer: str) -> Pattern:
    """Returns `expression` of `pattern`, or from an `opener` to the next `closer`, if there is one.

    An opener without a closer is looked for to the end of the text once, not again for each of a thousand more.
    """
    either = re.compile(rf"{pattern}|{opener}(?s:.*?)(?:{closer}|(?P<unclosed>\Z))")
    alone = re.compile(pattern)

    def label(text: str) -> np.ndarray:
        found = np.zeros(len(text), bool)
        matches = either.finditer(text)
        while match := next(matches, None):
            if match.lastgroup == "unclosed":  # and so are all that come
                matches = alone.finditer(text, match.start() + 1)
            else:
                found[match.start() : match.end()] = True
        return found

    return label


def deeper_than(depth: int) -> Pattern:
    """Returns the pattern of being inside more than `depth` brackets, ( [ or {; an empty line closes all."""

    def label(text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        steps = np.isin(codes, [ord(c) for c in "([{"]).astype(int) - np.isin(codes, [ord(c) for c in ")]}"])
        found = np.zeros(len(text), bool)
        start = 0
        for end in [*(match.end() for match in re.finditer(r"\n[ \t]*\r?\n", text)), len(text)]:
            total = np.cumsum(steps[start:end])
            # What closes without having been opened does not count.
            found[start:end] = total - np.minimum(np.minimum.accumulate(total), 0) > depth
            start = end
        return found

    return label


def upper_case(text: str) -> np.ndarray:
    """The pattern of capital letters of any script."""
    return np.fromiter(map(str.isupper, text), bool, len(text))


NAMED: Mapping[str, Pattern] = {
    "inside quotes": expression_or_between(r'"[^"\n]*"|' + r"(?<!\w)'[^'\n]*'(?!\w)", "“", "”"),
    "inside brackets": deeper_than(0),
    "inside two brackets": deeper_than(1),
    "inside a comment": expression_or_between(r"#[^\r\n]*|//[^\r\n]*", r"/\*", r"\*/"),
    "indentation": expression(r"(?m)^[ \t]+"),
    "first of a line": expression(r"(?m)^[^\r\n]"),
    "past column 20": expression(r"(?m)(?<=^.{20})[^\r\n]+"),
    "past column 40": expression(r"(?m)(?<=^.{40})[^\r\n]+"),
    "upper case": upper_case,
    "digit": expression(r"\d"),
    "space": expression(r" "),
}
