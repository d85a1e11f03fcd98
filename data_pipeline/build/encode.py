"""Encodes texts as shards: plans a preparation, and executes it in parallel."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline import signals
from data_pipeline.atomic_files import atomic_write, sealed, unsealed
from data_pipeline.build.hashing import mapped
from data_pipeline.build.sources import Extent, ParallelMap, Text
from data_pipeline.build.splits import Span, cut, shard_spans
from data_pipeline.build.utf8 import StartCount, count_all, index_characters, read_characters
from data_pipeline.manifest import Shard, SplitRecord
from data_pipeline.progress import Progress
from data_pipeline.settings import CorpusSettings
from data_pipeline.shard_writer import shard_sizes, write_shard
from data_pipeline.vocabulary import Vocabulary, canonical_json, escaped_bytes
from data_pipeline.worker_process import end_with_parent

SMALL = 64 << 20  # bytes of text; below, starting processes takes longer than the work


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """A shard to write."""

    directory: Path
    file: str
    vocabulary: Vocabulary
    extents: tuple[Extent, ...]
    block_bytes: int

    def pieces(self, starts: StartCount) -> Iterator[np.ndarray]:
        """Yields the ids in chunks; counts the characters of bytes on the way."""
        if self.vocabulary.kind == "bytes":
            for extent in self.extents:
                for chunk in extent.read():
                    starts.add(chunk)
                    yield np.frombuffer(chunk, np.uint8)
                starts.begin()
        else:
            yield from (self.vocabulary.encode(text, unknown="map") for text in read_characters(self.extents))


class Written(NamedTuple):
    """A shard on disk, with the counts made when it was written."""

    shard: Shard
    characters: int | None
    unknown: int


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """A split to write."""

    bytes: int
    shards: list[list[Extent]]


@contextlib.contextmanager
def parallel_map(workers: int, processes: bool, progress: Progress | None) -> Iterator[Callable[[str], ParallelMap]]:
    """Yields parallel(description) -> a map over a thread or process pool, which reports to `progress`.

    Threads suffice for little work.  Decoding UTF-8 holds the interpreter's lock, so large texts need `processes`;
    these are spawned, as forking a program with threads, such as those of JAX, may hang.

    Raises:
      ChildProcessError: one of them was killed.
    """
    pool: concurrent.futures.Executor
    if processes and workers > 1:
        spawn = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin_worker)
    else:
        pool = concurrent.futures.ThreadPoolExecutor(workers)

    def parallel(doing: str, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        items = list(items)
        for number, result in enumerate(mapped(pool, function, items), 1):
            if progress:
                progress(doing, number, len(items))
            yield result

    try:
        yield lambda doing: lambda function, items: parallel(doing, function, items)
    except concurrent.futures.BrokenExecutor:
        raise ChildProcessError(
            "a process of the preparation was killed, perhaps for want of memory: the same command goes on; "
            "launch.prepare --workers chooses fewer"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Runs in a worker process: leaves Ctrl-C to the parent, and exits if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.unblock()  # a pool that breaks ends its other workers by SIGTERM
    end_with_parent()


def plan(
    texts: dict[str, Text],
    settings: CorpusSettings,
    shard_bytes: int,
    parallel: Callable[[str], ParallelMap],
    vocabulary: Vocabulary | None = None,
    separator: str = "",
) -> tuple[Vocabulary, dict[str, SplitPlan]]:
    """Returns the vocabulary, and the extents of each shard of each split.

    Args:
      texts: split -> its text; or "" -> a text to be cut into splits.
      settings: only those of splits and vocabulary are used.
      shard_bytes: size of each shard of a split but the last.
      parallel: from `parallel_map`.
      vocabulary: that of another corpus; None: of the training split's characters, or bytes.
      separator: setting of what ends a document; a vocabulary of characters that are counted has it.

    Raises:
      ValueError: a text is too short, or, with a vocabulary of characters, not UTF-8.
    """
    characters = settings.vocabulary == "characters"
    indices = {name: index_characters(text, parallel("indexing")) for name, text in texts.items()} if characters else {}
    spans: dict[str, tuple[str, list[Span]]] = {}  # split -> (the text's key, spans in symbols)
    for key, text in texts.items():
        symbols = indices[key].characters if characters else text.bytes
        parts = {key: [(0, symbols)]} if key else cut(symbols, settings)
        spans |= {split: (key, part) for split, part in parts.items()}

    def byte_spans(key: str, part: list[Span]) -> list[Span]:
        if not characters:
            return part
        offsets = indices[key].byte_offsets(itertools.chain.from_iterable(part))
        return [(offsets[start], offsets[stop]) for start, stop in part]

    if vocabulary is None and not characters:
        vocabulary = Vocabulary("bytes")
    elif vocabulary is None:
        key, part = spans["train"]
        counts = count_all(indices[key], byte_spans(key, part), parallel("counting"))
        vocabulary = Vocabulary.from_counts(counts, settings.min_count, escaped_bytes(separator).decode())
    plans = {}
    for split, (key, part) in spans.items():
        shards = shard_spans(part, shard_bytes // vocabulary.dtype.itemsize)
        flat = iter(byte_spans(key, list(itertools.chain.from_iterable(shards))))
        by_shard = [[next(flat) for _ in shard] for shard in shards]
        extents = [[extent for span in shard for extent in texts[key].extents(*span)] for shard in by_shard]
        plans[split] = SplitPlan(sum(stop - start for shard in by_shard for start, stop in shard), extents)
    return vocabulary, plans


def write_splits(
    directory: Path, vocabulary: Vocabulary, plans: dict[str, SplitPlan], block_bytes: int, parallel: ParallelMap
) -> dict[str, SplitRecord]:
    """Writes all shards to `directory`, except those that are complete already."""
    tasks = [
        ShardTask(directory, f"{split}-{number:05d}.ids", vocabulary, tuple(extents), block_bytes)
        for split, planned in plans.items()
        for number, extents in enumerate(planned.shards)
    ]
    written = iter(parallel(_write_once, tasks))
    records = {}
    for split, planned in plans.items():
        shards, characters, unknown = zip(*(next(written) for _ in planned.shards), strict=True)
        symbols, whole = sum(shard.symbols for shard in shards), None if None in characters else sum(characters)
        records[split] = SplitRecord(symbols, planned.bytes, whole, sum(unknown), shards)
    assert next(written, None) is None
    return records


def _write_once(task: ShardTask) -> Written:
    """Writes a shard and then its note: the note marks a shard as complete after a killed preparation."""
    note = task.directory / f"{task.file}.json"
    known = unsealed(note)
    if known is not None:
        shard_fields, *counts = json.loads(known)
        shard = Shard(**shard_fields)
        sizes = shard_sizes(shard, task.vocabulary.dtype.itemsize, task.block_bytes)
        if all((task.directory / name).exists() for name in sizes):
            return Written(shard, *counts)
    starts, unknown, characters = StartCount(), 0, task.vocabulary.kind == "characters"

    def counted() -> Iterator[np.ndarray]:
        nonlocal unknown
        for ids in task.pieces(starts):
            unknown += int(np.count_nonzero(ids == 0)) if characters else 0
            yield ids

    shard = write_shard(task.directory, task.file, counted(), task.block_bytes)
    written = Written(shard, shard.symbols if characters else starts.characters, unknown)
    with atomic_write(note) as out:
        out.write(sealed(canonical_json([dataclasses.asdict(shard), *written[1:]])))
    return written
