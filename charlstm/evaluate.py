"""The score of a model on a held-out split: every symbol once, with carried state, training untouched."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from charlstm import mesh as mesh_lib
from charlstm import model
from charlstm.config import Config
from charlstm.loss import NATS_PER_BIT, cross_entropy
from charlstm.types import ModelParams, RecurrentState
from data_pipeline.batch import Batch
from data_pipeline.pieces import PiecePlan, read_pieces


class Split(Protocol):
    """A split of a corpus."""

    bytes: int  # of the original text

    def __len__(self) -> int: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, start: int, stop: int, /) -> np.ndarray: ...


class Score(NamedTuple):
    """Bits are sums; the figures per symbol and per byte are divided once."""

    bits: float
    characters: int  # symbols of the vocabulary
    bytes: int  # of the same text as it lay on disk

    @property
    def bits_per_character(self) -> float:
        return self.bits / self.characters

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes


def of_split(
    config: Config, vocabulary_size: int, split: Split, mesh: Mesh, separator: int | None = None
) -> Callable[[ModelParams], Score]:
    """A function params -> score of the whole of `split`, on all devices of `mesh`.

    Every symbol is scored once: symbols 1 .. N-1 by the model, and symbol 0, which nothing precedes, by log2(V) bits.
    """
    settings, pieces = config.evaluation, -(-len(split) // config.evaluation.piece)
    rows = -(-min(settings.evaluation_batch_size, pieces) // mesh.size) * mesh.size  # a multiple of the devices
    plan = PiecePlan(len(split), settings.piece, settings.burn_in, rows, config.streams.window)
    own_rows, window = mesh_lib.process_rows(mesh, rows), make_window(config, mesh)

    def evaluate(params: ModelParams) -> Score:
        carry = model.initial_state(config.model, len(own_rows), params.b_out.dtype)
        carry = mesh_lib.put(mesh, mesh_lib.BY_STREAM, carry)
        total, late = 0.0, None
        for batch in read_pieces(split, plan, own_rows, separator):
            carry, nats = window(params, carry, *mesh_lib.put(mesh, mesh_lib.BY_STREAM, batch))
            total += 0.0 if late is None else _sum(late)  # one window late, so that the device never waits
            late = nats
        assert late is not None
        return Score((total + _sum(late)) / NATS_PER_BIT + math.log2(vocabulary_size), len(split), split.bytes)

    return evaluate


def _sum(nats_B: jax.Array) -> float:
    """In float64: a figure must not depend on how many rows are summed."""
    return float(mesh_lib.fetch(nats_B).sum(dtype=np.float64))


def make_window(config: Config, mesh: Mesh) -> Callable[..., tuple[RecurrentState, jax.Array]]:
    """The compiled (params, carry, batch, scored [B, T]) -> (carry, nats [B] summed over the scored symbols)."""

    def local_window(params: ModelParams, carry: RecurrentState, batch: Batch, scored_bT: jax.Array) -> Any:
        carry, logits_TbV = model.apply(config.model, params, carry, batch.inputs, batch.reset)
        nats_Tb = cross_entropy(logits_TbV, batch.targets.T)
        return carry, jnp.where(scored_bT.T, nats_Tb, 0).sum(0)

    whole, by_row = mesh_lib.REPLICATED, mesh_lib.BY_STREAM
    return jax.jit(
        jax.shard_map(
            local_window,
            mesh=mesh,
            in_specs=(whole, by_row, by_row, by_row),
            out_specs=(by_row, by_row),
            check_vma=False,
        ),
        donate_argnums=1,
    )
