"""Divergence detection (non-finite values, loss spikes) and update skipping.

An update is accepted if the loss, the gradient norm and the new parameters are finite and the loss is no spike: at most
`spike_factor` times its moving average.  All of it is computed on the device from replicated numbers, so every process
decides alike, and a resumed run decides as before.  Where it is not to be skipped, a rejected
update raises `Diverged` in run/metrics.py once its numbers are read, and run/loop.py stops or rolls back.
"""

from typing import Any

import jax
import jax.numpy as jnp

from charlstm.config.training import TrainingConfig
from charlstm.types import DivergenceState

Tree = Any  # of arrays

EMA_DECAY = 0.98  # of the loss: averages over some fifty updates


def start(dtype: Any) -> DivergenceState:
    """Before the first update; `dtype` is that of the loss."""
    none = jnp.zeros((), jnp.int32)
    return DivergenceState(none, jnp.zeros((), dtype), none, none, none, none)


def is_accepted(
    settings: TrainingConfig, loss: jax.Array, norm: jax.Array, params: Tree, divergence_state: DivergenceState
) -> jax.Array:
    """True if the update to `params`, from `loss` and a gradient of this `norm`, is accepted; bool []."""
    accepted = jnp.isfinite(loss) & jnp.isfinite(norm) & all_finite(params)
    if settings.spike_factor > 0:
        accepted &= (divergence_state.loss_ema == 0) | (loss <= settings.spike_factor * divergence_state.loss_ema)
    return accepted


def all_finite(tree: Tree) -> jax.Array:
    """True if every element is finite; bool []."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def finite_rows(carry: Tree, nats_b: jax.Array) -> jax.Array:
    """True where the stream's recurrent state and loss are finite; bool [b]."""
    finite_b = jnp.isfinite(nats_b)
    for leaf in jax.tree.leaves(carry):
        finite_b &= jnp.isfinite(leaf).all(1)
    return finite_b


def select(accepted: jax.Array, new: Tree, old: Tree) -> Tree:
    """Selects `new` if accepted, else `old`, bit for bit."""
    return jax.tree.map(lambda n, o: jnp.where(accepted, n, o), new, old)


def reset_rows(carry: Tree, finite_b: jax.Array, first: Tree) -> Tree:
    """Replaces non-finite rows of the recurrent state by `first`: a NaN would stay in its stream for ever."""
    return jax.tree.map(lambda leaf, f: jnp.where(finite_b[:, None], leaf, f), carry, first)


def update(
    divergence_state: DivergenceState, loss: jax.Array, accepted: jax.Array, skips: bool, nonfinite_rows: jax.Array
) -> DivergenceState:
    """Updates the divergence state after a step of `loss`.

    Args:
      skips: whether on_divergence is skip: rejected updates are skipped, and non-finite rows reset.
      nonfinite_rows: int32 []: non-finite rows of the global batch.
    """
    moved = EMA_DECAY * divergence_state.loss_ema + (1 - EMA_DECAY) * loss
    usual = jnp.where(accepted, jnp.where(divergence_state.loss_ema == 0, loss, moved), divergence_state.loss_ema)
    divergence_state = divergence_state._replace(next_window=divergence_state.next_window + 1, loss_ema=usual)
    if not skips:
        return divergence_state
    skipped = (~accepted).astype(jnp.int32)
    return divergence_state._replace(
        skipped=divergence_state.skipped + skipped,
        consecutive_skips=(divergence_state.consecutive_skips + 1) * skipped,
        state_resets=divergence_state.state_resets + nonfinite_rows,
    )
