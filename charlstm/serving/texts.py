"""Texts that are wanted of a model: what they go on from, and what they get."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from charlstm.config.model import ModelConfig
from charlstm.inference.generate import Beginning, Made
from charlstm.inference.sampling import Sampling
from charlstm.types import ModelParams, RecurrentState
from data_pipeline.batch import Separator
from data_pipeline.vocabulary import Vocabulary


class Loaded(NamedTuple):
    """A model on its devices."""

    config: ModelConfig
    params: ModelParams
    vocabulary: Vocabulary
    separator: Separator
    unknown_id: int | None
    step: int  # of the checkpoint
    digest: bytes  # [16] of settings, vocabulary and parameters


class Group:
    """Texts that one model writes: those of a request."""

    def __init__(self, digest: bytes | None = None) -> None:
        """Takes the digest of the model that it must be, if any."""
        self.digest = digest
        self.model: Loaded | None = None  # once one of them is begun


class Prompt:
    """The beginning that texts go on from, read once for all of them."""

    def __init__(self, group: Group, ids: np.ndarray, after: Beginning | None = None, position: int = 0) -> None:
        """Takes what is to be read.

        Args:
          ids: symbols, from the first state or from `after`.
          position: symbols drawn before, by which the noise goes on.
        """
        self.group, self.ids, self.after, self.position = group, ids, after, position
        self.turns: Iterator[Beginning] | None = None  # once it is begun
        self.latest: Beginning | None = None  # what its last turn has yielded
        self.is_read = False


class Fetched:
    """A chunk in the memory of the host, as far as it is asked for."""

    def __init__(self, made: Made, before_RK: Any) -> None:
        """Fetches the symbols; `before_RK` are those before them."""
        self._made, self._before_RK = made, before_RK
        self.ids_TR, self.log_probabilities_TR = np.asarray(made.ids_TR), np.asarray(made.log_probabilities_TR)

    @functools.cached_property
    def before_RK(self) -> np.ndarray:
        """The symbols before."""
        return np.asarray(self._before_RK)

    @functools.cached_property
    def logits_TRV(self) -> np.ndarray:
        """The logits by which the symbols were chosen, `[T, R, V]`."""
        return np.asarray(self._made.logits_TRV)

    @functools.cached_property
    def states(self) -> RecurrentState:
        """`[T, R, H]` that the logits were computed with."""
        return jax.tree.map(np.asarray, self._made.states)


class Symbols:
    """The next symbols of one text."""

    def __init__(self, fetched: Fetched, slot: int, count: int) -> None:
        self._fetched, self._slot = fetched, slot
        self.ids = fetched.ids_TR[:count, slot]
        self.log_probabilities = fetched.log_probabilities_TR[:count, slot]

    def logits(self) -> np.ndarray:
        """Returns the logits [symbols, V] that the symbols were chosen by."""
        return self._fetched.logits_TRV[: len(self.ids), self._slot]

    def beginnings(self) -> list[Beginning]:
        """Returns what the text goes on from after each symbol."""
        before_K, one = self._fetched.before_RK[self._slot], slice(self._slot, self._slot + 1)
        text, K, states = np.concatenate([before_K, self.ids]), len(before_K), self._fetched.states
        return [
            Beginning(jax.tree.map(lambda leaf: leaf[t, one], states), text[t + 1 : t + 1 + K])  # noqa: B023
            for t in range(len(self.ids))
        ]


class Text:
    """A text that is wanted.  The slots' thread calls `begin`, `feed` and `fail`."""

    def __init__(self, prompt: Prompt, sampling: Sampling, seed: int, number: int, length: int) -> None:
        self.prompt, self.sampling, self.seed, self.number, self.length = prompt, sampling, seed, number, length
        self.is_left = False  # set by any thread: nobody wants it any more

    def begin(self, beginning: Beginning | None) -> None:
        """Takes what it goes on from.  A text of length 0 is done then."""

    def feed(self, symbols: Symbols) -> bool:
        """Takes its next symbols.  Returns True where it wants no more."""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """Learns that it will not be written."""
        raise NotImplementedError
