"""The digests of arrays: blind to the sharding, to nothing else."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from charlstm.run import digest

TYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "uint8", "int8", "int16", "bool", "float64", "int64")


def random_bits(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Every bit pattern of the type: quiet and signalling NaNs, -0.0 and denormals among them."""
    kind = jnp.dtype(dtype)
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    return rng.integers(0, 256, (*shape, kind.itemsize), np.uint8).view(kind)[..., 0]


def slow_digest(array: np.ndarray) -> str:
    """The twin: one element after another, in Python's own integers."""

    def mix(word: int) -> int:
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        return word ^ word >> 16

    def position(index: tuple[int, ...], seed: int) -> int:
        for along in index:
            seed = mix((seed + along) % 2**32)
        return seed

    itemsize = array.dtype.itemsize
    words = np.frombuffer(array.tobytes(), {1: np.uint8, 2: np.uint16}.get(itemsize, np.uint32))
    words = words.reshape(array.shape + ((2,) if itemsize == 8 else ()))
    lanes = [
        sum(mix(int(word) ^ position(index, seed)) for index, word in np.ndenumerate(words)) % 2**32
        for seed in digest.LANE_SEEDS
    ]
    return "".join(f"{lane:08x}" for lane in lanes)


def digest_of(array: jax.Array) -> str:
    return digest.digests(array)[""]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
def test_the_digest_equals_its_slow_twin_for_every_type(dtype):
    with jax.enable_x64(True):
        arrays = {str(shape): random_bits(dtype, shape) for shape in [(), (5,), (3, 7), (2, 3, 4)]}
        found = digest.digests({name: jnp.asarray(array) for name, array in arrays.items()})
    assert found == {name: slow_digest(array) for name, array in arrays.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
def test_the_digest_of_an_array_in_host_memory_equals_that_on_a_device(dtype, monkeypatch):
    shapes = [(), (1,), (5,), (3, 7), (2, 3, 4), (40, 1), (1, 40)]
    with jax.enable_x64(True):
        arrays = {str(shape): random_bits(dtype, shape) for shape in shapes}
        expected = digest.digests({name: jnp.asarray(array) for name, array in arrays.items()})
    for piece in (digest.PIECE, 16, 3):  # all at once, rows together, a row in pieces
        monkeypatch.setattr(digest, "PIECE", piece)
        assert {name: digest.host_digest(array) for name, array in arrays.items()} == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "bool"])
def test_the_digest_is_the_same_on_any_number_of_devices_and_along_any_axis(dtype):
    host = random_bits(dtype, (16, 24))
    expected = digest_of(jnp.asarray(host))
    for count in (1, 2, 4, 8):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
        for spec in (PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")):
            spread = jax.device_put(host, NamedSharding(mesh, spec))
            assert digest_of(spread) == expected, (count, spec)


def test_a_change_of_any_one_bit_changes_both_lanes():
    host = random_bits("float32", (3, 4))
    before = digest_of(jnp.asarray(host))
    for element in range(host.size):
        for bit in range(32):
            changed = host.copy()
            changed.view(np.uint32).flat[element] ^= np.uint32(1 << bit)
            after = digest_of(jnp.asarray(changed))
            assert after[:8] != before[:8] and after[8:] != before[8:] and after[:8] != after[8:], (element, bit)


def test_the_order_of_equal_values_in_another_shape_or_place_is_seen():
    host = np.arange(12, dtype=np.int32).reshape(3, 4)
    swapped = host.copy()
    swapped[0, 1], swapped[2, 3] = host[2, 3], host[0, 1]
    arrays = [host, swapped, host[::-1].copy(), host.T.copy(), host.reshape(4, 3), host.reshape(12), host[None]]
    assert len({digest_of(jnp.asarray(array)) for array in arrays}) == len(arrays)


def test_zeros_of_another_shape_have_another_digest():
    shapes = [(4,), (5,), (2, 2), (4, 1), (1, 4)]
    assert len({digest_of(jnp.zeros(shape)) for shape in shapes}) == len(shapes)


def test_negative_zero_and_the_payload_of_a_nan_are_seen():
    patterns = np.array([0x00000000, 0x80000000, 0x7FC00000, 0x7FC00001, 0x7F800001, 0xFFC00000, 0x00000001], np.uint32)
    assert len({digest_of(jnp.asarray(bits.view(np.float32))) for bits in patterns}) == len(patterns)


def test_positions_that_agree_modulo_two_to_the_32_hash_differently():
    shape = (70_000, 70_000)  # 4.9e9 elements; row 61 356, column 47 296 is element 2**32

    @jax.jit
    def hash_at(row, column):
        return lax.dynamic_slice(digest._positions(shape, digest.LANE_SEEDS[0]), (row, column), (1, 1))

    assert hash_at(0, 0) != hash_at(61_356, 47_296)
    assert hash_at(0, 5) != hash_at(61_356, 47_301)


def test_a_dimension_beyond_32_bits_is_refused():
    with pytest.raises(AssertionError, match="does not fit"):
        jax.eval_shape(digest.lane_sums, {"": jax.ShapeDtypeStruct((2**32,), jnp.uint8)})


def test_typed_keys_count_by_their_data():
    first, second = jax.random.key(1), jax.random.key(2)
    assert digest_of(first) == digest_of(jax.random.key_data(first)) != digest_of(second)


class Pair(NamedTuple):
    first: object
    second: object


def test_leaves_are_named_by_their_path_and_none_is_no_leaf():
    tree = Pair({"cells": (Pair(1, None), Pair(2, 3))}, [4])
    names = {"first.cells.0.first": 1, "first.cells.1.first": 2, "first.cells.1.second": 3, "second.0": 4}
    assert digest.named_leaves(tree) == names
    assert list(digest.named_leaves(tree).values()) == jax.tree.leaves(tree)
    assert digest.named_leaves(5) == {"": 5}


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(AssertionError, match="share a name"):
        digest.named_leaves({"a.b": 1, "a": {"b": 2}})


class Swapped(NamedTuple):
    second: object
    first: object


def test_the_state_digest_counts_names_types_shapes_and_values_but_not_the_order_of_fields():
    base = {"a": jnp.zeros((2, 3)), "b": jnp.ones(4)}
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": jnp.zeros((2, 3), jnp.int32), "b": base["b"]},
        {"a": jnp.zeros((3, 2)), "b": base["b"]},
        {"a": base["a"], "b": -base["b"]},
        {"a": base["a"]},
        {"a": base["a"], "b": base["b"], "c": base["a"]},
    ]
    assert len({digest.state_digest(tree) for tree in [base, *others]}) == 1 + len(others)
    one, other = base["a"], base["b"]
    assert digest.state_digest(Pair(one, other)) == digest.state_digest(Swapped(other, one))
    assert digest.state_digest(Pair(one, other)) != digest.state_digest(Swapped(one, other))
