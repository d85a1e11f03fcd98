"""Devices and processes: the one-axis mesh, what lies where on it, and what all the processes agree on.

Processes agree through the coordination service of `jax.distributed`, by its key-value store, and never through the
devices: where one process has failed, its next collective would be paired with another one of its peers.

Nothing else in the project asks how many devices there are.  Parameters and optimizer state lie whole on every device;
whatever has a row a stream (batches, recurrent state) is split by rows over the axis `AXIS`, in device order, and the
devices of one process are neighbours, so a process holds one run of rows.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # of the coordination service, jax.distributed shows only how to join it
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipeline.batch import rows_of_process

AXIS = "data"
REPLICATED, BY_STREAM = PartitionSpec(), PartitionSpec(AXIS)

# A process may verify a large checkpoint while the others wait; one that dies is noticed otherwise.
PATIENCE_MS = 24 * 3600 * 1000
_meetings = itertools.count()


def join(coordinator: str, count: int, index: int, heartbeat_timeout: int) -> None:
    """Makes this process number `index` of the `count` of a job; before anything asks for devices.

    Args:
      coordinator: HOST:PORT at which process 0 can be reached.
      heartbeat_timeout: seconds after which a process that is not heard of is lost; the others are then aborted.
    """
    jax.distributed.initialize(
        coordinator,
        count,
        index,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=heartbeat_timeout,
    )


def join_cluster(heartbeat_timeout: int) -> None:
    """As `join`, of the processes that a cluster has started.  Raises ValueError where JAX finds no cluster."""
    jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_timeout, shutdown_timeout_seconds=heartbeat_timeout)


def tells_of_a_lost_process(error: Exception) -> bool:
    """Whether `error`, raised in one of several processes, is how the loss of another one shows here."""
    words = ("gloo", "nccl", "coordination service", "connection closed by peer", "heartbeat", "unavailable")
    return any(word in str(error).lower() for word in words)


def make(devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices`; all devices of all processes by default.  Raises ValueError where there are none."""
    try:
        chosen = np.array(jax.devices() if devices is None else devices)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(". (")[0] or "none of the kind that JAX_PLATFORMS names"
        raise ValueError(f"there are no devices: {reason}") from None
    return Mesh(chosen, (AXIS,), axis_types=(AxisType.Auto,))


def describe(mesh: Mesh) -> str:
    """The devices in words, such as "8 x cpu in 1 process"."""
    kind, processes = mesh.devices.flat[0].device_kind, jax.process_count()
    return f"{mesh.size} x {kind} in {processes} process{'es' if processes > 1 else ''}"


def is_one_of_several() -> bool:
    """Whether the job has other processes."""
    return jax.process_count() > 1


def process_number() -> int:
    """Which process of the job this one is, from 0 on."""
    return jax.process_index()


def is_first_process() -> bool:
    """Whether this process writes what is written once: metrics, the terminal, the run directory."""
    return process_number() == 0


def process_rows(mesh: Mesh, rows: int) -> range:
    """The rows of a global batch of `rows` that this process reads."""
    assert rows % mesh.size == 0, (rows, mesh.size)
    return rows_of_process(rows, jax.process_index(), jax.process_count())


def put(mesh: Mesh, spec: PartitionSpec, tree: Any) -> Any:
    """Host arrays -> global arrays laid out by `spec`; for `BY_STREAM` each process gives its own rows only."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree)


def abstract(mesh: Mesh, spec: PartitionSpec, tree: Any) -> Any:
    """The shapes, types and places of `tree`: what a checkpoint is restored into."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def gather(word: str) -> list[str]:
    """What each process says, in the order of the processes: every process gets the same list, so all decide alike.

    All processes must come to the same meetings in the same order.  One that died ends the others' wait by ending them.
    """
    if jax.process_count() == 1:
        return [word]
    client, meeting = distributed.global_state.client, f"charlstm/{next(_meetings)}"
    assert client is not None, "several processes have joined through it"
    client.key_value_set(f"{meeting}/{jax.process_index()}", word)
    return [client.blocking_key_value_get(f"{meeting}/{p}", PATIENCE_MS) for p in range(jax.process_count())]


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process."""
    return "yes" in gather("yes" if flag else "no")


def once(act: Callable[[], None]) -> None:
    """Has the first process do `act`, when all have come here; all go on when it is done.

    Raises:
      ValueError: on the other processes, where `act` raised a ValueError or an OSError on the first.
    """
    gather("")  # nobody reads any more what is to be written
    if is_first_process():
        try:
            act()
        except (ValueError, OSError) as error:
            gather(str(error) or type(error).__name__)
            raise
    refusal = gather("")[0]
    if refusal:
        raise ValueError(refusal)


def stop_agreed(step: int, asked: bool) -> bool:
    """Whether all processes stop before the update after `step`: every process gets the same answer at the same step.

    Of several processes, one that got SIGTERM asks for it by that (JAX catches the signal), and `asked` does not count.
    """
    if jax.process_count() == 1:
        return asked
    return multihost_utils.reached_preemption_sync_point(step)


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of a global array on every process; all processes must ask for it together."""
    if jax.process_count() == 1:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
