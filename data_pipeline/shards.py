"""A prepared corpus: opened in O(shards), read in any order, every block checked when it is read."""

import dataclasses
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_pipeline.block_cache import BlockCache
from data_pipeline.blocks import REMEDY, Blocks
from data_pipeline.directory import Directory
from data_pipeline.manifest import (
    NAME,
    SOURCES,
    Manifest,
    Source,
    SourceSummary,
    SplitRecord,
    parse_manifest,
    parse_sources,
    read_manifest,
)
from data_pipeline.progress import Progress
from data_pipeline.settings import CorpusSettings
from data_pipeline.shard_writer import shard_sizes
from data_pipeline.stores import PATIENCE, Store, open_store
from data_pipeline.symbols import Places
from data_pipeline.vocabulary import Vocabulary

IN_FLIGHT = 32  # requests to an object store at a time


class Split:
    """One split of a corpus: a sequence of symbol ids.  Thread-safe, and can be pickled."""

    def __init__(self, record: SplitRecord, vocabulary: Vocabulary, blocks: Blocks) -> None:
        self._record, self._blocks = record, blocks
        self.vocabulary, self.dtype = vocabulary, vocabulary.dtype
        self.bytes, self.characters, self.unknown = record.bytes, record.characters, record.unknown
        self._starts = np.cumsum([0, *(shard.symbols for shard in record.shards)])
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Returns the number of symbols in the split."""
        return self._record.symbols

    def __reduce__(self) -> tuple:
        return Split, (self._record, self.vocabulary, self._blocks)

    @property
    def is_remote(self) -> bool:
        """Returns whether the split is in an object store, where few large readings cost less than many small ones."""
        return self._blocks.store.is_remote

    def keep_blocks(self, count: int) -> None:
        """Keeps the `count` most recently used blocks in memory: give at least one per place that is read in turn."""
        assert count >= 1
        self._blocks.keep(count)

    def separate(self) -> "Split":
        """Returns the same split for a reader that can be closed apart from others."""
        return Split(self._record, self.vocabulary, self._blocks.separate()) if self.is_remote else self

    def close(self) -> None:
        """Makes readings of an object store give up: those that wait for it, and later ones."""
        self._blocks.store.close()  # what the pool has still to do fails at once

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the ids `[stop - start]` of symbols `start` to `stop`, of `self.dtype`, as a new array.

        Raises:
          ValueError: the data are damaged or cannot be read; the message has the file and the byte offset.
        """
        ids = np.empty(stop - start, self.dtype)
        self.read_many([(start, ids)])
        return ids

    def read_many(self, places: Places) -> None:
        """Fills each array with the ids from its position on; of an object store, side by side.  Raises as `read`."""
        pieces = [piece for start, ids in places for piece in self._pieces(start, ids)]
        if not self.is_remote or len(pieces) < 2:
            for piece in pieces:
                self._blocks.fill(*piece)
            return
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(IN_FLIGHT, "store")
        readings = [self._pool.submit(self._blocks.fill, *piece) for piece in pieces]
        try:
            for reading in readings:
                reading.result()
        finally:
            for reading in readings:  # of a failure, do not begin the rest
                reading.cancel()

    def _pieces(self, start: int, ids: np.ndarray) -> Iterator[tuple[int, int, memoryview]]:
        """Yields (shard, its first byte, bytes to fill) of each part of `ids` that one request may bring."""
        stop, width = start + len(ids), self.dtype.itemsize
        assert 0 <= start <= stop <= len(self), f"symbols {start} to {stop} of {len(self)}"
        out = ids.view(np.uint8).data
        position = start
        while position < stop:
            number = int(np.searchsorted(self._starts, position, side="right")) - 1
            first = (position - int(self._starts[number])) * width
            most = (min(stop, int(self._starts[number + 1])) - position) * width
            if self.is_remote:
                most = min(most, self._blocks.range_bytes - first % self._blocks.range_bytes)
            done = (position - start) * width
            yield number, first, out[done : done + most]
            position += most // width


class ArraySplit:
    """A text in memory, to be read as a split is."""

    def __init__(self, text: str | bytes, vocabulary: Vocabulary) -> None:
        """Encodes `text`; what is not in the vocabulary becomes the unknown symbol, and is counted."""
        whole = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
        self.vocabulary, self._ids = vocabulary, vocabulary.encode(whole, "map")
        self.dtype, self.bytes = self._ids.dtype, len(whole.encode("utf-8", "surrogateescape"))
        self.characters = None if any("\udc80" <= symbol <= "\udcff" for symbol in whole) else len(whole)
        self.unknown = int((self._ids == 0).sum()) if vocabulary.kind == "characters" else 0

    @classmethod
    def of_ids(cls, ids: np.ndarray, vocabulary: Vocabulary) -> "ArraySplit":
        """Returns a split of these symbols.

        Their text, encoded again, can be others: the unknown one is decoded as U+FFFD, which may be a character.
        """
        split = cls(vocabulary.decode_bytes(ids), vocabulary)
        split._ids = ids.astype(split.dtype)
        split.unknown = int((ids == 0).sum()) if vocabulary.kind == "characters" else 0
        return split

    def __len__(self) -> int:
        """Symbols in the text."""
        return len(self._ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids `[stop - start]` of symbols `start` to `stop`."""
        return self._ids[start:stop].copy()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared corpus.  Only its manifest and the blocks read last are in memory."""

    directory: Path | str  # a path, or the URL of an object store
    vocabulary: Vocabulary
    splits: dict[str, Split]  # train, valid, test: those that have any symbols
    fingerprint: str  # in hex; equal for equal ids
    sources: SourceSummary  # of the files that it was made from
    document_separator: str  # that stands between its documents, as the setting; "" if they are not separated
    split: str  # how it was divided, as the setting; "files" if each split is a text of its own
    store: Store
    cache: BlockCache | None
    settings: CorpusSettings | None = dataclasses.field(default=None, kw_only=True)  # what a run of it records

    @property
    def name(self) -> str:
        """Short name, for people."""
        return str(self.directory).rpartition("/")[2]

    def read_sources(self) -> list[Source]:
        """Returns the files that the corpus was made from.  Raises ValueError if their list is damaged."""
        if not self.sources.files:
            return []
        return parse_sources(bytes(self.store.read(SOURCES)), self.sources, self.store.path(SOURCES))

    @property
    def places(self) -> tuple[str, ...]:
        """Its store and its cache, with one of which a warning about it begins."""
        return (self.store.path("").rstrip("/"), *([str(self.cache.directory)] if self.cache else []))

    def waiting(self) -> str:
        """Describes what is waited for, if an object store does not answer; else ""."""
        return self.store.waiting()

    def require_cache(self, places: int) -> None:
        """Raises ValueError if the block cache is too small for the number of `places` that are read."""
        if self.cache is not None:
            self.cache.require(places)

    def texts(self, split: str) -> dict[str, Split]:
        """Returns the texts of `split` that are scored each by itself: name -> text; here one, without a name."""
        return {"": self.splits[split]} if split in self.splits else {}

    @property
    def percent(self) -> dict[str, float]:
        """Share of each of these texts in what is learned from."""
        return {"": 100.0}

    @property
    def train(self) -> Split:
        """The split that is learned from."""
        return self._split("train")

    @property
    def valid(self) -> Split:
        """The split that checkpoints are compared on.  Raises ValueError if absent."""
        return self._split("valid")

    @property
    def test(self) -> Split:
        """The split that is scored at the end.  Raises ValueError if absent."""
        return self._split("test")

    def _split(self, name: str) -> Split:
        if name not in self.splits:
            raise ValueError(f"{self.directory} has no {name} split, only {', '.join(self.splits)}")
        return self.splits[name]


def open_corpus(
    directory: Path | str,
    *,
    patience: float = PATIENCE,
    cache: Path | None = None,
    cache_bytes: int = 0,
    check_sizes: bool = True,
) -> Corpus:
    """Opens the prepared corpus in `directory`, a path or the URL of an object store.

    Checks only the names and sizes of its files; in an object store not even these, as that is a request for each.

    Args:
      patience: seconds that an object store may be silent.
      cache: directory that keeps what was read from object stores.
      cache_bytes: its size; 0: no cache.
      check_sizes: look at every file; False where another process has done so, as 1 TB has 16,000 of them.

    Raises:
      ValueError: it is not a prepared corpus, or a file is missing or has another size.
    """
    store = open_store(directory, patience)
    directory = store.directory if isinstance(store, Directory) else str(directory).rstrip("/")
    manifest = _read_manifest(directory, store)
    dtype, block_bytes = manifest.vocabulary.dtype, manifest.block_bytes
    for record in manifest.splits.values() if check_sizes and not store.is_remote else ():
        for shard in record.shards:
            for name, size in shard_sizes(shard, dtype.itemsize, block_bytes).items():
                if (found := store.size(name)) != size:
                    raise ValueError(f"{store.path(name)} has {found} bytes instead of {size}: {REMEDY}")
    kept = None
    if store.is_remote and cache and cache_bytes:
        kept = BlockCache(cache, manifest.fingerprint, cache_bytes, block_bytes)
    splits = {
        name: Split(record, manifest.vocabulary, Blocks(store, record.shards, dtype.itemsize, block_bytes, kept))
        for name, record in manifest.splits.items()
    }
    return Corpus(
        directory=directory,
        vocabulary=manifest.vocabulary,
        splits=splits,
        fingerprint=manifest.fingerprint,
        sources=manifest.sources,
        document_separator=manifest.document_separator,
        split=manifest.split,
        store=store,
        cache=kept,
    )


def _read_manifest(directory: Path | str, store: Store) -> Manifest:
    """Raises ValueError as `read_manifest`."""
    if isinstance(store, Directory):
        return read_manifest(store.directory)
    return parse_manifest(bytes(store.read(NAME)), f"{directory}/{NAME}")


def verify_corpus(directory: Path | str, progress: Progress | None = None, patience: float = PATIENCE) -> None:
    """Reads all of the prepared corpus in `directory`.  Raises ValueError, naming the shard, if it is damaged."""
    corpus, done = open_corpus(directory, patience=patience), 0
    corpus.read_sources()
    manifest = _read_manifest(corpus.directory, corpus.store)
    total = sum(len(split) for split in corpus.splits.values())
    step = max(1, (1 << 20) // corpus.vocabulary.dtype.itemsize)
    for name, split in corpus.splits.items():
        start = 0
        for shard in manifest.splits[name].shards:
            digest, stop = hashlib.sha256(), start + shard.symbols
            for position in range(start, stop, step):
                digest.update(split.read(position, min(position + step, stop)).data)
            if digest.hexdigest() != shard.sha256:
                raise ValueError(
                    f"{corpus.store.path(shard.file)} has sha256 {digest.hexdigest()} instead of {shard.sha256}, which "
                    f"{NAME} has: {REMEDY}"
                )
            start, done = stop, done + shard.symbols
            if progress:
                progress("verifying", done, total)
