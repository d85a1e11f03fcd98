"""The tree of the exact reduction: one order of additions, whoever computes which part."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm.training import reduction

pytestmark = pytest.mark.optimized


def slow_tree(leaves):
    """Pairs of neighbors level by level; the odd one out goes up."""
    while len(leaves) > 1:
        pairs = [leaves[i] + leaves[i + 1] for i in range(0, len(leaves) - 1, 2)]
        leaves = pairs + leaves[len(pairs) * 2 :]
    return leaves[0]


def leaves(count: int, size: int = 50) -> np.ndarray:
    random = np.random.default_rng(count)
    return (random.normal(size=(count, size)) * 10.0 ** random.integers(-6, 6, (count, size))).astype(np.float32)


def sums_of(devices: int, shards: np.ndarray) -> np.ndarray:
    """The subtree sums of every device, one device after the other."""
    held = np.split(shards, devices)
    return np.concatenate(
        [reduction.subtree_sums(lambda leaf: (leaf, leaf.sum()), jnp.asarray(h), len(h))[0] for h in held]
    )


@pytest.mark.parametrize(
    "count", [1, 2, 6, 7, 8, *(pytest.param(count, marks=pytest.mark.long) for count in (3, 4, 12, 16, 24))]
)
def test_every_way_of_sharing_the_leaves_gives_the_bits_of_the_one_tree(count):
    shards = leaves(count)
    expected = slow_tree(list(shards))
    assert count < 4 or shards.sum(0).tobytes() != expected.tobytes(), "the order of additions matters for these"
    for devices in (d for d in range(1, count + 1) if count % d == 0):
        root = reduction.tree_sum(jnp.asarray(sums_of(devices, shards)))
        assert np.asarray(root).tobytes() == expected.tobytes(), devices


def test_the_sum_begins_with_the_neutral_element_so_that_minus_zero_survives():
    shards = np.full((4, 3), -0.0, np.float32)
    for devices in (1, 2, 4):
        root = np.asarray(reduction.tree_sum(jnp.asarray(sums_of(devices, shards))))
        assert np.signbit(root).all(), devices


@pytest.mark.parametrize(
    ("count", "expected"), [(1, (1, 0)), (2, (1, 1)), (6, (3, 1)), (7, (7, 0)), (8, (1, 3)), (24, (3, 3))]
)
def test_a_device_sums_the_largest_whole_subtrees_it_holds(count, expected):
    assert reduction.local_tree(count) == expected


def test_outputs_come_back_in_the_order_of_the_shards():
    for count in (1, 6, 8, 12):
        shards = jnp.asarray(leaves(count))
        _, outputs = reduction.subtree_sums(lambda leaf: (leaf, leaf[0]), shards, count)
        np.testing.assert_array_equal(outputs, shards[:, 0])


def test_a_large_number_of_shards_needs_few_buffers():
    """log2(k) + 1 gradients at a time, not k of them."""
    count, size = 64, 10_000
    program = jax.jit(lambda shards: reduction.subtree_sums(lambda s: (jnp.full(size, s), s), shards, count)[0])
    memory = program.lower(jnp.arange(count, dtype=jnp.float32)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * size * 16


@pytest.mark.parametrize("count", [1, 2, 6, 8])
def test_a_shards_gradient_stands_between_two_barriers(count):
    """What they are for shows in bits on some compilers only, so they are looked for in the program."""
    program = jax.make_jaxpr(lambda shards: reduction.subtree_sums(lambda s: (jnp.sin(s), jnp.cos(s)), shards, count))
    found = re.findall(r"= (optimization_barrier|sin|cos|add)\b", str(program(jnp.asarray(leaves(count)))))
    assert found[:4] == ["optimization_barrier", "sin", "cos", "optimization_barrier"], found
    assert set(found[4:]) <= {"add"}
