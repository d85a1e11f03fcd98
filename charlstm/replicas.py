"""Whether all devices still hold the same: a bit that flips in one device's memory goes unseen for ever otherwise.

Parameters, their average and optimizer state lie whole on every device and are never exchanged, so each device is asked
for a digest of its own copy, and the digests are compared.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from charlstm import digest
from charlstm import mesh as mesh_lib


def comparison(mesh: Mesh) -> Callable[[Any], str]:
    """A function of a replicated tree that says which device holds another one than the rest, and of which leaf.

    It answers "" where all copies are equal, and where there is only one.  All processes must ask together.
    """
    by_device = mesh_lib.BY_STREAM  # one row a device

    def local(leaves: dict[str, jax.Array]) -> jax.Array:
        sums = digest.lane_sums(leaves)
        return jnp.stack([sums[name] for name in sorted(leaves)])[None]  # uint32 [1, leaves, 2]

    digests = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(mesh_lib.REPLICATED,), out_specs=by_device, check_vma=False)
    )

    def differing(tree: Any) -> str:
        if mesh.size == 1:
            return ""
        leaves = dict(sorted(digest.named_leaves(tree).items()))  # as tracing sorts them
        found = mesh_lib.fetch(digests(leaves))  # [devices, leaves, 2]
        copies = Counter(row.tobytes() for row in found)
        most = max(copies.values())
        if most == mesh.size:
            return ""
        agreed = next(row for row in found if copies[row.tobytes()] == most)
        odd = [d for d in range(mesh.size) if found[d].tobytes() != agreed.tobytes()]
        names = [name for name, other in zip(leaves, (found[odd[0]] != agreed).any(1), strict=True) if other]
        which = ", ".join(mesh_lib.device_name(mesh, d) for d in odd)
        if 2 * most == mesh.size:  # half against half tells nobody which is right
            which = ", ".join(mesh_lib.device_name(mesh, d) for d in range(mesh.size))
            return f"the copies on {which} differ, in {_in_short(names)}"
        return f"the copy on {which} differs from that on the other devices, in {_in_short(names)}"

    return differing


def _in_short(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
