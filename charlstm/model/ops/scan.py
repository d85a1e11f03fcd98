"""The loop over the symbols of a window, and what it reads of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], start: Any, symbols: Any, reverse: bool = False
) -> tuple[Any, Any]:
    """`jax.lax.scan(step, start, symbols, reverse=reverse)`, not for autodiff.

    Outputs of bfloat16 are stacked as integers of their bits: to write those of one symbol, XLA on a CPU would convert
    those of all symbols to float32 and back, so that the window's time would grow with the square of its length.
    """
    dtypes: list[Any] = []

    def noted(carry: Any, symbol: Any) -> tuple[Any, Any]:
        carry, outputs = step(carry, symbol)
        dtypes[:] = [leaf.dtype for leaf in jax.tree.leaves(outputs)]
        return carry, jax.tree.map(_bits, outputs)

    final, stacked = jax.lax.scan(noted, start, symbols, reverse=reverse)
    leaves, tree = jax.tree.flatten(stacked)
    read = [jax.lax.bitcast_convert_type(a, d) if a.dtype != d else a for a, d in zip(leaves, dtypes, strict=True)]
    return final, jax.tree.unflatten(tree, read)


def blocks_at(array_TBG: jax.Array, t: jax.Array, count: int) -> list[jax.Array]:
    """The `count` blocks that lie side by side at symbol t of a window, `[B, G / count]` each.

    Each by a slice of its own: where slices of one slice are read in one loop, XLA on a CPU finds out anew for every
    number where they begin, and does without vectors.
    """
    _, B, G = array_TBG.shape
    H = G // count
    return [jax.lax.dynamic_slice(array_TBG, (t, 0, k * H), (1, B, H))[0] for k in range(count)]


def _bits(array: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array
