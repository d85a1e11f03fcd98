"""A corpus read backward: the same files, each split from its last symbol to its first."""

import dataclasses
from typing import Protocol

from data_pipeline.mixture import Joined, Mixture
from data_pipeline.shards import Corpus, Split
from data_pipeline.symbols import Places, StoredSymbols, Symbols, read_places
from data_pipeline.vocabulary import Vocabulary


class Text(Symbols, Protocol):
    """A split, or a text in memory, with what is counted in it."""

    vocabulary: Vocabulary
    bytes: int
    characters: int | None
    unknown: int


class Reversed(Split):
    """A split read backward: symbol i is symbol N - 1 - i of the text.  Thread-safe, and can be pickled."""

    def __init__(self, split: Text) -> None:
        self._split, self.dtype, self.vocabulary = split, split.dtype, split.vocabulary
        self.bytes, self.characters, self.unknown = split.bytes, split.characters, split.unknown

    def __len__(self) -> int:
        """Returns the number of symbols in the split."""
        return len(self._split)

    def __reduce__(self) -> tuple:
        return Reversed, (self._split,)

    @property
    def is_remote(self) -> bool:
        return isinstance(self._split, StoredSymbols) and self._split.is_remote

    def keep_blocks(self, count: int) -> None:
        if isinstance(self._split, StoredSymbols):
            self._split.keep_blocks(count)

    def separate(self) -> "Reversed":
        return Reversed(self._split.separate()) if isinstance(self._split, Split) else self

    def close(self) -> None:
        if isinstance(self._split, StoredSymbols):
            self._split.close()

    def read_many(self, places: Places) -> None:
        """Fills each array with the ids from its position on, in the order of reading.  Raises as `Split.read`."""
        read_places(self._split, [(len(self) - start - len(ids), ids) for start, ids in places])
        for _, ids in places:
            ids[:] = ids[::-1].copy()


def backward(corpus: Corpus) -> Corpus:
    """Returns the corpus with every split read backward.  In a mixture each text is, so that they stay in their order.

    The fingerprint stays that of the text: which way a run reads it is a setting (`StreamSettings.reverse`).
    """
    if not isinstance(corpus, Mixture):
        return dataclasses.replace(corpus, splits={name: Reversed(split) for name, split in corpus.splits.items()})
    corpora = {name: backward(one) for name, one in corpus.corpora.items()}
    splits: dict[str, Split] = {
        name: Joined([one.splits[name] for one in corpora.values() if name in one.splits]) for name in corpus.splits
    }
    return dataclasses.replace(corpus, corpora=corpora, splits=splits)
