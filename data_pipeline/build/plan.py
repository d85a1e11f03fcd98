"""Plans a preparation by parts: the inputs in their one order, cut into parts of about equal bytes.

The plan follows from the list of the inputs and the settings alone, so every worker computes the same one; how many
workers there are does not enter.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from data_pipeline.build.prepare import counted_settings, decoding, recorded_separator
from data_pipeline.build.sources import Text, TextFile
from data_pipeline.build.splits import Span, cut
from data_pipeline.build.texts import Decoding
from data_pipeline.settings import CorpusSettings
from data_pipeline.vocabulary import Vocabulary, canonical_json

PLAN_VERSION = 3  # 1 did not cut tables, 2 not .bz2
PART_BYTES, LEAST_PART_BYTES = 256 << 20, 1024
# Compression -> forms that are read from any place on; of others a file is one part.
CUT_FORMS = {"": ("text", "jsonl", "parquet"), ".bz2": ("jsonl", "xml")}


class Part(NamedTuple):
    """Files that one task prepares."""

    number: int
    stream: str  # split of their text, or "" of a text that is divided
    files: tuple[TextFile, ...]
    continued: bool  # whether the next part begins with the rest of the last file


class Share(NamedTuple):
    """The parts of one of several workers: every `count`-th one."""

    number: int  # from 0 on
    of: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Reads `i/n`.  Raises ValueError if it is none."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise ValueError(f"part={text!r} is not i/n with i from 0 to n - 1: the third of four workers is 2/4")
        return cls(int(number), int(count))


class Length(NamedTuple):
    """The symbols of a stream that lie in a part."""

    symbols: int
    added: int  # of these at its end, a separator that stands there only if a part with text follows


@dataclasses.dataclass(frozen=True)
class Plan:
    """The parts, texts and settings of a preparation."""

    parts: tuple[Part, ...]
    texts: dict[str, Text]
    settings: CorpusSettings
    vocabulary: Vocabulary | None  # None: of the characters that are counted
    shard_bytes: int
    block_bytes: int
    part_bytes: int

    @property
    def how(self) -> Decoding:
        return decoding(self.settings)

    @property
    def separator(self) -> str:
        """Returns the separator of documents that the corpus records, as the setting."""
        return recorded_separator(self.texts, self.settings)

    @property
    def files(self) -> list[TextFile]:
        """Returns the input files, in order."""
        return [file for text in self.texts.values() for file in text.files]

    def content(self) -> dict[str, Any]:
        """Returns what determines the corpus, as JSON; of local files the time of change stands for the content."""
        of_other = self.vocabulary if self.vocabulary and self.vocabulary.kind == "characters" else None
        return {
            "version": PLAN_VERSION,
            "files": [
                [stream, one.name, one.bytes, _version(one), one.start, one.ending.hex(), *one.kind]
                for stream, text in self.texts.items()
                for one in text.files
            ],
            "settings": counted_settings(self.texts, self.settings, of_other),
            "sizes": [self.part_bytes, self.shard_bytes, self.block_bytes],
        }

    @property
    def key(self) -> str:
        """Returns the digest of the content, in hex."""
        return hashlib.sha256(canonical_json(self.content())).hexdigest()


def make_plan(
    texts: dict[str, Text],
    settings: CorpusSettings,
    vocabulary: Vocabulary | None,
    sizes: tuple[int, int, int],
) -> Plan:
    """Returns the plan of texts, split -> its text or "" -> one text; `sizes` are bytes of a part, shard and block."""
    parts: list[Part] = []
    if sizes[0] < LEAST_PART_BYTES:
        raise ValueError(f"part_bytes={sizes[0]} must be at least {LEAST_PART_BYTES}")
    for stream, text in texts.items():
        batch: list[TextFile] = []
        size = 0
        for file in _pieces(text, sizes[0], is_whole=settings.split == "hash"):
            length = _length(file)
            if batch and size + length > sizes[0]:
                parts.append(Part(len(parts), stream, tuple(batch), bool(file.span and file.span[0])))
                batch, size = [], 0
            batch.append(file)
            size += length
        parts.append(Part(len(parts), stream, tuple(batch), False))
    if settings.vocabulary == "bytes":
        vocabulary = Vocabulary("bytes")
    return Plan(tuple(parts), texts, settings, vocabulary, sizes[1], sizes[2], sizes[0])


def _version(file: TextFile) -> str | int | None:
    """Returns what tells that a file was changed."""
    return file.etag if file.is_remote else file.stamp[1]


def _length(file: TextFile) -> int:
    return file.span[1] - file.span[0] if file.span else file.bytes


def _pieces(text: Text, most: int, is_whole: bool) -> Iterator[TextFile]:
    """Yields the files, cut into equal pieces of at most `most` bytes if they can be; `is_whole`: not plain texts."""
    for file in text.files:
        if not file.is_remote:  # workers may be in other directories
            file = dataclasses.replace(file, path=file.path.absolute())
        can_be_cut = file.kind.form in CUT_FORMS.get(file.kind.compression, ()) and not file.ending
        if file.bytes <= most or not can_be_cut or (is_whole and file.kind.form == "text"):
            yield file
            continue
        count = -(-file.bytes // most)
        places = [file.bytes * n // count for n in range(count + 1)]
        for start, stop in itertools.pairwise(places):
            yield dataclasses.replace(file, span=(start, stop))


def first_difference(ours: dict[str, Any], theirs: bytes) -> str:
    """Describes in what two plans differ; `theirs` is the other one's content in JSON."""
    other = json.loads(theirs)
    if ours["settings"] != other.get("settings"):
        return "the settings differ"
    if ours["sizes"] != other.get("sizes"):
        return "the sizes of parts differ"
    mine, others = ({(file[0], file[1]): file for file in files} for files in (ours["files"], other["files"]))
    for (_, name), file in mine.items():
        if others.get((file[0], name)) != file:
            return f"{name} was {'changed' if (file[0], name) in others else 'added'}"
    gone = next((name for stream, name in others if (stream, name) not in mine), "")
    return f"{gone} is gone" if gone else "the order of files differs"


def lay_out(lengths: dict[str, dict[int, Length]], plan: Plan) -> dict[str, tuple[str, list[Span]]]:
    """Returns split -> its stream, and its spans of symbols there.

    Args:
      lengths: stream -> number of a part -> what it has of the stream.
      plan: of the texts and the settings.

    Raises:
      ValueError: a text has no symbols, or nothing is left for training.
    """
    totals = {}
    for stream, parts in lengths.items():
        filled = [length for _, length in sorted(parts.items()) if length.symbols]
        totals[stream] = sum(length.symbols for length in filled) - (filled[-1].added if filled else 0)
    if plan.settings.split != "hash":
        for stream, text in plan.texts.items():
            if not totals.get(stream):
                raise ValueError(f"{text.name} has no text to prepare")
    if "" in totals:
        return {split: ("", spans) for split, spans in cut(totals[""], plan.settings).items()}
    if not totals.get("train"):
        raise ValueError("there is no text for training: change --valid_fraction and --test_fraction, or the input")
    return {split: (split, [(0, totals[split])]) for split in ("train", "valid", "test") if totals.get(split)}


def spans_within(parts: dict[int, Length], spans: list[Span]) -> dict[int, list[Span]]:
    """Returns number of a part -> what of the stream's `spans` lies in it, counted from its beginning."""
    found: dict[int, list[Span]] = {}
    start = 0
    for number, length in sorted(parts.items()):
        stop = start + length.symbols
        within = [(max(low, start) - start, min(high, stop) - start) for low, high in spans]
        found[number] = [(low, high) for low, high in within if low < high]
        start = stop
    return found
