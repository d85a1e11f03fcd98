"""Memory: a run that does not fit is refused before anything runs; one that runs out all the same is ended.

Sizes are first a formula of the settings, since what is too large for any machine would take minutes to be traced; then
those that XLA gives of the compiled update.
"""

import contextlib
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from charlstm import distributed
from charlstm.config import Config
from charlstm.model import layer
from charlstm.training import train_state
from charlstm.training.optimizers import RULES
from data_pipeline.batch import Batch

BEYOND_ALL = 10**15  # bytes; no machine has them, and the sizes of arrays come near to the largest integers
CLOSE = 0.9  # of what there is
LOOK_EVERY = 0.5  # seconds
CGROUPS = "/sys/fs/cgroup"
LESS = "lower hidden_size, num_layers or embedding_size"


End = Callable[[RuntimeError], None] | None  # called where a device fails


class Limit(NamedTuple):
    """So many bytes, and what sets them."""

    bytes: int
    of: str

    def __str__(self) -> str:
        return f"{format_bytes(self.bytes)} {self.of}"


class Update(NamedTuple):
    """Memory of the compiled update on one device, in bytes, and the number of this process's devices."""

    held: int  # state and batch
    temporary: int
    devices: int

    @property
    def on_a_device(self) -> int:
        return self.held + self.temporary


def state_bytes(config: Config, vocabulary_size: int) -> int:
    """Bytes of parameters and optimizer state, at least: a formula, so that nothing is traced."""
    settings, V = config.model, vocabulary_size
    E, gates = settings.embedding_size, layer.CELLS[settings.cell].GATES
    inputs = [E or V, *settings.widths[:-1]]
    weights = sum(gates * H * (X + H) for X, H in zip(inputs, settings.widths, strict=True))
    weights += V * E + (0 if settings.tie_embeddings else settings.widths[-1] * V)
    copies = 1 + RULES[config.optimizer.optimizer].moments + (config.optimizer.eval_params_field == "average")
    return 4 * copies * weights


def require_possible(config: Config, vocabulary_size: int = 1, dry: bool = False) -> None:
    """Raises ValueError where the state alone is more than this machine can hold; before anything is traced.

    Args:
      vocabulary_size: 1 where it is not known yet.
      dry: nothing is to be made, so only what no machine has is refused.
    """
    needed, there = state_bytes(config, vocabulary_size), limit()
    if dry:
        there = Limit(BEYOND_ALL, "at most on any machine")
    if needed > there.bytes:
        raise ValueError(f"parameters and optimizer state take {format_bytes(needed)}, and there are {there}: {LESS}")


def compiled_update(
    train_step: Any, config: Config, vocabulary_size: int, dtype: Any, mesh: distributed.Mesh
) -> Update:
    """Memory of the update for a window of the greatest length.  Compiles it, which its first call then need not do.

    Args:
      train_step: of `step.make`.
      dtype: of the ids in a batch.
    """
    shape = (config.streams.batch_size, config.streams.longest_window)
    ids = jax.ShapeDtypeStruct(shape, dtype)
    batch = distributed.abstract(mesh, distributed.BY_STREAM, Batch(ids, ids, jax.ShapeDtypeStruct(shape, np.bool_)))
    state = train_state.abstract(config, vocabulary_size, mesh)
    told = train_step.lower(state, batch).compile().memory_analysis()
    if told is None:  # not every backend tells; then nothing is refused
        return Update(0, 0, len(mesh.local_devices))
    fresh = told.output_size_in_bytes - told.alias_size_in_bytes  # of the state, all is written in place
    return Update(told.argument_size_in_bytes, told.temp_size_in_bytes + fresh, len(mesh.local_devices))


def too_much(update: Update, config: Config, mesh: distributed.Mesh) -> str:
    """Says why the update cannot run in this process, with both numbers and the remedy; "" where it may."""
    needed, there = _needed(update, mesh)
    if needed <= there.bytes:
        return ""
    names = ["batch_size", "window", "hidden_size", "num_layers"]
    less = ", ".join(f"{name}={_value(config, name)}" for name in names)
    remat = "" if config.model.remat else ", or give --remat"
    return f"{_in_words(update, mesh)}, and there are {there}: lower one of {less}{remat}"


def close(update: Update, mesh: distributed.Mesh) -> str:
    """A remark where the update may not fit, beside what else there is; else ""."""
    needed, there = _needed(update, mesh)
    free = _available()
    if distributed.memory_of_a_device(mesh) is None and free is not None and free < there.bytes:
        there = Limit(free, "available now")
    if needed <= CLOSE * there.bytes:
        return ""
    return f"memory may run out: {_in_words(update, mesh)}, and there are {there}"


def limit() -> Limit:
    """Bytes of the host's memory that this process can have, whatever else ends."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [Limit(pages + _of_file("/proc/meminfo", "SwapTotal:"), "of memory on this machine")]
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY:
        limits.append(Limit(most, "of address space (ulimit -v)"))
    limits += [Limit(most, "of memory for this control group") for most in _of_control_groups()]
    return min(limits)


def format_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


@contextlib.contextmanager
def watched(mesh: distributed.Mesh, end: End) -> Iterator[Callable[[jax.Array], None]]:
    """Within it, calls `end(error)` where a device fails, which may end the process if memory has run out.

    The others would wait for that device in a collective, for a minute, until XLA aborts; and so would Python's own way
    out.  Yields a function that is told of the newest array which lies on all devices.
    """
    if end is None or len(mesh.local_devices) == 1:
        yield lambda array: None
        return
    newest: list[jax.Array] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_EVERY):
            for array in newest[-1:]:
                _end_where_one_failed(array, end)

    def see(array: jax.Array) -> None:
        newest[:] = [array]

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield see
    except RuntimeError as error:
        end(error)
        raise
    finally:
        done.set()


def _end_where_one_failed(array: jax.Array, end: Callable[[RuntimeError], None]) -> None:
    for shard in array.addressable_shards:
        try:
            if shard.data.is_ready():
                shard.data.block_until_ready()
        except RuntimeError as error:
            end(error)


def _needed(update: Update, mesh: distributed.Mesh) -> tuple[int, Limit]:
    """The bytes that the update takes and those that are there for it: of a device, or of this process."""
    own = distributed.memory_of_a_device(mesh)
    if own is not None:
        return update.on_a_device, Limit(own, "of memory on the device")
    there = limit()
    mapped = "VmSize:" if "address" in there.of else "VmRSS:"
    left = there.bytes - _of_file("/proc/self/status", mapped)
    return update.on_a_device * update.devices, Limit(max(0, left), f"left {there.of}")


def _in_words(update: Update, mesh: distributed.Mesh) -> str:
    if update.devices == 1 or distributed.memory_of_a_device(mesh) is not None:
        return f"an update takes {format_bytes(update.on_a_device)}"
    whole = format_bytes(update.on_a_device * update.devices)
    return f"an update takes {whole} on {update.devices} devices ({format_bytes(update.on_a_device)} each)"


def _value(config: Config, name: str) -> int:
    return getattr(config.streams if hasattr(config.streams, name) else config.model, name)


def _of_file(path: str, name: str) -> int:
    """Bytes of a line such as "VmRSS:  12 kB"; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(name):
                return 1024 * int(line.split()[1])
    return 0


def _available() -> int | None:
    """Bytes that the system would give now without writing to a swap; None where it does not say."""
    return _of_file("/proc/meminfo", "MemAvailable:") or None


def _of_control_groups() -> Iterator[int]:
    """The limits of memory of the control groups that this process is in, version 2 and 1."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root, file = (Path(CGROUPS, "memory"), "memory.limit_in_bytes") if controllers else (CGROUPS, "memory.max")
            place = Path(root, name.strip("/"))
            for folder in (place, *place.parents):
                with contextlib.suppress(OSError, ValueError):  # "max" is none
                    yield int((folder / file).read_text())
                if folder == Path(root):
                    break
