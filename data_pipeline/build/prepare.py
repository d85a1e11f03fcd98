"""Prepares a corpus: a directory that appears atomically, and whose interrupted preparation can be resumed."""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_pipeline.atomic_files import expand_user, locked
from data_pipeline.build.appearing import is_complete, is_done, kept_if_interrupted, publish, real
from data_pipeline.build.decode import decode
from data_pipeline.build.encode import SMALL, parallel_map, plan, write_splits
from data_pipeline.build.hashing import hash_files
from data_pipeline.build.inputs import find_texts, would_contain
from data_pipeline.build.inspection import joined
from data_pipeline.build.sources import ParallelMap, Text, TextFile
from data_pipeline.build.splits import HashSplit
from data_pipeline.build.texts import Decoding
from data_pipeline.manifest import (
    BLOCK_BYTES,
    FORMAT_VERSION,
    NAME,
    SHARD_BYTES,
    SOURCES,
    Manifest,
    Source,
    summary,
    write_manifest,
    write_sources,
)
from data_pipeline.progress import Progress
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus
from data_pipeline.stores import is_remote
from data_pipeline.vocabulary import Vocabulary, canonical_json

FILES = (NAME, SOURCES, "train-00000.ids", "train-00000.crc")  # of a corpus, one of each kind


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
    """Prepares the text that `settings` name and returns the directory; does nothing if it is prepared already.

    The files do not depend on the number of workers.  Until they are complete they are in a hidden directory beside
    `output`, from which a killed preparation is resumed.

    Args:
      settings: the text, the vocabulary, the splits, the cache.
      output: the directory; None: in the cache, under a name with a digest of the text and the settings.
      progress: called with a description, the amount done and the total.
      say: called with a line that describes the text, if there is work.
      workers: threads or processes; 0: one per core.
      shard_bytes, block_bytes: sizes of a shard and of the data per checksum.

    Raises:
      ValueError: the text does not exist or does not suit the settings, or `output` holds something else.
    """
    cache, of_other = expand_user(settings.cache_dir), vocabulary_of(settings)
    workers = workers or cores()
    texts, described, binary = find_texts(settings, cache, workers, progress)
    processes = sum(text.bytes for text in texts.values()) > SMALL
    digests = _digests(texts, cache / "memo", workers, progress)
    work = _Work(texts, digests, settings, of_other, shard_bytes, block_bytes)
    output = real(expand_user(output or cache / "corpora" / f"{_label(texts)}-{work.key[:16]}"))
    say = say or (lambda line: None)
    if is_done(output, work.key):
        if binary:
            say(f"prepared before: {described}")
        return output
    refuse_inside(texts, settings, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    report = progress or (lambda doing, done, total: None)
    waiting = f"waiting for another preparation of {output}"
    with locked(output.with_name(f".{output.name}.lock"), lambda: report(waiting, 0, 0)):
        if is_done(output, work.key):
            return output
        partial = output.with_name(f".{output.name}.partial")
        if not is_complete(partial, work.key):  # else a preparation was killed before it renamed it
            for line in (f"preparing {described}", *remarks(texts, settings, of_other)):
                say(line)
            # The workers end before the partial directory is left.
            with contextlib.ExitStack() as writing, parallel_map(workers, processes, progress) as parallel:
                writing.enter_context(kept_if_interrupted(partial, work.key))
                manifest, sources = work.write(partial, parallel, say)
                for text in texts.values():
                    text.check_unchanged()
                write_sources(partial, sources)
                write_manifest(partial, manifest)
        publish(partial, output, work.key)
    return output


class _Work(NamedTuple):
    """Everything that determines the files of a corpus."""

    texts: dict[str, Text]
    digests: list[str]  # of all files, in their order
    settings: CorpusSettings
    of_other: Vocabulary | None
    shard_bytes: int
    block_bytes: int

    @property
    def key(self) -> str:
        """A digest of it, in hex."""
        rest = iter(self.digests)
        content = {
            split: [[next(rest), file.start, file.ending.hex(), *file.kind] for file in text.files]
            for split, text in self.texts.items()
        }
        how = counted_settings(self.texts, self.settings, self.of_other)
        sizes = [self.shard_bytes, self.block_bytes]
        return hashlib.sha256(canonical_json([FORMAT_VERSION, content, how, sizes])).hexdigest()

    def write(
        self, partial: Path, parallel: Callable[[str], ParallelMap], say: Callable[[str], None]
    ) -> tuple[Manifest, list[Source]]:
        """Writes the shards into `partial`; returns the manifest and the list of sources, which are not written."""
        settings = self.settings
        how = decoding(settings)
        plain, documents, bad, first_bad = decode(self.texts, self.digests, how, partial, parallel("decoding"))
        if bad:
            say(f"left out {bad:,} bad documents, the first: {first_bad}")
        plain = {split: joined(text, settings.file_separator_bytes()) for split, text in plain.items()}
        separator = recorded_separator(self.texts, settings)
        vocabulary, plans = plan(plain, settings, self.shard_bytes, parallel, self.of_other, separator)
        splits = write_splits(partial, vocabulary, plans, self.block_bytes, parallel("writing"))
        files = [file for text in self.texts.values() for file in text.files]
        sources = _sources(files, self.digests, documents)
        manifest = Manifest(
            vocabulary=vocabulary,
            splits=splits,
            sources=summary(sources),
            key=self.key,
            block_bytes=self.block_bytes,
            split=settings.split if "" in self.texts else "files",
            document_separator=separator,
            bad_documents=bad,
        )
        return manifest, sources


def _digests(texts: dict[str, Text], memo: Path, workers: int, progress: Progress | None) -> list[str]:
    files = [file for text in texts.values() for file in text.files]
    local = iter(hash_files([file for file in files if not file.is_remote], memo, workers, progress))
    return [_identity(file) if file.is_remote else next(local) for file in files]


def refuse_inside(texts: dict[str, Text], settings: CorpusSettings, output: Path) -> None:
    """Raises ValueError if the corpus would be part of the next text."""
    above = set(map(str, output.resolve().parents))
    inside = [min(found) for text in texts.values() if (found := text.folders & above)]
    specs = settings.corpus, settings.train, settings.valid, settings.test
    inside += [spec for spec in specs if spec and would_contain(spec, output, FILES)]
    if inside:
        raise ValueError(f"{output} lies inside of the input {inside[0]}: name an output outside of it")


def _sources(files: list[TextFile], digests: list[str], documents: list[int]) -> list[Source]:
    return [
        Source(file.name, file.bytes, None if file.is_remote else digest, file.etag, count)
        for file, digest, count in zip(files, digests, documents, strict=True)
    ]


def counted_settings(texts: dict[str, Text], settings: CorpusSettings, vocabulary: Vocabulary | None) -> list[object]:
    """Returns the settings that determine the files of a corpus of these texts."""
    how: list[object] = [settings.vocabulary]
    if settings.vocabulary == "characters":
        how.append(vocabulary.digest if vocabulary else settings.min_count)
    if "" in texts:
        how += [settings.split, settings.valid_fraction, settings.test_fraction]
    if any(len(text.files) > 1 for text in texts.values()):
        how.append(settings.file_separator_bytes().hex())
    if _has_documents(texts):
        how += [settings.text_field, settings.document_separator_bytes().hex(), settings.bad_documents]
    return how


def _has_documents(texts: dict[str, Text]) -> bool:
    return any(file.kind.form != "text" for text in texts.values() for file in text.files)


def recorded_separator(texts: dict[str, Text], settings: CorpusSettings) -> str:
    """Returns the separator that a corpus of these texts records, as the setting; "" if no file has documents."""
    return settings.document_separator if _has_documents(texts) else ""


def remarks(texts: dict[str, Text], settings: CorpusSettings, of_other: Vocabulary | None) -> list[str]:
    """Remarks on a separator that the vocabulary of another corpus lacks."""
    separator = recorded_separator(texts, settings)
    try:
        if of_other:
            of_other.encode_escaped(separator)
    except ValueError as error:
        return [
            f"document_separator={separator!r}: {error} of --vocabulary_of: documents will end with an unknown symbol, "
            "which --reset_state=document cannot use; it can use a --document_separator that is"
        ]
    return []


def _identity(file: TextFile) -> str:
    """Returns a digest of what is known of an object of a store without reading it."""
    return hashlib.sha256(canonical_json([file.name, file.bytes, file.etag])).hexdigest()


def decoding(settings: CorpusSettings) -> Decoding:
    """Returns the settings by which files become texts."""
    return Decoding(
        text_field=settings.text_field,
        document_separator=settings.document_separator_bytes(),
        file_separator=settings.file_separator_bytes(),
        drop_bad=settings.bad_documents == "drop",
        allow_binary=settings.binary == "allow",
        utf8=settings.vocabulary == "characters",
        split=HashSplit.of(settings) if settings.split == "hash" else None,
        patience=settings.remote_patience,
    )


def vocabulary_of(settings: CorpusSettings) -> Vocabulary | None:
    """Returns the vocabulary of another corpus that the text is to have, if any."""
    if not settings.vocabulary_of:
        return None
    where = settings.vocabulary_of if is_remote(settings.vocabulary_of) else expand_user(settings.vocabulary_of)
    vocabulary = open_corpus(where, patience=settings.remote_patience, check_sizes=False).vocabulary
    if vocabulary.kind != settings.vocabulary:
        raise ValueError(
            f"vocabulary_of={settings.vocabulary_of} is prepared with {vocabulary.kind}, not {settings.vocabulary}: "
            "name a corpus of characters, or leave it out"
        )
    return vocabulary


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _label(texts: dict[str, Text]) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "", next(iter(texts.values())).name)[:32] or "text"
