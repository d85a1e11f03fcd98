"""Finds texts in object stores and on web servers, and reads them in large ranges, one ahead."""

import concurrent.futures
import fnmatch
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.build.documents import kind_of_name
from data_pipeline.build.sources import CORPUS, Text, TextFile
from data_pipeline.manifest import NAME, corpora_among
from data_pipeline.stores import Missing, Remote, checked_url

RANGE = 8 << 20  # bytes of a request
MAGIC = "*?["


def find_remote(spec: str, patience: float) -> Text:
    """Finds the text of an object, a directory or a glob of an object store, in the order of the names.

    Of a web server, an object only: it cannot be listed.

    Raises:
      ValueError: there is no such object, or it may not be listed.
      Unreachable: the store does not answer.
    """
    url = checked_url(spec)
    scheme, _, rest = url.partition("://")
    parts = rest.split("/")
    plain = next((n for n, part in enumerate(parts) if set(part) & set(MAGIC)), len(parts))
    if plain == 0:
        raise ValueError(f"{spec} has a wildcard in the name of the bucket: name one bucket")
    found, corpora = [] if plain < len(parts) else _object(scheme, parts, patience), set[str]()
    if found:
        base, name = found[0].real.rpartition("/")[0], parts[-1].partition(".")[0]
    else:
        if scheme in ("http", "https"):
            raise ValueError(f"{spec} would have to be listed, which web servers cannot be: name one file")
        base, name = f"{scheme}://{'/'.join(parts[:plain])}", parts[plain - 1]
        found, corpora = _below(base, parts[plain:], patience)
    if "" in corpora or any(file.name == NAME for file in found):
        raise ValueError(f"{base} is a prepared corpus, not text: name it with --corpus")
    if not found:
        raise ValueError(f"{spec} has no files: name an object, a directory or a quoted glob")
    return Text(name, tuple(found), left_out=tuple(f"{folder}, {CORPUS}" for folder in sorted(corpora)))


def names_text(url: str) -> bool:
    """Returns whether a URL names a text by itself: by a wildcard, or an ending such as .txt or .jsonl.gz."""
    last = url.rpartition("/")[2]
    return bool(set(url) & set(MAGIC)) or last.endswith(".txt") or not kind_of_name(last).is_plain


def _object(scheme: str, parts: list[str], patience: float) -> list[TextFile]:
    """Returns the object of that name, if there is one."""
    if len(parts) < 2:
        return []
    base = f"{scheme}://{'/'.join(parts[:-1])}"
    try:
        listed = _store(base, patience).stat(parts[-1])
    except Missing:
        if scheme in ("http", "https"):
            raise
        return []
    return [_file(base, *listed)]


def _below(base: str, pattern: Sequence[str], patience: float) -> tuple[list[TextFile], set[str]]:
    """Returns the objects below `base` that match `pattern`, by parts of their names; without one, all.

    And the folders of prepared corpora whose objects are left out of them.
    """
    files, corpora = [], set()
    listed = sorted(_store(base, patience).objects())
    with_shards = corpora_among({name for name, _, _ in listed})
    for name, size, etag in listed:
        parts, folder = name.split("/"), name.rpartition("/")[0]
        hidden = not pattern and any(part.startswith(".") for part in parts)
        if size and not hidden and (not pattern or matches(parts, pattern)):
            if folder in with_shards:
                corpora.add(folder)
            else:
                files.append(_file(base, name, size, etag))
    return files, corpora


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Returns whether a name matches a glob, part by part; `**` stands for any number of parts.

    A part that begins with a dot is matched by one that does so alone, as on a disk.
    """
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    if pattern[0] == "**":
        return matches(parts, pattern[1:]) or (not hidden and matches(parts[1:], pattern))
    return not hidden and fnmatch.fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def _file(base: str, name: str, size: int, etag: str) -> TextFile:
    url = f"{base}/{name}"
    return TextFile(name, Path(name), (size,), url, (url,), etag=etag)


@functools.lru_cache(8)
def _store(base: str, patience: float) -> Remote:
    return Remote(base, patience)


class Ranges(io.RawIOBase):
    """An object of a store as a file; the range after the one that is read is asked for meanwhile.

    Raises ValueError if the object was changed since it was found.
    """

    def __init__(self, file: TextFile, patience: float) -> None:
        assert file.is_remote
        base, _, self._name = file.real.rpartition("/")
        self._store, self._size, self._etag = _store(base, patience), file.bytes, file.etag or ""
        self._position = 0
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "ahead")
        self._ahead: tuple[int, concurrent.futures.Future[memoryview]] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, stop = self._position, min(self._position + len(buffer), self._size)
        if start >= stop:
            return 0
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] == start:
            data = ahead[1].result()[: stop - start]
        else:
            data = self._read(start, stop)
        self._position = start + len(data)
        if (after := min(self._position + RANGE, self._size)) > self._position and len(buffer) >= RANGE:
            self._ahead = self._position, self._pool.submit(self._read, self._position, after)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _read(self, start: int, stop: int) -> memoryview:
        return self._store.read(self._name, start, stop, self._etag)
