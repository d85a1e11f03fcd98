"""A mixture of prepared corpora: its parts as a flag names them, their weights, and the mixture as a corpus.

Which member is read next is decided by `segments.Cycle`.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.manifest import SourceSummary
from data_pipeline.segments import Change, Member
from data_pipeline.shards import Corpus, Split
from data_pipeline.symbols import Places
from data_pipeline.vocabulary import canonical_json, escaped_bytes

MOST_SLOTS = 10_000  # P: in the cycle by which corpora take turns


class Part(NamedTuple):
    """A corpus as a mixture names it, and its weight."""

    name: str
    corpus: str
    weight: Fraction

    def __str__(self) -> str:
        weight = self.weight
        text = str(float(weight)) if Fraction(str(float(weight))) == weight else str(weight)
        return f"{self.name}={self.corpus}:{text}"


def parse(text: str) -> list[Part]:
    """Returns the parts of a mixture, written as [NAME=]CORPUS:WEIGHT,...

    Raises:
      ValueError: a part has another form, a weight is not a number or negative, or two parts have one name.
    """
    parts: dict[str, Part] = {}
    for word in text.split(","):
        named, _, weight = word.strip().rpartition(":")
        found, number = re.fullmatch(r"(?:([\w.-]+)=)?(.+)", named), _number(weight)
        if not found or number is None:
            raise ValueError(
                f"mixture={text!r}: {word!r} is not CORPUS:WEIGHT, such as data/web:0.6, or NAME=CORPUS:WEIGHT; a "
                "corpus with a comma in its path cannot be mixed"
            )
        name, corpus = found[1] or re.sub(r"[^\w.-]", "", Path(found[2]).stem) or "text", found[2]
        if number < 0:
            raise ValueError(f"mixture={text!r}: the weight of {name} is {weight}, and must be 0 or more")
        if name in parts:
            raise ValueError(
                f"mixture={text!r} names {name} twice, {parts[name].corpus} and {corpus}: leave one out, or tell them "
                f"apart by {name}2={corpus}:{weight}"
            )
        parts[name] = Part(name, corpus, number)
    return list(parts.values())


def _number(text: str) -> Fraction | None:
    """Returns the number or fraction that is written; None if none is."""
    try:
        return Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        return None


def parse_changes(text: str, names: Sequence[str]) -> tuple[Change, ...]:
    """Returns the changes of weights of a mixture of `names`, written as STEP:NAME:WEIGHT,...;STEP:NAME:WEIGHT,...

    Raises:
      ValueError: one has another form or begins no later than the one before it, or there is no corpus of that name.
    """
    changes: list[Change] = []
    for piece in filter(None, map(str.strip, text.split(";"))):
        step, _, rest = piece.partition(":")
        weights: dict[str, Fraction] = {}
        for word in rest.split(","):
            name, _, weight = word.strip().rpartition(":")
            number = _number(weight)
            if not step.isdecimal() or number is None or number < 0:
                raise ValueError(
                    f"mixture_from={text!r}: {piece!r} is not STEP:NAME:WEIGHT,... with weights of 0 or more, such as "
                    "100000:web:0.2,books:0.8"
                )
            if name not in names:
                raise ValueError(
                    f"mixture_from={text!r}: there is no {name!r} in the mixture, only {', '.join(names)}; "
                    f"--mixture={name}=CORPUS:WEIGHT,... gives a corpus that name"
                )
            if name in weights:
                raise ValueError(f"mixture_from={text!r} names {name} twice from step {step} on: leave one out")
            weights[name] = number
        if int(step) <= (changes[-1].step if changes else 0):
            raise ValueError(f"mixture_from={text!r}: step {step} must be more than 0 and than the steps before it")
        parts = [Part(name, "", weights.get(name, Fraction(0))) for name in names]
        changes.append(Change(int(step), tuple(slots(parts))))
    return tuple(changes)


def slots(parts: Sequence[Part]) -> list[int]:
    """Returns p_c, the slots of each part in a cycle: in proportion to the weights, exactly where P <= 10,000 permits.

    Raises:
      ValueError: a weight is more than 0 and less than half a slot, or all are 0.
    """
    total = sum(part.weight for part in parts)
    if not total:
        raise ValueError(f"the weights of {', '.join(part.name for part in parts)} are all 0: give one of them more")
    shares = [part.weight / total for part in parts]
    whole = math.lcm(*(share.denominator for share in shares))
    scale = whole if whole <= MOST_SLOTS else MOST_SLOTS - len(parts)  # rounding up adds less than a slot each
    found = [math.floor(share * scale + Fraction(1, 2)) for share in shares]
    for part, share, count in zip(parts, shares, found, strict=True):
        if share and not count:
            raise ValueError(
                f"the weight of {part.name} is {float(share):.3g} of the mixture, and rounds to 0 of {scale} slots: "
                f"use at least {0.5 / scale:.3g}, or leave it out"
            )
    return [count // math.gcd(*found) for count in found]


class Joined(Split):
    """Splits of several corpora, one after the other, to be read as one."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self._splits, self.dtype, self.vocabulary = list(splits), splits[0].dtype, splits[0].vocabulary
        self.bytes, self.unknown = sum(split.bytes for split in splits), sum(split.unknown for split in splits)
        characters = [split.characters for split in splits]
        self.characters = None if None in characters else sum(count or 0 for count in characters)
        self._starts = np.cumsum([0, *map(len, splits)])

    def __reduce__(self) -> tuple:
        return Joined, (self._splits,)

    def keep_blocks(self, count: int) -> None:
        for split in self._splits:
            split.keep_blocks(count)

    def __len__(self) -> int:
        """Returns the number of symbols of all splits."""
        return int(self._starts[-1])

    @property
    def is_remote(self) -> bool:
        """Returns whether one of the splits is in an object store."""
        return any(split.is_remote for split in self._splits)

    def separate(self) -> "Joined":
        """Returns the same splits for a reader that can be closed apart from others."""
        return Joined([split.separate() for split in self._splits])

    def close(self) -> None:
        for split in self._splits:
            split.close()

    def read_many(self, places: Places) -> None:
        """Fills each array with the ids from its position on.  Raises as `Split.read`."""
        by_split: list[list[tuple[int, np.ndarray]]] = [[] for _ in self._splits]
        for start, ids in places:
            number, done = int(np.searchsorted(self._starts, start, side="right")) - 1, 0
            while done < len(ids):
                first = start + done - int(self._starts[number])
                part = ids[done : done + len(self._splits[number]) - first]
                by_split[number].append((first, part))
                number, done = number + 1, done + len(part)
        for split, own in zip(self._splits, by_split, strict=True):
            if own:
                split.read_many(own)


@dataclasses.dataclass(frozen=True)
class Mixture(Corpus):
    """Corpora of one vocabulary, read in proportion to weights.  Its splits are theirs, one after the other."""

    corpora: dict[str, Corpus]
    weights: tuple[int, ...]  # p_c, see `slots`
    spec: str  # as `parse` reads it, with the places of the corpora

    @property
    def name(self) -> str:
        return "mixture of " + ", ".join(f"{share:.3g} % {name}" for name, share in self.percent.items())

    @property
    def percent(self) -> dict[str, float]:
        """Share of each corpus in what is learned from."""
        return {name: 100 * p / sum(self.weights) for name, p in zip(self.corpora, self.weights, strict=True)}

    @property
    def separators(self) -> list[str]:
        """The separators of documents that its corpora record, of several spellings of one the first."""
        return _separators(self.corpora.values())

    @property
    def members(self) -> tuple[Member, ...]:
        """The corpora as a `SegmentPlan` needs them."""
        corpora = zip(self.corpora.items(), self.weights, strict=True)
        return tuple(Member(name, len(corpus.train), p) for (name, corpus), p in corpora)

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(place for corpus in self.corpora.values() for place in corpus.places)

    def waiting(self) -> str:
        return "; ".join(filter(None, (corpus.waiting() for corpus in self.corpora.values())))

    def require_cache(self, places: int) -> None:
        for corpus in self.corpora.values():
            corpus.require_cache(places)

    def texts(self, split: str) -> dict[str, Split]:
        """Returns that split of each corpus that has it."""
        return {name: corpus.splits[split] for name, corpus in self.corpora.items() if split in corpus.splits}


def load(parts: Sequence[Part], open_one: Callable[[str], Corpus]) -> Mixture:
    """Returns the mixture of `parts`, each opened by `open_one`.

    Raises:
      ValueError: a corpus cannot be opened, two have different vocabularies, or a weight rounds to 0.
    """
    weights = slots(parts)
    corpora = {part.name: open_one(part.corpus) for part in parts}
    (first, one), *others = corpora.items()
    for name, other in others:
        if other.vocabulary != one.vocabulary:
            raise ValueError(
                f"{first} has {one.vocabulary.in_short} and {name} has {other.vocabulary.in_short}: prepare both with "
                f"--vocabulary=bytes, or {name} with --vocabulary_of={one.directory}"
            )
    return _mixture(parts, corpora, tuple(weights))


def _place(corpus: Corpus) -> str:
    """Returns what a run records: the text that it was prepared from, or its directory; an absolute path, or a URL."""
    directory = corpus.settings.corpus if corpus.settings else corpus.directory
    return str(directory.absolute()) if isinstance(directory, Path) else directory


def _separators(corpora: Iterable[Corpus]) -> list[str]:
    found: dict[bytes, str] = {}
    for text in filter(None, (corpus.document_separator for corpus in corpora)):
        found.setdefault(escaped_bytes(text), text)
    return list(found.values())


def _mixture(parts: Sequence[Part], corpora: Mapping[str, Corpus], weights: tuple[int, ...]) -> Mixture:
    found = list(corpora.values())
    splits: dict[str, Split] = {}
    for name in ("train", "valid", "test"):
        if having := [corpus.splits[name] for corpus in found if name in corpus.splits]:
            splits[name] = Joined(having)
    separators = _separators(found)
    identity = [[corpus.fingerprint, p] for corpus, p in zip(found, weights, strict=True)]
    return Mixture(
        directory=found[0].directory,
        vocabulary=found[0].vocabulary,
        splits=splits,
        fingerprint=hashlib.sha256(canonical_json(["mixture", *identity])).hexdigest(),
        sources=SourceSummary(
            files=sum(corpus.sources.files for corpus in found),
            bytes=sum(corpus.sources.bytes for corpus in found),
            documents=sum(corpus.sources.documents for corpus in found),
            sha256="",  # each has a file of its own
        ),
        document_separator=separators[0] if len(separators) == 1 else "",  # of several, see `Mixture.separators`
        split="",  # each has its own
        store=found[0].store,
        cache=None,  # each has its own
        corpora=dict(corpora),
        weights=weights,
        spec=",".join(str(part._replace(corpus=_place(corpora[part.name]))) for part in parts),
    )
