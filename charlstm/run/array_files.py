"""Arrays in files, as Orbax writes them: the only module that knows Orbax.  What it returns is not verified here.

They are read by TensorStore, the library below Orbax, which is imported where arrays are written: that takes half a
second, and most programs only read.

    <directory>/<item>/...      one field of the state: its leaves, by name

The state of the streams, which the devices divide by rows, has one file of each process (`row_files`): Orbax would make
three and two directories.  Of an array that lies whole on every device one copy is written, the one on the mesh's first
device, by the process that has it.  By default Orbax writes a slice of each copy: where the copies differ, that is an
array which no device holds.
"""

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from jax import lax

from charlstm import distributed
from charlstm.run import row_files
from charlstm.run.digest import host_digest, named_leaves

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

BY_ROWS = "recurrent_state"  # not told by its sharding: an update on one device returns it as whole
Result = TypeVar("Result")


def named_items(trees: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """item -> leaves by name; an item without leaves (the state of plain SGD) is not there."""
    return {item: leaves for item, tree in trees.items() if (leaves := named_leaves(tree))}


def start_writing(directory: Path, trees: dict[str, Any]) -> Callable[[], None]:
    """Copies what this process writes of the arrays to the host, and begins to write it in the background.

    Not by Orbax's own checkpointer, whose processes meet in collectives of the devices: one whose disk fails does not
    come to them, and the others would wait there, or take its next step for an answer.  What is returned waits until
    all is written, and raises what has failed.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    writes, failures = list[Callable[[], object]](), list[Exception]()

    def start() -> None:
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            for item, leaves in named_items(trees).items():
                place = directory / item
                os.stat(place)  # the first process has made it: what it does not see, it would not seal
                if item == BY_ROWS:
                    writes.append(row_files.start_writing(place, leaves))
                else:
                    saving = _handler().async_save(epath.Path(place), args=ocp.args.PyTreeSave(leaves))
                    writes.extend(write.result for write in loop.run_until_complete(saving) or [])

    try:
        _apart_from_event_loops(start)
    except distributed.FAILURES as error:
        failures.append(error)

    def wait() -> None:
        for write in writes:
            try:
                write()
            except distributed.FAILURES as error:
                failures.append(error)
        if failures:
            raise failures[0]

    return wait


def finalize(directory: Path) -> None:
    """Joins what all processes have written; the first process does it when they are done."""
    from etils import epath

    for item in directory.iterdir():
        if not row_files.are_in(item):
            _apart_from_event_loops(_handler().finalize, epath.Path(item))


def read(
    directory: Path, abstract: dict[str, Any], beat: Callable[[], None] = lambda: None
) -> Callable[[], dict[str, Any]]:
    """Reads what this process reads of the arrays of these items, with the shardings of `abstract`.

    That is what its own devices hold.  Of several processes each reads its share of the arrays that lie whole on all
    their devices, and sends them to the others over these: a thousand processes that all read all of them would ask as
    many times as much of the file system.

    Args:
      beat: called after every array, read or sent.

    Returns:
      What sends them and returns the arrays.  It meets the other processes in collectives: to be called when all of
      them have read.
    """
    wanted = {(item, name): leaf for item, tree in abstract.items() for name, leaf in named_leaves(tree).items()}
    readers = _readers(wanted)
    found = dict[tuple[str, str], Any]()
    for (item, name), leaf in wanted.items():
        reader = readers.get((item, name))
        if reader is None:
            found[item, name] = _read_by_devices(directory / item, name, leaf)
        elif reader == distributed.process_number():
            found[item, name] = _read(directory / item, name, leaf.dtype)
            if (found[item, name].shape, found[item, name].dtype) != (leaf.shape, leaf.dtype):
                raise ValueError(f"{item}.{name} is not of the shape and type that its seal names")
        beat()

    def send() -> dict[str, Any]:
        for place in readers:
            found[place] = jax.block_until_ready(_send(found.get(place), wanted[place]))  # one at a time in memory
            beat()
        return {
            item: jax.tree.unflatten(jax.tree.structure(tree), [found[item, name] for name in named_leaves(tree)])
            for item, tree in abstract.items()
        }

    return send


def _readers(wanted: dict[tuple[str, str], Any]) -> dict[tuple[str, str], int]:
    """The process that reads each array which lies whole on devices of several, the largest dealt out first.

    What lies on a process's own devices alone, as of a model that each of them loads, it reads by itself.
    """

    def is_dealt(sharding: Any) -> bool:
        return sharding.is_fully_replicated and not sharding.is_fully_addressable

    whole = [place for place, leaf in wanted.items() if is_dealt(leaf.sharding)]
    dealt = sorted(whole, key=lambda place: (-wanted[place].size * wanted[place].dtype.itemsize, place))
    return {place: number % distributed.number_of_processes() for number, place in enumerate(dealt)}


def _read_by_devices(item: Path, name: str, leaf: Any) -> jax.Array:
    pieces = dict[str, np.ndarray]()

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        key = str(index)
        if key not in pieces:  # several devices may hold the same
            pieces[key] = _read(item, name, leaf.dtype, index or ())
        return pieces[key]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, piece)


def _send(array: np.ndarray | None, leaf: Any) -> jax.Array:
    """The array that one process has read, whole on every device; the others give None.

    Its bits are added, as integers, to the zeros that all devices but one give: -0.0 + 0.0 would be 0.0.
    """
    mesh, bits = distributed.mesh_of(leaf), np.dtype(f"u{leaf.dtype.itemsize}")
    own = np.zeros((len(mesh.local_devices), *leaf.shape), bits)
    if array is not None:
        own[0] = array.view(bits)
    return _summed_bits(leaf.sharding, leaf.dtype)(distributed.put(mesh, distributed.BY_STREAM, own))


@functools.cache
def _summed_bits(sharding: Any, dtype: np.dtype) -> Callable[[jax.Array], jax.Array]:
    def summed(parts: jax.Array) -> jax.Array:
        bits = jnp.sum(parts, axis=0, dtype=parts.dtype)
        return bits.astype(dtype) if dtype == jnp.bool_ else lax.bitcast_convert_type(bits, dtype)

    return jax.jit(summed, out_shardings=sharding)


def check(directory: Path, arrays: dict[str, dict[str, Any]], beat: Callable[[], None] = lambda: None) -> None:
    """Raises ValueError or OSError where the files do not hold these arrays, "item.leaf" -> {dtype, shape, digest}.

    Holds one array at a time, and calls `beat` after each.  No device is asked, and no other process.
    """
    for full_name, expected in arrays.items():
        item, _, name = full_name.partition(".")
        array = _read(directory / item, name, jnp.dtype(expected["dtype"]))
        found = {"dtype": str(array.dtype), "shape": list(array.shape), "digest": host_digest(array)}
        if found != expected:
            raise ValueError(f"{full_name} is {found} and not {expected}")
        beat()


def _read(item: Path, name: str, dtype: np.dtype, index: tuple[slice, ...] = ()) -> np.ndarray:
    """An array, or the part at `index`; split by rows, it is taken to be of `dtype`."""
    try:
        if row_files.are_in(item):
            rows, *rest = index or (slice(None),)
            return row_files.read(item, name, dtype, rows.start or 0, rows.stop)[:, *rest]
        kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}, "path": f"{name}/"}
        store = tensorstore.open({"driver": "auto", "kvstore": kvstore}, read=True).result()
        return store[index].read().result()
    except distributed.FAILURES:
        raise
    except Exception as error:  # of any kind: a process that went its own way would leave the others waiting
        raise ValueError(f"{item.name} cannot be read ({type(error).__name__}: {error})") from error


def refuse_other_arrays(checkpoint: str, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError where the arrays that a seal lists are not those wanted, each `name -> {dtype, shape}`.

    What JAX would say of another shape helps nobody.
    """

    def words(array: dict[str, Any] | None) -> str:
        return f"{array['dtype']}{array['shape']}" if array else "absent"

    for name in sorted({*held, *wanted}):
        there, here = words(held.get(name)), words(wanted.get(name))
        if there != here:
            raise ValueError(
                f"{checkpoint} is of another model or optimizer: {name} is {there} there and {here} here; use the "
                "settings that it was made with, or another run_dir"
            )


def _apart_from_event_loops(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls `function` in a thread if an event loop runs here (Jupyter): Orbax runs event loops of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function(*arguments)
    with ThreadPoolExecutor(1, "orbax") as thread:
        return thread.submit(function, *arguments).result()


def _handler() -> "ocp.PyTreeCheckpointHandler":
    import orbax.checkpoint as ocp

    # Weights are noise: compression saves 8 % and takes most of the time.  OCDBT puts many arrays, and the pieces that
    # many devices hold, in few files.
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (jax.Array, handlers.ArrayHandler(use_replica_parallel=False)), (np.ndarray, handlers.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False, type_handler_registry=registry)
