"""Prepares a corpus from text; the same command again resumes an interrupted preparation.

python -m launch.prepare --input='books/*.txt' --output=data/books
"""

if __name__ == "__main__":  # before what takes long to import
    from data_pipeline import startup

    startup.attach("launch.prepare", "; the same command goes on")

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.atomic_files import expand_user
from data_pipeline.build import cache
from data_pipeline.build.by_parts import Sizes, prepare_by_parts
from data_pipeline.build.plan import PART_BYTES, Share
from data_pipeline.build.prepare import prepare
from data_pipeline.build.upload import check_writable, upload
from data_pipeline.manifest import is_prepared
from data_pipeline.progress import bar, say_on_stderr
from data_pipeline.settings import CorpusSettings, setting, without_effect
from data_pipeline.shards import open_corpus, verify_corpus
from data_pipeline.stores import checked_url, is_remote
from launch.support import cli, flags


@dataclasses.dataclass(frozen=True)
class PrepareFlags:
    """The prepared corpus."""

    output: str = setting("", "Directory to create, with its parents, or a URL (s3://, gs://, az://).  Required.")
    workers: int = setting(0, "Threads or processes; 0: one per core.")
    engine: str = setting(
        "",
        "Prepare by parts, with the same result wherever they are prepared: local (processes of this machine) or "
        "dask:ADDRESS, of a Dask scheduler or its scheduler file.  Empty, and no --part: on this machine, at once.",
    )
    part: str = setting("", "i/n: prepare by parts those of worker i of n, from 0 on; the last one joins all parts.")
    join: bool = setting(False, "Only join the parts that workers have prepared.")
    part_bytes: int = setting(PART_BYTES, "Bytes of the text's files in a part; enters the result.")
    verify: bool = setting(False, "Read the prepared corpus again and check its sha256.")

    cache: str = setting(
        "",
        "list what lies in --cache_dir, or clear it of prepared corpora, digests of files and blocks of object stores; "
        "downloads and compiled programs stay.",
        choices=("", "list", "clear"),
    )

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must be at least 0")
        if sum(map(bool, (self.engine, self.part, self.join))) > 1:
            raise ValueError("--engine, --part and --join are different ways to prepare by parts: give one of them")
        if self.part_bytes != PART_BYTES and not self.by_parts:
            raise ValueError("--part_bytes is of a preparation by parts: give --engine, --part or --join, too")

    @property
    def by_parts(self) -> bool:
        return bool(self.engine or self.part or self.join)


def main(argv: Sequence[str]) -> int:
    groups = PrepareFlags(), CorpusSettings(corpus="")
    (chosen, settings), _ = flags.parse(argv, __doc__ or "", *groups, renamed={"corpus": "input"})
    if chosen.cache:
        if settings.corpus or settings.train or chosen.output or chosen.verify or chosen.by_parts:
            raise ValueError(f"--cache={chosen.cache} is given with something to prepare or verify: leave one out")
        return _list_or_clear(expand_user(settings.cache_dir), chosen.cache)
    if not chosen.output:
        raise ValueError("--output is required: name the directory to make")
    if settings.corpus and settings.train:
        raise ValueError("--input and --train are both given: leave one out")
    if idle := without_effect(settings):
        raise ValueError("; ".join(idle))
    progress, done = bar(), []
    output = checked_url(chosen.output) if is_remote(chosen.output) else expand_user(chosen.output)
    if settings.corpus or settings.train:
        if isinstance(output, str) and output.startswith("http"):
            raise ValueError(
                f"--output={output}: a web server is for reading: name a directory, or s3://, gs:// or az://"
            )
        if chosen.by_parts:
            if not _prepare_by_parts(settings, output, chosen):
                return cli.DONE
            done.append("prepared")
        else:
            done.append("prepared" if _prepare(settings, output, chosen.workers) else "already prepared")
    elif not chosen.verify or chosen.by_parts:
        raise ValueError("--input, or --train, must name a text")
    if chosen.verify:
        verify_corpus(output, progress, settings.remote_patience)
        done.append("verified")
    corpus = open_corpus(output, patience=settings.remote_patience)
    sizes = ", ".join(f"{name} {len(split)}" for name, split in corpus.splits.items())
    vocabulary = f"{corpus.vocabulary.size} symbols in the vocabulary"
    print(f"{' and '.join(done)}: {output}, {vocabulary}, {sizes}", file=sys.stderr)
    return cli.DONE


def _list_or_clear(directory: Path, what: str) -> int:
    """Prints what the cache holds, or deletes it."""
    if what == "list":
        found = cache.entries(directory)
        for path, size in sorted(found, key=lambda entry: -entry.bytes):
            print(f"{size / 1e6:12,.1f} MB  {path}")
        print(f"{sum(entry.bytes for entry in found) / 1e6:12,.1f} MB  {directory}")
        return cli.DONE
    freed, busy = cache.clear(directory)
    for path in busy:
        print(f"{path} is being prepared, and stays", file=sys.stderr)
    print(f"cleared: {directory}, {freed / 1e6:,.1f} MB", file=sys.stderr)
    return cli.DONE


def _prepare(settings: CorpusSettings, output: Path | str, workers: int) -> bool:
    """Prepares the text; for an object store in the cache, from where it is copied.  Returns False if it was there."""
    progress = bar()
    if isinstance(output, str):
        check_writable(output, settings.remote_patience)
        directory = prepare(settings, None, progress, say=say_on_stderr, workers=workers)
        return upload(directory, output, settings.remote_patience, progress)
    there = is_prepared(output)
    prepare(settings, output, progress, say=say_on_stderr, workers=workers)
    return not there


def _prepare_by_parts(settings: CorpusSettings, output: Path | str, chosen: PrepareFlags) -> bool:
    """Returns whether the corpus is there: of several workers, the last one joins."""
    return prepare_by_parts(
        settings,
        output,
        bar(),
        name=chosen.engine or "local",
        share=Share.parse(chosen.part) if chosen.part else None,
        only_join=chosen.join,
        say=say_on_stderr,
        workers=chosen.workers,
        sizes=Sizes(chosen.part_bytes),
    )


if __name__ == "__main__":
    cli.run("launch.prepare", main)
