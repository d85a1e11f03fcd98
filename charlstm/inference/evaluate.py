"""The score of a model on a held-out split: every symbol once, with carried state, training untouched."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from charlstm import distributed
from charlstm.config import Config
from charlstm.inference.score import Score
from charlstm.model import language_model
from charlstm.model.ops import compiler
from charlstm.training.loss import NATS_PER_BIT, cross_entropy
from charlstm.types import ModelParams, RecurrentState
from data_pipeline.batch import Batch, Separator
from data_pipeline.eval_chunks import ChunkPlan, read_chunks
from data_pipeline.vocabulary import Vocabulary


class Split(Protocol):
    """A split of a corpus."""

    vocabulary: Vocabulary  # of its symbols
    bytes: int  # of the original text
    characters: int | None  # that start in it; None where it is not UTF-8
    unknown: int  # symbols that are not in the vocabulary

    def __len__(self) -> int: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, start: int, stop: int, /) -> np.ndarray: ...


Doing = Callable[[int, int], None]  # called with (windows done, windows in all)


def make_evaluator(
    config: Config, vocabulary_size: int, split: Split, mesh: Mesh, separator: Separator = (), shards: int = 1, most=0
) -> Callable[..., Score]:
    """A function (params, doing) -> score of the whole of `split`, on all devices of `mesh`.

    Every symbol is scored once: symbols 1 .. N-1 by the model, and symbol 0, which nothing precedes, by log2(V) bits.
    A device takes its rows in `shards` parts, one after the other, each at one shape: the score has the same bits on
    any number of devices whose product with `shards` is the same.

    Args:
      most: symbols that are scored, in chunks evenly spaced over a split that has more; 0: all.
    """
    evaluate = at_temperatures(config, vocabulary_size, split, mesh, separator, shards=shards, most=most)
    return lambda params, doing=None: evaluate(params, doing)[0]


def at_temperatures(
    config: Config,
    vocabulary_size: int,
    split: Split,
    mesh: Mesh,
    separator: Separator = (),
    temperatures: Sequence[float] = (1.0,),
    shards: int = 1,
    most: int = 0,
) -> Callable[..., list[Score]]:
    """Returns an evaluator for several softmax temperatures: a score each, all from the same logits."""
    plan = plan_of(config, split, mesh, shards, most)
    rows = plan.batch_size
    own_rows, window = distributed.process_rows(mesh, rows), make_window(config, mesh, temperatures, shards)

    def evaluate(params: ModelParams, doing: Doing | None = None) -> list[Score]:
        carry = language_model.zero_state(config.model, len(own_rows), params.b_out.dtype)
        carry = distributed.put(mesh, distributed.BY_STREAM, carry)
        total_K, late = np.zeros(len(temperatures)), None
        for done, batch in enumerate(read_chunks(split, plan, own_rows, separator)):
            if doing:
                doing(done, plan.groups * plan.windows)
            carry, nats = window(params, carry, *distributed.put(mesh, distributed.BY_STREAM, batch))
            total_K += 0 if late is None else _sum(late)  # one window late, so that the device never waits
            late = nats
        assert late is not None
        if doing:
            doing(done + 1, done + 1)
        return scores(total_K + _sum(late), vocabulary_size, split, plan.scored)

    return evaluate


def plan_of(config: Config, split: Split, mesh: Mesh, shards: int = 1, most: int = 0) -> ChunkPlan:
    """Returns the plan by which `split` is scored on `mesh`: its chunks, rows and windows."""
    settings, window = config.evaluation, config.streams.window
    plan = ChunkPlan(len(split), settings.eval_chunk, settings.burn_in, 1, window, most)
    parts = mesh.size * shards
    rows = -(-min(settings.evaluation_batch_size, plan.chunks) // parts) * parts
    return dataclasses.replace(plan, batch_size=rows)


def scores(nats_K: np.ndarray, vocabulary_size: int, split: Split, scored: int = 0) -> list[Score]:
    """Scores from sums over symbols 1 .. N-1 of `split`, or over `scored` of its symbols.

    For a part, the counts of characters, bytes and unknown symbols are estimated in proportion from the whole split.
    """
    bits_K = nats_K / NATS_PER_BIT + math.log2(vocabulary_size)
    scored = scored or len(split)

    def of(count: int) -> int:
        return count if scored == len(split) else round(count * scored / len(split))

    characters = None if split.characters is None else of(split.characters)
    return [Score(bits, scored, characters, of(split.bytes), of(split.unknown)) for bits in bits_K.tolist()]


def _sum(nats_BK: jax.Array) -> np.ndarray:
    """In float64: a figure must not depend on how many rows are summed."""
    return distributed.fetch(nats_BK).sum(0, dtype=np.float64)


def nats_at_temperatures(temperatures: Sequence[float], logits_TBV: jax.Array, targets_TB: jax.Array) -> jax.Array:
    """Cross-entropy with the softmax of logits / temperature, `[K, T, B]` nats for K temperatures."""
    # One after the other, so that the memory does not grow with K.
    return jax.lax.map(
        lambda temperature: cross_entropy(logits_TBV / temperature, targets_TB),
        jnp.asarray(temperatures, logits_TBV.dtype),
    )


def make_window(
    config: Config, mesh: Mesh, temperatures: Sequence[float] = (1.0,), shards: int = 1
) -> Callable[..., tuple[RecurrentState, jax.Array]]:
    """The compiled (params, carry, batch, scored [B, T]) -> (carry, nats [B, K] summed over the scored symbols)."""

    def local_window(params: ModelParams, *rows: Any) -> Any:
        by_shard = jax.tree.map(lambda a: a.reshape((shards, -1, *a.shape[1:])), rows)
        found = jax.lax.map(lambda part: shard_window(params, *part), by_shard)
        return jax.tree.map(lambda a: a.reshape((-1, *a.shape[2:])), found)

    def shard_window(params: ModelParams, carry: RecurrentState, batch: Batch, scored_bT: jax.Array) -> Any:
        carry, logits_TbV = language_model.apply(config.model, params, carry, batch.inputs, batch.reset)
        nats_KTb = nats_at_temperatures(temperatures, logits_TbV, batch.targets.T)
        return carry, jnp.where(scored_bT.T[None], nats_KTb, 0).sum(1).T

    whole, by_row = distributed.REPLICATED, distributed.BY_STREAM
    return jax.jit(
        jax.shard_map(
            compiler.in_full_precision(local_window),
            mesh=mesh,
            in_specs=(whole, by_row, by_row, by_row),
            out_specs=(by_row, by_row),
            check_vma=False,
        ),
        donate_argnums=1,
        compiler_options=compiler.options(),
    )
