"""A run from its newest checkpoint to its end: it reads, updates, looks, saves, and goes back where it diverges."""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from charlstm import distributed
from charlstm.config import Config
from charlstm.inference import evaluate as evaluate_lib
from charlstm.run import loop, memory, replicas, run_directory
from charlstm.run.checkpoint import Checkpoints
from charlstm.run.log import RunLog
from charlstm.run.metrics import Diverged, MetricAggregator, duration
from charlstm.training import step as step_lib
from charlstm.types import Metrics, ModelParams, TrainState
from data_pipeline import terminal
from data_pipeline.batch import Batch, Separator
from data_pipeline.loader import Windows, open_windows
from data_pipeline.shards import Corpus
from data_pipeline.streams import StreamPlan
from launch import cli, prometheus
from launch.prometheus import Monitor
from launch.watchdog import Watchdog


class Run(NamedTuple):
    """What a run is: where it lives, its settings, its text, and the devices it has now."""

    run_dir: Path
    config: Config
    identity: run_directory.Identity
    corpus: Corpus
    plan: StreamPlan
    mesh: distributed.Mesh

    @property
    def separator(self) -> Separator:
        return run_directory.separator(self.config, self.corpus.vocabulary)


class Around(NamedTuple):
    """What stands around a run: keeps it, writes of it, watches it."""

    checkpoints: Checkpoints
    log: RunLog
    watch: Watchdog
    told: Monitor


def train(run: Run, train_step: step_lib.TrainStep, params: ModelParams | None, around: Around) -> int:
    """Trains to --num_steps, or until it is told to stop; the exit status.

    Args:
      train_step: of `step.make`.
      params: what a run without a checkpoint starts from; None: from what is drawn.
    """
    config, plan, last = run.config, run.plan, run.config.training.num_steps
    checkpoints, log, watch, _ = around
    state, _, sums = _newest(run, params, around)
    distributed.run_on_first(lambda: run_directory.write_config(run.run_dir, config))
    start = int(state.step)
    log.rewind(start)
    if start >= last:
        log.say(f"finished: the run is at step {start} of {last}; --num_steps above that goes on")
        return cli.DONE
    text = run.corpus.splits["train"]
    of_ascii = text.characters == text.bytes and not text.unknown
    meter = MetricAggregator(plan.steps_per_epoch, config.training, log.say, run.corpus.vocabulary.kind, of_ascii)
    meter.restart(sums, _left_out(state))
    log.say(
        f"training on {distributed.describe(run.mesh)}: step {start} of {last}, {plan.steps_per_epoch} steps an epoch, "
        f"{config.training.logical_shards} logical shards"
    )
    began, save = time.monotonic(), _Saver(run, around, meter)
    validate = _validation(run, around, meter)
    if config.optimizer.eval_params_field == "average":
        log.say(f"what is evaluated is the average of the parameters (average={config.optimizer.average})")
    watch.about = lambda: {"num_steps": last, "status": meter.status()}
    around.told.values = lambda: _figures(run, around, meter, save)

    with _signals(watch) as asked_to_stop, memory.watched(run.mesh, cli.end_if_out_of_memory) as seen:
        step = _step(train_step, watch, seen)
        times = itertools.count()

        def stopping(step: int) -> bool:
            watch.tick(step)
            return save.given_up or distributed.stop_agreed(next(times), asked_to_stop())

        while True:
            try:
                with _windows(run, int(state.divergence.next_window)) as windows:
                    state = loop.train(
                        config.training,
                        state,
                        step,
                        lambda: distributed.put(run.mesh, distributed.BY_STREAM, meter.next_of(windows)),
                        evaluate=validate,
                        heard=lambda state, score: _heard(run, log, state, score),
                        save=save,
                        check=save.check,
                        log=log,
                        meter=meter,
                        stopping=stopping,
                    )
                break
            except Diverged as diverged:
                log.say(f"{'stopped' if config.training.on_divergence == 'stop' else 'diverged'}: {diverged}")
                with watch.pause("going back"):
                    back = _roll_back(run, params, around, meter, save, diverged)
                if back is None:
                    return cli.DIVERGED
                state = back
        checkpoints.wait()
        terminal.settle(status := _ending(run, around, int(state.step), began, save.given_up))
    return status


def _ending(run: Run, around: Around, step: int, began: float, given_up: bool) -> int:
    """Says how it ended; the exit status."""
    last, say = run.config.training.num_steps, around.log.say
    if around.checkpoints.failed_saves:
        left = f"the checkpoint of step {max(steps)}" if (steps := around.checkpoints.steps()) else "the beginning"
        say(f"ended at step {step}, which could not be saved; the same command goes on from {left}")
        return cli.NOT_SAVED
    if step < last:
        why = "as saves had failed (max_failed_saves)" if given_up else "by a signal"
        say(f"stopped {why} at step {step}, saved; the same command goes on")
        return cli.STOPPED
    say(f"finished: {last} steps, {duration(time.monotonic() - began)} in this process")
    return cli.DONE


def _step(train_step: step_lib.TrainStep, watch: Watchdog, seen: Callable[[jax.Array], None]) -> step_lib.TrainStep:
    """`train_step`, which is compiled for each length of a window that it meets: that is no step to `watch`."""
    met = set[int]()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        length = batch.inputs.shape[1]
        with contextlib.nullcontext() if length in met else watch.pause("compiling"):
            met.add(length)
            state, metrics = train_step(state, batch)
        seen(metrics.loss)
        return state, metrics

    return step


def _windows(run: Run, start: int) -> Windows:
    streams = run.config.streams
    return open_windows(
        run.corpus.splits["train"],
        run.plan,
        rows=distributed.process_rows(run.mesh, streams.batch_size),
        start_step=start,
        separator=run.separator,
        threads=streams.reader_threads,
        read_ahead=streams.read_ahead,
    )


def _newest(
    run: Run, params: ModelParams | None, around: Around
) -> tuple[TrainState, float | None, dict[str, Any] | None]:
    """The newest whole checkpoint: state, validation score, sums of the meter; else the state before the first step."""
    V = run.corpus.vocabulary.size
    if distributed.any_process(bool(around.checkpoints.steps())):
        state, meta = around.checkpoints.restore(step_lib.abstract(run.config, V, run.mesh))
        run_directory.check_checkpoint(meta["identity"], run.config, run.identity, run.run_dir)
        around.log.say(f"continuing from the checkpoint of step {int(state.step)}")
        return state, meta["bits_per_symbol"], meta["sums"]
    state = step_lib.place(run.mesh, step_lib.init(run.config, V))
    return (state if params is None else step_lib.with_params(run.config, state, params)), None, None


def _left_out(state: TrainState) -> int:
    """Windows of each stream that the run has passed over."""
    return int(state.divergence.next_window) - int(state.step)


def _roll_back(
    run: Run, params: ModelParams | None, around: Around, meter: MetricAggregator, save: "_Saver", diverged: Diverged
) -> TrainState | None:
    """The state that a run which diverged goes on from, saved; None where it is not to go back, or not any more."""
    training = run.config.training
    if training.on_divergence != "rollback":
        return None
    around.checkpoints.wait()
    state, score, sums = _newest(run, params, around)
    rollbacks = int(state.divergence.rollbacks) + 1
    if rollbacks > training.max_rollbacks:
        around.log.say(f"stopped: the run has gone back {training.max_rollbacks} times (max_rollbacks)")
        return None
    step, first = int(state.step), int(state.divergence.next_window)
    left_out = diverged.step - step if diverged.windows_at_fault else 0
    state = step_lib.roll_back(run.mesh, state, left_out)
    words = f"; windows {first} to {first + left_out - 1} of each stream are left out" if left_out else ""
    around.log.say(f"went back to step {step}, rollback {rollbacks} of {training.max_rollbacks}{words}")
    around.log.rewind(step)
    meter.restart(sums, _left_out(state))
    save.rollbacks += 1
    save(state, score)
    return state


def _validation(
    run: Run, around: Around, meter: MetricAggregator
) -> Callable[[int, ModelParams], dict[str, Any]] | None:
    """(step, params) -> the line of metrics.jsonl of the validation split; None where there is none."""
    split = run.corpus.splits.get("valid")
    if split is None:
        return None
    # In the logical shards, as gradients are: the same bits on any number of devices that divides them.
    shards = step_lib.shards_per_device(run.config, run.mesh.size)
    score_split = evaluate_lib.make_evaluator(
        run.config, run.corpus.vocabulary.size, split, run.mesh, run.separator, shards
    )

    def validate(step: int, params: ModelParams) -> dict[str, Any]:
        around.log.status(f"step {step}: evaluating the validation split")
        began = time.monotonic()
        with around.watch.pause("evaluating"):
            score = score_split(params)
        seconds = time.monotonic() - began
        meter.pause(seconds)
        around.log.say(f"step {step}: validation {score.in_words(run.corpus.vocabulary.kind)}")
        return meter.evaluation_record(step, "valid", score, len(split) / seconds)

    return validate


def _heard(run: Run, log: RunLog, state: TrainState, score: float) -> TrainState:
    """The state when validation has said `score`, where the run goes by it; says what comes of it."""
    optimizer, before = run.config.optimizer, state.plateau
    if not optimizer.validation_driven_by:
        return state
    state = step_lib.update_plateau(run.config, run.mesh, state, score)
    now = state.plateau
    where = f"step {int(state.step)}: evaluation {int(now.evaluations)}, {int(now.patience_count)} without gain:"
    if now.dropped and not before.dropped:
        log.say(f"{where} from here on the learning rate is times {optimizer.decay_rate:g}")
    if now.averaged and not before.averaged:
        log.say(f"{where} from here on the parameters are averaged")
    return state


class _Saver:
    """Makes a checkpoint of (state, validation bits per symbol), after a look at the devices' copies of it.

    Attributes:
      given_up: --max_failed_saves have failed, on one process or on all; every process knows it at the same step.
      rollbacks: how often this process went back.
    """

    def __init__(self, run: Run, around: Around, meter: MetricAggregator) -> None:
        self._checkpoints, self._watch, self._meter, self.given_up, self.rollbacks = (
            around.checkpoints, around.watch, meter, False, 0
        )  # fmt: skip
        self._own = run_directory.checkpoint_identity(run.config, run.identity)
        self._settings, self._mesh = run.config.training, run.mesh

    def __call__(self, state: TrainState, bits_per_symbol: float | None) -> None:
        began, most = time.monotonic(), self._settings.max_failed_saves
        with self._watch.pause("saving"):
            try:
                self._checkpoints.save(state, self._own, bits_per_symbol, self._meter.sums())
            except replicas.CopiesDiffer as found:
                raise _drifted(int(state.step), str(found)) from None
            failed = self._checkpoints.failed_saves  # of this save only what failed at once; it goes on behind
            self.given_up = bool(most) and distributed.any_process(failed >= most)
        self._meter.pause(time.monotonic() - began)

    def check(self, step: int, state: TrainState) -> None:
        """Raises Diverged where a device's copy of what is whole on every device is another than the rest's."""
        differing = replicas.compare(state._replace(recurrent_state=())._asdict(), self._mesh).differing
        if differing:
            raise _drifted(step, differing)


def _drifted(step: int, differing: str) -> Diverged:
    return Diverged(step, f"{differing} after step {step}", windows_at_fault=False)


def _figures(run: Run, around: Around, meter: MetricAggregator, save: "_Saver") -> dict[str, float | None]:
    """What a monitor is told."""
    return {
        "step": around.watch.step,
        **prometheus.of_records(meter.records),
        "checkpoint_age_seconds": prometheus.checkpoint_age(run.run_dir / "checkpoints"),
        "checkpoint_failures_in_a_row": around.checkpoints.failed_saves,
        "devices": run.mesh.size,
        "processes": distributed.number_of_processes(),
        "rollbacks_total": save.rollbacks,
        "skipped_updates_total": meter.skipped,
        "recurrent_state_rows_reset_total": meter.state_resets,
    }


@contextlib.contextmanager
def _signals(watch: Watchdog) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came since.  The first lets the step finish and be saved; a second Ctrl-C does not.

    Of several processes, JAX catches SIGTERM and tells the others of it; Ctrl-C is then as good as SIGTERM.
    """
    came: list[int] = []
    several = distributed.is_one_of_several()

    def note(number: int) -> None:
        if came and number == signal.SIGINT:
            terminal.leave(number)
        came.append(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(came) == 1:
            terminal.say(f"told to stop: saves and ends after {watch.doing}; a second Ctrl-C ends it at once, unsaved")

    with terminal.reacting(note):
        yield lambda: bool(came)
