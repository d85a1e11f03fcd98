"""Takes the bytes of a text in large pieces: counts its characters, or makes shards of it."""

import codecs
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.atomic_files import named_in_errors
from data_pipeline.build.splits import Span
from data_pipeline.build.texts import CHUNK
from data_pipeline.build.utf8 import StartCount
from data_pipeline.manifest import Shard
from data_pipeline.shard_writer import ShardWriter
from data_pipeline.vocabulary import Vocabulary


class ShardNote(NamedTuple):
    """A shard, with the counts made when it was written."""

    shard: Shard
    bytes: int  # of the text
    characters: int | None
    unknown: int

    def to_json(self) -> list[Any]:
        return [dataclasses.asdict(self.shard), *self[1:]]


class _Sink:
    """Takes bytes of a text, and hands them on in large pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def write(self, data: bytes) -> None:
        if len(data) >= CHUNK and not self._buffer:
            self._take(data, final=False)
            return
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

    def __init__(
        self,
        file: Path,
        vocabulary: Vocabulary,
        cuts: list[int],
        shard_bytes: int,
        block_bytes: int,
        put: Callable[[Path], None],
    ) -> None:
        """Begins a text.

        Args:
          file: beginning of the paths of its shards, until they are put in their place.
          vocabulary: of the ids.
          cuts: positions in symbols, ascending, where a shard ends besides.
          shard_bytes, block_bytes: sizes of a shard and of the data per checksum.
          put: takes each file of a shard that is whole.
        """
        super().__init__()
        self._prefix, self._vocabulary, self._put, self._block_bytes = file, vocabulary, put, block_bytes
        self._most = shard_bytes // vocabulary.dtype.itemsize
        self._cuts, self._position, self.notes = [*cuts], 0, list[ShardNote]()
        self._writer: ShardWriter | None = None

    def _take(self, data: bytes, final: bool) -> None:
        text: Any = data if self._vocabulary.kind == "bytes" else self._decoder.decode(data, final)
        if self._vocabulary.kind == "bytes":
            ids = np.frombuffer(data, np.uint8)
        else:
            ids = self._vocabulary.encode(text, unknown="map")
        done = 0
        while done < len(ids):
            room = self._most - (self._writer.symbols if self._writer else 0)
            if self._cuts:
                room = min(room, self._cuts[0] - self._position)
            stop = min(done + room, len(ids))
            self._add(ids[done:stop], text[done:stop])
            if stop == done + room:
                self._finish_shard()
            done = stop

    def _add(self, ids: np.ndarray, text: Any) -> None:
        if self._writer is None:
            self._path = self._prefix.with_name(f"{self._prefix.name}-{len(self.notes):05d}.ids")
            self._file = self._path.open("wb")
            self._writer = ShardWriter(self._file, self._block_bytes)
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
        checksums = self._path.with_name(shard.checksums)
        checksums.write_bytes(self._writer.checksums)
        self._starts.begin()
        is_bytes = self._vocabulary.kind == "bytes"
        characters = self._starts.characters if is_bytes else shard.symbols
        for path in (self._path, checksums):
            self._put(path)
        self.notes.append(ShardNote(shard, self._bytes, characters, self._unknown))
        self._writer = None

    def close(self) -> None:
        """Ends the text."""
        self.flush(final=True)
        self._finish_shard()
