"""Surprise of a model at each symbol of a text: bits, entropy, rank, and its best guesses."""

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.inference.evaluate import Split
from charlstm.inspect.trace import first_state, windows
from charlstm.model import language_model
from charlstm.model.ops import compiler
from charlstm.training.loss import NATS_PER_BIT, cross_entropy

if TYPE_CHECKING:
    from charlstm.api import Model

GUESSES = 5


class Expected(NamedTuple):
    """The expectation of each of N symbols, before it was read."""

    bits: np.ndarray  # float32 [N] of the symbol that came
    entropy: np.ndarray  # float32 [N] bits: what was to be expected of them
    rank: np.ndarray  # int32 [N] of the symbol that came, 1 if none was more probable
    guesses: np.ndarray  # int32 [N, GUESSES] ids of the most probable symbols, the best first
    probabilities: np.ndarray  # float32 [N, GUESSES]


def expected(model: "Model", split: Split) -> Iterator[Expected]:
    """Yields what was expected at the symbols of a text, a window at a time.

    Before the first symbol, which nothing precedes, all are equally probable, as in a score.

    Args:
      split: in the order in which the model reads.
    """
    config, V = model.config.model, model.vocabulary.size
    count = min(GUESSES, V)
    if len(split):
        first, even = split.read(0, 1).astype(np.int32), np.full(1, math.log2(V), np.float32)
        guesses = np.arange(count, dtype=np.int32)[None]
        yield Expected(even, even, first + 1, guesses, np.full((1, count), 1 / V, np.float32))
    state, left = first_state(config, model.params, 1), len(split) - 1
    for read, following, reset in windows(split, model.separator, 1):
        state, found = _expected(model.params, state, read, following, reset, config, count)
        yield Expected(*(np.asarray(array)[:left] for array in found))
        left -= read.shape[1]


def joined(parts: Iterator[Expected]) -> Expected:
    """Returns the expectations of all symbols of a text that has any."""
    return Expected(*map(np.concatenate, zip(*parts, strict=True)))


@partial(compiler.jit, static_argnames=("config", "count"))
def _expected(params, state, ids_BT, following_BT, reset_BT, config, count):
    state, logits_TBV = language_model.apply(config, params, state, ids_BT, reset_BT)
    bits_T = cross_entropy(logits_TBV, following_BT.T)[:, 0] / NATS_PER_BIT
    log_p_TV = jax.nn.log_softmax(logits_TBV[:, 0].astype(jnp.float32), axis=1)
    entropy_T = -(jnp.exp(log_p_TV) * log_p_TV).sum(1) / NATS_PER_BIT
    own_T1 = jnp.take_along_axis(log_p_TV, following_BT[0][:, None], axis=1)
    # Of equally probable symbols the lower id comes first, as in the guesses.
    earlier_TV = jnp.arange(log_p_TV.shape[1])[None] < following_BT[0][:, None]
    rank_T = 1 + ((log_p_TV > own_T1) | ((log_p_TV == own_T1) & earlier_TV)).sum(1, jnp.int32)
    best_TK, guesses_TK = jax.lax.top_k(log_p_TV, count)
    return state, (bits_T.astype(jnp.float32), entropy_T, rank_T, guesses_TK, jnp.exp(best_TK))
