"""Settings of a corpus beside one that was prepared before: what is compared with it, and what has no effect."""

import dataclasses
import os
from typing import Any

from charlstm import distributed
from charlstm.config import Config
from data_pipeline import mixture
from data_pipeline.build.datasets import NAMES
from data_pipeline.build.prepare import vocabulary_of
from data_pipeline.build.splits import cut
from data_pipeline.mixture import Mixture
from data_pipeline.settings import CorpusSettings, without_effect
from data_pipeline.shards import Corpus
from data_pipeline.stores import is_remote

NOT_RECORDED = (  # in a corpus, of how it was prepared
    *("min_count", "input_kind", "text_field", "include", "exclude", "file_separator", "bad_documents"),
)
FRACTIONS = ("valid_fraction", "test_fraction")
WITHOUT_FRACTIONS = ("hash", "files")  # splits of a corpus whose sizes do not follow from the fractions
CHECKED = ("vocabulary", "split", *FRACTIONS)  # of a corpus that was prepared before
OPENED_BY = ("binary", "cache_dir", "cache_bytes", "remote_patience")  # which do not change what is read
EXPLICIT = ("train", "valid", "test")


def check(settings: CorpusSettings, corpus: Corpus, names: set[str]) -> None:
    """Raises ValueError if a directory that was prepared before has other symbols or splits than the flags given."""
    kind = corpus.vocabulary.kind
    if "vocabulary" in names and settings.vocabulary != kind:
        raise ValueError(
            f"--vocabulary={settings.vocabulary} was given and {corpus.directory} is prepared with {kind}: give "
            f"--vocabulary={kind}, or the text itself as --corpus"
        )
    sizes = {name: len(split) for name, split in corpus.splits.items()}
    if not settings.train and "split" in names and settings.split != corpus.split:
        raise ValueError(
            f"--split={settings.split} was given and {corpus.directory} is prepared with {corpus.split}: leave it out, "
            "or give the text itself as --corpus"
        )
    if not settings.train and corpus.split not in WITHOUT_FRACTIONS and names.intersection(FRACTIONS):
        how = dataclasses.replace(settings, split=corpus.split)
        wanted = {name: sum(b - a for a, b in spans) for name, spans in cut(sum(sizes.values()), how).items()}
        if wanted != sizes:
            raise ValueError(
                f"split={how.split}, valid_fraction={settings.valid_fraction} and test_fraction="
                f"{settings.test_fraction} mean splits of {_sizes(wanted)} symbols and {corpus.directory} has "
                f"{_sizes(sizes)}: leave them out, or give the text itself as --corpus"
            )


def check_vocabulary_of(settings: CorpusSettings, corpus: Corpus) -> None:
    """Raises ValueError if a corpus that was prepared before has another vocabulary than that of --vocabulary_of."""
    digest = distributed.take_from_first(lambda: getattr(vocabulary_of(settings), "digest", ""))
    if digest != corpus.vocabulary.digest:
        raise ValueError(
            f"--vocabulary_of={settings.vocabulary_of} has the vocabulary {digest[:12]} and {corpus.directory} is "
            f"prepared with {corpus.vocabulary.digest[:12]}: leave it out, or give the text itself as --corpus"
        )


def check_loaded(settings: CorpusSettings, corpus: Corpus, names: set[str]) -> None:
    """Raises ValueError if a corpus that Python has loaded is another one than the settings `names` ask for."""
    own, wanted = recorded(corpus), dataclasses.replace(settings, **places(settings))
    compared = (*EXPLICIT, *(() if is_of(own.corpus, corpus) else unrecorded(own.split)))
    try:
        check(settings, corpus, names)
        if "vocabulary_of" in names and wanted.vocabulary_of != own.vocabulary_of:
            check_vocabulary_of(settings, corpus)
        for name in names.intersection(compared):
            value, had = getattr(wanted, name), getattr(own, name)
            if value != had:
                raise ValueError(f"{name}={value!r} was given and {corpus.name} has {name}={had!r}: leave it out")
    except ValueError as error:
        telling = names.intersection((*CHECKED, "vocabulary_of", *compared))
        given = ", ".join(f"{name}={getattr(settings, name)!r}" for name in sorted(telling))
        raise ValueError(f"{error}; in Python, cl.load_corpus(..., {given}) prepares it so") from None


def recorded(corpus: Corpus) -> CorpusSettings:
    """The settings that a run of `corpus` records, by which it is prepared again where the cache has lost it."""
    return corpus.settings or CorpusSettings(corpus=absolute(str(corpus.directory)))


def to_record(settings: CorpusSettings, corpus: Corpus) -> CorpusSettings:
    """`settings` that found `corpus`, as a run records them: of a prepared directory only how it is opened."""
    if is_of(settings.corpus, corpus):
        settings = CorpusSettings(settings.corpus, **{name: getattr(settings, name) for name in OPENED_BY})
    return dataclasses.replace(settings, **places(settings))


def recorded_separator(config: Config, corpus: Corpus, names: set[str]) -> dict[str, str]:
    """The separator that the corpus records, as a setting to replace; none if it is among the `names` given.

    Raises:
      ValueError: the corpora of a mixture record several, and the run resets state at documents.
    """
    if "document_separator" in names:
        return {}
    if isinstance(corpus, Mixture) and len(corpus.separators) > 1 and config.streams.reset_state == "document":
        recorded = {name: one.document_separator for name, one in corpus.corpora.items() if one.document_separator}
        raise ValueError(
            "the corpora of the mixture record different separators of documents "
            f"({', '.join(f'{name} {text!r}' for name, text in recorded.items())}): prepare them with one, or give the "
            "--document_separator at which state is to be reset"
        )
    return {"document_separator": corpus.document_separator} if corpus.document_separator else {}


def remarks(config: Config, corpus: Corpus) -> list[str]:
    """Remarks on settings of preparing a text that have no effect: on a text, or on a corpus that was prepared before.

    They are not refused: a flagfile may well have those with which the corpus was prepared.
    """
    settings, usual, named = config.corpus, CorpusSettings(), [(config.corpus.corpus, corpus)]
    if isinstance(corpus, Mixture):
        named = [(part.corpus, corpus.corpora[part.name]) for part in mixture.parse(config.streams.mixture)]
    before = [one for spec, one in named if not settings.train and is_of(spec, one)]
    idle: dict[str, list[str]] = {}  # settings -> the corpora that do not record them
    for one in before:
        others = [name for name in unrecorded(one.split) if getattr(settings, name) != getattr(usual, name)]
        if others:
            given = ", ".join(f"{name}={getattr(settings, name)!r}" for name in others)
            idle.setdefault(given, []).append(one.name)
    found = [f"without effect on {', '.join(names)}, prepared before: {given}" for given, names in idle.items()]
    if len(before) < len(named):
        found += [f"without effect: {sentence}" for sentence in without_effect(settings)]
    return found


def unrecorded(split: str) -> tuple[str, ...]:
    """Names of the settings of preparing that cannot be compared with a corpus that is so split."""
    return NOT_RECORDED + (FRACTIONS if split in WITHOUT_FRACTIONS else ())


def is_of(spec: str, corpus: Corpus) -> bool:
    """True if `spec` names the prepared directory of `corpus`, and not its text."""
    return absolute(spec).rstrip("/") == absolute(str(corpus.directory))


def places(settings: CorpusSettings) -> dict[str, Any]:
    """The texts and corpora that `settings` name, by absolute paths and URLs."""
    return {name: absolute(getattr(settings, name)) for name in ("corpus", *EXPLICIT, "vocabulary_of")}


def absolute(spec: str) -> str:
    """Absolute path, or the URL, of a text, as a later command may run in another directory."""
    return spec if not spec or spec in NAMES or is_remote(spec) else os.path.abspath(os.path.expanduser(spec))


def _sizes(splits: dict[str, int]) -> str:
    return " + ".join(str(splits.get(name, 0)) for name in ("train", "valid", "test"))
