"""Texts to be prepared: files found, hashed, and read as one long sequence of bytes."""

import bisect
import collections
import concurrent.futures
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.atomic_files import atomic_write, expand_user, named_in_errors, sealed, unsealed
from data_pipeline.manifest import has_shards, is_prepared
from data_pipeline.progress import Progress
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
    real: str  # its path without links
    identity: tuple[object, ...]  # the same for all names of one file, links and hard links
    start: int = 0  # bytes at its beginning that are not text: a byte-order mark
    ending: bytes = b""  # what is put after it

    @property
    def bytes(self) -> int:
        return self.stamp[0]

    @property
    def text_bytes(self) -> int:
        """Bytes of the text that it makes, with its ending."""
        return self.bytes - self.start + len(self.ending)

    def extent(self, start: int, stop: int) -> "Extent":
        """Bytes `start` to `stop` of those."""
        end = self.bytes - self.start  # where the ending begins
        ending = self.ending[max(start - end, 0) : max(stop - end, 0)]
        return Extent(self.path, self.start + min(start, end), self.start + min(stop, end), ending)


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
    """Files one after the other."""

    name: str
    files: tuple[TextFile, ...]
    folders: frozenset[str] = frozenset()  # real paths of those that were looked through for files
    repeated: tuple[tuple[str, str], ...] = ()  # names left out, and the name under which the same is there

    @functools.cached_property
    def starts(self) -> list[int]:
        """Where each file starts in the text, in bytes; and last, where the text ends."""
        return list(itertools.accumulate((file.text_bytes for file in self.files), initial=0))

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
            low, high = max(start - offset, 0), min(stop - offset, file.text_bytes)
            if low < high:
                found.append(file.extent(low, high))
        return found

    def check_unchanged(self) -> None:
        """Raises ValueError where a file is not what it was when the text was found."""
        for file in self.files:
            if _stamp(_stat(file.path)) != file.stamp:
                raise ValueError(f"{file.path} was changed while it was prepared: start again when it is complete")


def find_text(spec: str) -> Text:
    """The text of a file, of a directory or of a glob.

    Of a directory, all regular files below it are taken, in the order of their relative names, without those whose name
    or whose folder's name begins with a dot.  Links are followed.  What is found under several names is taken once: a
    folder under the first one met, a file under the first one in that order.

    Raises:
      ValueError: there is no such file, nothing in it, or something that cannot be read.
    """
    path = expand_user(spec)
    repeated: dict[Path, Path] = {}
    folders: dict[str, Path] = {}
    if path.is_dir():
        base, paths = path, list(_walk(path, folders, repeated))
    elif path.exists():
        base, paths = path.parent, [(path, os.path.realpath(path))]
    elif glob.has_magic(spec):
        found = set(map(Path, glob.glob(str(path), recursive=True)))
        paths = [(one, os.path.realpath(one)) for one in found if _is_file(one)]
        base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    else:
        raise ValueError(f"{spec} does not exist: name a text file, a directory or a quoted glob")
    if not paths:
        raise ValueError(f"{spec} has no files: name a text file, a directory or a quoted glob")
    if is_prepared(path):
        raise ValueError(f"{spec} is a prepared corpus, not text: name it with --corpus")
    if has_shards(path):
        raise ValueError(f"{spec} has shards but no manifest.json: it is not whole, prepare it again")
    files: dict[object, TextFile] = {}
    for file in sorted_files(base, paths):
        first = files.setdefault(file.identity, file)
        if first is not file:
            repeated[file.path] = first.path
    name = path.stem if base == path.parent else base.name
    left_out = (
        (one.relative_to(base).as_posix(), first.relative_to(base).as_posix()) for one, first in repeated.items()
    )
    text = Text(name, tuple(files.values()), frozenset(folders), tuple(left_out))
    if not text.bytes:
        raise ValueError(f"{spec} is empty: there is no text to prepare")
    return text


def sorted_files(base: Path, paths: Iterable[tuple[Path, str]]) -> list[TextFile]:
    """The files of `paths`, each with its real path, sorted by their names relative to `base`."""
    named = sorted((path.relative_to(base).as_posix(), path, real) for path, real in paths)
    files = []
    for relative, path, real in named:
        found = _stat(path)
        # The number of a file alone is not to be trusted: some file systems give the same one to several.
        identity = (found.st_dev, found.st_ino) if found.st_nlink > 1 else (real,)
        files.append(TextFile(relative, path, _stamp(found), real, identity))
    return files


def hash_files(files: list[TextFile], memo: Path, workers: int, progress: Progress | None) -> list[str]:
    """The sha256, in hex, of each file's content.

    They are kept in the directory `memo`, so that nothing is read when the same files, unchanged, are asked for again.
    """
    lock, done, total = threading.Lock(), 0, sum(file.bytes for file in files)

    def add(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress:
                progress("hashing", done, total)

    def hash_one(file: TextFile) -> str:
        digest = hashlib.sha256()
        for chunk in Extent(file.path, 0, file.bytes).read():
            digest.update(chunk)
            add(len(chunk))
        return digest.hexdigest()

    def hash_all() -> list[str]:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            return list(pool.map(hash_one, files))

    return remembered(memo, files, [], hash_all)


def remembered(memo: Path, files: list[TextFile], how: list[Any], find: Callable[[], Any]) -> Any:
    """What `find()` gives, which is json; kept in the directory `memo` by the files' paths and stamps, and `how`."""
    stamps = [*how, *([file.real, *file.stamp] for file in files)]
    kept = memo / f"{hashlib.sha256(canonical_json(stamps)).hexdigest()}.json"
    known = unsealed(kept)
    if known is not None:
        return json.loads(known)
    found = find()
    memo.mkdir(parents=True, exist_ok=True)
    with atomic_write(kept) as out:
        out.write(sealed(canonical_json(found)))
    return found


def hash_file(path: Path, algorithm: str) -> str:
    """The digest of a file's content, in hex; `algorithm` is one of hashlib's names."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def refuse_unreadable(error: OSError) -> NoReturn:
    """Raises ValueError: of a text no part is left out in silence."""
    raise ValueError(f"{error.filename} cannot be read ({error.strerror}): make it readable or move it away") from None


def _walk(directory: Path, folders: dict[str, Path], repeated: dict[Path, Path]) -> Iterator[tuple[Path, str]]:
    """Every regular file below `directory`, and its real path.

    Links are followed.  A real folder is entered once, and goes to `folders` with the name that it was entered by; its
    other names go to `repeated`.  So links end that lead in a circle, or to each other.
    """
    waiting = collections.deque([(directory, os.path.realpath(directory))])
    while waiting:
        folder, real = waiting.popleft()
        first = folders.setdefault(real, folder)
        if first is not folder:
            repeated[folder] = first
            continue
        try:
            # A folder itself comes before links to it.
            entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name))
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = folder / entry.name
                where = os.path.realpath(path) if entry.is_symlink() else os.path.join(real, entry.name)
                if entry.is_dir():
                    waiting.append((path, where))
                elif _is_file(path):
                    yield path, where
        except OSError as error:
            refuse_unreadable(error)


def _is_file(path: Path) -> bool:
    """Unlike `os.path.isfile`, does not say no of what it may not look at."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:  # a link to nothing
        return False
    except OSError as error:
        refuse_unreadable(error)


def _stat(path: Path) -> os.stat_result:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a regular file: name a text file, a directory or a quoted glob")
    return found


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
