"""The training state: drawn, laid out on devices, and changed between updates (plateau, rollback)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from charlstm import distributed, rng
from charlstm.config import Config
from charlstm.model import language_model
from charlstm.training import averaging, divergence, optimizers, plateau
from charlstm.types import ModelParams, TrainState


def init(config: Config, vocabulary_size: int) -> TrainState:
    """Initial training state."""
    params = language_model.init(config.model, vocabulary_size, rng.named(jax.random.key(config.training.seed), "init"))
    dtype = params.b_out.dtype
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizers.make(config.optimizer).init(params),
        recurrent_state=language_model.zero_state(config.model, config.streams.batch_size, dtype),
        divergence=divergence.start(dtype),
        plateau=plateau.start(),
        average=averaging.start(config.optimizer, params),
    )


def abstract(config: Config, vocabulary_size: int, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state on `mesh`: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda: init(config, vocabulary_size))
    return jax.tree.map(
        lambda spec, tree: distributed.abstract(mesh, spec, tree), state_specs(), shapes, is_leaf=_is_spec
    )


def place(mesh: Mesh, state: TrainState) -> TrainState:
    """Lays out `state`, identical on every process, on `mesh`."""
    rows = distributed.process_rows(mesh, jax.tree.leaves(state.recurrent_state)[0].shape[0])
    own = jax.tree.map(lambda a: a[rows.start : rows.stop], state.recurrent_state)
    state = state._replace(recurrent_state=own)
    return jax.tree.map(lambda spec, tree: distributed.put(mesh, spec, tree), state_specs(), state, is_leaf=_is_spec)


def with_params(config: Config, state: TrainState, params: ModelParams) -> TrainState:
    """Replaces the parameters of a `state` before its first update; copied, since a step donates the state."""
    params = jax.tree.map(jnp.copy, params)
    return state._replace(params=params, average=averaging.start(config.optimizer, params))


def update_plateau(config: Config, mesh: Mesh, state: TrainState, score: float) -> TrainState:
    """Updates the plateau state with a validation score, bits per symbol.  Identical on all processes."""
    updated = plateau.update(config.optimizer, jax.tree.map(np.asarray, state.plateau), score)
    return state._replace(plateau=distributed.put(mesh, distributed.REPLICATED, updated))


def skipped_windows(state: TrainState) -> int:
    """Windows of each stream that the run has passed over."""
    return int(state.divergence.next_window) - int(state.step)


def roll_back(mesh: Mesh, state: TrainState, windows: int, rollbacks: int) -> TrainState:
    """Makes the run's `rollbacks`-th rollback, to `state`, skipping `windows`; if any, resets the recurrent state."""
    counts = np.int32(int(state.divergence.next_window) + windows), np.int32(rollbacks)
    window, count = distributed.put(mesh, distributed.REPLICATED, counts)
    divergence_state = state.divergence._replace(next_window=window, rollbacks=count)
    carry = state.recurrent_state
    if windows:
        rows = distributed.process_rows(mesh, jax.tree.leaves(carry)[0].shape[0])
        zeros = jax.tree.map(lambda a: np.zeros((len(rows), *a.shape[1:]), a.dtype), carry)
        first = language_model.reset_state(jax.tree.map(np.asarray, state.params), zeros)
        carry = distributed.put(mesh, distributed.BY_STREAM, first)
    return state._replace(recurrent_state=carry, divergence=divergence_state)


def state_specs() -> Any:
    """Partition specs of the state: replicated, except the recurrent state, which is split by stream."""
    whole: Any = distributed.REPLICATED
    rows: Any = distributed.BY_STREAM
    return TrainState(whole, whole, whole, recurrent_state=rows, divergence=whole, plateau=whole, average=whole)


def _is_spec(node: Any) -> bool:
    return isinstance(node, jax.sharding.PartitionSpec)
