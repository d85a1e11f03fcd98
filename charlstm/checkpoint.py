"""Checkpoints that cannot lie: what `restore` returns is, bit for bit, what `save` was given, or it is refused.

    checkpoints/<step>/checkpoint.json     the seal: identity, metric, digest of each array, sha256 of each file
                       params/...  opt_state/...  and all the rest: the arrays as Orbax writes them
                <step>.saving...           not finished; finished or deleted when a writer opens the directory again
                <step>.corrupt-*           failed verification; kept, never read
                <step>.abandoned-*         later than the step that the run went back to; kept, never read

Orbax copies the arrays and writes them in the background.  Which steps there are is decided here: Orbax's own manager
lists a step by its name alone, reports a save that failed as one that succeeded, skips saves after a return to an older
step, and restores a flipped bit in silence.  A step gets its name by one rename after its seal, so a process may be
killed anywhere.
"""

import asyncio
import contextlib
import json
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from charlstm import file_manifest, mesh
from charlstm.digest import describe, digests, named_leaves
from charlstm.file_manifest import Damaged, StepDirectory, refuse_other_arrays
from charlstm.types import ModelParams, TrainState


class Checkpoints:
    """The checkpoints of one run, in one directory.

    One writer at a time; readers (`writable=False`) change nothing and may come and go.  In a run of several processes
    each of them makes the same calls, and the first does what is done once.  Close it, or use it in a `with`.

    Attributes:
      failed_saves: saves that failed since the last one that succeeded.
      last_failure: the sentence about the latest of these; None when there is none.
    """

    def __init__(self, directory: Path, *, keep: int = 3, writable: bool = True, log: Callable[[str], None]) -> None:
        """Opens `directory`; a writer makes it and clears up what a killed process left unfinished.

        Args:
          keep: the newest checkpoints to keep (1 or more); the best on validation is kept besides.
          log: takes one line; called from a background thread too.

        Raises:
          ValueError: the directory cannot be written.
        """
        assert keep >= 1, keep
        self.failed_saves = 0
        self.last_failure: str | None = None
        self._files = StepDirectory(directory.absolute())
        self._keep, self._writable, self._log = keep, writable, log
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        logging.getLogger("absl").addFilter(_not_from_orbax)  # failures are told by `log`, in one line
        if writable:
            mesh.once(self._open)
            mesh.together(self._files.require_seen)

    def _open(self) -> None:
        try:
            self._files.path.mkdir(parents=True, exist_ok=True)
            self._files.sweep()
        except OSError as error:
            raise ValueError(f"{self._files.path} cannot be written ({error.strerror}): name another run_dir") from None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()
        self._thread.shutdown()

    def save(self, state: TrainState, identity: dict[str, Any], score: float | None, sums: Any = None) -> None:
        """Saves `state` under its step: waits for the save before, copies to the host, and leaves the rest behind.

        A step that is there already is replaced, and later ones are set aside: the run went back.  A save that fails is
        logged and counted, never raised, and leaves the checkpoints before it whole.

        Args:
          state: every leaf a jax.Array, none of size zero; may be donated or deleted on return.
          identity, sums: plain JSON; what the state belongs to (settings, text, versions), and the meter's sums.
          score: bits per symbol on validation; None or not finite where there is none to compare by.
        """
        assert self._writable
        assert json.loads(json.dumps(identity)) == identity, f"not plain JSON: {identity}"
        self.wait()
        step, items = int(state.step), _items(state)
        found = digests(items)
        meta = {
            "format": file_manifest.FORMAT,
            "step": step,
            "identity": identity,
            "sums": sums,
            "bits_per_symbol": score if score is not None and math.isfinite(score) else None,
            "arrays": {name: {**held, "digest": found[name]} for name, held in describe(items).items()},
        }
        try:
            self.discard_after(step)
            mesh.once(lambda: self._make_way(step, items))
        except mesh.FAILURES as error:
            self._failed(step, error)
        else:
            self._pending = self._thread.submit(self._commit, _start_writing(self._files.staging(step), items), meta)

    def wait(self) -> None:
        """Until the last save is whole on disk, or has failed and is counted."""
        if self._pending:
            self._pending.result()
            self._pending = None

    def steps(self) -> list[int]:
        """The steps that there are, ascending.  Whether they are whole is known only after `restore`."""
        return self._files.steps()

    def best(self) -> int | None:
        """The step with the lowest validation metric, the earlier of equals; None where no step has one."""
        scores = {step: meta["bits_per_symbol"] for step, meta in self._files.sealed().items()}
        return min((step for step in scores if scores[step] is not None), key=lambda step: scores[step], default=None)

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the arrays: format, step, identity, bits_per_symbol, sums, arrays.  No array is read.

        Args:
          step: None for the newest.  Where its seal is damaged, the newest other step that has one answers.

        Raises:
          ValueError: there is no such step, or no step with a whole seal, or its format is another.
        """
        candidates = self._candidates(step)
        for candidate in candidates:
            with contextlib.suppress(Damaged):
                return self._files.read_by_all(candidate, None, mesh.gather)
        raise self._files.none_whole(candidates)

    def restore(self, abstract: TrainState, *, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The state that was saved, and its meta (as `read_meta`).

        A checkpoint that fails verification is skipped, saying so; a writer that finds another one whole sets it aside.

        Args:
          abstract: a jax.ShapeDtypeStruct for each leaf, with the sharding it shall have, on any number of devices.
          step: None for the newest; where the one asked for is damaged, the newest whole one is restored.

        Raises:
          ValueError: there is no such step, or none is whole, or it holds other leaves, shapes or types.
        """
        trees, meta = self._restore(_items(abstract), step)
        number = jax.device_put(np.asarray(meta["step"], abstract.step.dtype), abstract.step.sharding)
        return abstract._replace(step=number, **trees), meta

    def restore_params(
        self, abstract: ModelParams, *, step: int | None = None, item: str = "params"
    ) -> tuple[ModelParams, dict[str, Any]]:
        """As `restore`, of one `item` alone, the params or their average; the files of the rest are not read."""
        trees, meta = self._restore({item: abstract}, step)
        return trees[item], meta

    def discard_after(self, step: int) -> None:
        """Goes back: later steps are set aside, so that none of them is ever taken for the newest."""
        assert self._writable
        self.wait()
        mesh.once(lambda: self._set_aside([later for later in self.steps() if later > step], "abandoned"))

    def _make_way(self, step: int, items: dict[str, Any]) -> None:
        """Makes the directories that all processes write in."""
        self._files.sweep()
        for item in _named_items(items):
            (self._files.staging(step) / item).mkdir(parents=True)

    def _commit(self, written: Callable[[], None], meta: dict[str, Any]) -> None:
        """In the background: waits until all processes have written; the first then gives the step its name."""
        try:
            mesh.together(written, "saves")
            mesh.once(lambda: self._name(meta), "saves")
        except mesh.FAILURES as error:
            self._failed(meta["step"], error)
            return
        self.failed_saves, self.last_failure = 0, None
        if mesh.is_first_process():
            try:
                self._files.remove_old(self._keep, self.best())
            except OSError as error:
                self._log(f"old checkpoints in {self._files.path} could not be removed: {error}")

    def _name(self, meta: dict[str, Any]) -> None:
        staging = self._files.staging(meta["step"])
        for item in staging.iterdir():
            _handler().finalize(epath.Path(item))
        file_manifest.seal(staging, meta)
        self._files.promote(staging, meta["step"])

    def _failed(self, step: int, error: Exception) -> None:
        if mesh.is_first_process():
            self._files.clear_staging(step)  # the disk may be full
        self.failed_saves += 1
        reason = f"{type(error).__name__}: {error}".splitlines()[0].partition(" [tensorstore_spec")[0]
        if len(reason) > 240:
            reason = f"{reason[:80]} ... {reason[-150:]}"  # the path stands in between; the cause comes last
        self.last_failure = f"checkpoint {step} was not saved (failure {self.failed_saves} in a row): {reason}"
        self._log(self.last_failure)

    def _restore(self, trees: dict[str, Any], step: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.wait()
        damaged, candidates = [], self._candidates(step)
        for candidate in candidates:
            try:
                restored, meta = self._read(candidate, trees)
            except Damaged as damage:
                self._log(f"checkpoint {candidate} in {self._files.path} is damaged: {damage}")
                damaged.append(candidate)
                continue
            if damaged:
                self._log(f"checkpoint {candidate} is the newest whole one and is used instead")
            if damaged and self._writable:
                mesh.once(lambda: self._set_aside(damaged, "corrupt"))
            return restored, meta
        # Nothing was set aside: the same command again must refuse again, not find an empty directory and start anew.
        raise self._files.none_whole(candidates)

    def _read(self, step: int, trees: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Files first, then names, shapes and types, then the arrays, then their digests; with one result on all.

        What Orbax raises on files that are whole goes up: out of memory, say, which proves nothing of the checkpoint.
        """
        meta = self._files.read_by_all(step, trees, mesh.gather)
        held = {name: array for name, array in meta["arrays"].items() if name.partition(".")[0] in trees}
        refuse_other_arrays(f"checkpoint {step} in {self._files.path}", held, describe(trees))
        restored = mesh.together(lambda: _read_arrays(self._files.step(step), trees))
        wrong = ""
        for name, digest in digests(restored).items():
            if digest != held[name]["digest"]:
                wrong = f"{name} has digest {digest}, {held[name]['digest']} was saved"
        if mesh.any_process(bool(wrong)):
            raise Damaged(wrong or "another process has read other arrays")
        return restored, meta

    def _candidates(self, step: int | None) -> list[int]:
        """The steps to try, in order, as the first process sees them."""
        seen = mesh.together(self.steps)
        steps, step = json.loads(mesh.gather(json.dumps([seen, step]))[0])
        return self._files.in_order(steps, step)

    def _set_aside(self, steps: list[int], why: str) -> None:
        for step in steps:
            self._log(f"checkpoint {step} was set aside as {self._files.set_aside(step, why)}")


def _items(state: TrainState) -> dict[str, Any]:
    """What is saved apart, so that it can be restored apart.  The step is in the seal."""
    return {field: value for field, value in state._asdict().items() if field != "step"}


def _named_items(trees: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """item -> leaves by name; an item without leaves (the state of plain SGD) is not there."""
    return {item: leaves for item, tree in trees.items() if (leaves := named_leaves(tree))}


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Weights are noise: compression saves 8 % and takes most of the time.  OCDBT puts many arrays, and the pieces that
    # many devices hold, in few files.
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)


def _start_writing(directory: Path, trees: dict[str, Any]) -> Callable[[], None]:
    """Copies what this process writes of the arrays to the host, and begins to write it in the background.

    Not by Orbax's own checkpointer, whose processes meet in collectives of the devices: one whose disk fails does not
    come to them, and the others would wait there, or take its next step for an answer.  What is returned waits until
    all is written, and raises what has failed.
    """
    writes, failures = list[Any](), list[Exception]()
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        try:
            for item, leaves in _named_items(trees).items():
                os.stat(directory / item)  # the first process has made it: what it does not see, it would not seal
                saving = _handler().async_save(epath.Path(directory / item), args=ocp.args.PyTreeSave(leaves))
                writes += loop.run_until_complete(saving) or []
        except mesh.FAILURES as error:
            failures.append(error)

    def wait() -> None:
        for write in writes:
            try:
                write.result()
            except mesh.FAILURES as error:
                failures.append(error)
        if failures:
            raise failures[0]

    return wait


def _read_arrays(directory: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for item, leaves in _named_items(abstract).items():
        restore = ocp.args.PyTreeRestore(leaves, ocp.checkpoint_utils.construct_restore_args(leaves))
        found[item] = _handler().restore(epath.Path(directory / item), args=restore)
    return {
        item: jax.tree.unflatten(jax.tree.structure(tree), [found[item][name] for name in named_leaves(tree)])
        for item, tree in abstract.items()
    }


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
