"""The score of a model on a held-out split: every symbol once, with carried state, training untouched."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from charlstm import mesh as mesh_lib
from charlstm import model
from charlstm.config import Config
from charlstm.loss import NATS_PER_BIT, cross_entropy
from charlstm.types import ModelParams
from data_pipeline.batch import Batch


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


Evaluate = Callable[[ModelParams, Iterable[tuple[Batch, np.ndarray]]], float]


def batch_rows(config: Config, pieces: int, devices: int) -> int:
    """Pieces scored side by side: as configured, but no more than there are, and a multiple of the devices."""
    rows = min(config.evaluation.evaluation_batch_size, pieces)
    return -(-rows // devices) * devices


def make(config: Config, mesh: Mesh, rows: int) -> Evaluate:
    """A function (params, windows of pieces) -> nats summed over all scored symbols.

    Args:
      rows: pieces side by side in the global batch; a multiple of the devices.
    """

    def local_window(params: ModelParams, carry: Any, batch: Batch, scored_bT: jax.Array) -> tuple[Any, jax.Array]:
        carry, logits_TbV = model.apply(config.model, params, carry, batch.inputs, batch.reset)
        nats_Tb = cross_entropy(logits_TbV, batch.targets.T)
        return carry, jax.lax.psum(jnp.where(scored_bT.T, nats_Tb, 0).sum(), mesh_lib.AXIS)

    whole, by_row = mesh_lib.REPLICATED, mesh_lib.BY_STREAM
    window = jax.jit(
        jax.shard_map(
            local_window,
            mesh=mesh,
            in_specs=(whole, by_row, by_row, by_row),
            out_specs=(by_row, whole),
            check_vma=False,
        ),
        donate_argnums=1,
    )

    def evaluate(params: ModelParams, windows: Iterable[tuple[Batch, np.ndarray]]) -> float:
        local_rows = len(mesh_lib.process_rows(mesh, rows))
        carry = mesh_lib.put(mesh, by_row, model.initial_state(config.model, local_rows, params.b_out.dtype))
        total, previous = 0.0, None
        for batch, scored in windows:
            carry, nats = window(params, carry, *mesh_lib.put(mesh, by_row, (batch, scored)))
            total += float(previous) if previous is not None else 0.0  # one window late, so that the device never waits
            previous = nats
        return total + (float(previous) if previous is not None else 0.0)

    return evaluate


def score(nats: float, symbols: int, text_bytes: int, vocabulary_size: int) -> Score:
    """The score of a split of `symbols` symbols; its first one, which nothing precedes, is charged log2(V) bits."""
    return Score(nats / NATS_PER_BIT + math.log2(vocabulary_size), symbols, text_bytes)
