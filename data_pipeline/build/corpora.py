"""Resolves --corpus to a prepared directory."""

from collections.abc import Callable
from pathlib import Path

from data_pipeline.atomic_files import expand_user
from data_pipeline.build.prepare import prepare
from data_pipeline.manifest import is_prepared
from data_pipeline.progress import Progress
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import Corpus, open_corpus


def load(
    settings: CorpusSettings, progress: Progress | None = None, say: Callable[[str], None] | None = None
) -> Corpus:
    """The corpus that `settings` name, opened; arguments and errors as of `resolve`."""
    corpus = open_corpus(resolve(settings, progress, say))
    if "train" not in corpus.splits:
        raise ValueError(f"{corpus.directory} has no training split")
    return corpus


def resolve(
    settings: CorpusSettings, progress: Progress | None = None, say: Callable[[str], None] | None = None
) -> Path:
    """Returns the prepared directory of the corpus that `settings` name; prepares a text into the cache if needed.

    A prepared directory is used as it is: then only `corpus` of the settings has an effect.  Safe to call in several
    processes at a time: one prepares, the others wait for it.

    Raises:
      ValueError: there is no such corpus, or it cannot be prepared.
    """
    directory = expand_user(settings.corpus)
    if not settings.train and is_prepared(directory):
        open_corpus(directory)
        return directory
    return prepare(settings, None, progress, say=say)
