"""Trains a character-level recurrent language model; the same command again continues it.

python -m launch.train --flagfile=configs/large.flags --corpus=my_texts/ --run_dir=runs/mine
"""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from charlstm import config as config_lib
from charlstm import evaluate as evaluate_lib
from charlstm import mesh as mesh_lib
from charlstm import step as step_lib
from charlstm import trainer
from charlstm.checkpoint import Checkpoints
from charlstm.config import Config
from charlstm.file_manifest import StepDirectory
from charlstm.metrics import Diverged, Meter, duration
from charlstm.run_log import RunLog
from charlstm.types import ModelParams, TrainState
from data_pipeline.loader import open_windows
from data_pipeline.settings import setting
from data_pipeline.shards import Corpus
from data_pipeline.streams import StreamPlan
from launch import chosen_corpus, compilation, dry_run, flags, job, program, run_directory
from launch.job import JobFlags
from launch.watchdog import Watchdog, WatchdogFlags


@dataclasses.dataclass(frozen=True)
class TrainFlags:
    """The run directory."""

    run_dir: str = setting("", "Where the run lives, or is to live: config, log, metrics, checkpoints.  Required.")
    initial_checkpoint: str = setting(
        "", "A run directory (or its checkpoints/STEP) whose parameters a new run starts from; nothing else is taken."
    )
    dry_run: bool = setting(False, "Print sizes, memory, traffic and an ETA from three timed steps; change nothing.")


class Run(NamedTuple):
    """What a run is: where it lives, its settings, its text, and the devices it has now."""

    run_dir: Path
    config: Config
    identity: run_directory.Identity
    corpus: Corpus
    plan: StreamPlan
    mesh: mesh_lib.Mesh

    @property
    def separator(self) -> int | None:
        return run_directory.separator(self.config, self.corpus.vocabulary)


def parse(argv: Sequence[str]) -> tuple[TrainFlags, JobFlags, WatchdogFlags, Config, list[str]]:
    """The settings in `argv`, and the flags given, without those that say how the process came to be one of a job."""
    groups = TrainFlags(), Config(), JobFlags(), WatchdogFlags()
    (chosen, config, joined, watching), given = flags.parse(argv, __doc__ or "", *groups)
    of_the_job = {field.name for field in dataclasses.fields(joined)}
    return chosen, joined, watching, config, [flag for flag in given if flag[2:].partition("=")[0] not in of_the_job]


def main(argv: Sequence[str]) -> int:
    chosen, joined, watching, config, given = parse(argv)
    if not chosen.run_dir and not chosen.dry_run:
        raise ValueError("--run_dir is required: name a directory for the run, such as --run_dir=runs/mine")
    compilation.keep()
    job.join(joined)
    try:
        return _run(chosen, watching, config, given)
    except (ValueError, RuntimeError) as error:
        if not (joined.has_others and mesh_lib.tells_of_a_lost_process(error)):
            raise
        job.leave(error)


def _run(chosen: TrainFlags, watching: WatchdogFlags, config: Config, given: list[str]) -> int:
    # The devices, and the text.  All that can be refused is refused before anything is written.
    mesh = mesh_lib.make()
    step_lib.shards_per_device(config_lib.resolve(config, mesh.size), mesh.size)  # a text may take hours to prepare
    run_dir = Path(chosen.run_dir).expanduser()
    if chosen.run_dir:
        chosen_corpus.refuse_inside(run_dir, config.corpus)
    corpus, config = chosen_corpus.open_for(config, given)
    plan = StreamPlan(
        len(corpus.splits["train"]),
        config.streams.batch_size,
        config.streams.window,
        config.training.seed,
        config.streams.rotate_streams,
        config.streams.reset_probability,
    )
    run_directory.separator(config, corpus.vocabulary)
    dry_run.require_memory(config, corpus.vocabulary.size)
    if chosen.dry_run:
        dry_run.report(config_lib.resolve(config, mesh.size), corpus, plan, mesh)
        return program.DONE

    # The run: a new one, or the one that is there.
    identity = run_directory.Identity(corpus.vocabulary, corpus.fingerprint)
    remarks: list[str] = []
    is_there = run_directory.exists(run_dir)
    if is_there:
        config, remarks = run_directory.continued(run_dir, config, identity)
        step_lib.shards_per_device(config, mesh.size, fixed=True)
    else:
        config = config_lib.resolve(config, mesh.size)
    run = Run(run_dir, config, identity, corpus, plan, mesh)
    params = _initial_params(run, chosen.initial_checkpoint, remarks.append)
    with contextlib.ExitStack() as held:
        mesh_lib.once(lambda: held.enter_context(run_directory.held(run_dir)))
        if not is_there:
            mesh_lib.once(lambda: run_directory.create(run_dir, config, identity, given))
        watch = Watchdog(watching, mesh_lib.process_number(), run_dir / "heartbeats")
        held.callback(watch.stop)
        log = RunLog(run_dir, sys.stderr, silent=not mesh_lib.is_first_process())
        held.callback(log.close)
        for remark in remarks:
            log.say(remark)
        checkpoints = Checkpoints(run_dir / "checkpoints", keep=config.training.keep_checkpoints, log=log.say)
        held.callback(checkpoints.close)
        log.trouble = lambda: f"  NOT SAVED, {failed} times" if (failed := checkpoints.failed_saves) else ""
        return _train(run, params, checkpoints, log, watch)


def _train(run: Run, params: ModelParams | None, checkpoints: Checkpoints, log: RunLog, watch: Watchdog) -> int:
    config, plan, mesh, last = run.config, run.plan, run.mesh, run.config.training.num_steps
    train_step = step_lib.make(config, run.corpus.vocabulary.size, mesh, plan.steps_per_epoch)
    state = _first_state(run, params, checkpoints, log)
    mesh_lib.once(lambda: run_directory.write_config(run.run_dir, config))  # what is refused until here changes nothing
    start = int(state.step)
    log.rewind(start)
    if start >= last:
        log.say(f"finished: the run is at step {start} of {last}; --num_steps above that goes on")
        return program.DONE
    meter = Meter(config.streams.batch_size, config.streams.window, plan.steps_per_epoch, last)
    log.say(
        f"training on {mesh_lib.describe(mesh)}: step {start} of {last}, {plan.steps_per_epoch} steps an epoch, "
        f"{config.training.logical_shards} logical shards"
    )
    watch.about = lambda: {"num_steps": last, "status": meter.status()}
    began = time.monotonic()
    save = _Saver(run, checkpoints, meter, watch)

    def stopping(step: int) -> bool:
        watch.beat(step)
        return save.given_up or mesh_lib.stop_agreed(step, asked_to_stop())

    with (
        _signals() as asked_to_stop,
        open_windows(
            run.corpus.splits["train"],
            plan,
            rows=mesh_lib.process_rows(mesh, config.streams.batch_size),
            start_step=start,
            separator=run.separator,
            threads=config.streams.reader_threads,
            read_ahead=config.streams.read_ahead,
        ) as windows,
    ):
        try:
            state = trainer.train(
                config.training,
                state,
                train_step,
                lambda: mesh_lib.put(mesh, mesh_lib.BY_STREAM, meter.next_of(windows)),
                evaluate=_validation(run, meter, log, watch),
                save=save,
                log=log,
                meter=meter,
                stopping=stopping,
            )
        except Diverged as diverged:
            log.say(f"stopped: {diverged}")
            return program.DIVERGED
        checkpoints.wait()
    if checkpoints.failed_saves:
        left = f"the checkpoint of step {max(steps)}" if (steps := checkpoints.steps()) else "the beginning"
        log.say(f"ended at step {int(state.step)}, which could not be saved; the same command goes on from {left}")
        return program.NOT_SAVED
    if int(state.step) < last:
        log.say(f"stopped by a signal at step {int(state.step)}, saved; the same command goes on")
        return program.STOPPED
    log.say(f"finished: {last} steps, {duration(time.monotonic() - began)} in this process")
    return program.DONE


def _first_state(run: Run, params: ModelParams | None, checkpoints: Checkpoints, log: RunLog) -> TrainState:
    """The newest whole checkpoint of the run; else the state before the first update, with `params` where given."""
    V = run.corpus.vocabulary.size
    if checkpoints.steps():
        state, meta = checkpoints.restore(step_lib.abstract(run.config, V, run.mesh))
        run_directory.require_own(meta["identity"], run.config, run.identity, run.run_dir)
        log.say(f"continuing from the checkpoint of step {int(state.step)}")
        return state
    state = step_lib.place(run.mesh, step_lib.init(run.config, V))
    return state if params is None else state._replace(params=params)


def _initial_params(run: Run, initial_checkpoint: str, say: Callable[[str], None]) -> ModelParams | None:
    """The parameters of --initial_checkpoint, for a run that has no checkpoint of its own yet."""
    if not initial_checkpoint or StepDirectory(run.run_dir / "checkpoints").steps():
        return None
    other = Path(initial_checkpoint).expanduser()
    step = int(other.name) if other.parent.name == "checkpoints" and other.name.isdecimal() else None
    other_dir = other.parent.parent if step is not None else other
    _, other_identity = run_directory.read(other_dir)
    if other_identity.vocabulary != run.identity.vocabulary:
        raise ValueError(
            f"initial_checkpoint={other_dir} has {other_identity.vocabulary_in_short} and this corpus "
            f"{run.identity.vocabulary_in_short}: its parameters would mean other symbols"
        )
    with Checkpoints(other_dir / "checkpoints", writable=False, log=say) as source:
        abstract = step_lib.abstract(run.config, run.identity.vocabulary.size, run.mesh).params
        params, meta = source.restore_params(abstract, step=step)
    say(f"starting from the parameters of step {meta['step']} of {other_dir}")
    return params


def _validation(
    run: Run, meter: Meter, log: RunLog, watch: Watchdog
) -> Callable[[int, ModelParams], dict[str, Any]] | None:
    """(step, params) -> the line of metrics.jsonl of the validation split; None where there is none."""
    split = run.corpus.splits.get("valid")
    if split is None:
        return None
    score_split = evaluate_lib.of_split(run.config, run.corpus.vocabulary.size, split, run.mesh, run.separator)

    def validate(step: int, params: ModelParams) -> dict[str, Any]:
        log.status(f"step {step}: evaluating the validation split")
        began = time.monotonic()
        with watch.pause():
            score = score_split(params)
        seconds = time.monotonic() - began
        meter.pause(seconds)
        log.say(f"step {step}: validation {_in_words(score)}")
        return meter.evaluation_record(step, "valid", score.bits_per_character, len(split) / seconds)

    return validate


def _in_words(score: evaluate_lib.Score) -> str:
    words = f"{score.bits_per_character:.4f} bits per character"
    return words if score.bytes == score.characters else f"{words}, {score.bits_per_byte:.4f} per byte"


class _Saver:
    """Makes a checkpoint of (state, validation bits per character).

    Attributes:
      given_up: --max_failed_saves have failed, on one process or on all; every process knows it at the same step.
    """

    def __init__(self, run: Run, checkpoints: Checkpoints, meter: Meter, watch: Watchdog) -> None:
        self._checkpoints, self._meter, self._watch, self.given_up = checkpoints, meter, watch, False
        self._own = run_directory.checkpoint_identity(run.config, run.identity)
        self._most = run.config.training.max_failed_saves

    def __call__(self, state: TrainState, bits_per_character: float | None) -> None:
        began = time.monotonic()
        with self._watch.pause():
            self._checkpoints.save(state, self._own, bits_per_character)
            failed = self._checkpoints.failed_saves  # of this save only what failed at once; it goes on behind
            self.given_up = bool(self._most) and mesh_lib.any_process(failed >= self._most)
        self._meter.pause(time.monotonic() - began)


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came since.  The first lets the step finish and be saved; a second Ctrl-C does not.

    Of several processes, JAX catches SIGTERM and tells the others of it; Ctrl-C is then as good as SIGTERM.
    """
    came: list[int] = []
    several = mesh_lib.is_one_of_several()

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    program.run("launch.train", main)
