"""Digests of files, and what else is found by reading them, cached by their paths, sizes and times."""

import concurrent.futures
import functools
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.atomic_files import atomic_write, sealed, unsealed
from data_pipeline.build.sources import Extent, TextFile
from data_pipeline.progress import Progress
from data_pipeline.vocabulary import canonical_json


def hash_files(files: list[TextFile], memo: Path, workers: int, progress: Progress | None) -> list[str]:
    """Returns the sha256, in hex, of each file's content.

    Results are cached in the directory `memo`, so that unchanged files are not read again.
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
            return list(mapped(pool, hash_one, files))

    return remembered(memo, files, [], hash_all)


def mapped(pool: concurrent.futures.Executor, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yields function(item) of each item, in order; of very many items several are one task of the pool."""
    size = min(64, max(1, len(items) // 512))
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    return itertools.chain.from_iterable(pool.map(functools.partial(_each, function), batches))


def _each(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    return [function(item) for item in items]


def remembered(memo: Path, files: list[TextFile], how: list[Any], find: Callable[[], Any]) -> Any:
    """Returns `find()`, which is JSON; cached in the directory `memo` by the files' paths and stamps, and `how`."""
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
    """Returns the digest of a file's content, in hex; `algorithm` is a name of hashlib."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
