"""Decodes files into texts on disk: compressed files, files of documents, files of object stores.

A text on disk can be read anywhere, as splits, vocabularies and shards need; files that are plain text already are left
where they are.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_pipeline.atomic_files import atomic_write, named_in_errors, sealed, unsealed
from data_pipeline.build import magic
from data_pipeline.build.decompress import Decompressed
from data_pipeline.build.documents import BadDocuments
from data_pipeline.build.inspection import begun
from data_pipeline.build.remote_inputs import RANGE, Ranges
from data_pipeline.build.sources import ParallelMap, Text, TextFile, found_file
from data_pipeline.build.splits import HashSplit
from data_pipeline.build.tables import READERS
from data_pipeline.build.utf8 import Utf8Check
from data_pipeline.vocabulary import canonical_json

BUFFER = 256 << 10  # bytes of a file in memory
CHUNK = 1 << 20
TOGETHER = 16 << 20  # bytes of files that are decoded in one task
BAD_LIMIT = 1000  # of so many documents, one may be bad


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


class Decoded(NamedTuple):
    """Texts on disk, and what was counted when they were written."""

    texts: list[tuple[str, str, int, int]]  # (split, or "", file, size, leading bytes of the separator at its end)
    documents: list[int]  # of each input file
    bad: int  # documents left out
    first_bad: str  # description of the first of them


@dataclasses.dataclass(frozen=True)
class DecodeTask:
    """Files to decode into one text, or one for each split."""

    directory: Path
    number: int
    files: tuple[TextFile, ...]
    how: Decoding


def decode(
    texts: dict[str, Text], digests: list[str], how: Decoding, directory: Path, parallel: ParallelMap
) -> tuple[dict[str, Text], list[int], int, str]:
    """Returns the texts as plain files, the rest of them decoded into `directory`, except what is there already.

    Args:
      texts: split -> its text, or "" -> one text, which a `how.split` divides by documents.
      digests: sha256 in hex of all their files, in order.
      how: the settings.
      directory: where decoded texts are written.
      parallel: from `parallel_map`.

    Returns:
      The texts; the number of documents of each file; the number of documents left out; description of the first.

    Raises:
      ValueError: a file is damaged, or is not what its name says, or too many documents are bad.
    """
    runs = [  # files that are text, one by one, and those between them together
        (key, run)
        for key, text in texts.items()
        for is_plain, files in itertools.groupby(text.files, _stays)
        for run in ([[file] for file in files] if is_plain else _batches(files))
    ]
    tasks = [DecodeTask(directory, n, tuple(run), how) for n, (_, run) in enumerate(runs) if not _stays(run[0])]
    results, known = iter(parallel(_decode_once, tasks)), iter(digests)
    counts, bad, first_bad = [], 0, ""
    found: dict[str, list[TextFile]] = {key: [] for key in texts}
    for key, run in runs:
        of_files = [next(known) for _ in run]
        if _stays(run[0]):
            split = how.split.split_of(_text_digest(run[0], of_files[0])) if how.split else key
            found.setdefault(split, []).append(run[0])
            counts.append(int(run[0].bytes > run[0].start))
            continue
        decoded = next(results)
        counts += decoded.documents
        bad, first_bad = bad + decoded.bad, first_bad or decoded.first_bad
        for split, name, _, separated in decoded.texts:
            file = dataclasses.replace(found_file(name, directory / name, str(directory / name)), separated=separated)
            found.setdefault(split or key, []).append(file)
    if bad * BAD_LIMIT > sum(counts) + bad:
        raise ValueError(
            f"{bad:,} of {sum(counts) + bad:,} documents are bad, more than 1 in {BAD_LIMIT:,}: {first_bad}"
        )
    if how.split:
        found.pop("")
    names = {key: text.name for key, text in texts.items()}
    for key in ["train"] if how.split else texts:
        if not found.get(key):
            raise ValueError(
                f"{names.get(key) or names['']} has no text{' for training' if how.split else ''} to prepare"
            )
    order = [split for split in ("", "train", "valid", "test") if split in found]
    return {split: Text(names.get(split) or names[""], tuple(found[split])) for split in order}, counts, bad, first_bad


def _stays(file: TextFile) -> bool:
    return file.kind.is_plain and not file.is_remote


def _batches(files: Iterable[TextFile]) -> Iterator[list[TextFile]]:
    """Yields small files together."""
    batch: list[TextFile] = []
    for file in files:
        if batch and sum(one.bytes for one in batch) + file.bytes > TOGETHER:
            yield batch
            batch = []
        batch.append(file)
    yield batch


def _text_digest(file: TextFile, digest: str) -> bytes:
    """Returns the sha256 of a plain file's text, without a byte-order mark."""
    if not file.start:
        return bytes.fromhex(digest)
    with file.path.open("rb") as opened:
        opened.seek(file.start)
        return hashlib.file_digest(opened, "sha256").digest()


def _decode_once(task: DecodeTask) -> Decoded:
    """Decodes files and then writes a note: the note marks the texts as complete after a killed preparation."""
    note = task.directory / f"text-{task.number:05d}.json"
    known = unsealed(note)
    if known is not None:
        decoded = Decoded(*json.loads(known))
        paths = [(task.directory / name, size) for _, name, size, _ in decoded.texts]
        if all(path.is_file() and path.stat().st_size == size for path, size in paths):
            return decoded
    outputs: dict[str, _TextOutput] = {}

    def output(digest: Callable[[], bytes]) -> _TextOutput:
        split = task.how.split.split_of(digest()) if task.how.split else ""
        if split not in outputs:
            outputs[split] = _TextOutput(task.directory / f"text-{task.number:05d}{split and '-' + split}", task.how)
        return outputs[split]

    documents, bad, first_bad = [], 0, ""
    try:
        for file in task.files:
            with named_in_errors(file.path):
                counted, refused = _decode_file(file, task, output)
            documents.append(counted)
            bad, first_bad = bad + refused.count, first_bad or refused.first
    finally:
        for one in outputs.values():
            one.close()
    written = [(split, *one.written()) for split, one in sorted(outputs.items()) if one.size]
    decoded = Decoded(written, documents, bad, first_bad)
    with atomic_write(note) as out:
        out.write(sealed(canonical_json(list(decoded))))
    return decoded


class _TextOutput:
    """A text that is written to disk."""

    def __init__(self, path: Path, how: Decoding) -> None:
        self.size, self._path, self._how = 0, path, how
        self._file = path.open("wb", BUFFER)
        self._tail, self._is_ended = b"", True  # the last bytes of a plain text; whether a document ended with its own

    def add_document(self, document: bytes) -> None:
        """Adds a document, and what separates it from the next."""
        if not self._is_ended:
            self._end()
        self._write(document)
        self._write(self._how.document_separator)
        self._is_ended = True

    def add_text(self, chunks: Iterable[bytes]) -> None:
        """Adds a plain text, and before it what separates it from the one before."""
        first = True
        for chunk in chunks:
            if first and not self._is_ended:
                self._end()
            first = self._is_ended = False
            self._write(chunk)
            self._tail = (self._tail + chunk)[-len(self._how.file_separator) :] if self._how.file_separator else b""

    def _end(self) -> None:
        separator = self._how.file_separator
        self._write(separator[begun(self._tail, separator) :])
        self._tail = b""

    def _write(self, data: bytes) -> None:
        with named_in_errors(self._path):
            self._file.write(data)
        self.size += len(data)

    def written(self) -> tuple[str, int, int]:
        """Returns its name, its size, and how many bytes of the separator it ends with."""
        separator = self._how.file_separator
        return self._path.name, self.size, len(separator) if self._is_ended else begun(self._tail, separator)

    def close(self) -> None:
        with named_in_errors(self._path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def _decode_file(
    file: TextFile, task: DecodeTask, output: Callable[[Callable[[], bytes]], _TextOutput]
) -> tuple[int, BadDocuments]:
    """Writes the documents of a file; returns their number, and those that were left out."""
    how = task.how
    reader = READERS.get(file.kind.form)
    bad = BadDocuments(file.shown, reader.unit if reader else "", how.drop_bad)
    if reader is None:
        digest = hashlib.sha256()
        if how.split:  # only all of it says where it goes
            for chunk in _plain_text(file, how):
                digest.update(chunk)
        chunks = _plain_text(file, how)
        first = next(chunks, b"")
        if first:
            output(digest.digest).add_text(itertools.chain([first], chunks))
        return int(bool(first)), bad
    count, separator = 0, how.document_separator
    with _opened(file, how.patience, task.directory if reader.seeks else None) as stream:
        for number, document in reader.read(stream, file.shown, how.text_field, bad):
            try:
                data = document.encode() if isinstance(document, str) else document
                if isinstance(document, bytes):
                    document.decode()
            except (UnicodeDecodeError, UnicodeEncodeError) as error:
                bad.add(number, f"no text that UTF-8 can have ({error.reason})")
                continue
            if not data:
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
    check, is_first = Utf8Check(file.shown) if how.utf8 else None, True
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
    raw: Any = io.BufferedReader(Ranges(file, patience), RANGE) if file.is_remote else file.path.open("rb", BUFFER)
    if not file.kind.compression:
        return raw
    stream = io.BufferedReader(Decompressed(raw, file.kind.compression, file.shown), BUFFER)
    if seekable_in is None:
        return stream
    whole: BinaryIO = tempfile.TemporaryFile(dir=seekable_in)  # type: ignore[assignment]
    with stream:
        shutil.copyfileobj(stream, whole, CHUNK)
    whole.seek(0)
    return whole
