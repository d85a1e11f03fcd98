"""Converts text to arrays of symbol ids, and back."""

import codecs
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

# \n and its like, \xHH, \uHHHH, \UHHHHHHHH; or a backslash that begins none of them, as the whole match.
ESCAPE = re.compile(r"\\(?:([\\fnrtv]|0(?![0-9]))|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))|\\")
ESCAPES = dict(zip(r"\fnrtv0", "\\\f\n\r\t\v\0", strict=True))
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # shown for id 0 of a character vocabulary, and for invalid UTF-8


def canonical_json(tree: Any) -> bytes:
    """Serializes `tree` in the one form that digests are taken of: ASCII, sorted keys, no spaces."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode("ascii")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The set of symbols.

    kind `bytes`: 256 symbols, a byte's id is its value, and text is UTF-8.  kind `characters`: id 0 is the unknown
    character and id k is the k-th of `characters`, which are Unicode code points in ascending order.
    """

    kind: str
    characters: str = ""  # kind `characters` only: sorted, each once

    def __post_init__(self) -> None:
        if self.kind not in ("bytes", "characters"):
            raise ValueError(f"vocabulary kind={self.kind!r} is neither bytes nor characters")
        if (self.kind == "characters") != bool(self.characters):
            raise ValueError(f"a vocabulary of {self.kind} with {len(self.characters)} characters of its own")
        codes = _code_points(self.characters)
        if np.any(codes[1:] <= codes[:-1]):
            raise ValueError("the characters of a vocabulary must be in ascending order, each once")

    @property
    def size(self) -> int:
        """V, the number of ids."""
        return 256 if self.kind == "bytes" else 1 + len(self.characters)

    @property
    def dtype(self) -> np.dtype:
        """Returns the smallest of uint8, uint16 and uint32 that holds every id, little-endian."""
        return np.dtype("<u1" if self.size <= 1 << 8 else "<u2" if self.size <= 1 << 16 else "<u4")

    @functools.cached_property
    def digest(self) -> str:
        """Returns the sha256, in hex, of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    @property
    def in_short(self) -> str:
        """Tells it apart from others, in a sentence for people."""
        return f"a vocabulary of {self.size} {self.kind} ({self.digest[:12]})"

    def encode(self, text: str, unknown: str = "refuse") -> np.ndarray:
        """Encodes `text` as ids `[symbols]`, of `self.dtype`.

        Args:
          text: any string.  Bytes that the operating system handed over as lone surrogates (`surrogateescape`) become
            those bytes again in a vocabulary of bytes.
          unknown: `refuse`, or `map` to encode unknown characters as id 0 (characters only).

        Raises:
          ValueError: a symbol is not in the vocabulary; the message has the symbol and its position.
        """
        if unknown not in ("refuse", "map"):
            raise ValueError(f"unknown={unknown!r} is neither refuse nor map")
        if self.kind == "bytes":
            try:
                return np.frombuffer(text.encode("utf-8", "surrogateescape"), self.dtype)
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"symbol {_named(text[error.start])} at position {error.start} has no UTF-8: leave it out"
                ) from None
        ids = self._ids_by_code_point.take(_code_points(text), mode="clip")
        if unknown == "refuse" and not ids.all():
            position = int(np.argmin(ids != 0))
            raise ValueError(
                f"symbol {_named(text[position])} at position {position} is not in the vocabulary: leave it out, or "
                "turn such symbols into the unknown one with unknown='map'"
            )
        return ids

    def decode(self, ids: np.ndarray) -> str:
        """Decodes `ids` `[symbols]` into text.  Invalid UTF-8 and unknown characters become U+FFFD."""
        if self.kind == "bytes":
            return self.decode_bytes(ids).decode("utf-8", "replace")
        codes = self._code_points_by_id[np.asarray(ids)]
        return codes.tobytes().decode("utf-32-le", "replace")

    def decode_bytes(self, ids: np.ndarray) -> bytes:
        """Decodes `ids` `[symbols]` into bytes: exactly those that were encoded, or UTF-8 of the characters."""
        if self.kind == "bytes":
            ids = np.asarray(ids)
            assert ids.size == 0 or 0 <= ids.min() <= ids.max() < 256, "an id outside the vocabulary"
            return ids.astype(np.uint8).tobytes()
        return self.decode(ids).encode("utf-8")

    def require_ids(self, ids: np.ndarray) -> None:
        """Raises ValueError where one of `ids`, of any shape, is no whole number or none of this vocabulary."""
        if ids.size and ids.dtype.kind not in "iu":
            raise ValueError(f"ids are of dtype {ids.dtype}: give whole numbers, such as vocabulary.encode(text)")
        others = ids[(ids < 0) | (ids >= self.size)]
        if others.size:
            raise ValueError(f"id {others[0]} is none of {self.size} symbols: ids are from 0 to {self.size - 1}")

    def encode_escaped(self, text: str) -> np.ndarray:
        r"""Encodes `text`, with its escapes replaced, as ids `[symbols]` of `self.dtype`.

        Escapes are \n \r \t \f \v \0 \\ \xHH \uHHHH \UHHHHHHHH.  \xHH is the byte HH in a vocabulary of bytes, and the
        character U+00HH in one of characters.

        Raises:
          ValueError: a backslash begins no escape, or a symbol is not in the vocabulary.
        """

        def replace(found: re.Match) -> str:
            named, byte, *code_points = found.groups()
            if named:
                return ESCAPES[named]
            if byte and self.kind == "bytes":
                return bytes.fromhex(byte).decode("ascii", "surrogateescape")
            code = next((int(digits, 16) for digits in (byte, *code_points) if digits), -1)
            if not 0 <= code < 0x110000 or 0xD800 <= code < 0xE000:
                wrong = text[found.start() : found.end() if code >= 0 else found.start() + 2]
                raise ValueError(
                    rf"{wrong} is not an escape: use \n \r \t \f \v \0 \xHH \uHHHH \UHHHHHHHH, or \\ for a backslash"
                )
            return chr(code)

        plain = ESCAPE.sub(replace, text)
        ids = self.encode(plain, "map")
        if self.kind == "characters" and not ids.all():
            position = int(np.argmin(ids != 0))
            raise ValueError(f"{_named(plain[position])} at position {position} is not in the vocabulary")
        return ids

    def decoder(self, errors: str = "replace") -> "Decoder":
        """Returns a decoder for ids that arrive a few at a time; `errors` as for `bytes.decode`."""
        return Decoder(self, errors)

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object of the manifest, which `from_json` reads."""
        return {"kind": self.kind} | ({"characters": self.characters} if self.kind == "characters" else {})

    @classmethod
    def from_json(cls, tree: Any) -> "Vocabulary":
        """Reads the vocabulary that `to_json` wrote.  Raises ValueError if `tree` is not one."""
        if not isinstance(tree, dict) or not all(isinstance(value, str) for value in tree.values()):
            raise ValueError("the vocabulary is not a json object of strings")
        if tree.keys() != ({"kind", "characters"} if tree.get("kind") == "characters" else {"kind"}):
            raise ValueError(f"the vocabulary has the fields {', '.join(map(repr, sorted(tree))) or 'none'}")
        return cls(**tree)

    @classmethod
    def from_counts(cls, counts: Mapping[int, int], min_count: int, always: str = "") -> "Vocabulary":
        """Builds the vocabulary of the characters counted at least `min_count` times, and of those of `always`.

        Args:
          counts: code point -> its number of occurrences in the training split.
          min_count: at least 1.

        Raises:
          ValueError: no character is that frequent.
        """
        kept = {code for code, count in counts.items() if count >= min_count}
        if not kept:
            raise ValueError(
                f"min_count={min_count} leaves no character: the most frequent one occurs {max(counts.values())} times"
            )
        return cls("characters", "".join(sorted({*map(chr, kept), *always})))

    @functools.cached_property
    def _code_points_by_id(self) -> np.ndarray:
        """uint32 `[V]`."""
        return _code_points(UNKNOWN + self.characters)

    @functools.cached_property
    def _ids_by_code_point(self) -> np.ndarray:
        """`[largest code point + 2]`; the last entry is 0, for every code point beyond (by `take(mode="clip")`)."""
        codes = self._code_points_by_id[1:]
        table = np.zeros(int(codes.max()) + 2, self.dtype)
        table[codes] = np.arange(1, self.size)
        return table


class Decoder:
    """Decodes ids into text as they arrive; holds back unfinished UTF-8 sequences."""

    def __init__(self, vocabulary: Vocabulary, errors: str):
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def feed(self, ids: np.ndarray) -> str:
        """Returns the text that `ids` `[symbols]` complete."""
        return self._utf8.decode(self._vocabulary.decode_bytes(ids))

    @property
    def pending(self) -> bytes:
        """The unfinished UTF-8 sequence that is held back, of at most 3 bytes."""
        return self._utf8.getstate()[0]

    def flush(self) -> str:
        """Returns the text still held back: an unfinished sequence, as U+FFFD with `replace`, or nothing."""
        return self._utf8.decode(b"", final=True)


def escaped_bytes(text: str) -> bytes:
    """Returns `text` with its escapes replaced, as bytes.  Raises ValueError as `Vocabulary.encode_escaped` does."""
    return Vocabulary("bytes").encode_escaped(text).tobytes()


def _code_points(text: str) -> np.ndarray:
    """uint32 `[len(text)]`."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _named(symbol: str) -> str:
    return f"{symbol!r} (U+{ord(symbol):04X})"
