"""Verified checkpoints: `restore` returns exactly the bits that `save` was given, or raises an error.

    checkpoints/<step>/checkpoint.json     the seal: identity, metric, digest of each array, sha256 of each file
                       params/...  opt_state/...  and all the rest: the arrays as Orbax writes them
                       recurrent_state/rows/      the state of the streams, a file of each process
                <step>.saving...           not finished; finished or deleted when a writer opens the directory again
                <step>.corrupt-*           failed verification; kept, never read
                <step>.abandoned-*         later than the step that the run went back to; kept, never read

The arrays are copied, and written in the background.  This module, not Orbax's manager, decides which steps exist:
the manager lists a step by its name alone, reports a failed save as a success, skips saves after a return to an older
step, and silently restores a flipped bit.  A step is sealed first and then named by one rename, so a process may be
killed at any point.
"""

import json
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import absl.logging
import jax
import numpy as np

from charlstm import distributed
from charlstm.run import array_files, replicas, sealing, step_directory
from charlstm.run.digest import describe, digests, quick_digests
from charlstm.run.sealing import Damaged
from charlstm.run.step_directory import StepDirectory
from charlstm.types import ModelParams, TrainState

Wanted = int | Literal["best", "planned"] | None  # a step, the best on validation, the newest planned, or the newest
Found = TypeVar("Found")


class Checkpoints:
    """The checkpoints of one run, in one directory.  Close it, or use it in a `with`.

    One writer at a time; readers (`writable=False`) change nothing and may come and go.  In a run of several processes
    each of them makes the same calls, and the first does what is done once.

    Attributes:
      failed_saves: saves that failed since the last one that succeeded.
      last_failure: the sentence about the latest of these; None when there is none.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 3,
        writable: bool = True,
        is_planned: Callable[[dict[str, Any]], bool] = lambda meta: False,
        log: Callable[[str], None],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Opens `directory`; a writer makes it and clears up what a killed process left unfinished.

        Args:
          keep: the newest checkpoints to keep (1 or more); the best on validation and the newest planned besides.
          is_planned: whether a checkpoint, by its `meta`, is one to go back to.
          log: takes one line; called from a background thread too.
          beat: called again and again while files are read or verified, in the background too: it lasts, and gets on.

        Raises:
          ValueError: the directory cannot be written.
        """
        assert keep >= 1, keep
        self.failed_saves = 0
        self.last_failure: str | None = None
        self.newest: int | None = None  # step that is whole on disk, as far as this process has saved or restored it
        # TensorStore takes no path that is relative or has .. in it.
        self._files = StepDirectory(directory.resolve(), beat, is_planned)
        self._keep, self._writable, self._log = keep, writable, log
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        # Failures are told by `log`, in one line.  The logger is Abseil's own kind, which knows who has called it.
        absl.logging.get_absl_logger().addFilter(_not_from_orbax)
        if writable:
            distributed.run_on_first(self._open)
            distributed.run_on_all(self._files.require_seen)

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
        """Saves `state` under its step: waits for the previous save, copies to the host, and writes in the background.

        A step that is there already is replaced, and later ones are set aside: the run went back.  A save that fails is
        logged and counted, never raised, and leaves the checkpoints before it whole.

        Args:
          state: every leaf a jax.Array, none of size zero; may be donated or deleted on return.
          identity, sums: plain JSON; what the state belongs to (settings, text, versions), and the sums of the metrics.
          score: bits per symbol on validation; None or not finite where there is none to compare by.

        Raises:
          CopiesDiffer: the devices do not hold the same; nothing is saved.
        """
        assert self._writable
        assert json.loads(json.dumps(identity)) == identity, f"not plain JSON: {identity}"
        self.wait()
        step, items = int(state.step), _items(state)
        on_every_device = state._replace(recurrent_state=())._asdict()
        compared = replicas.compare(on_every_device, distributed.mesh_of(state.step))
        if compared.differing:
            raise replicas.CopiesDiffer(compared.differing)
        found = compared.digests | digests({"recurrent_state": state.recurrent_state})
        meta = {
            "format": step_directory.FORMAT,
            "step": step,
            "identity": identity,
            "sums": sums,
            "bits_per_symbol": score if score is not None and math.isfinite(score) else None,
            "arrays": {name: {**held, "digest": found[name]} for name, held in describe(items).items()},
        }
        try:
            self.discard_after(step)
            distributed.run_on_first(lambda: self._make_staging(step, items))
        except distributed.FAILURES as error:
            self._failed(step, error)
        else:
            written = array_files.start_writing(self._files.staging(step), items)
            self._pending = self._thread.submit(self._commit, written, meta)

    def wait(self) -> None:
        """Waits until the last save is whole on disk, or has failed and is counted."""
        if self._pending:
            self._pending.result()
            self._pending = None

    def steps(self) -> list[int]:
        """The steps that there are, ascending.  Whether they are whole is known only after `restore`."""
        return self._files.steps()

    def best(self) -> int | None:
        """The step with the lowest validation metric, the earlier of equals; None where no step has one."""
        return next(iter(self._files.by_score()), None)

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """Metadata saved beside the arrays: format, step, identity, bits_per_symbol, sums, arrays.  No array is read.

        Args:
          step: None for the newest that has a whole seal.

        Raises:
          ValueError: there is no such step, or its seal is damaged, or its format is another.
        """
        return self._first_whole(
            step, lambda candidate: self._files.read_by_all(candidate, None, distributed.all_gather_str)
        )[0]

    def restore(self, abstract: TrainState, *, step: Wanted = None) -> tuple[TrainState, dict[str, Any]]:
        """The state that was saved, and its meta (as `read_meta`).

        Without a step's number, damaged checkpoints are logged and skipped; a writer that finds a whole one sets them
        aside.

        Args:
          abstract: a jax.ShapeDtypeStruct for each leaf, with the sharding it shall have, on any number of devices.
          step: None for the newest whole one; "planned" for the newest planned one, or where none is, the newest.

        Raises:
          ValueError: there is no such step, or it is damaged, or it holds other leaves, shapes or types.
        """
        trees, meta = self._restore(_items(abstract), step)
        self.newest = meta["step"]
        number = jax.device_put(np.asarray(meta["step"], abstract.step.dtype), abstract.step.sharding)
        return abstract._replace(step=number, **trees), meta

    def restore_params(
        self, abstract: ModelParams, *, step: Wanted = None, item: str = "params"
    ) -> tuple[ModelParams, dict[str, Any]]:
        """Restores one `item` alone, the params or their average; the files of the rest are not read.

        Args:
          step: "best" for the best whole one on validation, the newest where none was validated.
        """
        trees, meta = self._restore({item: abstract}, step)
        return trees[item], meta

    def discard_after(self, step: int) -> None:
        """Goes back: later steps are set aside, so that none of them is ever taken for the newest."""
        assert self._writable
        self.wait()
        distributed.run_on_first(lambda: self._set_aside([at for at in self.steps() if at > step], "abandoned"))

    def _make_staging(self, step: int, items: dict[str, Any]) -> None:
        """Makes the directories that all processes write in."""
        self._files.sweep()
        for item in array_files.named_items(items):
            (self._files.staging(step) / item).mkdir(parents=True)

    def _commit(self, written: Callable[[], None], meta: dict[str, Any]) -> None:
        """In the background: waits until all processes have written; the first then gives the step its name."""
        try:
            distributed.run_on_all(written, "saves")
            distributed.run_on_first(lambda: self._name(meta), "saves")
        except distributed.FAILURES as error:
            self._failed(meta["step"], error)
            return
        self.failed_saves, self.last_failure, self.newest = 0, None, meta["step"]
        if distributed.is_first_process():
            try:
                self._files.remove_old(self._keep)
            except OSError as error:
                self._log(f"old checkpoints in {self._files.path} could not be removed: {error}")

    def _name(self, meta: dict[str, Any]) -> None:
        staging = self._files.staging(meta["step"])
        array_files.finalize(staging)
        sealing.seal(staging, meta, self._files.beat)
        try:
            sealing.forget_cached(staging)
            array_files.check(staging, meta["arrays"], self._files.beat)
        except distributed.FAILURES as error:
            kept = ""
            if not self.failed_saves:  # keep only the first of several in a row, to look into; all would fill the disk
                kept = f"; kept as {self._files.set_aside_staging(meta['step'], 'corrupt')}"
            raise ValueError(f"read back, it is not what was written: {error}{kept}") from error
        self._files.promote(staging, meta["step"])

    def _failed(self, step: int, error: Exception) -> None:
        if distributed.is_first_process():
            self._files.clear_staging(step)  # the disk may be full
        self.failed_saves += 1
        reason = f"{type(error).__name__}: {error}".splitlines()[0].partition(" [tensorstore_spec")[0]
        if len(reason) > 240:
            reason = f"{reason[:80]} ... {reason[-150:]}"  # the path stands in between; the cause comes last
        self.last_failure = f"checkpoint {step} was not saved (failure {self.failed_saves} in a row): {reason}"
        self._log(self.last_failure)

    def _restore(self, trees: dict[str, Any], wanted: Wanted) -> tuple[dict[str, Any], dict[str, Any]]:
        self.wait()
        (restored, meta), damaged = self._first_whole(wanted, lambda candidate: self._read(candidate, trees))
        if damaged:
            kind, loud = ("best", "NOT THE BEST CHECKPOINT: ") if wanted == "best" else ("newest", "")
            self._log(f"{loud}checkpoint {meta['step']} is the {kind} whole one and is used instead")
            if self._writable:
                distributed.run_on_first(lambda: self._set_aside(damaged, "corrupt"))
        return restored, meta

    def _first_whole(self, wanted: Wanted, read: Callable[[int], Found]) -> tuple[Found, list[int]]:
        """Reads the first candidate that is whole; returns the result, and the damaged ones before it.

        If none is whole, none is set aside: the same command must be refused again, not start a new run.
        """
        damaged, candidates = list[int](), self._candidates(wanted)
        for candidate in candidates:
            try:
                return read(candidate), damaged
            except Damaged as damage:
                sentence = f"checkpoint {candidate} in {self._files.path} is damaged: {damage}"
                if candidate == wanted:
                    raise ValueError(f"{sentence}; name another one, or none for the newest whole one") from None
                self._log(sentence)
                damaged.append(candidate)
        raise self._files.none_whole(candidates)

    def _read(self, step: int, trees: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Checks files, then names, shapes and types; reads the arrays; checks their digests.  All processes agree.

        Each checks its share of the files, and all of them only where the arrays cannot be read then.  Errors of Orbax
        on whole files are not caught: out of memory, say, does not mean that the checkpoint is damaged.
        """
        share = distributed.process_number(), distributed.number_of_processes()
        meta = self._files.read_by_all(step, trees, distributed.all_gather_str, share)
        held = {name: array for name, array in meta["arrays"].items() if name.partition(".")[0] in trees}
        array_files.refuse_other_arrays(f"checkpoint {step} in {self._files.path}", held, describe(trees))
        try:
            send = distributed.run_on_all(lambda: array_files.read(self._files.step(step), trees, self._files.beat))
        except distributed.FAILURES:
            if distributed.is_one_of_several():
                self._files.read_by_all(step, trees, distributed.all_gather_str)
            raise
        restored, wrong = send(), ""
        for name, digest in quick_digests(restored).items():
            if digest != held[name]["digest"]:
                wrong = f"{name} has digest {digest}, {held[name]['digest']} was saved"
        if distributed.any_process(bool(wrong)):
            raise Damaged(wrong or "another process has read other arrays")
        return restored, meta

    def _candidates(self, wanted: Wanted) -> list[int]:
        """The steps to try, in order, as the first process sees them."""
        seen = distributed.run_on_all(lambda: self._files.candidates(wanted))
        return json.loads(distributed.all_gather_str(json.dumps(seen))[0])

    def _set_aside(self, steps: list[int], why: str) -> None:
        for step in steps:
            self._log(f"checkpoint {step} was set aside as {self._files.quarantine(step, why)}")


def _items(state: TrainState) -> dict[str, Any]:
    """Fields that are saved apart, so that they can be restored apart.  The step is in the seal."""
    return {field: value for field, value in state._asdict().items() if field != "step"}


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
