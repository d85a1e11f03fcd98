"""Checkpoints that cannot lie: what `restore` returns is, bit for bit, what `save` was given, or it is refused.

    checkpoints/<step>/checkpoint.json       the seal: identity, metric, digest of every array, size and sha256 of every file
                       params/<leaf>/...     the arrays as Orbax writes them, each leaf a Zarr array of raw bytes
                       opt_state/  recurrent_state/
                <step>.saving...             not finished; gone when the directory is opened again
                <step>.corrupt-*             failed verification; kept for inspection, never read
                <step>.abandoned-*           later than the step that the run went back to

Orbax writes the arrays in the background.  All the rest is done here, because a directory of Orbax's own lists a step by its
name alone, reports a save that failed as one that succeeded, and restores a flipped bit in silence.  A step gets its name by a
rename after its seal, so a process may be killed at any moment.
"""

import contextlib
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from charlstm import file_manifest, mesh
from charlstm.digest import digests, named_leaves
from charlstm.file_manifest import Damaged
from charlstm.types import ModelParams, TrainState

FORMAT = 1
_STEP = re.compile(r"0|[1-9][0-9]*")
_LEFTOVER = re.compile(r"(0|[1-9][0-9]*)\.(saving|removed).*")
# How a disk that is full, slow or gone shows: TensorStore raises ValueError, the runtime RuntimeError.
_SAVE_ERRORS = (OSError, ValueError, RuntimeError)


class Checkpoints:
    """The checkpoints of one run, in one directory.

    One writer at a time; readers (`writable=False`) change nothing and may come and go.  In a run of several processes each of
    them makes the same calls; the first process does what is done once.  Close it, or use it in a `with`.

    Attributes:
      failed_saves: saves that failed since the last one that succeeded.
      last_failure: the sentence about the latest of these; None when there is none.
    """

    def __init__(self, directory: Path, *, keep: int = 3, writable: bool = True, log: Callable[[str], None]) -> None:
        """Opens `directory`; a writer makes it and removes what a killed process left unfinished.

        Args:
          keep: the newest checkpoints to keep (1 or more); the best on validation is kept besides.
          log: takes one line; called from a background thread too.

        Raises:
          ValueError: the directory cannot be written.
        """
        assert keep >= 1, keep
        self.directory = directory.absolute()
        self.failed_saves = 0
        self.last_failure: str | None = None
        self._keep, self._writable, self._log = keep, writable, log
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        logging.getLogger("absl").addFilter(_not_from_orbax)  # failures are told by `log`, in one line
        if writable:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._sweep()
            except OSError as error:
                raise ValueError(f"{directory} cannot be written ({error.strerror}): choose another run_dir") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()
        self._thread.shutdown()

    def save(self, state: TrainState, identity: dict[str, Any], bits_per_character: float | None) -> None:
        """Saves `state` under its step; returns when it is copied to the host, and the rest happens in the background.

        A step that is there already is replaced, and later ones are set aside: the run went back.  A save that fails is logged and
        counted, never raised, and leaves the earlier checkpoints whole.

        Args:
          state: every leaf a jax.Array, none of size zero.
          identity: plain JSON; what this state belongs to (settings, vocabulary, corpus, versions).
          bits_per_character: on validation; None or not finite when there is none to compare by.
        """
        assert self._writable
        self.wait()
        step, items = int(state.step), _items(state)
        if bits_per_character is not None and not math.isfinite(bits_per_character):
            bits_per_character = None
        meta = {
            "format": FORMAT,
            "step": step,
            "identity": identity,
            "bits_per_character": bits_per_character,
            "arrays": _describe(items, digests(items)),
        }
        staging = self.directory / f"{step}.saving"  # one name on all processes; nothing else is being saved
        try:
            self.discard_after(step)
            self._sweep()
            writer = _start_writing(staging, items)
        except _SAVE_ERRORS as error:
            self._failed(step, error)
        else:
            self._pending = self._thread.submit(self._commit, writer, staging, meta)

    def wait(self) -> None:
        """Until the last save is whole on disk, or has failed and is counted."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def steps(self) -> list[int]:
        """The steps that there are, ascending.  That they are whole is known only after `restore`."""
        names = [path.name for path in self.directory.iterdir()] if self.directory.is_dir() else []
        return sorted(int(name) for name in names if _STEP.fullmatch(name))

    def best(self) -> int | None:
        """The step with the lowest validation metric, the earlier of equals; None when no step has one."""
        scores = [(meta["bits_per_character"], step) for step, meta in self._sealed()]
        return min([(score, step) for score, step in scores if score is not None], default=(None, None))[1]

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the arrays: format, step, identity, bits_per_character, arrays.  No array is read.

        Args:
          step: None for the newest.  Where its seal is damaged, the newest other step that has one answers.

        Raises:
          ValueError: there is no such step, or no step with a whole seal, or its format is another.
        """
        for candidate in self._candidates(step):
            with contextlib.suppress(Damaged):
                return self._known_format(file_manifest.read_meta(self._path(candidate)), candidate)
        raise self._none_whole()

    def restore(self, abstract: TrainState, *, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The state that was saved, and its meta (as `read_meta`).

        A checkpoint that fails verification is skipped and, where another one is whole, set aside under a unique name, saying so.

        Args:
          abstract: a jax.ShapeDtypeStruct for each leaf, with the sharding that it shall have; any number of devices.
          step: None for the newest; where the one asked for is damaged, the newest whole one is restored.

        Raises:
          ValueError: there is no such step, or none is whole, or it holds other leaves, shapes or types than `abstract`.
        """
        trees, meta = self._restore(_items(abstract), step)
        number = jax.device_put(np.asarray(meta["step"], abstract.step.dtype), abstract.step.sharding)
        return abstract._replace(step=number, **trees), meta

    def restore_params(self, abstract: ModelParams, *, step: int | None = None) -> tuple[ModelParams, dict[str, Any]]:
        """As `restore`, of the parameters alone; the files of the rest are not read."""
        trees, meta = self._restore({"params": abstract}, step)
        return trees["params"], meta

    def discard_after(self, step: int) -> None:
        """Goes back: later steps are set aside, so that none of them is ever taken for the newest."""
        assert self._writable
        self.wait()
        for later in self.steps():
            if later > step:
                self._set_aside(later, "abandoned")

    def _commit(self, writer: ocp.AsyncCheckpointer, staging: Path, meta: dict[str, Any]) -> None:
        """In the background: waits for Orbax, seals, gives the step its name, removes old steps."""
        try:
            with contextlib.closing(writer):
                writer.wait_until_finished()
            if mesh.is_first_process():
                file_manifest.seal(staging, meta)
                self._promote(staging, meta["step"])
        except _SAVE_ERRORS as error:
            self._failed(meta["step"], error)
            return
        self.failed_saves, self.last_failure = 0, None
        try:
            self._retire()
        except OSError as error:
            self._log(f"old checkpoints in {self.directory} could not be removed: {error}")

    def _failed(self, step: int, error: Exception) -> None:
        self.failed_saves += 1
        reason = f"{type(error).__name__}: {error}".splitlines()[0].partition(" [tensorstore_spec")[0]
        self.last_failure = f"checkpoint {step} was not saved (failure {self.failed_saves} in a row): {reason}"
        self._log(self.last_failure)

    def _promote(self, sealed: Path, step: int) -> None:
        final = self._path(step)
        if final.exists():
            os.rename(final, self._unique(step, "removed"))
        os.rename(sealed, final)
        file_manifest.fsync_directory(self.directory)

    def _retire(self) -> None:
        """Removes all but the newest and the best.  What has no seal is left for `restore` to judge."""
        sealed, best = [step for step, _ in self._sealed()], self.best()
        if mesh.is_first_process():
            for step in sealed[: -self._keep]:
                if step != best:
                    os.rename(self._path(step), self._unique(step, "removed"))  # never a half-removed step
            self._sweep()

    def _sweep(self) -> None:
        """Finishes or removes what a kill or a failure left: nobody is saving now."""
        if not mesh.is_first_process():
            return
        for path in sorted(self.directory.iterdir()):
            found = _LEFTOVER.fullmatch(path.name)
            if not found:
                continue
            if found[2] == "saving" and not self._path(int(found[1])).exists():
                with contextlib.suppress(
                    Damaged
                ):  # killed between the seal and the rename: it is whole, it only lacks its name
                    file_manifest.verify(path)
                    self._promote(path, int(found[1]))
                    continue
            shutil.rmtree(path, ignore_errors=True)

    def _restore(self, trees: dict[str, Any], step: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.wait()
        damaged = []
        for candidate in self._candidates(step):
            try:
                restored, meta = self._read(candidate, trees)
            except Damaged as damage:
                self._log(f"checkpoint {candidate} in {self.directory} is damaged: {damage}")
                damaged.append(candidate)
                continue
            if damaged:
                self._log(f"checkpoint {candidate} is the newest whole one: restored instead")
            for other in damaged if self._writable else []:
                self._set_aside(other, "corrupt")
            return restored, meta
        raise self._none_whole()

    def _read(self, step: int, trees: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Files first, then shapes, then arrays, then the arrays' digests."""
        damage, meta = None, {}
        try:
            meta = self._known_format(file_manifest.verify(self._path(step), trees), step)
            if meta["step"] != step:
                damage = Damaged(f"it was saved as step {meta['step']}")
        except Damaged as found:
            damage = found
        if mesh.any_process(
            damage is not None
        ):  # agreed before any process enters Orbax, whose barriers would not match
            raise damage or Damaged("another process finds it so")
        held = {name: array for name, array in meta["arrays"].items() if name.partition(".")[0] in trees}
        self._refuse_other_arrays(step, held, _describe(trees))
        restored = _read_arrays(self._path(step), trees)
        for name, digest in digests(restored).items():
            if digest != held[name]["digest"]:
                raise Damaged(f"{name} has digest {digest}, {held[name]['digest']} was saved")
        return restored, meta

    def _refuse_other_arrays(self, step: int, held: dict[str, Any], wanted: dict[str, Any]) -> None:
        for name in sorted({*held, *wanted}):
            there, here = (
                f"{found[name]['dtype']}{found[name]['shape']}" if name in found else "absent"
                for found in (held, wanted)
            )
            if there != here:
                raise ValueError(
                    f"checkpoint {step} in {self.directory} is of another model or optimizer: {name} is {there} there and "
                    f"{here} here; use the settings it was made with, or another run_dir"
                )

    def _known_format(self, meta: dict[str, Any], step: int) -> dict[str, Any]:
        if meta["format"] != FORMAT:
            raise ValueError(
                f"checkpoint {step} in {self.directory} has format {meta['format']}, this version reads {FORMAT}: "
                "use the version that wrote it"
            )
        return meta

    def _candidates(self, step: int | None) -> list[int]:
        """The steps to try, in order."""
        steps = self.steps()
        if not steps:
            raise ValueError(f"there is no checkpoint in {self.directory}")
        if step is not None and step not in steps:
            raise ValueError(
                f"there is no checkpoint {step} in {self.directory}: choose one of {', '.join(map(str, steps))}"
            )
        return sorted(steps, key=lambda each: (each == step, each), reverse=True)

    def _none_whole(self) -> ValueError:
        steps = ", ".join(map(str, self.steps()))
        return ValueError(f"no checkpoint in {self.directory} is whole (there are {steps}): remove it to start anew")

    def _sealed(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The steps with a readable seal, ascending, and their meta."""
        for step in self.steps():
            with contextlib.suppress(Damaged):
                yield step, file_manifest.read_meta(self._path(step))

    def _set_aside(self, step: int, why: str) -> None:
        if mesh.is_first_process():
            target = self._unique(step, why)
            os.rename(self._path(step), target)
            self._log(f"checkpoint {step} was set aside as {target.name}")

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _unique(self, step: int, why: str) -> Path:
        return self.directory / f"{step}.{why}-{uuid.uuid4().hex[:12]}"  # the same step may be damaged twice


def _items(state: TrainState) -> dict[str, Any]:
    """What is saved apart, so that it can be restored apart.  The step is in the seal."""
    return {field: value for field, value in state._asdict().items() if field != "step"}


def _describe(trees: dict[str, Any], found: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Type, shape and (where given) digest of each array, by the name it has in the whole state: "params.cells.0.w_h"."""
    described = {}
    for name, leaf in named_leaves(trees).items():
        assert leaf.size > 0, f"{name} has no elements"  # Orbax cannot save it
        described[name] = {
            "dtype": str(leaf.dtype),
            "shape": list(leaf.shape),
            **({"digest": found[name]} if found else {}),
        }
    return described


def _handler(items: dict[str, Any]) -> ocp.CompositeCheckpointHandler:
    # Weights are noise: compression saves 8 % and takes most of the time.  Without OCDBT each array is a file one can look at.
    return ocp.CompositeCheckpointHandler(
        **{item: ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False) for item in items}
    )


def _start_writing(directory: Path, trees: dict[str, Any]) -> ocp.AsyncCheckpointer:
    """A new writer for each save: nothing of one that failed can be left over."""
    items = {item: leaves for item, tree in trees.items() if (leaves := named_leaves(tree))}
    writer = ocp.AsyncCheckpointer(_handler(items))
    try:
        writer.save(directory, args=ocp.args.Composite(**{item: ocp.args.PyTreeSave(items[item]) for item in items}))
    except BaseException:
        writer.close()
        raise
    return writer


def _read_arrays(directory: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    items = {item: leaves for item, tree in abstract.items() if (leaves := named_leaves(tree))}
    args = {
        item: ocp.args.PyTreeRestore(leaves, restore_args=ocp.checkpoint_utils.construct_restore_args(leaves))
        for item, leaves in items.items()
    }
    with contextlib.closing(ocp.Checkpointer(_handler(items))) as reader:
        found = reader.restore(directory, args=ocp.args.Composite(**args))
    return {
        item: jax.tree.unflatten(jax.tree.structure(tree), [found[item][name] for name in named_leaves(tree)])
        for item, tree in abstract.items()
    }


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
