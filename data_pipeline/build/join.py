"""Joins the parts of a preparation: their counts into an encoding, their shards into a corpus."""

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_pipeline.atomic_files import Recoverable, named_in_errors
from data_pipeline.blocks import Blocks
from data_pipeline.build.decode import refuse_too_many_bad
from data_pipeline.build.parts import (
    ENCODING,
    Encoding,
    PartNote,
    PartTask,
    count_note,
    count_spans,
    part_note,
)
from data_pipeline.build.places import Place
from data_pipeline.build.plan import Length, Plan, lay_out, spans_within
from data_pipeline.build.sinks import ShardNote
from data_pipeline.build.sources import CHUNK, ParallelMap
from data_pipeline.build.splits import Span
from data_pipeline.build.utf8 import StartCount
from data_pipeline.manifest import Manifest, Shard, Source, SplitRecord, summary
from data_pipeline.shard_writer import shard_sizes, write_shard
from data_pipeline.shards import Split
from data_pipeline.vocabulary import Vocabulary, escaped_bytes

Lengths = dict[str, dict[int, Length]]  # stream -> number of a part -> what it has of it


class _Piece(NamedTuple):
    """A part of a shard that a split has."""

    note: ShardNote
    start: int  # in symbols
    stop: int

    @property
    def is_whole(self) -> bool:
        return (self.start, self.stop) == (0, self.note.shard.symbols)


def missing_counts(plan: Plan, place: Place) -> list[int]:
    """Returns the numbers of the parts whose characters have not been counted."""
    there = place.notes()
    return [] if ENCODING in there else [part.number for part in plan.parts if count_note(part.number) not in there]


def missing_parts(plan: Plan, place: Place) -> list[int]:
    """Returns the numbers of the parts that have not been written."""
    there = place.notes()
    return [part.number for part in plan.parts if part_note(part.number) not in there]


def join_counts(plan: Plan, tasks: list[PartTask], place: Place, parallel: ParallelMap) -> None:
    """Writes the encoding: the vocabulary of the training split, and where splits begin and end in each part.

    Only a part that lies within the training split in part is counted again.
    """
    if place.read(ENCODING) is not None:
        return
    lengths: Lengths = {}
    counts: dict[tuple[str, int], tuple[list[int], list[int]]] = {}
    for part in plan.parts:
        content = place.read(count_note(part.number))
        if content is None:
            raise FileNotFoundError(f"{count_note(part.number)} is gone")
        for stream, (symbols, added, *counted) in json.loads(content).items():
            lengths.setdefault(stream, {})[part.number] = Length(symbols, added)
            counts[stream, part.number] = tuple(counted)
    cuts: dict[int, dict[str, list[int]]] = {}
    layout = lay_out(lengths, plan)
    for stream, parts in lengths.items():
        spans = [span for of, spans in layout.values() if of == stream for span in spans]
        for number, within in spans_within(parts, spans).items():
            ends = {end for span in within for end in span} - {0, parts[number].symbols}
            if ends:
                cuts.setdefault(number, {})[stream] = sorted(ends)
    vocabulary = plan.vocabulary or _counted_vocabulary(plan, tasks, lengths, counts, parallel)
    place.write(ENCODING, Encoding(vocabulary, cuts).to_json())


def _counted_vocabulary(
    plan: Plan,
    tasks: list[PartTask],
    lengths: Lengths,
    counts: dict[tuple[str, int], tuple[list[int], list[int]]],
    parallel: ParallelMap,
) -> Vocabulary:
    stream, spans = lay_out(lengths, plan)["train"]
    again, total = [], dict[int, int]()
    found = []
    for number, within in spans_within(lengths[stream], spans).items():
        if within == [(0, lengths[stream][number].symbols)]:
            found.append(counts[stream, number])
        elif within:
            again.append((tasks[number], stream, within))
    found += parallel(_count_again, again)
    for codes, times in found:
        for code, count in zip(codes, times, strict=True):
            total[code] = total.get(code, 0) + count
    return Vocabulary.from_counts(total, plan.settings.min_count, escaped_bytes(plan.separator).decode())


def _count_again(task: tuple[PartTask, str, list[Span]]) -> tuple[list[int], list[int]]:
    return count_spans(*task)


def join_parts(plan: Plan, tasks: list[PartTask], place: Place) -> tuple[int, str]:
    """Makes the corpus of the parts; returns the number of documents left out, and a description of the first.

    Raises:
      ValueError: a part is missing, or there are too many bad documents.
    """
    notes = [_note(place, part.number) for part in plan.parts]
    missing = [number for number, note in enumerate(notes) if note is None]
    if missing:
        numbers = ", ".join(map(str, missing[:8])) + (", ..." if missing[8:] else "")
        raise Recoverable(
            f"{len(missing)} of {len(notes)} parts are missing ({numbers}): start their workers again (part p is of "
            "worker p modulo n), or prepare the rest with --engine=local"
        )
    whole = [note for note in notes if note is not None]
    vocabulary = tasks[0].encoding().vocabulary
    _require_shards(place, whole, vocabulary, plan.block_bytes)
    documents, digests = _by_file(plan, whole)
    bad = sum(note.bad for note in whole)
    first_bad = next((note.first_bad for note in whole if note.bad), "")
    refuse_too_many_bad(bad, sum(documents), first_bad)
    lengths: Lengths = {}
    for number, note in enumerate(whole):
        for stream, of_part in note.streams.items():
            lengths.setdefault(stream, {})[number] = of_part.length
    splits = {
        split: _record(split, _pieces(whole, stream, spans), vocabulary, plan.block_bytes, place)
        for split, (stream, spans) in lay_out(lengths, plan).items()
    }
    sources = [
        Source(file.name, file.bytes, digest, file.etag, count)
        for file, digest, count in zip(plan.files, digests, documents, strict=True)
    ]
    manifest = Manifest(
        vocabulary=vocabulary,
        splits=splits,
        sources=summary(sources),
        key=plan.key,
        block_bytes=plan.block_bytes,
        split=plan.settings.split if "" in plan.texts else "files",
        document_separator=plan.separator,
        bad_documents=bad,
    )
    place.publish(manifest, sources)
    return bad, first_bad


def _note(place: Place, number: int) -> PartNote | None:
    content = place.read(part_note(number))
    return None if content is None else PartNote.from_json(content)


def _require_shards(place: Place, notes: list[PartNote], vocabulary: Vocabulary, block_bytes: int) -> None:
    """Raises ValueError if a shard that a note tells of is not there: somebody has deleted it."""
    for number, note in enumerate(notes):
        for stream in note.streams.values():
            for one in stream.shards:
                if not place.has(shard_sizes(one.shard, vocabulary.dtype.itemsize, block_bytes)):
                    raise Recoverable(
                        f"{place.store.path(one.shard.file)} of part {number} is missing or was changed: prepare that "
                        "part again, or the rest with --engine=local"
                    )


def _by_file(plan: Plan, notes: list[PartNote]) -> tuple[list[int], list[str | None]]:
    """Returns the documents of each input file, and its digest."""
    documents: list[int] = []
    digests: list[str | None] = []
    for part, note in zip(plan.parts, notes, strict=True):
        for file, count, digest in zip(part.files, note.documents, note.digests, strict=True):
            if file.span and file.span[0]:
                documents[-1] += count
            else:
                documents.append(count)
                digests.append(digest)
    return documents, digests


def _pieces(notes: list[PartNote], stream: str, spans: list[Span]) -> list[_Piece]:
    """Returns what of the shards of a stream lies in `spans`, which are ascending."""
    pieces, start, waiting = [], 0, list(spans)
    for one in (shard for note in notes if stream in note.streams for shard in note.streams[stream].shards):
        stop = start + one.shard.symbols
        while waiting and waiting[0][1] <= start:
            waiting.pop(0)
        for low, high in waiting:
            if low >= stop:
                break
            pieces.append(_Piece(one, max(low, start) - start, min(high, stop) - start))
        start = stop
    return pieces


def _record(split: str, pieces: list[_Piece], vocabulary: Vocabulary, block_bytes: int, place: Place) -> SplitRecord:
    """Returns the record of a split; shards that lie in it in part are written anew."""
    notes = [
        piece.note if piece.is_whole else _cut(f"{split}-cut-{number:05d}-00000.ids", piece, block_bytes, place)
        for number, piece in enumerate(pieces)
    ]
    shards = tuple(note.shard for note in notes)
    characters = [note.characters for note in notes]
    return SplitRecord(
        sum(shard.symbols for shard in shards),
        sum(note.bytes for note in notes),
        None if None in characters else sum(one for one in characters if one is not None),
        sum(note.unknown for note in notes),
        shards,
    )


def _cut(file: str, piece: _Piece, block_bytes: int, place: Place) -> ShardNote:
    """Writes a part of a shard of bytes as a shard; characters are cut where they are counted."""
    assert piece.note.shard.symbols == piece.note.bytes, "symbols are bytes"
    shard, starts, vocabulary = piece.note.shard, StartCount(), Vocabulary("bytes")
    record = SplitRecord(shard.symbols, shard.symbols, None, 0, (shard,))
    text = Split(record, vocabulary, Blocks(place.store, (shard,), vocabulary.dtype.itemsize, block_bytes))

    def pieces() -> Iterator[np.ndarray]:
        for start in range(piece.start, piece.stop, CHUNK):
            ids = text.read(start, min(start + CHUNK, piece.stop))
            starts.add(ids.tobytes())
            yield ids
        starts.begin()

    with place.scratch() as directory:
        with named_in_errors(directory):
            made: Shard = write_shard(directory, file, pieces(), block_bytes)
        for name in (made.file, made.checksums):
            place.put(directory / name)
    return ShardNote(made, made.symbols, starts.characters, 0)
