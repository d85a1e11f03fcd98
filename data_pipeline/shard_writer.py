"""Writes shards: the ids of a piece of a split, and the checksums of their blocks."""

import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.atomic_files import atomic_write
from data_pipeline.manifest import Shard


class ShardWriter:
    """Writes ids to a file as they come, and computes the digests and checksums that go with them."""

    def __init__(self, out: BinaryIO, block_bytes: int) -> None:
        self._out, self._block_bytes = out, block_bytes
        self._digest, self._pending, self.checksums, self.symbols = hashlib.sha256(), b"", bytearray(), 0

    def add(self, ids: np.ndarray) -> None:
        """Writes the next ids `[any]`, of the vocabulary's dtype."""
        self.symbols += len(ids)
        data = np.ascontiguousarray(ids).view(np.uint8).data
        self._digest.update(data)
        self._out.write(data)
        content = memoryview(self._pending + bytes(data))
        whole = len(content) - len(content) % self._block_bytes
        for start in range(0, whole, self._block_bytes):
            self.checksums += _checksum(content[start : start + self._block_bytes])
        self._pending = bytes(content[whole:])

    def finish(self, file: str) -> Shard:
        """Returns the record of the shard, which is called `file`; `checksums` are whole then."""
        if self._pending:
            self.checksums += _checksum(self._pending)
        return Shard(file, self.symbols, self._digest.hexdigest(), hashlib.sha256(self.checksums).hexdigest())


def write_shard(directory: Path, file: str, pieces: Iterable[np.ndarray], block_bytes: int) -> Shard:
    """Writes a shard and its checksums; `pieces` are its ids `[any]`, of the vocabulary's dtype, in order.

    Each of the two files appears whole or not at all.
    """
    with atomic_write(directory / file) as out:
        writer = ShardWriter(out, block_bytes)
        for ids in pieces:
            writer.add(ids)
    shard = writer.finish(file)
    with atomic_write(directory / shard.checksums) as out:
        out.write(writer.checksums)
    return shard


def shard_sizes(shard: Shard, itemsize: int, block_bytes: int) -> dict[str, int]:
    """Returns the names of a shard's two files, data and checksums -> their sizes in bytes."""
    size = shard.symbols * itemsize
    return {shard.file: size, shard.checksums: 4 * -(-size // block_bytes)}


def _checksum(block: bytes | memoryview) -> bytes:
    return zlib.crc32(block).to_bytes(4, "little")
