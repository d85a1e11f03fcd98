"""A bounded cache on disk of what was read from an object store.

Extents, runs of blocks, are immutable files: written beside and renamed, read by descriptor, deleted at will.  So
processes share a cache without locks, counters or memory: what vanished or is torn is a miss, and whoever reads checks
the blocks.  The cache never holds an original.
"""

import contextlib
import logging
import os
import re
import secrets
import threading
import time
from pathlib import Path

EXTENT_BYTES = 256 * 1024  # about; a whole number of blocks
SWEPT_AFTER = 16  # a process looks at the whole cache when it has written this part of the limit
KEPT = 0.9  # part of the limit that is left by a sweep
TOUCHED_EVERY = 60.0  # seconds
ABANDONED = 3600.0  # seconds after which an unfinished file is of a killed process
_ours = re.compile(r"[A-Za-z0-9_-]+\.ids\.\d+-\d+(\.[0-9a-f]{8}\.new)?")  # the only names that are ever deleted

_log = logging.getLogger("data_pipeline")


def extent_blocks(block_bytes: int) -> int:
    """Returns the number of blocks of an extent."""
    return max(1, EXTENT_BYTES // block_bytes)


class BlockCache:
    """The extents of one corpus, in a directory that all corpora share.  Thread-safe, and can be pickled."""

    def __init__(self, directory: Path, fingerprint: str, limit: int, block_bytes: int) -> None:
        """Opens the cache; makes no directory before there is something to keep.

        Args:
          directory: that of the extents of all corpora.
          fingerprint: identity of this corpus.
          limit: bytes that all extents in `directory` may take, approximately.
          block_bytes: size of a block.
        """
        self._arguments = directory, fingerprint, limit, block_bytes
        self.directory, self.limit, self._block_bytes = directory, limit, block_bytes
        self._own = directory / fingerprint[:16]
        self.extent = extent_blocks(block_bytes)
        self.off = False
        self._unswept = limit  # bytes written since the last sweep; the first one comes with the first extent
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return BlockCache, self._arguments

    def require(self, places: int) -> None:
        """Raises ValueError if the cache has no room for two extents of every place that is read."""
        needed = 2 * places * self.extent * self._block_bytes
        if self.limit < needed:
            raise ValueError(
                f"cache_bytes={self.limit} is less than {needed}, two extents of each of {places} streams: give at "
                "least that, or --cache_bytes=0 for no cache"
            )

    def has(self, file: str, number: int) -> bool:
        """Returns whether there is a file of extent `number` of a shard."""
        return not self.off and self._path(file, number).exists()

    def get(self, file: str, number: int, start: int, stop: int) -> bytes | None:
        """Returns bytes `start` to `stop` of extent `number` of a shard; None if they are not there."""
        if self.off:
            return None
        try:
            descriptor = os.open(self._path(file, number), os.O_RDONLY)
        except OSError:
            return None
        try:
            data = os.pread(descriptor, stop - start, start)
            if time.time() - os.fstat(descriptor).st_mtime > TOUCHED_EVERY:
                os.utime(descriptor)
        except OSError:  # a failing disk, or one that cannot be written: the store has the original
            return None
        finally:
            os.close(descriptor)
        return data if len(data) == stop - start else None

    def put(self, file: str, number: int, data: memoryview) -> None:
        """Keeps an extent.  A disk that does not take it turns the cache off, for this process."""
        if self.off:
            return
        path = self._path(file, number)
        beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
        try:
            try:
                self._own.mkdir(parents=True, exist_ok=True)
                # Not synced to disk: what is torn by a loss of power does not match its checksums.
                with open(beside, "wb") as out:
                    out.write(data)
                os.replace(beside, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    beside.unlink()
            with self._lock:
                self._unswept += len(data)
                due = self._unswept >= self.limit // SWEPT_AFTER
                self._unswept = 0 if due else self._unswept
            if due:
                self.sweep()
        except FileNotFoundError:
            pass  # somebody deletes the cache at this moment
        except OSError as error:
            with self._lock:
                said, self.off = self.off, True
            if not said:
                _log.warning("%s is used no more: %s", self.directory, error.strerror or error)

    def drop(self, file: str, number: int) -> None:
        """Deletes a damaged extent."""
        with contextlib.suppress(OSError):
            self._path(file, number).unlink()

    def sweep(self) -> None:
        """Deletes the extents used least recently, of all corpora, if all together are beyond the limit."""
        found, now = [], time.time()
        for folder in _entries(self.directory):
            for entry in _entries(folder.path) if folder.is_dir(follow_symlinks=False) else []:
                if not _ours.fullmatch(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(".new") and now - status.st_mtime > ABANDONED:
                        os.unlink(entry.path)
                    else:
                        found.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        if total <= self.limit:
            return
        for _, size, path in sorted(found):
            if total <= KEPT * self.limit:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size

    def _path(self, file: str, number: int) -> Path:
        # With the size of the extent: corpora of equal ids may have other blocks.
        return self._own / f"{file}.{number}-{self.extent * self._block_bytes}"


def _entries(directory: Path | str) -> list[os.DirEntry]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
