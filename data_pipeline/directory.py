"""A directory of files as a store of objects, see `data_pipeline.stores`."""

import os
import resource
from pathlib import Path

from data_pipeline.recent import Recent

OPEN_FILES = 64  # at least; each takes a descriptor, and a process often has only 1024


class Directory:
    """A directory of files."""

    is_remote = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: Recent[_OpenFile] = Recent(OPEN_FILES)

    def __reduce__(self) -> tuple:
        return Directory, (self.directory,)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        try:
            file = self._files.get_or(name, lambda: _OpenFile(self.directory / name))
        except FileNotFoundError:
            raise ValueError(f"{self.path(name)} is missing: delete the corpus and prepare it again") from None
        size = file.size() if stop is None else stop - start
        data = file.read(start, size)
        if len(data) != size:
            # Read from a descriptor, a file that has shrunk is short; a map of it would kill the process.
            raise ValueError(f"{self.path(name)} has {file.size()} bytes, not {start + size}: it was changed in use")
        return memoryview(data)

    def size(self, name: str) -> int:
        try:
            return (self.directory / name).stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{self.path(name)} is missing: delete the corpus and prepare it again") from None

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def keep(self, places: int) -> None:
        """Keeps a file open for each place, as far as the process may have so many."""
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        self._files.capacity = max(OPEN_FILES, min(places, allowed))

    def waiting(self) -> str:
        return ""

    def separate(self) -> "Directory":
        return self

    def close(self) -> None:
        pass


class _OpenFile:
    """A file that stays open, and is closed when nobody reads it any more."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        # Streams read at random: the system's read-ahead, of megabytes, would cost more than the block itself.
        if hasattr(os, "posix_fadvise"):  # not on a Mac
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read(self, start: int, count: int) -> bytes:
        """Returns `count` bytes from `start` on, fewer at the end of the file."""
        data = os.pread(self._descriptor, count, start)
        while 0 < len(data) < count and (more := os.pread(self._descriptor, count - len(data), start + len(data))):
            data += more
        return data
