"""Sampling: text made symbol by symbol, each drawn from the model's distribution given all that came before.

How a symbol is drawn stands in sampling.py.  The noise of row r at position t is that of the key (seed, "sample", r, t)
and of nothing else, so a row's text does not depend on how many rows are sampled beside it, on how many symbols are
made at a time, or on the devices.
"""

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
from charlstm.inference.sampling import Choice, Sampling, by_rows, choose
from charlstm.model import language_model
from charlstm.model.layer import Held
from charlstm.model.ops import compiler
from charlstm.types import ModelParams, RecurrentState
from data_pipeline.batch import Separator, ends_separator, looks_back

CHUNK = 64  # symbols of one call of the device
MOST_NOISE = 1 << 26  # random numbers per call, unless a single symbol of every row needs more
WINDOW = 128  # symbols of the prompt read by one call
# XLA sums a vector-matrix product in another order than a matrix-matrix product.  With two rows or more on each device,
# a row sampled alone has the same bits as the first of several.
LEAST_ROWS = 2
WHOLE, ROWS, COLUMNS = distributed.REPLICATED, distributed.BY_STREAM, PartitionSpec(None, distributed.AXIS)


class Chunk(NamedTuple):
    """Result of one call of the device: the next n symbols of each of R rows."""

    ids: np.ndarray  # int32 [R, n]
    log_probabilities: np.ndarray  # [R, n] natural logarithms of the model's own softmax: temperature 1, all symbols


class Beginning(NamedTuple):
    """The end of what was read: the last K symbols, as many as the separator has and at least one; the state before."""

    state: RecurrentState  # [1, H] after all symbols but the last
    last_K: np.ndarray  # int32; -1 beyond the beginning of the text


class Made(NamedTuple):
    """T symbols of R rows, on the device."""

    ids_TR: jax.Array
    log_probabilities_TR: jax.Array
    logits_TRV: jax.Array | None = None  # that each symbol was chosen by
    states: RecurrentState | None = None  # [T, R, H] that its logits were computed with


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
    mesh, count = batch_of(params, rows)
    V = params.b_out.shape[0]
    chunk = max(1, min(chunk, MOST_NOISE // (count * V)))
    *_, beginning = reading(config, params, np.asarray(prompt, np.int32), separator, window=window)
    state = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), beginning.state)
    numbers, last_RK = np.arange(count), jnp.tile(beginning.last_K, (count, 1))
    if not len(prompt):
        last_RK = first_symbols(seed, numbers, V, unknown_id, looks_back(separator))
    keys_R, choice = row_keys(seed, "sample", numbers), by_rows([sampling] * count, params.b_out.dtype)
    previous: Made | None = None
    for start in range(0, length, chunk):
        gumbel_TRV = noise(keys_R, np.full(count, start, np.int32), choice, mesh, chunk, V)
        state, last_RK, made = make_chunk(
            params, state, last_RK, gumbel_TRV, choice, mesh, config, unknown_id, separator, chunk, held
        )
        if previous is not None:
            yield _fetch(previous, rows, chunk)
        previous = made
    if previous is not None:
        yield _fetch(previous, rows, (length - 1) % chunk + 1)


def _fetch(made: Made, rows: int, symbols: int) -> Chunk:
    return Chunk(*(np.asarray(array_TR).T[:rows, :symbols] for array_TR in made[:2]))


def batch_of(params: ModelParams, rows: int) -> tuple[Mesh, int]:
    """Returns the devices that hold `params`, and the number of rows, `rows` or more, that is split over them."""
    mesh = distributed.make(sorted(jnp.asarray(params.b_out).devices(), key=lambda device: device.id))
    return mesh, mesh.size * max(-(-rows // mesh.size), LEAST_ROWS)


def row_keys(seed: int, name: str, numbers_R: np.ndarray) -> jax.Array:
    """Returns the random key of each sample, by its number, for the purpose `name`."""
    return _row_keys(np.uint32(seed), np.asarray(numbers_R, np.int32), name)


@partial(compiler.jit, static_argnames="name")
def _row_keys(seed, numbers_R, name):
    return jax.vmap(partial(jax.random.fold_in, rng.named(jax.random.key(seed), name)))(numbers_R)


def first_symbols(
    seed: int, numbers_R: np.ndarray, vocabulary_size: int, unknown_id: int | None, back: int
) -> jax.Array:
    """A symbol for each sample, drawn uniformly, after `back` that are none: [R, back + 1]."""
    known = np.setdiff1d(np.arange(vocabulary_size, dtype=np.int32), [] if unknown_id is None else [unknown_id])
    first_R = jax.vmap(lambda key: jax.random.choice(key, known))(row_keys(seed, "first", numbers_R))
    return jnp.pad(first_R[:, None], ((0, 0), (back, 0)), constant_values=-1)


def reading(
    config: ModelConfig,
    params: ModelParams,
    ids: np.ndarray,
    separator: Separator,
    after: Beginning | None = None,
    window: int = WINDOW,
) -> Iterator[Beginning]:
    """Reads symbols, a window a turn; the last of what is yielded is what a text goes on from after all of them.

    Every window has the same shape, so the program is compiled once.  From the first state, the text is padded in front
    to whole windows, and the state is reset at its first symbol.

    Args:
      after: what is read on from; None for the first state.
    """
    back, is_first = looks_back(separator), after is None
    text = np.concatenate([np.full(back + 1, -1) if after is None else after.last_K, ids]).astype(np.int32)
    start = back + is_first  # of what is read, which ends before the last symbol
    read, reset, last_K = text[start:-1], ends_separator(text[start - back : -1], separator), text[-1 - back :]
    state = language_model.reset_state(params, language_model.zero_state(config, 1, params.b_out.dtype))
    state = state if after is None else after.state
    yield Beginning(state, last_K)
    missing = -len(read) % window
    where = (missing, 0) if is_first else (0, missing)
    padded, resets = np.pad(read, where), np.pad(reset, where)
    if is_first and len(read):
        resets[missing] = True
    for start in range(0, len(padded), window):
        part = padded[None, start : start + window], resets[None, start : start + window]
        if is_first:
            state = _read_window(params, state, *part, config)
        else:
            state = _read_some(params, state, *part, np.int32(min(window, len(read) - start)), config)
        yield Beginning(state, last_K)


@partial(compiler.jit, static_argnames="config")
def _read_window(params, state, ids_BT, reset_BT, config):
    return language_model.apply(config, params, state, ids_BT, reset_BT)[0]


@partial(compiler.jit, static_argnames="config")
def _read_some(params, state, ids_BT, reset_BT, count, config):
    """Reads the first `count` symbols of a window."""
    params = language_model.fold_embedding(config, params)

    def read(t, state):
        id_B1, reset_B1 = (jax.lax.dynamic_slice_in_dim(array, t, 1, axis=1) for array in (ids_BT, reset_BT))
        return language_model.apply(config, params, state, id_B1, reset_B1)[0]

    return jax.lax.fori_loop(0, count, read, state)


@partial(compiler.jit, static_argnames=("mesh", "symbols", "vocabulary_size"))
def noise(keys_R, start_R, choice: Choice, mesh: Mesh, symbols, vocabulary_size):
    """Gumbel noise TRV for positions from `start_R` on; of no meaning if every row's temperature is 0."""
    dtype = choice.temperature_R.dtype

    def at(key, position):
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocabulary_size,)).astype(dtype)

    def of_rows(keys_R, start_R, temperature_R):
        positions_TR = start_R[None] + jnp.arange(symbols, dtype=jnp.int32)[:, None]
        return jax.lax.cond(
            jnp.any(temperature_R > 0),
            lambda: jax.vmap(jax.vmap(at), (None, 0))(keys_R, positions_TR),
            lambda: jnp.zeros((*positions_TR.shape, vocabulary_size), dtype),
        )

    split = jax.shard_map(of_rows, mesh=mesh, in_specs=(ROWS, ROWS, ROWS), out_specs=COLUMNS, check_vma=False)
    return split(keys_R, start_R, choice.temperature_R)


@partial(
    compiler.jit,
    static_argnames=("mesh", "config", "unknown_id", "separator", "symbols", "held", "keep"),
    donate_argnames="state",
)
def make_chunk(
    params,
    state,
    last_RK,
    gumbel_TRV,
    choice: Choice,
    mesh: Mesh,
    config,
    unknown_id,
    separator,
    symbols,
    held=(),
    keep=False,
) -> tuple[RecurrentState, jax.Array, Made]:
    """The next `symbols` of every row: (state, last symbols, what was made).

    Args:
      last_RK: the K symbols before, as many as the separator has, and at least one.
      keep: logits and states are part of what was made.
    """

    def make_one(params, choice, carry, gumbel_RV):
        state, last_RK = carry
        window = last_RK[:, -1:], ends_separator(last_RK, separator)
        if held:
            state, logits_TRV, _ = language_model.trace(config, params, state, *window, held)
        else:
            state, logits_TRV = language_model.apply(config, params, state, *window)
        logits_RV = logits_TRV[0]
        next_R = choose(_without(logits_RV, unknown_id), gumbel_RV, choice)
        log_probability_R1 = jnp.take_along_axis(jax.nn.log_softmax(logits_RV, axis=1), next_R[:, None], axis=1)
        last_RK = jnp.concatenate([last_RK[:, 1:], next_R[:, None]], axis=1)
        kept = (logits_RV, state) if keep else ()
        return (state, last_RK), Made(next_R, log_probability_R1[:, 0], *kept)

    def of_rows(params, state, last_RK, gumbel_TRV, choice):
        params = language_model.fold_embedding(config, params)
        (state, last_RK), made = jax.lax.scan(partial(make_one, params, choice), (state, last_RK), gumbel_TRV, symbols)
        return state, last_RK, made

    given, made = (WHOLE, ROWS, ROWS, COLUMNS, ROWS), (ROWS, ROWS, COLUMNS)
    return jax.shard_map(of_rows, mesh=mesh, in_specs=given, out_specs=made, check_vma=False)(
        params, state, last_RK, gumbel_TRV, choice
    )


def _without(logits_RV: jax.Array, unknown_id: int | None) -> jax.Array:
    return logits_RV if unknown_id is None else logits_RV.at[:, unknown_id].set(-math.inf)
