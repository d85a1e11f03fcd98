"""Choice of the next symbol: the settings, and the draw, row by row.

    p(next symbol) = softmax(logits / temperature), cut to the top_k most probable, then to the nucleus of top_p

A symbol is drawn by the Gumbel-max trick: argmax(logits + temperature g), with g standard Gumbel noise, is a draw from
softmax(logits / temperature), and at temperature 0 it is the most probable symbol.  The settings are arrays, a value a
row: another temperature compiles nothing anew, and rows with settings of their own go side by side.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.config.arguments import of_kind
from data_pipeline.settings import setting


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Choice of the next symbol."""

    temperature: float = setting(
        1.0, "Divides the logits: below 1 the text is more careful, above 1 bolder; 0 takes the most probable symbol."
    )
    top_k: int = setting(0, "Choose among the K most probable symbols only; 0: among all.")
    top_p: float = setting(
        1.0, "Choose among the fewest symbols whose probabilities, after --temperature and --top_k, add up to this."
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            of_kind(field.name, getattr(self, field.name), type(field.default))
        if not 0 <= self.temperature <= 1e6:
            raise ValueError(f"temperature={self.temperature} must be at least 0 (the most probable symbol) and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (all symbols) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be more than 0 and at most 1 (all symbols)")


class Choice(NamedTuple):
    """`Sampling` of R rows, as arrays of NumPy or JAX."""

    temperature_R: Any  # of the logits' dtype
    top_k_R: Any  # int32; 0: all symbols
    top_p_R: Any  # of the logits' dtype


def by_rows(samplings: Sequence[Sampling], dtype: jax.typing.DTypeLike) -> Choice:
    """Returns the settings of each row, in the logits' dtype."""
    least = float(jnp.finfo(dtype).tiny)  # so that a temperature near 0 is no division by 0
    return Choice(
        np.array([s.temperature and max(s.temperature, least) for s in samplings], dtype),
        np.array([min(s.top_k, np.iinfo(np.int32).max) for s in samplings], np.int32),
        np.array([s.top_p for s in samplings], dtype),
    )


def choose(logits_RV: jax.Array, gumbel_RV: jax.Array, choice: Choice) -> jax.Array:
    """The symbol chosen for each row, int32 [R].

    Args:
      logits_RV: -inf for a symbol that must not be chosen.
      gumbel_RV: standard Gumbel noise, or anything finite for a row of temperature 0.
    """
    # Nothing is sorted as long as no row cuts.  A branch, not another program: whether a row cuts must not change a
    # bit of the others.
    some_cut = jnp.any(_cuts(choice))
    return jax.lax.cond(some_cut, _choose_among_some, _choose_among_all, logits_RV, gumbel_RV, choice)


def _cuts(choice: Choice) -> jax.Array:
    return (choice.top_k_R > 0) | (choice.top_p_R < 1)


def _choose_among_all(logits_RV: jax.Array, gumbel_RV: jax.Array, choice: Choice) -> jax.Array:
    return _first_largest(logits_RV + choice.temperature_R[:, None] * gumbel_RV)


def _choose_among_some(logits_RV: jax.Array, gumbel_RV: jax.Array, choice: Choice) -> jax.Array:
    # Symbols in order of probability, of equal ones the lower id first, each with the noise that is its own.
    V, temperature_R1 = logits_RV.shape[1], choice.temperature_R[:, None]
    sorted_RV, ids_RV = jax.lax.top_k(logits_RV, V)
    is_kept_RV = jnp.arange(V)[None] < jnp.where(choice.top_k_R > 0, choice.top_k_R, V)[:, None]
    sorted_RV = jnp.where(is_kept_RV, sorted_RV, -math.inf)
    sorted_RV = jnp.where(_nucleus(sorted_RV, temperature_R1, choice.top_p_R[:, None]), sorted_RV, -math.inf)
    noisy_RV = sorted_RV + temperature_R1 * jnp.take_along_axis(gumbel_RV, ids_RV, axis=1)
    chosen_R = jnp.take_along_axis(ids_RV, _first_largest(noisy_RV)[:, None], axis=1)[:, 0].astype(jnp.int32)
    return jnp.where(_cuts(choice), chosen_R, _choose_among_all(logits_RV, gumbel_RV, choice))


def _first_largest(values_RV: jax.Array) -> jax.Array:
    """`argmax` of each row, int32 [R], as two reductions: XLA on a CPU does them in vectors, in a quarter of the time.

    Of a row that has a NaN it is the last.
    """
    last = values_RV.shape[1] - 1
    is_largest_RV = values_RV == values_RV.max(axis=1, keepdims=True)
    return jnp.where(is_largest_RV, jnp.arange(last + 1, dtype=jnp.int32), last).min(axis=1)


def _nucleus(sorted_RV: jax.Array, temperature_R1: jax.Array, top_p_R1: jax.Array) -> jax.Array:
    """True for symbols in the nucleus; they are given in order of probability.  bool [R, V].

    The nucleus (Holtzman et al., The Curious Case of Neural Text Degeneration, ICLR 2020) is the smallest set of most
    probable symbols that has a probability of `top_p` together: a symbol is in it when those before it fall short.
    """
    # The largest is subtracted first: at a temperature near 0 the quotients would overflow.
    least = jnp.finfo(sorted_RV.dtype).tiny
    p_RV = jax.nn.softmax((sorted_RV - sorted_RV[:, :1]) / jnp.maximum(temperature_R1, least), axis=1)
    before_RV = jnp.cumsum(p_RV, axis=1) - p_RV  # where top_p is rounded to 0 none is left, and argmax takes the first
    return (before_RV < top_p_R1) | (top_p_R1 == 1)  # else the last symbols would be lost to rounding
