"""The sum of all shards' gradients: exact (the same bits on any number of devices) or fast (one all-reduce).

The M logical shards are the leaves of one fixed binary tree: at each level neighbors are added pairwise, and an odd
one out at the end goes up as it is. Floating-point addition is commutative but not associative, so the tree fixes the
order of summation: whatever computes its nodes, and wherever, the root has the same bits. A device holds k = M/n
neighboring leaves, k = 2^j r with r odd, and sums r whole subtrees of 2^j leaves by itself (12 leaves: 3 subtrees of
4). The r partial sums of every device are exchanged (all-to-all), the upper tree is summed by pieces, and the pieces
are gathered (all-gather): the traffic of a ring all-reduce, when M/n is a power of two.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def local_tree(shards: int) -> tuple[int, int]:
    """(r, j) of `shards` = 2^j r, r odd: r whole subtrees, each of j levels."""
    levels = (shards & -shards).bit_length() - 1
    return shards >> levels, levels


def subtree_sums(gradient_of: Callable[[Any], tuple[jax.Array, Any]], shards: Any, count: int) -> tuple[jax.Array, Any]:
    """Gradients of `count` neighboring shards, computed one after the other, summed as far as the tree allows.

    Args:
      gradient_of: one shard's (gradient [P], outputs).
      shards: its arguments, each leaf `[count, ...]`.

    Returns:
      The subtree sums `[r, P]` of `local_tree(count)`, and the outputs, each leaf `[count, ...]`.
    """
    subtrees, levels = local_tree(count)
    tree_shape = (subtrees, *(2,) * levels)
    shards = jax.tree.map(lambda a: a.reshape((*tree_shape, *a.shape[1:])), shards)

    def subtree(level: int, leaves: Any) -> tuple[jax.Array, Any]:
        if level == 0:
            # The barriers keep XLA from fusing a shard's arithmetic with the sum around it: a multiplication contracted
            # into the addition would round differently from one device count to another.
            return jax.lax.optimization_barrier(gradient_of(jax.lax.optimization_barrier(leaves)))

        def add(total, half):
            gradient, outputs = subtree(level - 1, half)
            return total + gradient, outputs

        shape = jax.eval_shape(gradient_of, jax.tree.map(lambda a: a.reshape((-1, *a.shape[level:]))[0], leaves))[0]
        # -0.0, not 0.0: -0.0 + x is x to the bit, also for x = -0.0.
        return jax.lax.scan(add, jnp.full(shape.shape, -0.0, shape.dtype), leaves)

    if subtrees == 1:
        sums, outputs = subtree(levels, jax.tree.map(lambda a: a[0], shards))
        sums = sums[None]
    else:
        sums, outputs = jax.lax.map(lambda leaves: subtree(levels, leaves), shards)
    lead = 1 + levels if subtrees > 1 else levels
    return sums, jax.tree.map(lambda a: a.reshape((count, *a.shape[lead:])), outputs)


def tree_sum(nodes: jax.Array) -> jax.Array:
    """`[R, P]` -> `[P]`: the fixed binary tree over the first axis."""
    while nodes.shape[0] > 1:
        pairs = nodes.shape[0] // 2 * 2
        nodes = jnp.concatenate([nodes[0:pairs:2] + nodes[1:pairs:2], nodes[pairs:]])
    return nodes[0]


def exact_sum(partial_RP: jax.Array, axis: str, devices: int) -> jax.Array:
    """The root of the tree, on every device, from each device's r subtree sums `[r, P]`."""
    if devices == 1:
        return tree_sum(partial_RP)
    r, size = partial_RP.shape
    padded = jnp.pad(partial_RP, ((0, 0), (0, -size % devices)))
    pieces = padded.reshape(r, devices, -1).swapaxes(0, 1)  # [device that sums it, r, piece]
    nodes = jax.lax.all_to_all(pieces, axis, split_axis=0, concat_axis=0)  # [device it came from, r, piece]
    root_piece = tree_sum(nodes.reshape(devices * r, -1))
    return jax.lax.all_gather(root_piece, axis, tiled=True)[:size]


def fast_sum(partial_RP: jax.Array, axis: str) -> jax.Array:
    """The sum over all devices, on every device, as one all-reduce."""
    return jax.lax.psum(tree_sum(partial_RP), axis)
