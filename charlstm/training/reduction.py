"""The sum of all shards' gradients: exact (the same bits on any number of devices) or fast (one all-reduce).

The M logical shards are the leaves of one fixed binary tree: at each level neighbors are added pairwise, and an odd
one out at the end goes up as it is. Floating-point addition is commutative but not associative, so the tree fixes the
order of summation: whatever computes its nodes, and wherever, the root has the same bits. A device computes its k = M/n
neighboring leaves one after the other and adds two nodes as soon as it has both children of a third, as a binary
counter carries. It is left with the largest nodes that lie within its leaves: one where k is a power of two, two for
k = 3, at most 2 log2(k). Those of all devices are exchanged (all-to-all), the upper tree is summed by pieces, and the
pieces are gathered (all-gather): where each device has one node, the traffic of a ring all-reduce.

Temporaries, in gradients: the nodes kept, and the one in the making or those that are sent: `kept` + `left` of a Plan.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.model.ops.matmul import row_major


class Plan(NamedTuple):
    """Additions that n devices of k leaves each make by themselves, and the nodes that they are left with."""

    additions: np.ndarray  # [n, k]: how many follow each leaf
    borders: tuple[tuple[int, ...], ...]  # for each device, of the nodes that it is left with, counted in leaves
    kept: int  # the most nodes that a device has between two leaves

    @property
    def left(self) -> int:
        """The most nodes that a device is left with."""
        return max(map(len, self.borders)) - 1


@functools.cache
def make_plan(count: int, devices: int) -> Plan:
    """For `count` leaves on each of the devices."""
    additions, left, kept = np.zeros((devices, count), np.int32), [], 1
    for device in range(devices):
        borders = [device * count]
        for leaf in range(count):
            borders.append(borders[-1] + 1)
            while are_siblings(borders, devices * count):
                del borders[-2]
                additions[device, leaf] += 1
            kept = max(kept, len(borders) - 1)
        left.append(tuple(borders))
    return Plan(additions, tuple(left), kept)


def are_siblings(borders: list[int], leaves: int) -> bool:
    """Returns True if the last two nodes between these borders are the children of a node of the tree."""
    if len(borders) < 3:
        return False
    first, middle, end = borders[-3:]
    size = 2 * (middle - first)
    return first % size == 0 and end == min(first + size, leaves)


def local_sums(gradient_of: Callable[[Any], tuple[Any, Any]], shards: Any, plan: Plan, device: Any) -> tuple[Any, Any]:
    """Gradients of a device's shards, computed one after the other, summed as far as the tree allows.

    Args:
      gradient_of: one shard's (gradient, outputs).
      shards: its arguments, each leaf `[k, ...]`.
      device: the number of this device.

    Returns:
      The nodes that it is left with, each leaf `[plan.left, ...]`, the first ones first and the rest undefined; and the
      outputs, each leaf `[k, ...]`.
    """

    def one(leaf: Any) -> tuple[Any, Any]:
        # The barriers keep XLA from fusing a shard's arithmetic with the sum around it: a multiplication contracted
        # into the addition would round differently from one device count to another.  So would a product whose layout
        # is chosen to suit that sum: layouts pass through barriers.
        gradient, outputs = gradient_of(jax.lax.optimization_barrier(leaf))
        return jax.lax.optimization_barrier((jax.tree.map(row_major, gradient), outputs))

    if plan.additions.shape[1] == 1:
        return jax.tree.map(lambda a: a[None], one(jax.tree.map(lambda a: a[0], shards)))

    index, update = jax.lax.dynamic_index_in_dim, jax.lax.dynamic_update_index_in_dim

    def add(carry: Any, args: Any) -> tuple[Any, Any]:
        nodes, filled = carry
        additions, leaf = args
        gradient, outputs = one(leaf)

        def add_left(number: Any, right: Any) -> Any:
            left = jax.tree.map(lambda a: index(a, filled - 1 - number, keepdims=False), nodes)
            return jax.tree.map(jnp.add, left, right)

        node = jax.lax.fori_loop(0, additions, add_left, gradient)
        filled -= additions
        return (jax.tree.map(lambda a, new: update(a, new, filled, 0), nodes, node), filled + 1), outputs

    shape = jax.eval_shape(gradient_of, jax.tree.map(lambda a: a[0], shards))[0]
    nodes = jax.tree.map(lambda a: jnp.zeros((plan.kept, *a.shape), a.dtype), shape)
    additions = jnp.asarray(plan.additions)[device]
    (nodes, _), outputs = jax.lax.scan(add, (nodes, jnp.zeros((), jnp.int32)), (additions, shards))
    return jax.tree.map(lambda a: a[: plan.left], nodes), outputs


def tree_sum(nodes: jax.Array, plan: Plan) -> jax.Array:
    """`[n, plan.left, ...]` -> `[...]`: the root, from the nodes that all devices are left with."""
    stack: list[jax.Array] = []
    borders = [0]
    for device, own in enumerate(plan.borders):
        for number, border in enumerate(own[1:]):
            stack.append(nodes[device, number])
            borders.append(border)
            while are_siblings(borders, plan.additions.size):
                del borders[-2]
                stack[-2:] = [stack[-2] + stack[-1]]
    assert len(stack) == 1, borders
    return stack[0]


def exact_sum(nodes: Any, axis: str, plan: Plan) -> jax.Array:
    """The root of the tree, flattened `[P]`, on every device, from the nodes that each is left with."""
    devices, leaves = len(plan.borders), jax.tree.leaves(nodes)
    if devices == 1:
        return jnp.concatenate([leaf[0].ravel() for leaf in leaves])
    size = sum(leaf[0].size for leaf in leaves)
    padding = jnp.zeros((plan.left, -size % devices), leaves[0].dtype)
    # The barrier keeps XLA from building each piece from the leaves, which would have to be kept as well.
    flat_RP = jax.lax.optimization_barrier(
        jnp.concatenate([*(leaf.reshape(plan.left, -1) for leaf in leaves), padding], 1)
    )
    pieces = flat_RP.reshape(plan.left, devices, -1).swapaxes(0, 1)  # [device that sums it, node, piece]
    received = jax.lax.all_to_all(pieces, axis, split_axis=0, concat_axis=0)  # [device it came from, node, piece]
    return jax.lax.all_gather(tree_sum(received, plan), axis, tiled=True)[:size]


def fast_sum(nodes: Any, axis: str) -> jax.Array:
    """The sum over all devices, flattened `[P]`, on every device, as one all-reduce, from the one node of each."""
    return jax.lax.psum(jnp.concatenate([leaf[0].ravel() for leaf in jax.tree.leaves(nodes)]), axis)
