"""Which updates are sound, what becomes of one that is not, and what a run has met on its way.

An update is sound where the loss, the gradient's norm and the new parameters are finite, and the loss is no spike: not
more than `spike_factor` times what it usually is.  All of it is computed on the device from replicated numbers, so
every process judges alike, and a run that was killed judges again as it did before.
"""

from typing import Any

import jax
import jax.numpy as jnp

from charlstm.config.training import TrainingConfig
from charlstm.types import Course

Tree = Any  # of arrays

USUAL_DECAY = 0.98  # of the usual loss: it is that of some fifty updates


def start(dtype: Any) -> Course:
    """Before the first update; `dtype` is that of the loss."""
    none = jnp.zeros((), jnp.int32)
    return Course(none, jnp.zeros((), dtype), none, none, none, none)


def is_sound(settings: TrainingConfig, loss: jax.Array, norm: jax.Array, params: Tree, course: Course) -> jax.Array:
    """bool []: whether the update to `params`, made for `loss` and a gradient of this `norm`, is sound."""
    sound = jnp.isfinite(loss) & jnp.isfinite(norm) & all_finite(params)
    if settings.spike_factor > 0:
        sound &= (course.usual_loss == 0) | (loss <= settings.spike_factor * course.usual_loss)
    return sound


def all_finite(tree: Tree) -> jax.Array:
    """bool []"""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def finite_rows(carry: Tree, nats_b: jax.Array) -> jax.Array:
    """bool [b]: the stream's recurrent state and its loss are finite."""
    finite_b = jnp.isfinite(nats_b)
    for leaf in jax.tree.leaves(carry):
        finite_b &= jnp.isfinite(leaf).all(1)
    return finite_b


def either(sound: jax.Array, new: Tree, old: Tree) -> Tree:
    """`new` where it is sound, else `old`, bit for bit."""
    return jax.tree.map(lambda n, o: jnp.where(sound, n, o), new, old)


def mended(carry: Tree, finite_b: jax.Array, first: Tree) -> Tree:
    """The recurrent state with `first` for its poisoned rows: one NaN otherwise lives in its stream for ever."""
    return jax.tree.map(lambda leaf, f: jnp.where(finite_b[:, None], leaf, f), carry, first)


def after(course: Course, loss: jax.Array, sound: jax.Array, skips: bool, poisoned_rows: jax.Array) -> Course:
    """The course after a step of `loss`.

    Args:
      skips: updates that are not sound are skipped, and poisoned rows reset.
      poisoned_rows: int32 []: rows of the global batch that are not finite.
    """
    moved = USUAL_DECAY * course.usual_loss + (1 - USUAL_DECAY) * loss
    usual = jnp.where(sound, jnp.where(course.usual_loss == 0, loss, moved), course.usual_loss)
    course = course._replace(window=course.window + 1, usual_loss=usual)
    if not skips:
        return course
    skipped = (~sound).astype(jnp.int32)
    return course._replace(
        skipped=course.skipped + skipped,
        skipped_in_a_row=(course.skipped_in_a_row + 1) * skipped,
        rows_reset=course.rows_reset + poisoned_rows,
    )
