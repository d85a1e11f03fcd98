"""Text -> a prepared corpus: a directory that appears whole, and is continued where its preparation was stopped."""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.atomic_files import atomic_write, expand_user, locked, sync_directory
from data_pipeline.build.encode import SMALL, parallel_map, plan, write_splits
from data_pipeline.build.inputs import find_texts
from data_pipeline.build.sources import Text, hash_files
from data_pipeline.manifest import (
    BLOCK_BYTES,
    FORMAT_VERSION,
    SHARD_BYTES,
    Manifest,
    Source,
    is_prepared,
    read_manifest,
    write_manifest,
)
from data_pipeline.progress import Progress
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus
from data_pipeline.vocabulary import canonical_json


def prepare(
    settings: CorpusSettings,
    output: Path | None = None,
    progress: Progress | None = None,
    *,
    say: Callable[[str], None] | None = None,
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
    block_bytes: int = BLOCK_BYTES,
) -> Path:
    """The prepared directory of the text that `settings` name; does nothing where it is there already.

    What is written does not depend on the number of workers.  Until it is complete it lies in a hidden directory beside
    `output`, from which a preparation that was killed is continued.

    Args:
      settings: the text, the vocabulary, the splits, the cache.
      output: where to; None: in the cache, under a name that has a digest of the text and the settings.
      progress: told what is being done, how much of it is done and how much there is.
      say: told in one line, where there is work, what the text is.
      workers: threads or processes; 0: one for each core.
      shard_bytes, block_bytes: sizes of a shard and of what is under one checksum.

    Raises:
      ValueError: there is no such text, it cannot be prepared so, or `output` holds something else.
    """
    cache = expand_user(settings.cache_dir)
    workers = workers or _cores()
    texts, described = find_texts(settings, cache, workers, progress)
    processes = sum(text.bytes for text in texts.values()) > SMALL
    files = [file for text in texts.values() for file in text.files]
    digests = hash_files(files, cache / "memo", workers, progress)
    key = _key(texts, digests, settings, [shard_bytes, block_bytes])
    output = expand_user(output or cache / "corpora" / f"{_label(texts)}-{key[:16]}").absolute()
    if _is_done(output, key):
        return output
    for text in texts.values():
        inside = text.folders.intersection(map(str, output.resolve().parents))
        if inside:
            # The corpus would be text for the next one.
            raise ValueError(f"{output} lies inside of the input {min(inside)}: name an output outside of it")
    output.parent.mkdir(parents=True, exist_ok=True)
    report = progress or (lambda doing, done, total: None)
    waiting = f"waiting for another preparation of {output}"
    with locked(output.with_name(f".{output.name}.lock"), lambda: report(waiting, 0, 0)):
        if _is_done(output, key):
            return output
        if say:
            say(f"preparing {described}")
        # The workers come to rest before the partial directory is left.
        with contextlib.ExitStack() as writing, parallel_map(workers, processes, progress) as parallel:
            vocabulary, plans = plan(texts, settings, shard_bytes, parallel)
            partial = writing.enter_context(_partial_directory(output, key))
            splits = write_splits(partial, vocabulary, plans, block_bytes, parallel("writing"))
            for text in texts.values():
                text.check_unchanged()
        sources = (Source(file.name, file.bytes, digest) for file, digest in zip(files, digests, strict=True))
        _publish(partial, output, Manifest(vocabulary, splits, tuple(sources), key, block_bytes))
    return output


def _key(texts: dict[str, Text], digests: list[str], settings: CorpusSettings, sizes: list[int]) -> str:
    """A digest, in hex, of all that the files to be written depend on."""
    rest = iter(digests)
    content = {
        split: [[next(rest), file.start, file.ending.hex()] for file in text.files] for split, text in texts.items()
    }
    how: list[object] = [settings.vocabulary]
    if settings.vocabulary == "characters":
        how.append(settings.min_count)
    if "" in texts:
        how += [settings.split, settings.valid_fraction, settings.test_fraction]
    return hashlib.sha256(canonical_json([FORMAT_VERSION, content, how, sizes])).hexdigest()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _label(texts: dict[str, Text]) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "", next(iter(texts.values())).name)[:32] or "text"


def _is_done(output: Path, key: str) -> bool:
    """Whether `output` is the corpus of that key.  Raises ValueError where it is something else."""
    if is_prepared(output):
        found = read_manifest(output).key
        if found != key:
            raise ValueError(
                f"{output} is a corpus of another text or other settings (key {found[:16]} instead of {key[:16]}): "
                "delete it or name another output"
            )
        open_corpus(output)
        return True
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not a prepared corpus: delete it or name another output")
    return False


@contextlib.contextmanager
def _partial_directory(output: Path, key: str) -> Iterator[Path]:
    """The directory to write in, empty or with whole shards of the same preparation.

    It stays where the block is stopped, and goes where the block refuses the text.
    """
    partial = output.with_name(f".{output.name}.partial")
    owner = partial / "key"
    if not (owner.is_file() and owner.read_bytes() == key.encode()):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        with atomic_write(owner) as out:
            out.write(key.encode())
    else:
        for torn in partial.glob("*.new"):  # what was being written at a kill
            torn.unlink()
    try:
        yield partial
    except ValueError:  # the text has changed: what was written is not what the key says
        shutil.rmtree(partial)
        raise


def _publish(partial: Path, output: Path, manifest: Manifest) -> None:
    """Makes the complete corpus appear at `output`, by renaming its directory."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    kept = {shard.file for shard in shards} | {shard.checksums for shard in shards}
    for path in partial.iterdir():
        if path.name not in kept:
            path.unlink()
    write_manifest(partial, manifest)
    try:
        os.replace(partial, output)
    except OSError:
        if not _is_done(output, manifest.key):
            raise
        shutil.rmtree(partial)
    sync_directory(output.parent)
