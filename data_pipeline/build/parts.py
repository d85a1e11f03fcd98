"""Prepares one part of a plan: counts its characters, writes its shards.

Both can be done again at any time, by anybody: a note says what was done, and comes last.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.atomic_files import named_in_errors
from data_pipeline.build.hashing import hash_file
from data_pipeline.build.places import Place
from data_pipeline.build.plan import Length, Part
from data_pipeline.build.sinks import CharacterCount, ShardNote, ShardSink
from data_pipeline.build.sources import TextFile
from data_pipeline.build.splits import Span
from data_pipeline.build.texts import Decoding, TextOutput, decode_file
from data_pipeline.manifest import Shard
from data_pipeline.shard_writer import shard_sizes
from data_pipeline.vocabulary import Vocabulary, canonical_json

ENCODING = "encoding.json"


class Encoding(NamedTuple):
    """The vocabulary that turns symbols into ids, and the places at which shards end besides their size."""

    vocabulary: Vocabulary
    cuts: dict[int, dict[str, list[int]]]  # number of a part -> stream -> symbols after which a split begins or ends

    def to_json(self) -> bytes:
        cuts = {str(number): streams for number, streams in self.cuts.items()}
        return canonical_json([self.vocabulary.to_json(), cuts])

    @classmethod
    def from_json(cls, content: bytes) -> "Encoding":
        vocabulary, cuts = json.loads(content)
        return cls(Vocabulary.from_json(vocabulary), {int(number): streams for number, streams in cuts.items()})


@dataclasses.dataclass(frozen=True)
class PartTask:
    """A part to prepare.  It names its text and its place, and is small enough to be sent."""

    part: Part
    place: Place
    how: Decoding
    kind: str  # of the vocabulary
    shard_bytes: int
    block_bytes: int

    def encoding(self) -> Encoding:
        """Returns the encoding, which is a note unless symbols are bytes."""
        if self.kind == "bytes":
            return Encoding(Vocabulary("bytes"), {})
        content = self.place.read(ENCODING)
        if content is None:
            raise FileNotFoundError(f"{self.place.store.path(ENCODING)} is gone")
        return Encoding.from_json(content)


class Stream(NamedTuple):
    """The shards of a part that belong to a stream, and the separator added to them."""

    shards: list[ShardNote]
    added: int

    @property
    def length(self) -> Length:
        return Length(sum(note.shard.symbols for note in self.shards), self.added)


class PartNote(NamedTuple):
    """The streams, documents and digests of a part that was written."""

    streams: dict[str, Stream]
    documents: list[int]  # of each file
    digests: list[str | None]  # sha256 of each file; None if it is in an object store, or in several parts
    bad: int  # documents left out
    first_bad: str  # description of the first of them

    def to_json(self) -> bytes:
        streams = {name: [[one.to_json() for one in stream.shards], stream.added] for name, stream in self[0].items()}
        return canonical_json([streams, *self[1:]])

    @classmethod
    def from_json(cls, content: bytes) -> "PartNote":
        streams, *rest = json.loads(content)
        read = {
            name: Stream([ShardNote(Shard(**shard), *counts) for shard, *counts in shards], added)
            for name, (shards, added) in streams.items()
        }
        return cls(read, *rest)


def count_note(number: int) -> str:
    return f"count-{number:05d}.json"


def part_note(number: int) -> str:
    return f"part-{number:05d}.json"


def written(task: PartTask) -> PartNote | None:
    """Returns the note of a part that was written whole."""
    content = task.place.read(part_note(task.part.number))
    if content is None:
        return None
    note, itemsize = PartNote.from_json(content), task.encoding().vocabulary.dtype.itemsize
    sizes: dict[str, int] = {}
    for stream in note.streams.values():
        for one in stream.shards:
            sizes |= shard_sizes(one.shard, itemsize, task.block_bytes)
    return note if task.place.has(sizes) else None


def count_part(task: PartTask) -> int:
    """Counts the characters of a part, unless they are; returns the bytes of its files."""
    if task.place.read(count_note(task.part.number)) is None:
        streams, found = {}, dict[str, Any]()
        with task.place.scratch() as directory:
            _read(task, directory, lambda stream: CharacterCount(), found, is_counted=False)
        for stream, (text, count) in sorted(found.items()):
            added = _end(task, text)
            count.flush(final=True)
            streams[stream] = [count.symbols, added, *count.counts()]
        task.place.write(count_note(task.part.number), canonical_json(streams))
    return sum(file.bytes for file in task.part.files)


def count_spans(task: PartTask, stream: str, spans: list[Span]) -> tuple[list[int], list[int]]:
    """Returns the code points of these symbols of a part's stream, and their counts."""
    found = dict[str, Any]()
    with task.place.scratch() as directory:
        _read(task, directory, lambda name: CharacterCount(spans if name == stream else []), found, is_counted=True)
    text, count = found[stream]
    _end(task, text)
    count.flush(final=True)
    return count.counts()


def write_part(task: PartTask) -> int:
    """Writes the shards of a part and then its note, unless they are there; returns the bytes of its files."""
    if written(task) is None:
        encoding, number, streams, found = task.encoding(), task.part.number, {}, dict[str, Any]()
        with task.place.scratch() as directory:

            def sink(stream: str) -> ShardSink:
                cuts = encoding.cuts.get(number, {}).get(stream, [])
                file = directory / f"{stream or 'text'}-{number:05d}"
                return ShardSink(file, encoding.vocabulary, cuts, task.shard_bytes, task.block_bytes, task.place.put)

            documents, digests, bad, first_bad = _read(task, directory, sink, found, is_counted=True)
            for stream, (text, shards) in sorted(found.items()):
                added = _end(task, text)
                shards.close()
                streams[stream] = Stream(shards.notes, added)
        note = PartNote(streams, documents, digests, bad, first_bad)
        task.place.write(part_note(number), note.to_json())
    return sum(file.bytes for file in task.part.files)


def _end(task: PartTask, text: TextOutput) -> int:
    """Separates a text from that of the next part; returns the number of symbols added."""
    goes_on = task.part.continued and task.part.files[-1].kind.form == "text"
    count = 0 if goes_on else text.end()
    separator = task.how.file_separator[len(task.how.file_separator) - count :]
    return count if task.kind == "bytes" else len(separator.decode())


def _read(
    task: PartTask, directory: Path, sink: Callable[[str], Any], found: dict[str, Any], is_counted: bool
) -> tuple[list[int], list[str | None], int, str]:
    """Reads the files of a part into sinks, made by stream; `found` gets stream -> its text and sink.

    Returns:
      The documents and the digest of each file; the number of documents left out; description of the first.
    """
    # What has been counted is known to be UTF-8.
    how, part = task.how._replace(utf8=task.how.utf8 and not is_counted), task.part

    def output(digest: Callable[[], bytes]) -> TextOutput:
        stream = how.split.split_of(digest()) if how.split else part.stream
        if stream not in found:
            made = sink(stream)
            found[stream] = TextOutput(made.write, how), made
        return found[stream][0]

    documents: list[int] = []
    digests: list[str | None] = []
    bad, first_bad = 0, ""
    for file in part.files:
        _require_unchanged(file)
        with named_in_errors(file.path):
            counted, refused = decode_file(file, how, directory, output)
        has_digest = is_counted and not file.is_remote and not file.span
        digests.append(hash_file(file.path, "sha256") if has_digest else None)
        _require_unchanged(file)
        documents.append(counted)
        bad, first_bad = bad + refused.count, first_bad or refused.first
    return documents, digests, bad, first_bad


def _require_unchanged(file: TextFile) -> None:
    """Raises ValueError if a file was changed since the plan was made; of an object its ETag tells."""
    if file.is_remote:
        return
    try:
        now = os.stat(file.path)
    except FileNotFoundError:
        raise ValueError(f"{file.path} is gone: start again when all files are there") from None
    if (now.st_size, now.st_mtime_ns) != file.stamp[:2]:
        raise ValueError(f"{file.path} was changed while it was prepared: start again when it is complete")
