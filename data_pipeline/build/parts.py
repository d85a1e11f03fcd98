"""Prepares one part of a plan: counts its characters, writes its shards.

Both can be done again at any time, by anybody: a note says what was done, and comes last.
"""

import codecs
import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.atomic_files import named_in_errors
from data_pipeline.build.places import Place
from data_pipeline.build.plan import Length, Part
from data_pipeline.build.sources import TextFile, hash_file
from data_pipeline.build.splits import Span
from data_pipeline.build.texts import CHUNK, Decoding, TextOutput, decode_file
from data_pipeline.build.utf8 import StartCount
from data_pipeline.manifest import Shard
from data_pipeline.shard_writer import ShardWriter, shard_sizes
from data_pipeline.vocabulary import Vocabulary, canonical_json

ENCODING = "encoding.json"


class Encoding(NamedTuple):
    """How symbols become ids, and where shards end besides their size."""

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


class ShardNote(NamedTuple):
    """A shard, with the counts made when it was written."""

    shard: Shard
    bytes: int  # of the text
    characters: int | None
    unknown: int

    def to_json(self) -> list[Any]:
        return [dataclasses.asdict(self.shard), *self[1:]]


class Stream(NamedTuple):
    """What a part has of a stream."""

    shards: list[ShardNote]
    added: int

    @property
    def length(self) -> Length:
        return Length(sum(note.shard.symbols for note in self.shards), self.added)


class PartNote(NamedTuple):
    """What was written of a part."""

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
            _read(task, directory, lambda stream: CharacterCount(), found)
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
        _read(task, directory, lambda name: CharacterCount(spans if name == stream else []), found)
    text, count = found[stream]
    _end(task, text)
    count.flush(final=True)
    return count.counts()


def write_part(task: PartTask) -> int:
    """Writes the shards of a part and then its note, unless they are there; returns the bytes of its files."""
    if written(task) is None:
        encoding, number, streams, found = task.encoding(), task.part.number, {}, dict[str, Any]()
        with task.place.scratch() as directory:
            sink = functools.partial(ShardSink, task, encoding, directory)
            documents, digests, bad, first_bad = _read(task, directory, sink, found, with_digests=True)
            for stream, (text, shards) in sorted(found.items()):
                added = _end(task, text)
                shards.close()
                streams[stream] = Stream(shards.notes, added)
        note = PartNote(streams, documents, digests, bad, first_bad)
        task.place.write(part_note(number), note.to_json())
    return sum(file.bytes for file in task.part.files)


def _end(task: PartTask, text: TextOutput) -> int:
    """Separates a text from that of the next part; returns the number of symbols added."""
    count = 0 if task.part.continued else text.end()
    separator = task.how.file_separator[len(task.how.file_separator) - count :]
    return count if task.kind == "bytes" else len(separator.decode())


def _read(
    task: PartTask, directory: Path, sink: Callable[[str], Any], found: dict[str, Any], with_digests: bool = False
) -> tuple[list[int], list[str | None], int, str]:
    """Reads the files of a part into sinks, made by stream; `found` gets stream -> its text and sink.

    Returns:
      The documents and the digest of each file; the number of documents left out; description of the first.
    """
    how, part = task.how, task.part

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
        has_digest = with_digests and not file.is_remote and not file.span
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


class _Sink:
    """Takes bytes of a text, and hands them on in large pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def write(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= CHUNK:
            self.flush()

    def flush(self, final: bool = False) -> None:
        data = bytes(self._buffer)
        self._buffer.clear()
        self._take(data, final)

    def _take(self, data: bytes, final: bool) -> None:
        raise NotImplementedError


class CharacterCount(_Sink):
    """Counts characters; with `spans`, each only in these.

    Attributes:
      symbols: all characters.
    """

    def __init__(self, spans: list[Span] | None = None) -> None:
        super().__init__()
        self.symbols, self._spans, self._total = 0, spans, np.zeros(0, np.int64)

    def _take(self, data: bytes, final: bool) -> None:
        text = self._decoder.decode(data, final)
        begins, self.symbols = self.symbols, self.symbols + len(text)
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        for start, stop in [(begins, self.symbols)] if self._spans is None else self._spans:
            counts = np.bincount(codes[max(start - begins, 0) : max(stop - begins, 0)])
            if len(counts) > len(self._total):
                counts, self._total = self._total, counts
            self._total[: len(counts)] += counts

    def counts(self) -> tuple[list[int], list[int]]:
        """Returns the code points in ascending order, and their counts."""
        codes = np.flatnonzero(self._total)
        return codes.tolist(), self._total[codes].tolist()


class ShardSink(_Sink):
    """Encodes a text, and puts its shards in their place, each as soon as it is whole.

    Attributes:
      notes: the shards.
    """

    def __init__(self, task: PartTask, encoding: Encoding, directory: Path, stream: str) -> None:
        super().__init__()
        self._task, self._vocabulary, self._directory = task, encoding.vocabulary, directory
        self._prefix = f"{stream or 'text'}-{task.part.number:05d}"
        self._cuts = [*encoding.cuts.get(task.part.number, {}).get(stream, [])]
        self._position, self.notes = 0, list[ShardNote]()
        self._writer: ShardWriter | None = None

    def _take(self, data: bytes, final: bool) -> None:
        text: Any = data if self._vocabulary.kind == "bytes" else self._decoder.decode(data, final)
        if self._vocabulary.kind == "bytes":
            ids = np.frombuffer(data, np.uint8)
        else:
            ids = self._vocabulary.encode(text, unknown="map")
        done, most = 0, self._task.shard_bytes // self._vocabulary.dtype.itemsize
        while done < len(ids):
            room = most - (self._writer.symbols if self._writer else 0)
            if self._cuts:
                room = min(room, self._cuts[0] - self._position)
            stop = min(done + room, len(ids))
            self._add(ids[done:stop], text[done:stop])
            if stop == done + room:
                self._finish_shard()
            done = stop

    def _add(self, ids: np.ndarray, text: Any) -> None:
        if self._writer is None:
            self._path = self._directory / f"{self._prefix}-{len(self.notes):05d}.ids"
            self._file = self._path.open("wb")
            self._writer = ShardWriter(self._file, self._task.block_bytes)
            self._bytes, self._unknown, self._starts = 0, 0, StartCount()
        with named_in_errors(self._path):
            self._writer.add(ids)
        self._position += len(ids)
        if self._vocabulary.kind == "bytes":
            self._starts.add(text)
            self._bytes += len(text)
        else:
            self._bytes += len(text.encode())
            self._unknown += int(np.count_nonzero(ids == 0))

    def _finish_shard(self) -> None:
        """Ends a shard; a cut that is met is met once."""
        if self._cuts and self._cuts[0] == self._position:
            self._cuts.pop(0)
        if self._writer is None:
            return
        with named_in_errors(self._path), self._file:
            shard = self._writer.finish(self._path.name)
        checksums = self._directory / shard.checksums
        checksums.write_bytes(self._writer.checksums)
        self._starts.begin()
        is_bytes = self._vocabulary.kind == "bytes"
        characters = self._starts.characters if is_bytes else shard.symbols
        for path in (self._path, checksums):
            self._task.place.put(path)
        self.notes.append(ShardNote(shard, self._bytes, characters, self._unknown))
        self._writer = None

    def close(self) -> None:
        """Ends the text."""
        self.flush(final=True)
        self._finish_shard()
