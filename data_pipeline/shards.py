"""Reads a prepared corpus: opened in O(shards), read through memory maps, every block checked when it is read."""

import collections
import dataclasses
import hashlib
import mmap
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from data_pipeline.atomic_files import atomic_write
from data_pipeline.manifest import NAME, Shard, Source, SplitRecord, read_manifest
from data_pipeline.progress import Progress
from data_pipeline.vocabulary import Vocabulary

OPEN_SHARDS = 64  # maps kept open per split; each takes a file descriptor, and a process often has only 1024
Value = TypeVar("Value")


class Recent(Generic[Value]):
    """A thread-safe cache of the `capacity` values used last."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._values: collections.OrderedDict[object, Value] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object) -> Value | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: object, value: Value) -> None:
        with self._lock:
            self._values[key] = value
            while len(self._values) > self.capacity:
                self._values.popitem(last=False)


class MappedFile:
    """A file of known size, memory-mapped for reading."""

    def __init__(self, path: Path, size: int):
        self._path, self._size = path, size
        _check_size(path, size)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        # Streams read at random: the system's read-ahead, of megabytes, would cost more than the block itself.
        self._map.madvise(mmap.MADV_RANDOM)

    def read(self, start: int, stop: int) -> bytes:
        """Returns a copy of bytes `start` to `stop`.

        Raises:
          ValueError: the file has shrunk.  (Touching the missing part of a map kills a process, so the size is checked
            each time.)
        """
        if self._map.size() != self._size:
            raise ValueError(f"{self._path} has {self._map.size()} bytes, not {self._size}: it was changed in use")
        data = self._map[start:stop]
        # The pages stay in the system's cache, but no longer count as this process's memory.
        self._map.madvise(mmap.MADV_DONTNEED)
        return data


class Split:
    """One split of a corpus: a sequence of symbol ids.  Thread-safe, and can be pickled."""

    def __init__(self, directory: Path, record: SplitRecord, dtype: np.dtype, block_bytes: int, keep_blocks: int = 64):
        self._directory, self._record, self._block_bytes = directory, record, block_bytes
        self.dtype = dtype
        self.bytes, self.characters, self.unknown = record.bytes, record.characters, record.unknown
        self._starts = np.cumsum([0, *(shard.symbols for shard in record.shards)])
        self._maps: Recent[tuple[MappedFile, bytes]] = Recent(OPEN_SHARDS)
        self._blocks: Recent[np.ndarray] = Recent(keep_blocks)

    def __len__(self) -> int:
        """Returns the number of symbols in the split."""
        return self._record.symbols

    def __reduce__(self) -> tuple:
        return Split, (self._directory, self._record, self.dtype, self._block_bytes, self._blocks.capacity)

    def keep_blocks(self, count: int) -> None:
        """Keeps the `count` blocks used last in memory: at least one for each place that is read in turn."""
        assert count >= 1
        self._blocks.capacity = count

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the ids `[stop - start]` of symbols `start` to `stop`, of `self.dtype`, as a new array.

        Raises:
          ValueError: the data on disk is damaged; the message has the file and the byte offset.
        """
        assert 0 <= start <= stop <= len(self), f"symbols {start} to {stop} of {len(self)}"
        ids = np.empty(stop - start, self.dtype)
        block_symbols = self._block_bytes // self.dtype.itemsize
        position = start
        while position < stop:
            number = int(np.searchsorted(self._starts, position, side="right")) - 1
            index, offset = divmod(position - int(self._starts[number]), block_symbols)
            piece = self._block(number, index)[offset : offset + stop - position]
            ids[position - start : position - start + len(piece)] = piece
            position += len(piece)
        return ids

    def _block(self, number: int, index: int) -> np.ndarray:
        """Returns the ids of block `index` of shard `number`, checked against their checksum unless cached."""
        block = self._blocks.get((number, index))
        if block is None:
            shard = self._record.shards[number]
            data, checksums = self._map(number)
            start = index * self._block_bytes
            content = data.read(start, min(start + self._block_bytes, shard.symbols * self.dtype.itemsize))
            if _checksum(content) != checksums[4 * index : 4 * index + 4]:
                raise ValueError(
                    f"{self._directory / shard.file} is damaged: the block at byte {start} does not match its "
                    "checksum; delete the corpus and prepare it again"
                )
            block = np.frombuffer(content, self.dtype)
            self._blocks.put((number, index), block)
        return block

    def _map(self, number: int) -> tuple[MappedFile, bytes]:
        """Maps a shard and reads its checksums, verified by the manifest and kept in memory from here on."""
        maps = self._maps.get(number)
        if maps is None:
            shard = self._record.shards[number]
            sizes = shard_sizes(shard, self.dtype.itemsize, self._block_bytes)
            data, checked = (MappedFile(self._directory / name, size) for name, size in sizes.items())
            checksums = checked.read(0, sizes[shard.checksums])
            if hashlib.sha256(checksums).hexdigest() != shard.checksums_sha256:
                raise ValueError(
                    f"{self._directory / shard.file} may be of another text: {shard.checksums} is not the file that "
                    f"{NAME} tells of; delete the corpus and prepare it again"
                )
            maps = data, checksums
            self._maps.put(number, maps)
        return maps


class ArraySplit:
    """A text in memory, to be read as a split is."""

    def __init__(self, text: str | bytes, vocabulary: Vocabulary) -> None:
        """Encodes `text`; what is not in the vocabulary becomes the unknown symbol, and is counted."""
        whole = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
        self._ids = vocabulary.encode(whole, "map")
        self.dtype, self.bytes = self._ids.dtype, len(whole.encode("utf-8", "surrogateescape"))
        self.characters = None if any("\udc80" <= symbol <= "\udcff" for symbol in whole) else len(whole)
        self.unknown = int((self._ids == 0).sum()) if vocabulary.kind == "characters" else 0

    def __len__(self) -> int:
        """Symbols in the text."""
        return len(self._ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids `[stop - start]` of symbols `start` to `stop`."""
        return self._ids[start:stop].copy()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared corpus.  Only its manifest and the blocks read last are in memory."""

    directory: Path
    vocabulary: Vocabulary
    splits: dict[str, Split]  # train, valid, test: those that have any symbols
    fingerprint: str  # in hex; equal for equal ids
    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        """Short name, for people."""
        return self.directory.name

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


def open_corpus(directory: Path | str) -> Corpus:
    """Opens the prepared corpus in `directory`.  Checks only the names and sizes of its files.

    Raises:
      ValueError: it is not a prepared corpus, or a file is missing or has another size.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    dtype = manifest.vocabulary.dtype
    for record in manifest.splits.values():
        for shard in record.shards:
            for name, size in shard_sizes(shard, dtype.itemsize, manifest.block_bytes).items():
                _check_size(directory / name, size)
    splits = {name: Split(directory, split, dtype, manifest.block_bytes) for name, split in manifest.splits.items()}
    return Corpus(directory, manifest.vocabulary, splits, manifest.fingerprint, manifest.sources)


def verify_corpus(directory: Path, progress: Progress | None = None) -> None:
    """Reads all of the prepared corpus in `directory`.  Raises ValueError, naming the shard, if it is damaged."""
    corpus, manifest, done = open_corpus(directory), read_manifest(directory), 0
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
                    f"{directory / shard.file} has sha256 {digest.hexdigest()} instead of {shard.sha256}, which "
                    f"{NAME} has: delete the corpus and prepare it again"
                )
            start, done = stop, done + shard.symbols
            if progress:
                progress("verifying", done, total)


def write_shard(directory: Path, file: str, pieces: Iterable[np.ndarray], block_bytes: int) -> Shard:
    """Writes a shard and its checksums; `pieces` are its ids `[any]`, of the vocabulary's dtype, in order.

    Each of the two files appears whole or not at all.
    """
    digest, checksums, pending, symbols = hashlib.sha256(), bytearray(), b"", 0
    with atomic_write(directory / file) as out:
        for ids in pieces:
            symbols += len(ids)
            data = np.ascontiguousarray(ids).view(np.uint8).data
            digest.update(data)
            out.write(data)
            content = memoryview(pending + bytes(data))
            whole = len(content) - len(content) % block_bytes
            for start in range(0, whole, block_bytes):
                checksums += _checksum(content[start : start + block_bytes])
            pending = bytes(content[whole:])
    if pending:
        checksums += _checksum(pending)
    shard = Shard(file, symbols, digest.hexdigest(), hashlib.sha256(checksums).hexdigest())
    with atomic_write(directory / shard.checksums) as out:
        out.write(checksums)
    return shard


def shard_sizes(shard: Shard, itemsize: int, block_bytes: int) -> dict[str, int]:
    """Returns the names of a shard's two files, data and checksums -> their sizes in bytes."""
    size = shard.symbols * itemsize
    return {shard.file: size, shard.checksums: 4 * -(-size // block_bytes)}


def _checksum(block: bytes | memoryview) -> bytes:
    return zlib.crc32(block).to_bytes(4, "little")


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: delete the corpus and prepare it again") from None
    if found != size:
        raise ValueError(f"{path} has {found} bytes instead of {size}: delete the corpus and prepare it again")
