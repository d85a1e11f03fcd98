"""Reads the bytes of a split's shards; every block is checked, whatever store or cache it comes from."""

import hashlib
import logging
import zlib

import numpy as np

from data_pipeline.block_cache import BlockCache, extent_blocks
from data_pipeline.manifest import NAME, Shard
from data_pipeline.recent import Recent
from data_pipeline.stores import Store

PLACES = 64  # places that are read in turn, unless said otherwise
RANGE_BYTES = 4 * 1024 * 1024  # most of one request, about
ATTEMPTS = 3  # readings of a damaged block from a remote store
REMEDY = "delete the corpus and prepare it again"

_log = logging.getLogger("data_pipeline")


class Blocks:
    """The bytes of shards.  Thread-safe, and can be pickled.

    Attributes:
      store: where the shards lie.
      range_bytes: one call of `fill` reads at most up to the next multiple of this many bytes of a shard.
    """

    def __init__(
        self, store: Store, shards: tuple[Shard, ...], itemsize: int, block_bytes: int, cache: BlockCache | None = None
    ) -> None:
        self.store, self._shards, self._itemsize, self._block_bytes = store, shards, itemsize, block_bytes
        self._cache = cache
        extent = extent_blocks(block_bytes) * block_bytes
        self.range_bytes = extent * max(1, RANGE_BYTES // extent)
        self._checksums: Recent[np.ndarray] = Recent(PLACES)  # by shard
        self._kept: Recent[memoryview] = Recent(
            PLACES
        )  # the last block of what was read: the next reading begins there

    def __reduce__(self) -> tuple:
        return Blocks, (self.store, self._shards, self._itemsize, self._block_bytes, self._cache)

    def separate(self) -> "Blocks":
        """Returns the same blocks, memory and cache for a reader that can be closed apart from others."""
        other = object.__new__(Blocks)  # copy.copy would copy neither memory nor cache, by __reduce__
        other.__dict__ |= self.__dict__
        other.store = self.store.separate()
        return other

    def keep(self, places: int) -> None:
        """Keeps a block and the checksums of a shard in memory for each of the places that are read in turn."""
        self._kept.capacity, self._checksums.capacity = places, max(PLACES, places)
        self.store.keep(places)

    def fill(self, number: int, start: int, out: memoryview) -> None:
        """Fills `out` with the bytes of shard `number` from `start` on.

        Raises:
          ValueError: they are damaged; the message has the file and the byte offset.
        """
        stop, position = start + len(out), start
        while position < stop:
            index, offset = divmod(position, self._block_bytes)
            content = self._kept.get((number, index))
            if content is None:
                last = -(-stop // self._block_bytes)
                content = self._read(number, index, last)
                if index + -(-len(content) // self._block_bytes) >= last:
                    end = (last - 1 - index) * self._block_bytes
                    # A copy, as the whole would stay in memory with a part of it.
                    self._kept.put((number, last - 1), memoryview(bytes(content[end : end + self._block_bytes])))
            part = content[offset : offset + stop - position]
            out[position - start : position - start + len(part)] = part
            position += len(part)

    def _read(self, number: int, first: int, last: int) -> memoryview:
        """Returns bytes from block `first` on: up to `last`; fewer if the cache has only those; or more."""
        if self._cache is None or self._cache.off:
            return self._fetch(number, first, last)
        file, extent = self._shards[number].file, self._cache.extent
        place = first // extent
        wanted = [self._bounds(number, block)[0] for block in (first, min(last, (place + 1) * extent))]
        begin = self._bounds(number, place * extent)[0]
        data = self._cache.get(file, place, wanted[0] - begin, wanted[1] - begin)
        if data is not None:
            if not self._damaged(number, first, memoryview(data)):
                return memoryview(data)
            self._cache.drop(file, place)
        end = place + 1
        while end * extent < last and not self._cache.has(file, end):
            end += 1
        content = self._fetch(number, place * extent, end * extent)
        step = extent * self._block_bytes
        for missing in range(place, end):
            self._cache.put(file, missing, content[(missing - place) * step : (missing + 1 - place) * step])
        return content[wanted[0] - begin :]

    def _fetch(self, number: int, first: int, last: int) -> memoryview:
        """Returns blocks `first` to `last` of a shard from the store, checked."""
        shard = self._shards[number]
        start, stop = self._bounds(number, first)[0], self._bounds(number, last - 1)[1]
        content = self.store.read(shard.file, start, stop)
        if damaged := self._damaged(number, first, content):
            repaired = bytearray(content)
            for index in damaged:
                block = (index - first) * self._block_bytes
                bad = content[block : block + self._block_bytes]
                repaired[block : block + len(bad)] = self._fetch_again(number, index, bytes(bad))
            content = memoryview(repaired)
        return content

    def _fetch_again(self, number: int, index: int, bad: bytes) -> memoryview:
        """Returns block `index`, of which the store gave `bad`; raises ValueError if it does not get better."""
        path, bounds = self.store.path(self._shards[number].file), self._bounds(number, index)
        where = f"the block at byte {bounds[0]} does not match its checksum"
        if not self.store.is_remote:
            raise ValueError(f"{path} is damaged: {where}; {REMEDY}")
        same = True
        for _ in range(ATTEMPTS - 1):
            content = self.store.read(self._shards[number].file, *bounds)
            if not self._damaged(number, index, content):
                _log.warning("%s: %s as it came, and does when fetched again", path, where)
                return content
            same = same and content == bad
        if same:
            raise ValueError(f"{path} is damaged at the source: {where}, {ATTEMPTS} times alike; upload it again")
        raise ValueError(f"{path} is damaged on the way: {where}, {ATTEMPTS} times differently; look at the network")

    def _damaged(self, number: int, first: int, content: memoryview) -> list[int]:
        """Returns the blocks of `content`, which begins with block `first`, that do not match their checksums."""
        found = [
            zlib.crc32(content[start : start + self._block_bytes])
            for start in range(0, len(content), self._block_bytes)
        ]
        wanted = self._checksums.get_or(number, lambda: self._fetch_checksums(number))[first : first + len(found)]
        return [first + int(index) for index in np.flatnonzero(wanted != np.array(found, np.uint32))]

    def _fetch_checksums(self, number: int) -> np.ndarray:
        """Returns the checksums of a shard, uint32 [blocks], verified by the manifest."""
        shard = self._shards[number]
        size = 4 * -(-shard.symbols * self._itemsize // self._block_bytes)
        for _ in range(ATTEMPTS if self.store.is_remote else 1):
            data = self.store.read(shard.checksums, 0, size)
            if hashlib.sha256(data).hexdigest() == shard.checksums_sha256:
                return np.frombuffer(data, "<u4")
        raise ValueError(
            f"{self.store.path(shard.file)} may be of another text: {shard.checksums} is not the file that {NAME} "
            f"tells of; {REMEDY}"
        )

    def _bounds(self, number: int, index: int) -> tuple[int, int]:
        """Returns the first byte of a block, and the first one after it; at most the end of the shard."""
        size = self._shards[number].symbols * self._itemsize
        return min(index * self._block_bytes, size), min((index + 1) * self._block_bytes, size)
