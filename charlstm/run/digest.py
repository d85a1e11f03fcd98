"""Digests of arrays on the device: the same for the same values, however they are spread over devices.

Orbax restores a flipped bit of an array without a word, so a checkpoint carries these digests and they are computed
again after every restore.  They also tell whether two runs ended with the same bits.

An element's bits w at position p = (i, j, ...) count as mix(w ^ hash(p)), and the digest is the wrapping sum of all of
them, twice over with different seeds.  Integer sums do not depend on their order, so no sharding shows; `mix` (the
finalizer of MurmurHash3, A. Appleby, public domain) is a bijection of 32-bit words, so a change in one word of an array
always changes both sums.  Many changes at once go unseen by chance only, once in 2**64.  Against malice it is no help.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LANE_SEEDS = (0x9E3779B9, 0x7F4A7C15)
PIECE = 1 << 16  # elements that the host's digest takes at once
FEW = 1 << 24  # elements, at most 0.2 s of the host's digest: a program takes as long to be traced


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by name, in the order of `jax.tree.leaves`: "cells.0.w_h".  A None is no leaf; a bare leaf is ""."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), f"two leaves share a name among {[jax.tree_util.keystr(p) for p, _ in leaves]}"
    return named


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """Type and shape of each leaf, by its name, as plain JSON."""
    leaves = named_leaves(tree)
    for name, leaf in leaves.items():
        assert leaf.size > 0, f"{name} has no elements"  # Orbax cannot save it
    return {name: {"dtype": str(leaf.dtype), "shape": list(leaf.shape)} for name, leaf in leaves.items()}


def digests(tree: Any) -> dict[str, str]:
    """The digest of every leaf by its name, 16 hex digits.

    Leaves are `jax.Array`s of one device set, of any real type or typed keys; each dimension is below 2**32, their
    product need not be.  The shape counts, the type does not (see `state_digest`).
    """
    leaves = named_leaves(tree)
    for name, leaf in leaves.items():
        assert isinstance(leaf, jax.Array), f"{name} is a {type(leaf)}, not a jax.Array"
    # Of what every device holds, one copy: two devices of a CPU take four times as long as one for the same.
    sums = jax.device_get([_digests_at_once(held) for held in _by_devices(leaves)])
    sums = sums[0] | sums[1]
    return {name: to_hex(sums[name]) for name in leaves}


def quick_digests(tree: Any) -> dict[str, str]:
    """Returns the same as `digests`: by NumPy, where each device has all arrays whole and these are small."""
    leaves = named_leaves(tree)
    if sum(leaf.size for leaf in leaves.values()) > FEW or not all(a.is_fully_replicated for a in leaves.values()):
        return digests(tree)
    return {name: host_digest(np.asarray(leaf.addressable_data(0))) for name, leaf in leaves.items()}


def host_digest(array: np.ndarray) -> str:
    """Digest of one array in host memory, by NumPy, equal to that of `digests`; copies only pieces of it."""
    size = array.dtype.itemsize
    unsigned = {1: np.uint8, 2: np.uint16}.get(size, np.uint32)
    words: np.ndarray = array.reshape(-1).view(unsigned).reshape(array.shape + ((2,) if size == 8 else ()))
    return to_hex([_host_lane(words, seed) for seed in LANE_SEEDS])


def to_hex(lanes: Any) -> str:
    """A digest as it is written: its two lanes in 16 digits."""
    return "".join(f"{int(lane):08x}" for lane in lanes)


def _host_lane(words: np.ndarray, seed: int) -> int:
    """The sum of one lane, in pieces that a processor's cache holds."""
    *leading, last = words.shape or (1,)
    prefix = np.full(1, seed, np.uint32)  # the hashes of the positions of rows
    for along in leading:
        prefix = _mix(prefix[:, None] + np.arange(along, dtype=np.uint32)).reshape(-1)
    rows, at_once, total = words.reshape(-1, last), max(1, PIECE // last), 0
    for top in range(0, len(rows), at_once):
        for left in range(0, last, PIECE):
            piece = rows[top : top + at_once, left : left + PIECE].astype(np.uint32)
            hashed = prefix[top : top + at_once, None]
            if words.ndim:
                hashed = _mix(hashed + np.arange(left, left + piece.shape[1], dtype=np.uint32))
            total += int(np.sum(_mix(piece ^ hashed), dtype=np.uint32))
    return total % 2**32


def _by_devices(leaves: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Splits the leaves into replicated ones, as this process's first copy, and sharded ones."""
    whole = {name: a.addressable_data(0) for name, a in leaves.items() if a.is_fully_replicated}
    return whole, {name: leaf for name, leaf in leaves.items() if name not in whole}


def state_digest(tree: Any) -> str:
    """One sha256, in hex, over the names, types, shapes and digests of all leaves."""
    leaves, found = named_leaves(tree), digests(tree)
    lines = [f"{name} {leaf.dtype} {list(leaf.shape)} {found[name]}\n" for name, leaf in sorted(leaves.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def lane_sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """uint32 [2] for every leaf: what its digest is made of, to be traced in a program."""

    def lane(words: jax.Array, seed: int) -> jax.Array:
        return jnp.sum(_mix(words ^ _positions(words.shape, seed)), dtype=jnp.uint32)

    return {
        name: jnp.stack([lane(words, seed) for seed in LANE_SEEDS])
        for name, words in ((name, _words(leaf)) for name, leaf in leaves.items())
    }


# One program for all leaves, so that a mesh meets in few collectives, not one a leaf.
_digests_at_once = jax.jit(lane_sums)


def _words(leaf: jax.Array) -> jax.Array:
    """The bits of each element as uint32; an element of 64 bits becomes two along a new last dimension."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def _positions(shape: tuple[int, ...], seed: int) -> jax.Array:
    """uint32 `shape`: a hash of each index.  Folded in dimension by dimension: a flat index would wrap at 2**32."""
    assert all(size < 2**32 for size in shape), f"a dimension of {shape} does not fit an index of 32 bits"
    hashed = jnp.full((), seed, jnp.uint32)
    for dimension in range(len(shape)):
        prefix = shape[: dimension + 1]
        along = lax.broadcasted_iota(jnp.uint32, prefix, dimension)
        hashed = _mix(lax.broadcast_in_dim(hashed, prefix, tuple(range(dimension))) + along)
    return hashed


def _mix(word: Any) -> Any:
    """A bijection of uint32 that spreads every bit over the word."""
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))
