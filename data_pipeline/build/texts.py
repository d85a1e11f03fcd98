"""Reads the text of a file, plain or of documents, compressed or not, on a disk or in an object store."""

import hashlib
import io
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_pipeline.build import magic
from data_pipeline.build.bz2_spans import Bz2Span
from data_pipeline.build.decompress import Decompressed
from data_pipeline.build.documents import DOCUMENT_BYTES, BadDocuments
from data_pipeline.build.inspection import begun
from data_pipeline.build.remote_inputs import RANGE, Ranges
from data_pipeline.build.sources import TextFile
from data_pipeline.build.splits import HashSplit
from data_pipeline.build.tables import READERS
from data_pipeline.build.utf8 import Utf8Check

BUFFER = 256 << 10  # bytes of a file in memory
CHUNK = 1 << 20
LINE = 64 << 10  # bytes in which the end of a line is looked for


class Decoding(NamedTuple):
    """Settings by which files become texts."""

    text_field: str
    document_separator: bytes  # put after each document of a file of documents
    file_separator: bytes  # put between plain texts
    drop_bad: bool
    allow_binary: bool
    utf8: bool  # whether plain texts must be UTF-8; documents must be in any case
    split: HashSplit | None  # None: documents stay together
    patience: float  # seconds that an object store may be silent


class TextOutput:
    """A text to which documents and plain texts are added, with what stands between them.

    Attributes:
      size: its bytes.
    """

    def __init__(self, write: Callable[[bytes], object], how: Decoding) -> None:
        self.size, self._put, self._how = 0, write, how
        self._tail, self._is_ended = b"", True  # the last bytes of a plain text; whether a document ended with its own

    def add_document(self, document: bytes) -> None:
        """Adds a document, and what separates it from the next."""
        self.end()
        self._write(document)
        self._write(self._how.document_separator)

    def add_text(self, chunks: Iterable[bytes], ending: bytes = b"") -> None:
        """Adds a plain text, and before it what separates it from the one before; `ending` takes its place after it."""
        first = True
        for chunk in chunks:
            if first:
                self.end()
            first = self._is_ended = False
            self._write(chunk)
            self._tail = (self._tail + chunk)[-len(self._how.file_separator) :] if self._how.file_separator else b""
        if ending:
            self._write(ending)
            self._is_ended = True

    def end(self) -> int:
        """Ends a plain text with the missing part of the separator; returns the number of bytes added."""
        separator, before = self._how.file_separator, self.size
        if not self._is_ended:
            self._write(separator[begun(self._tail, separator) :])
        self._tail, self._is_ended = b"", True
        return self.size - before

    def separated(self) -> int:
        """Returns how many bytes of the separator it ends with."""
        separator = self._how.file_separator
        return len(separator) if self._is_ended else begun(self._tail, separator)

    def _write(self, data: bytes) -> None:
        self._put(data)
        self.size += len(data)


def decode_file(
    file: TextFile, how: Decoding, directory: Path, output: Callable[[Callable[[], bytes]], TextOutput]
) -> tuple[int, BadDocuments]:
    """Adds the documents of a file to texts; returns their number, and those that were left out.

    Args:
      file: the file, or a span of it: the lines, characters, groups of rows or streams that begin in these bytes.
      how: the settings.
      directory: for what has no name and takes disk.
      output: returns the text to which a document goes, given a function that returns its sha256.
    """
    reader, name = READERS.get(file.kind.form), file.shown
    if file.span and file.span[0]:
        name += f" from byte {file.span[0]} on"
    bad = BadDocuments(name, reader.unit if reader else "", how.drop_bad)
    if reader is None:
        digest = hashlib.sha256()
        if how.split:  # only all of it says where it goes
            for chunk in _plain_text(file, how):
                digest.update(chunk)
        chunks = _plain_text(file, how)
        first = next(chunks, b"")
        if first or file.ending:
            output(digest.digest).add_text(itertools.chain([first], chunks) if first else (), file.ending)
        return int(bool(first) and not (file.span and file.span[0])), bad
    count, separator = 0, how.document_separator
    with _opened(file, how.patience, directory if reader.seeks else None) as stream:
        span = (file.span,) if file.span and reader.knows_span else ()
        for number, document in reader.read(stream, name, how.text_field, bad, *span):
            try:
                data = document.encode() if isinstance(document, str) else document
                if isinstance(document, bytes):
                    document.decode()
            except (UnicodeDecodeError, UnicodeEncodeError) as error:
                bad.add(number, f"no text that UTF-8 can have ({error.reason})")
                continue
            if not data:
                continue
            if len(data) > DOCUMENT_BYTES:
                bad.add(number, f"a document of more than {DOCUMENT_BYTES:,} bytes", data[:400])
                continue
            if separator and (data + separator).find(separator) != len(data):
                shown = separator.decode("utf-8", "replace")
                bad.add(number, f"the document has the separator {shown!r} within (--document_separator)", data[:400])
                continue
            output(hashlib.sha256(data).digest).add_document(data)
            count += 1
    return count, bad


def _plain_text(file: TextFile, how: Decoding) -> Iterator[bytes]:
    """Yields the text of a file, without its byte-order mark."""
    begins = file.span[0] if file.span else 0
    check, is_first = Utf8Check(file.shown, begins) if how.utf8 else None, not begins
    with _opened(file, how.patience, None) as stream:
        while chunk := stream.read(CHUNK):
            if is_first:
                kind = None if how.allow_binary else magic.kind_of(chunk[: magic.HEAD])
                if kind:
                    raise ValueError(
                        f"{file.shown} has no text within but {kind.name}: leave it out with --exclude, or give "
                        "--binary=allow to learn bytes as they are"
                    )
                chunk = chunk.removeprefix(magic.BYTE_ORDER_MARK)
                is_first = False
            if check:
                check.add(chunk)
            if chunk:
                yield chunk
    if check:
        check.add(b"", final=True)


def _opened(file: TextFile, patience: float, seekable_in: Path | None) -> Any:
    """Returns the decompressed content as a binary file; one that can seek, for which a directory is given.

    What is decompressed cannot seek, and goes through a file that has no name.
    """
    if file.span and seekable_in is None and not file.kind.compression:
        opened: Any = Ranges(file, patience) if file.is_remote else file.path.open("rb", 0)
        return io.BufferedReader(_Span(opened, file), RANGE if file.is_remote else BUFFER)
    raw: Any = io.BufferedReader(Ranges(file, patience), RANGE) if file.is_remote else file.path.open("rb", BUFFER)
    if not file.kind.compression:
        return raw
    if file.span:
        return io.BufferedReader(Bz2Span(raw, file), BUFFER)
    stream = io.BufferedReader(Decompressed(raw, file.kind.compression, file.shown), BUFFER)
    if seekable_in is None:
        return stream
    whole: BinaryIO = tempfile.TemporaryFile(dir=seekable_in)  # type: ignore[assignment]
    with stream:
        shutil.copyfileobj(stream, whole, CHUNK)
    whole.seek(0)
    return whole


class _Span(io.RawIOBase):
    """The lines of a file, or of a plain text the characters, that begin in a span of its bytes."""

    def __init__(self, raw: Any, file: TextFile) -> None:
        assert file.span and not file.kind.compression
        self._raw = raw
        begins = self._first_character if file.kind.form == "text" else self._first_line
        start, self._stop = (at if at in (0, file.bytes) else begins(at, file.bytes) for at in file.span)
        self._position = min(start, self._stop)
        raw.seek(self._position)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        taken = self._raw.readinto(memoryview(buffer)[: self._stop - self._position])
        self._position += taken
        return taken

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _first_character(self, at: int, size: int) -> int:
        self._raw.seek(at)
        after = self._raw.read(3)
        return at + next((n for n, byte in enumerate(after) if byte & 0xC0 != 0x80), len(after))

    def _first_line(self, at: int, size: int) -> int:
        self._raw.seek(at - 1)
        position = at - 1
        while chunk := self._raw.read(LINE):
            if (found := chunk.find(b"\n")) >= 0:
                return position + found + 1
            position += len(chunk)
        return size
