"""What --corpus names, as a prepared directory."""

from collections.abc import Callable
from pathlib import Path

from data_pipeline.atomic_files import expand_user
from data_pipeline.build.prepare import prepare
from data_pipeline.manifest import is_prepared
from data_pipeline.progress import Progress
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus


def resolve(
    settings: CorpusSettings, progress: Progress | None = None, say: Callable[[str], None] | None = None
) -> Path:
    """The prepared directory of the corpus that `settings` name; a text is prepared into the cache where it is not yet.

    A prepared directory is used as it is: of the settings, only `corpus` counts then.  May be called by several
    processes at a time: one prepares, the others wait for it.

    Raises:
      ValueError: there is no such corpus, or it cannot be prepared.
    """
    directory = expand_user(settings.corpus)
    if not settings.train and is_prepared(directory):
        open_corpus(directory)
        return directory
    return prepare(settings, None, progress, say=say)
