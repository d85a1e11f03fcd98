"""Sampling: text made symbol by symbol, each drawn from the model's distribution given all that came before.

    p(next symbol) = softmax(logits / temperature), cut to the top_k most probable, then to the nucleus of top_p

A symbol is drawn by the Gumbel-max trick: argmax(logits + temperature g), with g standard Gumbel noise, is a draw from
softmax(logits / temperature), and at temperature 0 it is the most probable symbol.  The noise of row r at position t is
that of the key (seed, "sample", r, t) and of nothing else, so a row's text does not depend on how many rows are sampled
beside it, on how many symbols are made at a time, or on the devices.
"""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from charlstm import distributed, rng
from charlstm.config.model import ModelConfig
from charlstm.model import language_model
from charlstm.model.layer import Held
from charlstm.model.ops import compiler
from charlstm.types import ModelParams, RecurrentState
from data_pipeline.batch import Separator, ends_separator, looks_back
from data_pipeline.settings import setting

CHUNK = 64  # symbols of one call of the device
MOST_NOISE = 1 << 26  # random numbers per call, unless a single symbol of every row needs more
WINDOW = 128  # symbols of the prompt read by one call
# XLA sums a vector-matrix product in another order than a matrix-matrix product.  With two rows or more on each device,
# a row sampled alone has the same bits as the first of several.
LEAST_ROWS = 2
WHOLE, ROWS, COLUMNS = distributed.REPLICATED, distributed.BY_STREAM, PartitionSpec(None, distributed.AXIS)


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
        if not 0 <= self.temperature <= 1e6:
            raise ValueError(f"temperature={self.temperature} must be at least 0 (the most probable symbol) and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (all symbols) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be more than 0 and at most 1 (all symbols)")


class Chunk(NamedTuple):
    """Result of one call of the device: the next n symbols of each of R rows."""

    ids: np.ndarray  # int32 [R, n]
    log_probabilities: np.ndarray  # [R, n] natural logarithms of the model's own softmax: temperature 1, all symbols


def generate(
    config: ModelConfig,
    params: ModelParams,
    prompt: np.ndarray,
    sampling: Sampling,
    *,
    rows: int,
    length: int,
    seed: int,
    unknown_id: int | None = None,
    separator: Separator = (),
    held: tuple[Held, ...] = (),
    chunk: int = CHUNK,
    window: int = WINDOW,
) -> Iterator[Chunk]:
    """Continues `prompt` in `rows` independent ways, a few symbols at a time.

    Args:
      params: whole on each of the devices that the rows are split over.
      prompt: ids [symbols], read from the first state.  When empty, each row begins after a symbol drawn uniformly,
        which is not part of its text.
      rows: texts made side by side, in one batch.
      length: symbols made of each.
      seed: 0 to 2**32 - 1; the same seed makes the same text.
      unknown_id: a symbol that is never drawn.
      separator: ids that end a document, for a model trained with --reset_state=document.  Its last symbol is read from
        the initial state, both in the prompt and in the sampled text.
      held: as of `language_model.trace`: units whose state is held from the prompt's last symbol on.
      chunk: symbols made by one call of the device, fewer where the rows are very many; does not change the text.
      window: symbols of the prompt read by one call; does not change the text.

    Yields:
      Chunks of `chunk` symbols, the last one shorter where `length` is no multiple.  The device makes the next chunk
      while the caller has this one.
    """
    assert rows >= 1 and length >= 0 and chunk >= 1 and window >= 1, (rows, length, chunk, window)
    mesh = distributed.make(sorted(jnp.asarray(params.b_out).devices(), key=lambda device: device.id))
    count = mesh.size * max(-(-rows // mesh.size), LEAST_ROWS)
    key, V = jax.random.key(seed), params.b_out.shape[0]
    chunk = max(1, min(chunk, MOST_NOISE // (count * V)))
    row_keys = _row_keys(rng.named(key, "sample"), count)
    prompt = np.asarray(prompt, np.int32)
    state = _after(config, params, prompt[:-1], separator, window)
    state = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), state)
    back = looks_back(separator)
    if len(prompt):
        last_RK = jnp.tile(_with_nothing_before(prompt, back)[-1 - back :], (count, 1))
    else:
        last_RK = _first_symbols(_row_keys(rng.named(key, "first"), count), V, unknown_id, back)
    previous: tuple[jax.Array, jax.Array] | None = None
    for start in range(0, length, chunk):
        gumbel_TRV = None
        if sampling.temperature:
            gumbel_TRV = _noise(row_keys, np.int32(start), mesh, chunk, V, params.b_out.dtype)
        state, last_RK, made = _make_chunk(
            params, state, last_RK, gumbel_TRV, mesh, config, sampling, unknown_id, separator, chunk, held
        )
        if previous is not None:
            yield _fetch(previous, rows, chunk)
        previous = made
    if previous is not None:
        yield _fetch(previous, rows, (length - 1) % chunk + 1)


def _fetch(made: tuple[jax.Array, jax.Array], rows: int, symbols: int) -> Chunk:
    return Chunk(*(np.asarray(array_TR).T[:rows, :symbols] for array_TR in made))


@partial(compiler.jit, static_argnames="rows")
def _row_keys(key: jax.Array, rows: int) -> jax.Array:
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows, dtype=jnp.int32))


def _first_symbols(row_keys: jax.Array, vocabulary_size: int, unknown_id: int | None, back: int) -> jax.Array:
    """A symbol for each row, drawn uniformly, after `back` that are none: [R, back + 1]."""
    known = np.setdiff1d(np.arange(vocabulary_size, dtype=np.int32), [] if unknown_id is None else [unknown_id])
    first_R = jax.vmap(lambda key: jax.random.choice(key, known))(row_keys)
    return jnp.pad(first_R[:, None], ((0, 0), (back, 0)), constant_values=-1)


def _after(
    config: ModelConfig, params: ModelParams, ids: np.ndarray, separator: Separator, window: int
) -> RecurrentState:
    """The state [1, H] of each layer after reading `ids` from the first state, whole windows at a time.

    The text is padded in front to whole windows, and the state is reset at its first symbol.  So every window has the
    same shape, and the program is compiled once.
    """
    state = language_model.reset_state(params, language_model.zero_state(config, 1, params.b_out.dtype))
    missing = -len(ids) % window
    padded = np.concatenate([np.zeros(missing, np.int32), ids])
    reset = np.arange(len(padded)) == missing
    reset[missing:] |= ends_separator(_with_nothing_before(ids, looks_back(separator)), separator)
    for start in range(0, len(padded), window):
        part = slice(start, start + window)
        state = _read_window(params, state, padded[None, part], reset[None, part], config)
    return state


def _with_nothing_before(ids: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([np.full(count, -1, np.int32), ids])


@partial(compiler.jit, static_argnames="config")
def _read_window(params, state, ids_BT, reset_BT, config):
    return language_model.apply(config, params, state, ids_BT, reset_BT)[0]


@partial(compiler.jit, static_argnames=("mesh", "symbols", "vocabulary_size", "dtype"))
def _noise(row_keys, start, mesh: Mesh, symbols, vocabulary_size, dtype):
    """Gumbel noise TRV for positions from `start` on."""

    def at(position, key):
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocabulary_size,)).astype(dtype)

    def of_rows(row_keys, start):
        positions_T = start + jnp.arange(symbols, dtype=jnp.int32)
        return jax.vmap(jax.vmap(at, (None, 0)), (0, None))(positions_T, row_keys)

    split = jax.shard_map(of_rows, mesh=mesh, in_specs=(ROWS, WHOLE), out_specs=COLUMNS, check_vma=False)
    return split(row_keys, start)


@partial(
    compiler.jit,
    static_argnames=("mesh", "config", "sampling", "unknown_id", "separator", "symbols", "held"),
    donate_argnames="state",
)
def _make_chunk(
    params, state, last_RK, gumbel_TRV, mesh: Mesh, config, sampling, unknown_id, separator, symbols, held=()
):
    """The next `symbols` of every row: (state, last symbols, (ids, log-probabilities) [T, R]).

    `last_RK` are the K symbols before, as many as the separator has, and at least one.
    """

    def make_one(params, carry, gumbel_RV):
        state, last_RK = carry
        window = last_RK[:, -1:], ends_separator(last_RK, separator)
        if held:
            state, logits_TRV, _ = language_model.trace(config, params, state, *window, held)
        else:
            state, logits_TRV = language_model.apply(config, params, state, *window)
        logits_RV = logits_TRV[0]
        next_R = choose(_without(logits_RV, unknown_id), gumbel_RV, sampling)
        log_probability_R1 = jnp.take_along_axis(jax.nn.log_softmax(logits_RV, axis=1), next_R[:, None], axis=1)
        last_RK = jnp.concatenate([last_RK[:, 1:], next_R[:, None]], axis=1)
        return (state, last_RK), (next_R, log_probability_R1[:, 0])

    def of_rows(params, state, last_RK, gumbel_TRV):
        params = language_model.fold_embedding(config, params)
        (state, last_RK), made = jax.lax.scan(partial(make_one, params), (state, last_RK), gumbel_TRV, symbols)
        return state, last_RK, made

    given, made = (WHOLE, ROWS, ROWS, COLUMNS), (ROWS, ROWS, COLUMNS)
    return jax.shard_map(of_rows, mesh=mesh, in_specs=given, out_specs=made, check_vma=False)(
        params, state, last_RK, gumbel_TRV
    )


def _without(logits_RV: jax.Array, unknown_id: int | None) -> jax.Array:
    return logits_RV if unknown_id is None else logits_RV.at[:, unknown_id].set(-math.inf)


def choose(logits_RV: jax.Array, gumbel_RV: jax.Array | None, sampling: Sampling) -> jax.Array:
    """The symbol chosen for each row, int32 [R].

    Args:
      logits_RV: -inf for a symbol that must not be chosen.
      gumbel_RV: standard Gumbel noise; None for temperature 0: the most probable symbol.
    """
    if gumbel_RV is None:
        return _first_largest(logits_RV)
    least = float(jnp.finfo(logits_RV.dtype).tiny)  # so that a temperature near 0 is no division by 0
    temperature = jnp.asarray(max(sampling.temperature, least), logits_RV.dtype)
    if not sampling.top_k and sampling.top_p == 1:
        return _first_largest(logits_RV + temperature * gumbel_RV)
    # K symbols in order of probability, of equal ones the lower id first, each with the noise that is its own.
    V = logits_RV.shape[1]
    logits_RK, ids_RK = jax.lax.top_k(logits_RV, min(sampling.top_k or V, V))
    logits_RK = jnp.where(_nucleus(logits_RK, temperature, sampling.top_p), logits_RK, -math.inf)
    noisy_RK = logits_RK + temperature * jnp.take_along_axis(gumbel_RV, ids_RK, axis=1)
    return jnp.take_along_axis(ids_RK, _first_largest(noisy_RK)[:, None], axis=1)[:, 0].astype(jnp.int32)


def _first_largest(values_RV: jax.Array) -> jax.Array:
    """`argmax` of each row, int32 [R], as two reductions: XLA on a CPU does them in vectors, in a quarter of the time.

    Of a row that has a NaN it is the last.
    """
    last = values_RV.shape[1] - 1
    is_largest_RV = values_RV == values_RV.max(axis=1, keepdims=True)
    return jnp.where(is_largest_RV, jnp.arange(last + 1, dtype=jnp.int32), last).min(axis=1)


def _nucleus(logits_RK: jax.Array, temperature: jax.Array, top_p: float) -> jax.Array:
    """True for symbols in the nucleus; they are given in order of probability.  bool [R, K].

    The nucleus (Holtzman et al., The Curious Case of Neural Text Degeneration, ICLR 2020) is the smallest set of most
    probable symbols that has a probability of `top_p` together: a symbol is in it when those before it fall short.
    """
    if top_p == 1:  # else the last symbols would be lost to rounding
        return jnp.ones(logits_RK.shape, bool)
    # The largest is subtracted first: at a temperature near 0 the quotients would overflow.
    p_RK = jax.nn.softmax((logits_RK - logits_RK[:, :1]) / temperature, axis=1)
    before_RK = jnp.cumsum(p_RK, axis=1) - p_RK  # where top_p is rounded to 0 none is left, and argmax takes the first
    return before_RK < jnp.asarray(top_p, p_RK.dtype)
