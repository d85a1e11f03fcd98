"""Devices and processes: the one-axis mesh, shardings, and agreement of processes.

Processes agree through the coordination service of `jax.distributed`, by its key-value store, and never through the
devices: where one process has failed, its next collective would be paired with another one of its peers.

Nothing else in the project asks how many devices there are.  Parameters and optimizer state lie whole on every device;
whatever has a row a stream (batches, recurrent state) is split by rows over the axis `AXIS`, in device order, and the
devices of one process are neighbors, so a process holds one run of rows.
"""

import contextlib
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # of the coordination service, jax.distributed shows only how to join it
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipeline.batch import rows_of_process

AXIS = "data"
REPLICATED, BY_STREAM = PartitionSpec(), PartitionSpec(AXIS)

MOSAIC_SINCE = (0, 11)  # of JAX: before, a step that has Mosaic's kernels in its loops cannot be traced

# A process may verify a large checkpoint while the others wait; one that dies is noticed otherwise.
PATIENCE_MS = 24 * 3600 * 1000
_meetings: dict[str, Iterator[int]] = defaultdict(itertools.count)
# How a disk that is full, slow or gone shows: TensorStore raises ValueError, the runtime RuntimeError.
FAILURES = (OSError, ValueError, RuntimeError)
_LOST = re.compile(
    r"(process \d+: )?[A-Z_]+: .*(?i:gloo|nccl|coordination.?service|connection closed by peer|heartbeat)", re.DOTALL
)
Result = TypeVar("Result")


def join(coordinator: str, count: int, index: int, heartbeat_timeout: int) -> None:
    """Makes this process number `index` of the `count` of a job; before anything asks for devices.

    Anybody who reaches the coordinator may take part: it asks for no password.  One named as "localhost" or 127.0.0.1
    is reached from this machine alone; any other listens on all networks of process 0.

    Args:
      coordinator: HOST:PORT at which process 0 can be reached.
      heartbeat_timeout: seconds after which a process that is not heard of is lost; the others are then aborted.
    """
    host, _, port = coordinator.rpartition(":")
    loopback = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "[::1]": "[::1]"}.get(host)
    jax.distributed.initialize(
        f"{loopback or host}:{port}",
        count,
        index,
        coordinator_bind_address=f"{loopback}:{port}" if loopback else None,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=heartbeat_timeout,
    )


def join_cluster(heartbeat_timeout: int) -> None:
    """Joins the processes that a cluster has started.  Raises ValueError where JAX finds no cluster."""
    jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_timeout, shutdown_timeout_seconds=heartbeat_timeout)


def is_peer_failure(error: Exception) -> bool:
    """True if `error` is a symptom of a lost peer (Gloo, NCCL, coordination service).

    That is an error of JAX's runtime, which begins with a status code: of a collective, or of the coordination service.
    An error of a disk may be "temporarily unavailable", or name a file with such a word in it.
    """
    if isinstance(error, OSError) or "[OS error " in str(error):  # the latter is TensorStore's
        return False
    out_of_reach = isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith("UNAVAILABLE: ")
    return out_of_reach or _LOST.match(str(error)) is not None


def all_take_part() -> bool:
    """True if a run has all devices: its job has several processes, or the user has set their number on a CPU."""
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    return chosen or "JAX_NUM_CPU_DEVICES" in os.environ or jax.distributed.is_initialized()


def use_cpu_cores() -> None:
    """Makes one device per core of a CPU, unless JAX has started or `all_take_part`."""
    if not all_take_part():
        with contextlib.suppress(RuntimeError):  # it has started
            jax.config.update("jax_num_cpu_devices", usable_cores())


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1  # not on a Mac


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
    kind, processes = device_kind(mesh), jax.process_count()
    return f"{mesh.size} x {kind} in {processes} process{'es' if processes > 1 else ''}"


def device_kind(mesh: Mesh) -> str:
    """Kind of the devices, such as "cpu"."""
    return mesh.devices.flat[0].device_kind


def memory_of_a_device(mesh: Mesh) -> int | None:
    """Bytes of a device's own memory that JAX may use; None where that is the host's, or not told."""
    if mesh.devices.flat[0].platform == "cpu":
        return None
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def has_mosaic(mesh: Mesh) -> bool:
    """True if Mosaic kernels run on the devices: NVIDIA GPUs from Hopper on, with this JAX."""
    device = mesh.devices.flat[0]
    if device.platform != "gpu" or jax.__version_info__ < MOSAIC_SINCE:
        return False
    try:
        return float(getattr(device, "compute_capability", 0)) >= 9
    except ValueError:  # AMD's are "gfx942" and the like
        return False


def is_in_host_memory(mesh: Mesh) -> bool:
    """True if the devices are CPUs, whose arrays the program can read in place."""
    return mesh.devices.flat[0].platform == "cpu"


def mesh_of(array: jax.Array) -> Mesh:
    """The mesh over which `array` was put."""
    sharding = array.sharding
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh), sharding
    return sharding.mesh


def device_name(mesh: Mesh, number: int) -> str:
    """A device of the mesh in words, such as "device 3 (cpu:3 of process 0)"."""
    device = mesh.devices.flat[number]
    return f"device {number} ({device.platform}:{device.id} of process {device.process_index})"


def number_of_processes() -> int:
    return jax.process_count()


def is_one_of_several() -> bool:
    """True if the job has several processes."""
    return jax.process_count() > 1


def process_number() -> int:
    """Number of this process in the job, from 0 on."""
    return jax.process_index()


def is_first_process() -> bool:
    """True if this process writes what is written once: metrics, the terminal, the run directory."""
    return process_number() == 0


def process_rows(mesh: Mesh, rows: int) -> range:
    """The rows of a global batch of `rows` that this process reads."""
    assert rows % mesh.size == 0, (rows, mesh.size)
    return rows_of_process(rows, jax.process_index(), jax.process_count())


def put(mesh: Mesh, spec: PartitionSpec, tree: Any) -> Any:
    """Host arrays -> global arrays laid out by `spec`; for `BY_STREAM` each process gives its own rows only."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree)


def own_copy(tree: Any) -> Any:
    """Returns replicated arrays as arrays of this process's first device alone; nothing is copied."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def abstract(mesh: Mesh, spec: PartitionSpec, tree: Any) -> Any:
    """The shapes, types and places of `tree`: what a checkpoint is restored into."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def all_gather_str(word: str, apart: str = "main") -> list[str]:
    """All-gathers one string per process through the coordination service, in the order of the processes.

    All processes must come to the same meetings in the same order; a thread beside the main one names its own `apart`.
    One that died ends the others' wait by ending them.
    """
    if jax.process_count() == 1:
        return [word]
    client, own, place = distributed.global_state.client, jax.process_index(), f"charlstm/{apart}"
    meeting = next(_meetings[apart])
    assert client is not None, "several processes have joined through it"
    # The first process reads all words, at once, and gives the others an answer that is short where most words are
    # alike: neither the calls of a process nor what it reads grow with the processes.  The barrier is the same each
    # time: the service would keep every one that it had ever seen.
    key = f"{place}/{{}}/{own}" if own else f"{place}/answer/{{}}"
    if own:
        client.key_value_set(key.format(meeting), word)
    client.wait_at_barrier(place, PATIENCE_MS)
    if own:
        answer = client.blocking_key_value_get(f"{place}/answer/{meeting}", PATIENCE_MS)
    else:
        words = {int(name.rpartition("/")[2]): said for name, said in client.key_value_dir_get(f"{place}/{meeting}/")}
        most = Counter([word, *words.values()]).most_common(1)[0][0]
        answer = json.dumps([most, {process: said for process, said in {0: word, **words}.items() if said != most}])
        client.key_value_set(key.format(meeting), answer)
    # Whoever came to this meeting has read all of the one before: a long run does not fill the service's memory.
    if meeting:
        client.key_value_delete(key.format(meeting - 1))
    most, others = json.loads(answer)
    return [others.get(str(process), most) for process in range(jax.process_count())]


def latest_of_all(name: str, value: float) -> dict[int, float]:
    """Publishes `value`, and on the first process returns the latest that each has published, by process.

    Nobody waits for anybody, so some of them are of the call before, or missing; elsewhere, only the own is returned.
    """
    client, own = distributed.global_state.client, jax.process_index()
    assert client is not None, "several processes have joined through it"
    if own:
        client.key_value_set(f"charlstm/{name}/{own}", str(value), allow_overwrite=True)
        return {own: value}
    told = client.key_value_dir_get(f"charlstm/{name}/")
    return {0: value} | {int(key.rpartition("/")[2]): float(word) for key, word in told}


def any_process(flag: bool) -> bool:
    """True if `flag` is true on any process."""
    return "yes" in all_gather_str("yes" if flag else "no")


def run_on_all(act: Callable[[], Result], apart: str = "main") -> Result:
    """Runs `act` on every process; returns its result on this one when it has succeeded on all.

    Raises:
      ValueError, OSError, RuntimeError: what `act` raised on this process.
      ValueError, OSError: it raised one of these on another process only.
    """
    try:
        result = act()
    except FAILURES as error:
        words = str(error) or type(error).__name__
        all_gather_str(json.dumps([getattr(error, "errno", None), words]), apart)
        raise
    for process, failure in enumerate(all_gather_str("", apart)):
        if failure:
            raise _as_of_another(process, *json.loads(failure))
    return result


def _as_of_another(process: int, number: int | None, words: str) -> Exception:
    """The failure of another process, with its errno if it has one, by which this process ends with the same status."""
    sentence = f"process {process}: {words}"
    if number is None:
        return ValueError(sentence)
    error = OSError(sentence)
    error.errno = number
    return error


def run_on_first(act: Callable[[], object], apart: str = "main") -> None:
    """Runs `act` on the first process when all have come here; all go on when it is done.  Raises as `run_on_all`."""
    all_gather_str("", apart)  # nobody reads any more what is to be written
    run_on_all(lambda: act() if is_first_process() else None, apart)


def take_from_first(act: Callable[[], str], apart: str = "main") -> str:
    """Runs `act` on the first process alone; returns its result on all.  Raises as `run_on_all`."""
    found = run_on_all(lambda: act() if is_first_process() else "", apart)
    return all_gather_str(found, apart)[0]


def exit_barrier(seconds: float) -> bool:
    """True if all processes come here within `seconds`: what one alone refuses, the others do not know of."""
    client = distributed.global_state.client
    assert client is not None, "several processes have joined through it"
    try:
        client.wait_at_barrier("charlstm/leaving", int(1000 * seconds))
    except RuntimeError:  # they have not
        return False
    return True


def stop_agreed(times: int, asked: bool) -> bool:
    """Preemption sync point: the same answer on every process at the same call index `times`.

    Of several processes, one that got SIGTERM asks for it by that (JAX catches the signal), and `asked` does not count.
    """
    if jax.process_count() == 1:
        return asked
    return multihost_utils.reached_preemption_sync_point(times)


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of a global array on every process; all processes must ask for it together."""
    if jax.process_count() == 1:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
