"""Devices and processes: the one-axis mesh, what lies where on it, and what all the processes agree on.

Nothing else in the project asks how many devices there are.  Parameters and optimizer state lie whole on every device;
whatever has a row a stream (batches, recurrent state) is split by rows over the axis `AXIS`, in device order, and the
devices of one process are neighbours, so a process holds one run of rows.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
REPLICATED, BY_STREAM = PartitionSpec(), PartitionSpec(AXIS)


def make(devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices`; all devices of all processes by default."""
    chosen = np.array(jax.devices() if devices is None else devices)
    return Mesh(chosen, (AXIS,), axis_types=(AxisType.Auto,))


def describe(mesh: Mesh) -> str:
    """The devices in words, such as "8 x cpu in 1 process"."""
    kind, processes = mesh.devices.flat[0].device_kind, jax.process_count()
    return f"{mesh.size} x {kind} in {processes} process{'es' if processes > 1 else ''}"


def is_first_process() -> bool:
    """Whether this process writes what is written once: metrics, the terminal, the run directory."""
    return jax.process_index() == 0


def process_rows(mesh: Mesh, rows: int) -> range:
    """The rows of a global batch of `rows` that this process reads."""
    count, index = jax.process_count(), jax.process_index()
    assert rows % mesh.size == 0, (rows, mesh.size)
    return range(rows * index // count, rows * (index + 1) // count)


def put(mesh: Mesh, spec: PartitionSpec, tree: Any) -> Any:
    """Host arrays -> global arrays laid out by `spec`; for `BY_STREAM` each process gives its own rows only."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree)


def abstract(mesh: Mesh, spec: PartitionSpec, tree: Any) -> Any:
    """The shapes, types and places of `tree`: what a checkpoint is restored into."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process: every process gets the same answer, so all decide alike."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of a global array on every process; all processes must ask for it together."""
    if jax.process_count() == 1:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
