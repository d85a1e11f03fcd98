"""Decodes files into texts on disk: compressed files, files of documents, files of object stores.

A text on disk can be read anywhere, as splits, vocabularies and shards need; files that are plain text already are left
where they are.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipeline.atomic_files import atomic_write, named_in_errors, sealed, unsealed
from data_pipeline.build.sources import ParallelMap, Text, TextFile, found_file
from data_pipeline.build.texts import BUFFER, Decoding, TextOutput, decode_file
from data_pipeline.vocabulary import canonical_json

TOGETHER = 16 << 20  # bytes of files that are decoded in one task
BAD_LIMIT = 1000  # of so many documents, one may be bad


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
    refuse_too_many_bad(bad, sum(counts), first_bad)
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


def refuse_too_many_bad(bad: int, good: int, first_bad: str) -> None:
    """Raises ValueError if more than one document in `BAD_LIMIT` is bad."""
    if bad * BAD_LIMIT > good + bad:
        raise ValueError(f"{bad:,} of {good + bad:,} documents are bad, more than 1 in {BAD_LIMIT:,}: {first_bad}")


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
    outputs: dict[str, _TextOnDisk] = {}

    def output(digest: Callable[[], bytes]) -> TextOutput:
        split = task.how.split.split_of(digest()) if task.how.split else ""
        if split not in outputs:
            outputs[split] = _TextOnDisk(task.directory / f"text-{task.number:05d}{split and '-' + split}", task.how)
        return outputs[split]

    documents, bad, first_bad = [], 0, ""
    try:
        for file in task.files:
            with named_in_errors(file.path):
                counted, refused = decode_file(file, task.how, task.directory, output)
            documents.append(counted)
            bad, first_bad = bad + refused.count, first_bad or refused.first
    finally:
        for one in outputs.values():
            one.close()
    written = [(split, one.path.name, one.size, one.separated()) for split, one in sorted(outputs.items()) if one.size]
    decoded = Decoded(written, documents, bad, first_bad)
    with atomic_write(note) as out:
        out.write(sealed(canonical_json(list(decoded))))
    return decoded


class _TextOnDisk(TextOutput):
    """A text that is written to disk."""

    def __init__(self, path: Path, how: Decoding) -> None:
        self.path = path
        self._file = path.open("wb", BUFFER)
        super().__init__(self._file.write, how)

    def _write(self, data: bytes) -> None:
        with named_in_errors(self.path):
            super()._write(data)

    def close(self) -> None:
        with named_in_errors(self.path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
