"""Finds the files of a text, and reads them as one long sequence of bytes."""

import bisect
import collections
import dataclasses
import functools
import glob
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.atomic_files import expand_user, named_in_errors
from data_pipeline.build.documents import PLAIN, Kind
from data_pipeline.manifest import corpora_among, has_shards, is_prepared

CHUNK = 1 << 20  # bytes read at a time
CORPUS = "a prepared corpus"

# Calls a function with each item, in parallel, and yields the results in order.
ParallelMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of a text, with its size and times when it was found."""

    name: str  # relative to the input
    path: Path  # of an object of a store only its name
    stamp: tuple[int, ...]  # size, modification and change time in ns, inode: changes when the content does
    real: str  # its path without links, or the URL of an object of a store
    identity: tuple[object, ...]  # the same for all names of a file, links and hard links
    start: int = 0  # leading bytes that are not text: a byte-order mark
    ending: bytes = b""  # added after it
    separated: int = 0  # leading bytes of the separator of files with which it ends
    kind: Kind = PLAIN
    etag: str | None = None  # of an object of a store
    span: tuple[int, int] | None = None  # bytes of the file that are meant, if not all

    @property
    def is_remote(self) -> bool:
        return self.etag is not None

    @property
    def shown(self) -> str:
        """Returns its name for messages."""
        return self.real if self.is_remote else str(self.path)

    @property
    def bytes(self) -> int:
        return self.stamp[0]

    @property
    def text_bytes(self) -> int:
        """Returns the number of bytes of text in it, with its ending."""
        return self.bytes - self.start + len(self.ending)

    def extent(self, start: int, stop: int) -> "Extent":
        """Returns bytes `start` to `stop` of these."""
        end = self.bytes - self.start  # where the ending begins
        ending = self.ending[max(start - end, 0) : max(stop - end, 0)]
        return Extent(self.path, self.start + min(start, end), self.start + min(stop, end), ending)


@dataclasses.dataclass(frozen=True)
class Extent:
    """A range of bytes of one file, and an ending to add."""

    path: Path
    start: int
    stop: int
    ending: bytes = b""

    def read(self) -> Iterator[bytes]:
        """Yields the bytes, in chunks.  Raises ValueError if the file has become shorter."""
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
    """A sequence of files."""

    name: str
    files: tuple[TextFile, ...]
    folders: frozenset[str] = frozenset()  # real paths of the folders searched
    repeated: tuple[tuple[str, str], ...] = ()  # names left out, with the name under which the same file is included
    left_out: tuple[str, ...] = ()  # others left out, and why: broken links, prepared corpora, what was not chosen

    @functools.cached_property
    def starts(self) -> list[int]:
        """Returns the offset of each file in the text, in bytes; and last, the size of the text."""
        return list(itertools.accumulate((file.text_bytes for file in self.files), initial=0))

    @property
    def bytes(self) -> int:
        return self.starts[-1]

    def extents(self, start: int, stop: int) -> list[Extent]:
        """Returns bytes `start` to `stop` of the text, as extents of its files."""
        found = []
        first = bisect.bisect_right(self.starts, start) - 1
        for number in range(first, len(self.files)):
            file, offset = self.files[number], self.starts[number]
            if offset >= stop:
                break
            low, high = max(start - offset, 0), min(stop - offset, file.text_bytes)
            if low < high:
                found.append(file.extent(low, high))
        return found

    def check_unchanged(self) -> None:
        """Raises ValueError if a file has changed since the text was found."""
        for file in self.files:
            if not file.is_remote and _stamp(_stat(file.path)) != file.stamp:
                raise ValueError(f"{file.path} was changed while it was prepared: start again when it is complete")


class NoSuchText(ValueError):
    """There is no file of that name."""


def find_text(spec: str) -> Text:
    """Finds the text of a file, a directory or a glob.

    The text of a directory is all regular files below it, in the order of their relative names, except those whose name
    or folder begins with a dot, and those of prepared corpora.  Links are followed.  A file or folder with several
    names is taken once: a folder under the first name met, a file under the first name in that order.

    Raises:
      NoSuchText: there is no such file.
      ValueError: it is empty, or something cannot be read.
    """
    path = expand_user(spec)
    repeated: dict[Path, Path] = {}
    folders: dict[str, Path] = {}
    left_out: dict[Path, str] = {}
    if path.is_dir():
        base, paths = path, list(_walk(path, folders, repeated, left_out))
    elif path.exists():
        base, paths = path.parent, [(path, os.path.realpath(path))]
    elif glob.has_magic(spec):
        found = set(map(Path, glob.glob(str(path), recursive=True)))
        folders_found = sorted({one.parent for one in found if _is_file(one)})
        left_out = {folder: CORPUS for folder in folders_found if has_shards(folder)}
        paths = [(one, os.path.realpath(one)) for one in found if one.parent not in left_out and _is_file(one)]
        base = glob_base(path)
    else:
        raise NoSuchText(f"{spec} does not exist: name a text file, a directory or a quoted glob")
    if is_prepared(path):
        raise ValueError(f"{spec} is a prepared corpus, not text: name it with --corpus")
    if has_shards(path):
        raise ValueError(f"{spec} has shards but no manifest.json: it is not whole, prepare it again")
    if not paths:
        but = f" but those of {CORPUS}" if CORPUS in left_out.values() else ""
        raise ValueError(f"{spec} has no files{but}: name a text file, a directory or a quoted glob")
    files: dict[object, TextFile] = {}
    for file in sorted_files(base, paths):
        first = files.setdefault(file.identity, file)
        if first is not file:
            repeated[file.path] = first.path
    name = path.stem if base == path.parent else base.name
    again = ((one.relative_to(base).as_posix(), first.relative_to(base).as_posix()) for one, first in repeated.items())
    others = (f"{one.relative_to(base).as_posix()}, {what}" for one, what in left_out.items())
    text = Text(name, tuple(files.values()), frozenset(folders), tuple(again), tuple(others))
    if not text.bytes:
        raise ValueError(f"{spec} is empty: there is no text to prepare")
    return text


def glob_base(pattern: Path) -> Path:
    """Returns the part of a glob before the first wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def sorted_files(base: Path, paths: Iterable[tuple[Path, str]]) -> list[TextFile]:
    """Returns the files of `paths`, each with its real path, sorted by their names relative to `base`."""
    named = sorted((path.relative_to(base).as_posix(), path, real) for path, real in paths)
    return [found_file(relative, path, real) for relative, path, real in named]


def found_file(name: str, path: Path, real: str) -> TextFile:
    """Returns the file at `path`, which is `real` without links, by its name relative to the input."""
    found = _stat(path)
    # The inode alone is not reliable: some file systems give several files the same one.
    identity = (found.st_dev, found.st_ino) if found.st_nlink > 1 else (real,)
    return TextFile(name, path, _stamp(found), real, identity)


def refuse_unreadable(error: OSError) -> NoReturn:
    """Raises ValueError: no part of a text is left out silently."""
    raise ValueError(f"{error.filename} cannot be read ({error.strerror}): make it readable or move it away") from None


def _walk(
    directory: Path, folders: dict[str, Path], repeated: dict[Path, Path], left_out: dict[Path, str]
) -> Iterator[tuple[Path, str]]:
    """Yields every regular file below `directory`, and its real path.

    Links are followed.  A real folder is entered once, and added to `folders` with the name by which it was entered;
    its other names are added to `repeated`.  So circular links end.  Links to nothing, and folders that are prepared
    corpora, are added to `left_out`.
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
            if corpora_among({entry.name for entry in entries}):
                left_out[folder] = CORPUS
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = folder / entry.name
                where = os.path.realpath(path) if entry.is_symlink() else os.path.join(real, entry.name)
                if entry.is_dir():
                    waiting.append((path, where))
                elif _is_file(path):
                    yield path, where
                elif entry.is_symlink() and not path.exists():
                    left_out[path] = "a link to nothing"
        except OSError as error:
            refuse_unreadable(error)


def _is_file(path: Path) -> bool:
    """Returns whether a path is a regular file; unlike `os.path.isfile`, raises if it may not be inspected."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:  # a broken link
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
