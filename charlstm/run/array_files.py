"""Arrays in files, as Orbax writes them: the only module that knows Orbax.  What it returns is not verified here.

They are read by TensorStore, the library below Orbax, which is imported where arrays are written: that takes half a
second, and most programs only read.

    <directory>/<item>/...      one field of the state: its leaves, by name

Of an array that lies whole on every device one copy is written, the one on the mesh's first device, by the process that
has it.  By default Orbax writes a slice of each copy: where the copies differ, that is an array which no device holds.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
import tensorstore

from charlstm import distributed
from charlstm.run.digest import host_digest, named_leaves

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

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

    writes, failures = list[Any](), list[Exception]()

    def start() -> None:
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            for item, leaves in named_items(trees).items():
                os.stat(directory / item)  # the first process has made it: what it does not see, it would not seal
                saving = _handler().async_save(epath.Path(directory / item), args=ocp.args.PyTreeSave(leaves))
                writes.extend(loop.run_until_complete(saving) or [])

    try:
        _apart_from_event_loops(start)
    except distributed.FAILURES as error:
        failures.append(error)

    def wait() -> None:
        for write in writes:
            try:
                write.result()
            except distributed.FAILURES as error:
                failures.append(error)
        if failures:
            raise failures[0]

    return wait


def finalize(directory: Path) -> None:
    """Joins what all processes have written; the first process does it when they are done."""
    from etils import epath

    for item in directory.iterdir():
        _apart_from_event_loops(_handler().finalize, epath.Path(item))


def read(directory: Path, abstract: dict[str, Any], beat: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The arrays of these items, with the shardings of `abstract`; each process reads what its own devices hold.

    Args:
      beat: called after every array.
    """

    def one(item: str, name: str, leaf: Any) -> jax.Array:
        store, pieces = _open(directory / item, name), dict[str, np.ndarray]()

        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            key = str(index)
            if key not in pieces:  # several devices may hold the same
                pieces[key] = _result(item, (store if index is None else store[index]).read())
            return pieces[key]

        array = jax.make_array_from_callback(leaf.shape, leaf.sharding, piece)
        beat()
        return array

    return {
        item: jax.tree.unflatten(jax.tree.structure(tree), [one(item, *leaf) for leaf in named_leaves(tree).items()])
        for item, tree in abstract.items()
    }


def check(directory: Path, arrays: dict[str, dict[str, Any]], beat: Callable[[], None] = lambda: None) -> None:
    """Raises ValueError or OSError where the files do not hold these arrays, "item.leaf" -> {dtype, shape, digest}.

    Holds one array at a time, and calls `beat` after each.  No device is asked, and no other process.
    """
    for full_name, expected in arrays.items():
        item, _, name = full_name.partition(".")
        array = _result(item, _open(directory / item, name).read())
        found = {"dtype": str(array.dtype), "shape": list(array.shape), "digest": host_digest(array)}
        if found != expected:
            raise ValueError(f"{full_name} is {found} and not {expected}")
        beat()


def _open(item: Path, name: str) -> Any:
    kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}, "path": f"{name}/"}
    return _result(item.name, tensorstore.open({"driver": "auto", "kvstore": kvstore}, read=True))


def _result(item: str, future: Any) -> Any:
    try:
        return future.result()
    except distributed.FAILURES:
        raise
    except Exception as error:  # of any kind: a process that went its own way would leave the others waiting
        raise ValueError(f"{item} cannot be read ({type(error).__name__}: {error})") from error


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
