"""Comparison of replicas: a bit that flips in one device's memory would otherwise never be noticed.

Parameters, their average and optimizer state lie whole on every device and are never exchanged.
"""

import functools
import hashlib
import json
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from charlstm import distributed
from charlstm.run import digest

PIECE = 1 << 20  # bytes compared at once


class CopiesDiffer(Exception):
    """A device holds another copy than the rest; the sentence says which device, and of which leaves."""


class Compared(NamedTuple):
    """Result of comparing the copies of a replicated tree."""

    digests: dict[str, str]  # of the copy on this process's first device, as `digest.digests`
    differing: str  # which device holds another copy than the rest, and of which leaf; "" where all are equal


def compare(tree: Any, mesh: Mesh) -> Compared:
    """Compares all devices' copies of a tree that lies whole on each of them.  All processes must ask together.

    In memory of the host copies are compared byte by byte, ten times as fast as their digests are computed.
    """
    leaves = dict(sorted(digest.named_leaves(tree).items()))  # as tracing sorts them
    copies = _in_host_memory(leaves) if distributed.is_in_host_memory(mesh) else _on_devices(leaves, mesh)
    own = [hashlib.sha256(json.dumps(copy).encode()).hexdigest() for copy in copies]
    differing = ""
    if len(set(_of_all(own))) > 1:
        differing = _in_words(_of_all(copies), mesh)
    return Compared(copies[0], differing)


def _of_all(own: list[Any]) -> list[Any]:
    """Gathers a string of each device from all processes, in the order of the mesh."""
    return [one for word in distributed.all_gather_str(json.dumps(own)) for one in json.loads(word)]


def _in_host_memory(leaves: dict[str, jax.Array]) -> list[dict[str, str]]:
    """For each device of this process, the digests of its copies."""
    shards = {name: [shard.data for shard in leaf.addressable_shards] for name, leaf in leaves.items()}
    first, *others = (dict(zip(shards, copy, strict=True)) for copy in zip(*shards.values(), strict=True))
    expected = digest.digests(first)
    different = [{name: copy for name, copy in other.items() if not _equal(copy, first[name])} for other in others]
    return [expected, *(expected | digest.digests(other) if other else expected for other in different)]


def _on_devices(leaves: dict[str, jax.Array], mesh: Mesh) -> list[dict[str, str]]:
    """Compares on the devices, by one program in which each looks at its own copies."""
    shards = _digests_by_device(mesh)(leaves).addressable_shards
    rows = np.concatenate(jax.device_get([shard.data for shard in shards]))  # [devices here, leaves, 2]
    return [{name: digest.to_hex(lanes) for name, lanes in zip(leaves, row, strict=True)} for row in rows]


@functools.cache
def _digests_by_device(mesh: Mesh) -> Any:
    """leaves -> uint32 [devices, leaves, 2], a row on each device."""

    def local(leaves: dict[str, jax.Array]) -> jax.Array:
        sums = digest.lane_sums(leaves)
        return jnp.stack([sums[name] for name in sorted(leaves)])[None]

    by_device = distributed.BY_STREAM  # a row each
    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(distributed.REPLICATED,), out_specs=by_device, check_vma=False)
    )


def _equal(one: jax.Array, other: jax.Array) -> bool:
    """True if two arrays in host memory have the same bytes.  Neither is copied."""
    a, b = (np.asarray(array).reshape(-1).view(np.uint8) for array in (one, other))
    return all(np.array_equal(a[at : at + PIECE], b[at : at + PIECE]) for at in range(0, a.size, PIECE))


def _in_words(copies: list[dict[str, str]], mesh: Mesh) -> str:
    found = [tuple(copy.items()) for copy in copies]
    agreed, most = Counter(found).most_common(1)[0]
    odd = [number for number, copy in enumerate(found) if copy != agreed]
    names = [name for name, value in agreed if copies[odd[0]][name] != value]
    which = ", ".join(distributed.device_name(mesh, number) for number in odd)
    if 2 * most == mesh.size:  # half against half tells nobody which is right
        which = ", ".join(distributed.device_name(mesh, number) for number in range(mesh.size))
        return f"the copies on {which} differ, in {_in_short(names)}"
    return f"the copy on {which} differs from that on the other devices, in {_in_short(names)}"


def _in_short(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
