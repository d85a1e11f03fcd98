"""The corpus of a run: opened, and checked against the settings that come with it."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config, arguments
from charlstm.run import prepared, run_directory
from data_pipeline import direction, mixture
from data_pipeline.atomic_files import atomic_write, expand_user
from data_pipeline.batch import Separator, ends_separator, looks_back
from data_pipeline.build import corpora
from data_pipeline.build.inputs import would_contain
from data_pipeline.eval_chunks import ChunkPlan
from data_pipeline.manifest import is_prepared
from data_pipeline.mixture import Mixture
from data_pipeline.progress import announced, bar, say_on_stderr
from data_pipeline.segments import Change, Member, SegmentPlan, automatic_segment
from data_pipeline.settings import CorpusSettings, without_effect
from data_pipeline.shards import Corpus
from data_pipeline.stores import is_remote
from data_pipeline.streams import StreamPlan, Symbols

SEARCHED = 64 << 20  # symbols in which a separator is looked for: a fraction of a second
CHUNK = 1 << 20  # symbols
# Of a run, one of each kind and depth.
FILES = ("log.txt", "metrics.jsonl", "config.json", "logs/process-0.txt", "checkpoints/0/checkpoint.json")


def open_for(config: Config, given: Sequence[str]) -> tuple[Corpus, Config]:
    """The corpus or mixture, and `config` with the vocabulary that it has.

    Raises:
      ValueError: it cannot be had, or it was prepared otherwise than the flags `given` say.
    """
    settings, mixed = config.corpus, config.streams.mixture
    names = {flag.removeprefix("--").partition("=")[0] for flag in given}
    for name, value in (("train", settings.train), ("mixture", mixed)):
        if value and settings.corpus and "corpus" in names:
            raise ValueError(
                f"--corpus={settings.corpus} and --{name}={value} are both given: leave one out, or give --corpus= "
                "where a flagfile names one"
            )
    if settings.train and mixed:
        raise ValueError(f"--train={settings.train} and --mixture={mixed} are both given: leave one out")
    if not settings.corpus and not settings.train and not mixed:
        raise ValueError("--corpus is empty: name a text, a prepared directory, or python")
    parts = [part._replace(corpus=prepared.absolute(part.corpus)) for part in mixture.parse(mixed)] if mixed else []
    for part in parts:
        if "," in part.corpus:  # the folder in which the command runs may have one
            raise ValueError(
                f"{part.corpus} has a comma in its path, and cannot be mixed: rename the folder, or name it by a link"
            )
    corpus = load(config)
    for one in corpus.corpora.values() if isinstance(corpus, Mixture) else [corpus]:
        if "train" not in one.splits:
            raise ValueError(f"{one.directory} has no training split")
        prepared.check(settings, one, names)
    if settings.vocabulary_of and "vocabulary_of" in names:
        prepared.check_vocabulary_of(settings, corpus)
    where = prepared.places(settings)
    if mixed:
        where |= {"corpus": "", "mixture": ",".join(map(str, parts))}
    where |= prepared.recorded_separator(config, corpus, names)
    return corpus, config_lib.replace(config, vocabulary=corpus.vocabulary.kind, **where)


def taken(config: Config, corpus: Corpus) -> Config:
    """Returns `config` with the text, the symbols, the splits and the separator of a corpus that is open.

    Raises:
      ValueError: settings of `config` that are not the default ask for another text, other symbols or splits.
    """
    usual, mixed = config_lib.Config().corpus, config.streams.mixture
    names = {field.name for field in dataclasses.fields(usual)}
    named = {name for name in names if getattr(config.corpus, name) != getattr(usual, name)}
    corpora = list(corpus.corpora.values()) if isinstance(corpus, Mixture) else [corpus]
    for one in corpora:
        prepared.check_loaded(config.corpus, one, named)
    if mixed and (not isinstance(corpus, Mixture) or corpus.weights != tuple(mixture.slots(mixture.parse(mixed)))):
        raise ValueError(f"mixture={mixed} was given and the corpus is {corpus.name}: leave it out, or load that one")
    recorded = [prepared.recorded(one) for one in corpora]
    of_texts = [own for own, one in zip(recorded, corpora, strict=True) if not prepared.is_of(own.corpus, one)]
    own = (of_texts or recorded)[0]  # texts of a mixture are prepared alike
    vocabulary_of = config.corpus.vocabulary_of or own.vocabulary_of
    where = {name: getattr(own, name) for name in names if name not in named or name in prepared.EXPLICIT}
    where |= {"corpus": own.corpus, "mixture": "", "vocabulary_of": prepared.absolute(vocabulary_of)}
    if isinstance(corpus, Mixture):
        where |= {"corpus": "", "mixture": corpus.spec}
    where |= prepared.recorded_separator(config, corpus, named)
    return config_lib.replace(config, **where | {"vocabulary": corpus.vocabulary.kind})


def load(config: Config) -> Corpus:
    """The corpus or mixture that `config` names, each text prepared into the cache if absent.

    All processes of a job call it together: the first looks for the text, and prepares it, while the others wait.

    Raises:
      ValueError, OSError: it cannot be had; on all processes.
    """

    def open_one(name: str) -> Corpus:
        settings = dataclasses.replace(config.corpus, corpus=name)
        waits = not distributed.is_first_process()
        with announced("waiting for the first process, which looks at the text") if waits else nullcontext():
            found = distributed.take_from_first(lambda: str(corpora.resolve(settings, bar(), say_on_stderr)))
        return distributed.run_on_all(lambda: corpora.open_prepared(_seen_here(found, settings), settings))

    mixed = config.streams.mixture
    return mixture.load(mixture.parse(mixed), open_one) if mixed else open_one(config.corpus.corpus)


def load_own(run_dir: Path, config: Config, remedy: str = "") -> Corpus:
    """The corpus or mixture of a run, as `load` finds it, checked to be the one that the run was trained on.

    Args:
      config: of the run, or with another place of its corpus.
      remedy: how a refusal ends, such as ": give --text".

    Raises:
      ValueError, OSError: it cannot be had, is another one, or the model was imported and has none.
    """
    if not (config.streams.mixture or config.corpus.corpus or config.corpus.train):
        raise ValueError(f"this model was imported and has no corpus of its own{remedy}")
    corpus, own = load(config), run_directory.read(run_dir)[1]
    now = run_directory.Identity(corpus.vocabulary, corpus.fingerprint)
    run_directory.check_identity(run_dir, own, now, remedy=remedy)
    return corpus


def _seen_here(found: str, settings: CorpusSettings) -> Path | str:
    """The prepared directory that the first process has found, or one of this host's own if it cannot be seen here."""
    if is_remote(found) or is_prepared(Path(found)):
        return found
    return corpora.resolve(settings, bar(), say_on_stderr)


def as_read(config: Config, corpus: Corpus) -> Corpus:
    """The corpus in the direction in which a run of `config` reads it."""
    return direction.backward(corpus) if config.streams.reverse else corpus


def fix_segment(config: Config, corpus: Corpus) -> Config:
    """Fills in a mixture's --segment left at -1 (automatic)."""
    if config.streams.segment >= 0 or not isinstance(corpus, Mixture):
        return config
    streams, changes = config.streams, changes_of(config, corpus)
    return config_lib.replace(
        config, segment=automatic_segment(corpus.members, streams.batch_size, streams.longest_window, changes)
    )


def changes_of(config: Config, corpus: Corpus) -> tuple[Change, ...]:
    """Changes of a mixture's weights.  Raises ValueError if the corpus is none, or they are not of this one."""
    text = config.streams.mixture_from
    if text and not isinstance(corpus, Mixture):
        raise ValueError(f"mixture_from={text!r} is of a mixture: give --mixture, or leave it out")
    return mixture.parse_changes(text, list(corpus.corpora)) if isinstance(corpus, Mixture) else ()


def check_what_was_read(then: Config, now: Config, windows: int) -> None:
    """Raises ValueError where `now` has other weights of a mixture in the `windows` that were read as `then` says."""
    read = []
    for streams in (then.streams, now.streams):
        names = [part.name for part in mixture.parse(streams.mixture)] if streams.mixture else []
        changes = mixture.parse_changes(streams.mixture_from, names)
        read.append([change for change in changes if change.step < windows])
    if read[0] != read[1]:
        raise ValueError(
            f"mixture_from={now.streams.mixture_from!r} has other weights before step {windows}, up to where the run "
            f"has read its text, than mixture_from={then.streams.mixture_from!r}: give this, with changes from step "
            f"{windows} on, or name another run_dir"
        )


def plan_for(config: Config, corpus: Corpus) -> StreamPlan:
    """Plan of how the training split is read.

    Raises:
      ValueError: splits are too short, all of which the message names.
    """
    config = fix_segment(config, corpus)
    streams, evaluation = config.streams, config.evaluation
    refusals = []
    for name, valid in corpus.texts("valid").items():
        try:
            ChunkPlan(len(valid), evaluation.eval_chunk, evaluation.burn_in, 1, streams.window)
        except ValueError as error:
            where = f"validation of {name}" if name else "validation"
            refusals.append(f"{where}: {error}; give more text, or --valid_fraction=0 for none")
    how = (
        *(len(corpus.splits["train"]), streams.batch_size, streams.window, config.training.seed),
        *(streams.rotate_streams, streams.reset_probability),
        *(streams.window_deviation, streams.short_window_probability),
    )
    try:
        plan = StreamPlan(*how)
        if isinstance(corpus, Mixture) or streams.segment > 0:
            members = corpus.members if isinstance(corpus, Mixture) else (Member("the corpus", plan.symbols),)
            plan = SegmentPlan(*how, members, streams.segment, streams.shuffle_segments, changes_of(config, corpus))
        else:
            changes_of(config, corpus)
    except ValueError as error:
        refusals.insert(0, str(error))
    if refusals:
        raise ValueError("; ".join(refusals))
    return plan


def description(plan: StreamPlan, num_steps: int) -> list[str]:
    """Describes the corpora of a mixture, a line each, and the segments; nothing for one corpus in its order."""
    if not isinstance(plan, SegmentPlan):
        return []
    order = "in random order" if plan.shuffle else "in the order of the text"
    turns = f"segments of {plan.segment:,} symbols, {order}" if plan.segment else "each stream stays in one corpus"
    if len(plan.members) == 1:
        return [turns]
    lines, parts = [], len(plan.cycle)
    for member, streams, passes in zip(plan.members, plan.streams, plan.passes(num_steps), strict=True):
        share, whole = (member.weight, parts) if plan.segment else (streams, plan.batch_size)
        of = f"{share} of {whole} {'parts' if plan.segment else 'streams'}"
        lines.append(
            f"{member.name}: {100 * share / whole:.3g} % ({of}) of what is read, {member.symbols:,} training symbols, "
            f"read {passes:.2f} times in {num_steps:,} steps"
        )
    for change in plan.changes:
        shares = zip(plan.members, change.weights, strict=True)
        parts_then = ", ".join(f"{100 * p / sum(change.weights):.3g} % {member.name}" for member, p in shares)
        lines.append(f"from step {change.step:,} on, as turns begin: {parts_then}")
    return [*lines, turns]


def remarks_on_separator(config: Config, corpus: Corpus, separator: Separator) -> list[str]:
    """Remarks on the separator of documents: that it was not found."""
    split = corpus.splits["train"]
    if not separator or _occurs(split, separator):
        return []
    where = "" if len(split) <= SEARCHED else f"the first {SEARCHED:,} symbols of "
    return [
        f"document_separator={config.corpus.document_separator!r} does not occur in {where}the training split, where "
        "no state will be zeroed for it (--file_separator puts one between files)"
    ]


def _occurs(split: Symbols, separator: Separator) -> bool:
    """True if the separator occurs in the first `SEARCHED` symbols of `split`."""
    for start in range(0, min(len(split), SEARCHED), CHUNK):
        stop = min(start + CHUNK + looks_back(separator), len(split))
        if stop - start >= len(separator) and ends_separator(split.read(start, stop), separator).any():
            return True
    return False


def settings_of(source: Any, settings: Mapping[str, Any]) -> CorpusSettings:
    """The settings of the corpus that `api.load_corpus` is given; what is a text itself is written down in the cache.

    Raises:
      TypeError: the source is neither a path nor a text, or there is no such setting.
      ValueError: the text is empty, or settings go not with each other.
    """
    kinds = {field.name: type(field.default) for field in dataclasses.fields(CorpusSettings) if field.name != "corpus"}
    if unknown := [name for name in settings if name not in kinds]:
        raise TypeError(arguments.unknown_setting(unknown[0], kinds))
    values = {name: arguments.of_kind(name, value, kinds[name]) for name, value in settings.items()}
    given = CorpusSettings("", **values)
    if isinstance(source, str) and "\n" in source:
        source = source.encode("utf-8", "surrogateescape")
    if not given.train:
        if isinstance(source, bytes):
            source = written_down(source, expand_user(given.cache_dir) / "texts")
        place = arguments.path("source", source, "a text, its file or directory, or the name of a corpus")
        given = dataclasses.replace(given, corpus=place)
    if idle := without_effect(given):
        raise ValueError("; ".join(idle))
    return given


def written_down(text: bytes, folder: Path) -> Path:
    """The file that holds `text`, made if absent: a corpus is prepared from files.

    Raises:
      ValueError: there is nothing in it to learn.
    """
    if not text or text.isspace():
        raise ValueError("the text given is empty, or white space alone: give one that has something to learn")
    path = folder / f"{hashlib.sha256(text).hexdigest()[:32]}.txt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(text)
    return path


def refuse_inside(run_dir: Path, settings: CorpusSettings, mixed: str = "") -> None:
    """Raises ValueError where the run would become a part of its own text."""
    parts = [part.corpus for part in mixture.parse(mixed)] if mixed else []
    for spec in (settings.corpus, settings.train, settings.valid, settings.test, *parts):
        if spec and would_contain(spec, run_dir, FILES):
            raise ValueError(f"run_dir={run_dir} lies inside of the corpus {spec}: name one outside of it")
