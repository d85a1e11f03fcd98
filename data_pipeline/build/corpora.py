"""Resolves --corpus to a prepared directory."""

from collections.abc import Callable
from pathlib import Path

from data_pipeline.atomic_files import expand_user
from data_pipeline.build.prepare import prepare
from data_pipeline.build.remote_inputs import names_text
from data_pipeline.manifest import is_prepared
from data_pipeline.progress import Progress
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import Corpus, open_corpus
from data_pipeline.stores import is_remote


def load(
    settings: CorpusSettings, progress: Progress | None = None, say: Callable[[str], None] | None = None
) -> Corpus:
    """The corpus that `settings` name, opened; arguments and errors as of `resolve`."""
    corpus = open_prepared(resolve(settings, progress, say), settings)
    if "train" not in corpus.splits:
        raise ValueError(f"{corpus.directory} has no training split")
    return corpus


def open_prepared(directory: Path | str, settings: CorpusSettings) -> Corpus:
    """Opens a corpus that `resolve` has found, which need not have a training split; errors as of `open_corpus`."""
    return open_corpus(
        directory,
        patience=settings.remote_patience,
        cache=expand_user(settings.cache_dir) / "blocks",
        cache_bytes=settings.cache_bytes,
        check_sizes=False,
    )


def resolve(
    settings: CorpusSettings, progress: Progress | None = None, say: Callable[[str], None] | None = None
) -> Path | str:
    """Returns the prepared directory of the corpus that `settings` name; prepares a text into the cache if needed.

    A URL is that of a prepared directory, and is returned as it is, unless it is a glob or ends as a file of text does.

    A prepared directory is used as it is: then only `corpus` of the settings has an effect; the sizes of its files are
    checked.  Safe to call in several
    processes at a time: one prepares, the others wait for it.

    Raises:
      ValueError: there is no such corpus, or it cannot be prepared.
    """
    if not settings.train and is_remote(settings.corpus) and not names_text(settings.corpus):
        return settings.corpus
    directory = expand_user(settings.corpus)
    if not settings.train and is_prepared(directory):
        open_corpus(directory)
        return directory
    return prepare(settings, None, progress, say=say)
