"""Texts to be prepared: files found, hashed, and read as one long sequence of bytes."""

import bisect
import concurrent.futures
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.files import Meter, Progress, at_home, named_in_errors, sealed, unsealed, written_whole
from data_pipeline.manifest import has_shards, is_prepared
from data_pipeline.vocabulary import canonical_json

CHUNK = 1 << 20  # bytes read at a time

# Calls a function with each of the items, in parallel, and yields the results in order.
ParallelMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of a text, and what it looked like when it was found."""

    name: str  # relative to the input
    path: Path
    stamp: tuple[int, ...]  # size, modification and change time in ns, inode: changes when the content does

    @property
    def bytes(self) -> int:
        return self.stamp[0]


@dataclasses.dataclass(frozen=True)
class Extent:
    """A stretch of one file, and what is put after it."""

    path: Path
    start: int
    stop: int
    ending: bytes = b""

    def read(self) -> Iterator[bytes]:
        """The bytes, in chunks.  Raises ValueError where the file has become shorter."""
        with named_in_errors(self.path), self.path.open("rb") as file:
            file.seek(self.start)
            position = self.start
            while position < self.stop:
                chunk = file.read(min(CHUNK, self.stop - position))
                if not chunk:
                    raise ValueError(f"{self.path} became shorter while it was read: start again when it is complete")
                position += len(chunk)
                yield chunk
        if self.ending:
            yield self.ending


@dataclasses.dataclass(frozen=True)
class Text:
    """Files one after the other, each followed by `ending`."""

    name: str
    files: tuple[TextFile, ...]
    ending: bytes = b""
    folder: Path | None = None  # of which the files are all those below it

    @functools.cached_property
    def starts(self) -> list[int]:
        """Where each file starts in the text, in bytes; and last, where the text ends."""
        return list(itertools.accumulate((file.bytes + len(self.ending) for file in self.files), initial=0))

    @property
    def bytes(self) -> int:
        return self.starts[-1]

    def extents(self, start: int, stop: int) -> list[Extent]:
        """Bytes `start` to `stop` of the text, as stretches of its files."""
        found = []
        first = bisect.bisect_right(self.starts, start) - 1
        for file, offset in zip(self.files[first:], self.starts[first:], strict=False):
            if offset >= stop:
                break
            low, high = max(start - offset, 0), min(stop - offset, file.bytes + len(self.ending))
            ending = self.ending[max(low - file.bytes, 0) : max(high - file.bytes, 0)]
            if low < high:
                found.append(Extent(file.path, min(low, file.bytes), min(high, file.bytes), ending))
        return found

    def check_unchanged(self) -> None:
        """Raises ValueError where a file is not what it was when the text was found."""
        for file in self.files:
            if _stamp(file.path) != file.stamp:
                raise ValueError(f"{file.path} was changed while it was prepared: start again when it is complete")


def find_text(spec: str) -> Text:
    """The text of a file, of a directory or of a glob.

    Of a directory, all regular files below it are taken, in the order of their relative names, without those whose name
    or whose folder's name begins with a dot.

    Raises:
      ValueError: there is no such file, nothing in it, or something that cannot be read.
    """
    path = at_home(spec)
    if path.is_dir():
        base, paths = path, list(_walk(path))
    elif path.exists():
        base, paths = path.parent, [path]
    elif glob.has_magic(spec):
        paths = [Path(found) for found in glob.glob(str(path), recursive=True) if os.path.isfile(found)]
        base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    else:
        raise ValueError(f"{spec} does not exist: name a text file, a directory or a quoted glob")
    if not paths:
        raise ValueError(f"{spec} has no files: name a text file, a directory or a quoted glob")
    if is_prepared(path):
        raise ValueError(f"{spec} is a prepared corpus, not text: name it with --corpus")
    if has_shards(path):
        raise ValueError(f"{spec} has shards but no manifest.json: it is not whole, prepare it again")
    name = path.stem if base == path.parent else base.name
    text = make_text(name, base, paths, folder=path if base == path else None)
    if not text.bytes:
        raise ValueError(f"{spec} is empty: there is no text to prepare")
    return text


def make_text(name: str, base: Path, paths: Iterable[Path], ending: bytes = b"", folder: Path | None = None) -> Text:
    """The text of `paths`, sorted by their names relative to `base`."""
    named = sorted((path.relative_to(base).as_posix(), path) for path in paths)
    return Text(name, tuple(TextFile(relative, path, _stamp(path)) for relative, path in named), ending, folder)


def hash_files(files: list[TextFile], memo: Path, workers: int, progress: Progress | None) -> list[str]:
    """The sha256, in hex, of each file's content.

    They are kept in the directory `memo` under a digest of the files' paths and stamps, so that nothing is read when
    the same files, unchanged, are asked for again.
    """
    stamps = [[os.fspath(file.path.resolve()), *file.stamp] for file in files]
    kept = memo / f"{hashlib.sha256(canonical_json(stamps)).hexdigest()}.json"
    known = unsealed(kept)
    if known is not None:
        return json.loads(known)
    meter = Meter(progress, "hashing", sum(file.bytes for file in files))

    def hash_one(file: TextFile) -> str:
        digest = hashlib.sha256()
        for chunk in Extent(file.path, 0, file.bytes).read():
            digest.update(chunk)
            meter.add(len(chunk))
        return digest.hexdigest()

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        digests = list(pool.map(hash_one, files))
    memo.mkdir(parents=True, exist_ok=True)
    with written_whole(kept) as out:
        out.write(sealed(canonical_json(digests)))
    return digests


def hash_file(path: Path, algorithm: str) -> str:
    """The digest of a file's content, in hex; `algorithm` is one of hashlib's names."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def refuse_unreadable(error: OSError) -> NoReturn:
    """Raises ValueError: of a text no part is left out in silence."""
    raise ValueError(f"{error.filename} cannot be read ({error.strerror}): make it readable or move it away") from None


def _walk(directory: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(directory, onerror=refuse_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and _is_file(Path(folder, name)):
                yield Path(folder, name)


def _is_file(path: Path) -> bool:
    """Unlike `os.path.isfile`, does not say no of what it may not look at."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:  # a link to nothing
        return False
    except OSError as error:
        refuse_unreadable(error)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a regular file: name a text file, a directory or a quoted glob")
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
