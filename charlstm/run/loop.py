"""The training loop: a run from its newest checkpoint to its end.

Each step reads a batch and updates the parameters; at intervals it logs, evaluates and saves.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.run import announce, corpus, digest, memory, replicas, run_directory, run_lock, samples
from charlstm.run.checkpoint import Checkpoints, Wanted
from charlstm.run.log import RunLog
from charlstm.run.metrics import Diverged, MetricAggregator, finite_score, time_left
from charlstm.run.services import Outcome, Services
from charlstm.run.start import Run, due
from charlstm.run.validation import Interrupted, Validation
from charlstm.training import averaging, train_state
from charlstm.types import Metrics, TrainState
from data_pipeline.batch import Batch


def train(run: Run, services: Services, given: Sequence[str] = (), terminal: TextIO | None = None) -> Outcome:
    """Trains `run` to --num_steps, or until it is asked to stop.

    Args:
      given: the flags that began the run, kept as its flagfile.
      terminal: takes the log's lines; stderr by default.

    Raises:
      ValueError: another job has the run directory, or it cannot be written.
      Diverged: training diverged, and rollback is off or max_rollbacks is used up.
    """
    with contextlib.ExitStack() as opened:
        distributed.run_on_first(lambda: opened.enter_context(run_lock.lock_run_directory(run.run_dir)))
        opened.enter_context(services.opened(run.run_dir))
        if not run.resumed:
            distributed.run_on_first(
                lambda: run_directory.create(run.run_dir, run.config, run.identity, given, run.initial)
            )
        log = RunLog(run.run_dir, terminal or sys.stderr, not distributed.is_first_process(), services.copy_of(run))
        opened.callback(log.close)
        opened.enter_context(log.collecting("data_pipeline", run.corpus.places))
        for remark in run.remarks:
            log.info(remark)
        place, keep = run.run_dir / "checkpoints", run.config.training.keep_checkpoints
        checkpoints = Checkpoints(place, keep=keep, is_planned=run.is_planned, log=log.info, beat=services.beat)
        return Training(run, opened.enter_context(checkpoints), log, services).train()


class Training:
    """One run as it trains.

    Attributes:
      metrics: what the steps reported.
      rollbacks: how often this process rolled back.
      gave_up: true once any process had max_failed_saves failed saves in a row; agreed by all processes.
    """

    def __init__(self, run: Run, checkpoints: Checkpoints, log: RunLog, services: Services) -> None:
        self.run, self.checkpoints, self.log, self.services = run, checkpoints, log, services
        text, kind = run.corpus.splits["train"], run.corpus.vocabulary.kind
        ascii_only = text.characters == text.bytes and not text.unknown
        self.metrics = MetricAggregator(run.plan.steps_per_epoch, run.config.training, log.info, kind, ascii_only)
        self.rollbacks, self.gave_up = 0, False
        self._stop_polls, self._told = itertools.count(), False
        self._lengths = set[int]()  # of windows, for which the update is compiled
        self._valid = Validation(run) if "valid" in run.corpus.splits else None

    def train(self) -> Outcome:
        """Trains from the newest checkpoint, or from the beginning.  Raises Diverged."""
        config, began = self.run.config, time.monotonic()
        state, _, sums = self.restore()
        # Nothing was written until here.
        distributed.run_on_first(lambda: run_directory.write_config(self.run.run_dir, config))
        self.set_back(state, sums)
        start = int(state.step)
        nothing_left = announce.already_finished(self.run, self.metrics, start)
        if nothing_left and not self.metrics.evaluation_due:
            self.log.info(nothing_left)
            return Outcome.FINISHED
        for line in announce.beginning(self.run, start):
            self.log.info(line)
        with self.services.watching(self), memory.watched(self.run.mesh, self.services.end) as self._watch_memory:
            while True:
                try:
                    state = self.train_from(state)
                    break
                except Diverged as diverged:
                    stops = config.training.on_divergence == "stop"
                    self.log.info(f"{'stopped' if stops else 'diverged'}: {diverged}")
                    with self.services.pause("rolling back"):
                        state = self.roll_back(diverged)
            self.checkpoints.wait()
            outcome = self.outcome(int(state.step), time.monotonic() - began)
            self.services.ended(outcome)
        return outcome

    def train_from(self, state: TrainState) -> TrainState:
        """Trains from `state` to num_steps, or until all processes agree to stop; the state it ended with, saved."""
        settings = self.run.config.training
        step, last = int(state.step), settings.num_steps
        saved = step or None  # what is on disk already is not saved again: it would lose its score
        if not step and settings.on_divergence == "rollback":  # to go back to, also where a stop makes the first one
            self.save(state, None)
            saved = step
        if self.metrics.evaluation_due:
            state, score = self.evaluate_and_sample(step, state)
            if score is not None:
                self.save(state, score)
        with self.run.open_windows(int(state.divergence.next_window)) as windows:
            while step < last and not self.metrics.exhausted and not self.stopping(step):
                state, metrics = self.update(state, self.next_batch(windows))
                step += 1
                self.metrics.add(step, metrics)
                self.log.status(self.status())
                if due(step, settings.check_replicas_every):
                    self.check_replicas(state)
                if due(step, settings.log_every, last):
                    self.metrics.settle()
                    self.log.progress(self.status())
                    self.record(self.metrics.train_record(), state, final=step == last and self._valid is None)
                state, score = self.evaluate_and_sample(step, state)
                if score is not None or due(step, settings.checkpoint_every, last):
                    self.save(state, score)
                    saved = step
        if step != saved:
            self.save(state, None)
        return state

    def evaluate_and_sample(self, step: int, state: TrainState) -> tuple[TrainState, float | None]:
        """Evaluates and samples if due.  Returns the state (validation may change it), and the score or None."""
        settings, last, score = self.run.config.training, self.run.config.training.num_steps, None
        if self.evaluates(step):
            self.metrics.settle()
            try:
                *of_texts, record = self.evaluate(step, state)
            except Interrupted:
                self.metrics.evaluation_due = True
                return state, None
            self.metrics.evaluation_due = False
            score = finite_score(step, record)
            for one in of_texts:
                self.log.record(one)
            if due(step, settings.evaluate_every):  # a longer run does not evaluate at this last step
                state = self.update_plateau(state, score)
                self.metrics.add_score(score)
            self.record(record, state, final=step == last or self.metrics.exhausted)
        if settings.sampled_every is not None and due(step, settings.sampled_every, last):
            self.sample(step, state)
        return state, score

    def evaluates(self, step: int) -> bool:
        """True if the validation split is scored after `step`."""
        settings = self.run.config.training
        return self._valid is not None and due(step, settings.evaluate_every, settings.num_steps)

    def record(self, record: dict[str, Any], state: TrainState, final: bool) -> None:
        """Keeps a line of metrics.jsonl; the run's `final` one has a digest of the state."""
        self.log.record(record | ({"state_digest": digest.state_digest(state)} if final else {}))

    def restore(self, wanted: Wanted = None) -> tuple[TrainState, float | None, dict[str, Any] | None]:
        """Returns (state, validation score, metric sums): of the `wanted` whole checkpoint, or of a new run."""
        run, V = self.run, self.run.corpus.vocabulary.size
        if distributed.any_process(bool(self.checkpoints.steps())):
            state, meta = self.checkpoints.restore(train_state.abstract(run.config, V, run.mesh), step=wanted)
            made_with = run_directory.check_checkpoint(meta["identity"], run.config, run.identity, run.run_dir)
            corpus.check_what_was_read(made_with, run.config, int(state.divergence.next_window))
            self.log.info(f"continuing from the checkpoint of step {int(state.step)}")
            score, sums = meta["bits_per_symbol"], meta["sums"]
            if self._valid and (changed := config_lib.score_changes(made_with, run.config)):
                self.log.info(
                    f"new scores do not compare with those so far ({changed}): best and stop_after begin anew"
                )
                score, sums = None, sums and sums | {"best": None, "without_gain": 0}
            return state, score, sums
        state = train_state.place(run.mesh, train_state.init(run.config, V))
        return (state if run.params is None else train_state.with_params(run.config, state, run.params)), None, None

    def set_back(self, state: TrainState, sums: dict[str, Any] | None) -> None:
        """Sets the metrics, and the lines that were written of them, to the step of `state`."""
        step = int(state.step)
        self._left_out, self._went_back = train_state.skipped_windows(state), int(state.divergence.rollbacks)
        self.metrics.restart(sums, self._left_out)
        self.metrics.evaluation_due &= self.evaluates(step)  # not of a last step that is none any more
        self.log.rewind(step, evaluated=not self.metrics.evaluation_due)

    def stopping(self, step: int) -> bool:
        """True if the run is to stop before the next update, which all processes answer alike."""
        self.services.tick(step)
        return self.gave_up or self.told_to_stop()

    def told_to_stop(self) -> bool:
        """True once all processes know that one was told to."""
        self._told = self._told or distributed.stop_agreed(next(self._stop_polls), self.services.stop_requested())
        return self._told

    def next_batch(self, windows: Iterator[Batch]) -> Batch:
        """The next window of every stream, on the devices."""
        return distributed.put(self.run.mesh, distributed.BY_STREAM, self.metrics.next_of(windows))

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update.  It is compiled once for each window length, with the watchdog paused."""
        length = batch.inputs.shape[1]
        with contextlib.nullcontext() if length in self._lengths else self.services.pause("compiling"):
            self._lengths.add(length)
            state, metrics = self.run.train_step(state, batch)
        self._watch_memory(metrics.loss)
        return state, metrics

    def evaluate(self, step: int, state: TrainState) -> list[dict[str, Any]]:
        """Scores the validation split.  Returns its record for metrics.jsonl; for a mixture, first one per corpus.

        Raises Interrupted if the run must stop.
        """
        assert self._valid is not None
        began, left = time.monotonic(), time_left()

        def doing(done: int, windows: int) -> None:
            self.log.status(f"step {step}: evaluating the validation split, {done / windows:.0%}{left(done, windows)}")
            if done < windows and self.told_to_stop():
                self.log.info(f"step {step}: validation is interrupted, and made up for when the run goes on")
                raise Interrupted

        with self.services.pause("evaluating"):
            scores = self._valid.score(state, doing)
        seconds = time.monotonic() - began
        self.metrics.pause(seconds)
        speed, records = sum(scores[name].symbols for name in self._valid.names) / seconds, []
        for name, score in scores.items():
            self.log.info(f"step {step}: {self._valid.in_words(name, score)}")
            records.append(self.metrics.evaluation_record(step, f"valid/{name}" if name else "valid", score, speed))
        return records

    def sample(self, step: int, state: TrainState) -> None:
        """Writes a sample of the model to samples.jsonl and the log; training is not affected."""
        self.metrics.settle()
        began, run = time.monotonic(), self.run
        self.log.status(f"step {step}: writing a sample of {run.config.training.sample_length} symbols")

        def keep() -> None:
            drawn = samples.draw(run.config, run.corpus.vocabulary, run.separator, averaging.to_evaluate(state))
            self.log.sample({"step": step, "time": round(time.time(), 3), **drawn}, samples.in_short(drawn))

        with self.services.pause("sampling"):
            distributed.run_on_first(keep)
        self.metrics.pause(time.monotonic() - began)

    def update_plateau(self, state: TrainState, score: float) -> TrainState:
        """Updates the plateau state with a validation score, if the run depends on scores; logs what changes."""
        optimizer, before = self.run.config.optimizer, state.plateau
        if not optimizer.validation_driven_by:
            return state
        state = train_state.update_plateau(self.run.config, self.run.mesh, state, score)
        for line in announce.turn(optimizer, int(state.step), before, state.plateau):
            self.log.info(line)
        return state

    def save(self, state: TrainState, score: float | None) -> None:
        """Makes a checkpoint, after a comparison of the devices.  Raises Diverged where they differ."""
        self.metrics.settle()
        began, most = time.monotonic(), self.run.config.training.max_failed_saves
        identity = run_directory.checkpoint_identity(self.run.config, self.run.identity)
        with self.services.pause("saving"):
            self.log.sync()
            try:
                self.checkpoints.save(state, identity, score, self.metrics.sums())
            except replicas.CopiesDiffer as found:
                raise _drifted(int(state.step), str(found)) from None
            failed = self.checkpoints.failed_saves  # this save, still being written, counts only if it failed at once
            self.gave_up = bool(most) and distributed.any_process(failed >= most)
        self.metrics.pause(time.monotonic() - began)

    def check_replicas(self, state: TrainState) -> None:
        """Raises Diverged if a device's copy of the replicated state differs from the others'."""
        differing = replicas.compare(state._replace(recurrent_state=())._asdict(), self.run.mesh).differing
        if differing:
            raise _drifted(int(state.step), differing)

    def roll_back(self, diverged: Diverged) -> TrainState:
        """Restores and saves the state that a diverged run continues from.  Raises `diverged` if it must stop."""
        training = self.run.config.training
        if training.on_divergence != "rollback":
            raise diverged
        self.checkpoints.wait()
        state, score, sums = self.restore("planned")
        # Counted from how this try began: the checkpoint knows of no rollback whose own save has failed.
        rollbacks = self._went_back + 1
        if rollbacks > training.max_rollbacks:
            self.log.info(f"stopped: the run has gone back {training.max_rollbacks} times (max_rollbacks)")
            raise diverged
        step, first = int(state.step), int(state.divergence.next_window)
        skipped = (diverged.step if diverged.windows_at_fault else step) + self._left_out - first
        state = train_state.roll_back(self.run.mesh, state, skipped, rollbacks)
        words = f"; windows {first} to {first + skipped - 1} of each stream are left out" if skipped else ""
        self.log.info(f"went back to step {step}, rollback {rollbacks} of {training.max_rollbacks}{words}")
        self.set_back(state, sums)
        self.rollbacks += 1
        self.save(state, score)
        return state

    def status(self) -> str:
        """The status line.  Failed saves come first, so that a narrow terminal does not cut them off."""
        line, failed = self.metrics.status(), self.checkpoints.failed_saves
        return f"NOT SAVED, {failed} times  {line}" if line and failed else line

    def outcome(self, step: int, seconds: float) -> Outcome:
        """Says how the run ended."""
        outcome, sentence = announce.ending(self.run, self.metrics, self.checkpoints, step, seconds, self.gave_up)
        self.log.info(sentence)
        return outcome


def _drifted(step: int, differing: str) -> Diverged:
    return Diverged(step, f"{differing} after step {step}", windows_at_fault=False)
