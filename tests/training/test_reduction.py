"""The tree of the exact reduction: one order of additions, whoever computes which part."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm import distributed
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


def root(shards: np.ndarray, devices: int) -> np.ndarray:
    """The sum by so many devices, computed one after the other."""
    plan = reduction.make_plan(len(shards) // devices, devices)
    nodes = [
        reduction.local_sums(lambda leaf: (leaf, leaf.sum()), jnp.asarray(held), plan, device)[0]
        for device, held in enumerate(np.split(shards, devices))
    ]
    return np.asarray(reduction.tree_sum(jnp.stack(nodes), plan))


@pytest.mark.parametrize(
    "count", [1, 2, 6, 7, 8, *(pytest.param(count, marks=pytest.mark.long) for count in (3, 4, 12, 16, 24))]
)
def test_every_way_of_sharing_the_leaves_gives_the_bits_of_the_one_tree(count):
    shards = leaves(count)
    expected = slow_tree(list(shards))
    assert count < 4 or shards.sum(0).tobytes() != expected.tobytes(), "the order of additions matters for these"
    for devices in (d for d in range(1, count + 1) if count % d == 0):
        assert root(shards, devices).tobytes() == expected.tobytes(), devices


def test_nothing_is_added_to_the_first_so_that_minus_zero_survives():
    shards = np.full((4, 3), -0.0, np.float32)
    for devices in (1, 2, 4):
        assert np.signbit(root(shards, devices)).all(), devices


@pytest.mark.parametrize(
    ("count", "devices", "expected"),
    [
        (7, 1, [(0, 7)]),
        (4, 2, [(0, 4), (4, 8)]),
        (6, 2, [(0, 4, 6), (6, 8, 12)]),
        (7, 2, [(0, 4, 6, 7), (7, 8, 14)]),
        (3, 3, [(0, 2, 3), (3, 4, 6), (6, 8, 9)]),
    ],
)
def test_a_device_is_left_with_the_largest_nodes_within_its_leaves(count, devices, expected):
    assert list(reduction.make_plan(count, devices).borders) == expected


def test_outputs_come_back_in_the_order_of_the_shards():
    for count in (1, 6, 8, 12):
        shards = jnp.asarray(leaves(count))
        _, outputs = reduction.local_sums(lambda leaf: (leaf, leaf[0]), shards, reduction.make_plan(count, 1), 0)
        np.testing.assert_array_equal(outputs, shards[:, 0])


@pytest.mark.parametrize(
    ("count", "devices", "gradients"),
    [
        # On one device floor(log2 k) + 1: the nodes kept, and the one in the making.
        (2, 1, 2),
        (3, 1, 2),
        (31, 1, 5),
        (64, 1, 7),
        # On several also what is sent, beside what is received.
        (1, 8, 2),
        (2, 4, 2),
        (4, 2, 3),
        (3, 2, 4),
        (12, 4, 6),
        (7, 2, 6),
        pytest.param(31, 2, 10, marks=pytest.mark.long),
    ],
)
def test_the_temporaries_are_few_gradients_for_any_number_of_shards(count, devices, gradients):
    mesh, plan = distributed.make(jax.devices()[:devices]), reduction.make_plan(count, devices)

    def gradient_of(shard):
        return (jnp.full((100, 99), shard), jnp.full(103, shard)), shard

    def reduced(shards):
        nodes, _ = reduction.local_sums(gradient_of, shards, plan, jax.lax.axis_index(distributed.AXIS))
        total = reduction.exact_sum(nodes, distributed.AXIS, plan)
        return jax.lax.optimization_barrier(total).sum()  # so that the total is a temporary, too

    specs = {"in_specs": distributed.BY_STREAM, "out_specs": distributed.REPLICATED}
    program = jax.jit(jax.shard_map(reduced, mesh=mesh, check_vma=False, **specs))
    memory = program.lower(jnp.zeros(count * devices, jnp.float32)).compile().memory_analysis()
    assert gradients == plan.kept + plan.left
    # The pieces that are sent and received may leave gaps as large as one of them.
    gap = plan.left / devices if devices > 1 else 0
    assert memory.temp_size_in_bytes < 4 * 10_003 * (gradients + gap + 0.1)


@pytest.mark.parametrize("count", [1, 2, 6, 8])
def test_a_shards_gradient_stands_between_two_barriers(count):
    """What they are for shows in bits on some compilers only, so they are looked for in the program."""
    plan = reduction.make_plan(count, 1)
    program = jax.make_jaxpr(lambda shards: reduction.local_sums(lambda s: (jnp.sin(s), jnp.cos(s)), shards, plan, 0))
    found = re.findall(r"= (optimization_barrier|sin|cos|add)\b", str(program(jnp.asarray(leaves(count)))))
    assert found[:4] == ["optimization_barrier", "sin", "cos", "optimization_barrier"], found
    assert set(found[4:]) <= {"add"}
