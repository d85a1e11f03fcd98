"""A text that goes on: the state is kept between what is read and what is written, so nothing is read twice."""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from charlstm.config.model import ModelConfig
from charlstm.inference.generate import (
    WINDOW,
    Beginning,
    Chunk,
    batch_of,
    first_symbols,
    make_chunk,
    noise,
    reading,
    row_keys,
)
from charlstm.inference.sampling import Sampling, by_rows
from charlstm.model import language_model
from charlstm.model.ops import compiler
from charlstm.types import ModelParams
from data_pipeline.batch import Separator, ends_separator, looks_back

SYMBOLS = 16  # written by one call of the device: few, as a reader waits for them


def distributions(
    config: ModelConfig,
    params: ModelParams,
    ids: np.ndarray,
    separator: Separator,
    after: Beginning | None = None,
    window: int = WINDOW,
) -> Iterator[np.ndarray]:
    """Yields the log-probabilities of the symbol after each one, [symbols, V], a window a turn.

    Args:
      ids: from the first state; or those after `after`, whose last symbol comes first then.
    """
    back, is_first = looks_back(separator), after is None
    text = np.concatenate([np.full(back + 1, -1) if after is None else after.last_K, ids]).astype(np.int32)
    start = back + is_first
    read, reset = text[start:], ends_separator(text[start - back :], separator)
    state = language_model.reset_state(params, language_model.zero_state(config, 1, params.b_out.dtype))
    state = state if after is None else after.state
    for start in range(0, len(read), window):
        count = len(read[start : start + window])
        part = (np.pad(array[None, start : start + count], ((0, 0), (0, window - count))) for array in (read, reset))
        state, log_probabilities_TV = _distributions(params, state, *part, config)
        yield np.asarray(log_probabilities_TV)[:count]


@partial(compiler.jit, static_argnames="config")
def _distributions(params, state, ids_BT, reset_BT, config):
    state, logits_TBV = language_model.apply(config, params, state, ids_BT, reset_BT)
    return state, jax.nn.log_softmax(logits_TBV[:, 0], axis=1)


class Continuation:
    """One text that is read and written in turns.

    What is written after the first thing read is the text of `generate`, of one row with the same seed.
    """

    def __init__(
        self, config: ModelConfig, params: ModelParams, unknown_id: int | None = None, separator: Separator = ()
    ) -> None:
        self._config, self._params, self._separator, self._unknown_id = config, params, separator, unknown_id
        self._mesh, self._count = batch_of(params, 1)
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Forgets the text."""
        *_, self._after = reading(self._config, self._params, np.zeros(0, np.int32), self._separator)
        self._is_empty = True
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Draws what follows with another seed."""
        self._seed, self._position = seed, 0
        self._keys = row_keys(seed, "sample", np.zeros(self._count, np.int32))

    def read(self, ids: np.ndarray) -> None:
        """Adds symbols to the text."""
        if len(ids):
            after = None if self._is_empty else self._after
            *_, self._after = reading(self._config, self._params, ids, self._separator, after)
            self._is_empty = False

    def next_log_probabilities(self) -> np.ndarray:
        """Returns the model's own log-probabilities [V] of the next symbol."""
        self._begin()
        nothing = np.zeros(0, np.int32)
        return next(distributions(self._config, self._params, nothing, self._separator, self._after))[0]

    def write(self, sampling: Sampling, most: int = SYMBOLS) -> Chunk:
        """Draws the next symbols, `SYMBOLS` or `most`, which belong to the text then."""
        self._begin()
        choice = by_rows([sampling] * self._count, self._params.b_out.dtype)
        start_R = np.full(self._count, self._position, np.int32)
        gumbel_TRV = noise(self._keys, start_R, choice, self._mesh, SYMBOLS, self._params.b_out.shape[0])
        # By NumPy: each operation on a device is a program of its own, which the first text would wait for.
        state = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), self._count, axis=0), self._after.state)
        last_RK = np.tile(self._after.last_K, (self._count, 1))
        how = self._mesh, self._config, self._unknown_id, self._separator, SYMBOLS
        _, _, made = make_chunk(self._params, state, last_RK, gumbel_TRV, choice, *how, keep=True)
        ids, log_probabilities = (np.asarray(array_TR).T[:1, :most] for array_TR in made[:2])
        state = jax.tree.map(lambda leaf: np.asarray(leaf)[len(ids[0]) - 1, :1], made.states)
        text = np.concatenate([self._after.last_K, ids[0]])
        self._after, self._position = Beginning(state, text[len(ids[0]) :]), self._position + len(ids[0])
        return Chunk(ids, log_probabilities)

    def _begin(self) -> None:
        """Draws the symbol that an empty text begins after."""
        if self._is_empty:
            V, back = self._params.b_out.shape[0], looks_back(self._separator)
            first_RK = first_symbols(self._seed, np.zeros(1, np.int32), V, self._unknown_id, back)
            self._after, self._is_empty = self._after._replace(last_K=np.asarray(first_RK[0])), False
