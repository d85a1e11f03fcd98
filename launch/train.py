"""Trains a character-level recurrent language model; the same command again continues it.

python -m launch.train --flagfile=configs/large.flags --corpus=my_texts/ --run_dir=runs/mine
"""

import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from charlstm import config as config_lib
from charlstm import evaluate as evaluate_lib
from charlstm import mesh as mesh_lib
from charlstm import step as step_lib
from charlstm import trainer
from charlstm.checkpoint import Checkpoints
from charlstm.config import Config
from charlstm.metrics import Diverged, Meter, RunLog, duration
from charlstm.types import ModelParams, TrainState
from data_pipeline import corpora
from data_pipeline.loader import open_windows
from data_pipeline.progress import bar
from data_pipeline.settings import setting
from data_pipeline.shards import Corpus, open_corpus
from data_pipeline.streams import StreamPlan
from launch import dry_run, flags, program, run_directory


@dataclasses.dataclass(frozen=True)
class TrainFlags:
    """The run directory."""

    run_dir: str = setting("", "Where the run lives, or is to live: config, log, metrics, checkpoints.  Required.")
    initial_checkpoint: str = setting(
        "", "A run directory (or its checkpoints/STEP) whose parameters a new run starts from; nothing else is taken."
    )
    dry_run: bool = setting(False, "Print sizes, memory, traffic and an ETA from three timed steps; change nothing.")


def main(argv: Sequence[str]) -> int:
    (chosen, config), given = flags.parse(argv, __doc__ or "", TrainFlags(), Config())
    if not chosen.run_dir and not chosen.dry_run:
        raise ValueError("--run_dir is required: name a directory for the run, such as --run_dir=runs/mine")

    # The text, and the devices.
    corpus = open_corpus(corpora.resolve(config.corpus, bar()))
    if "train" not in corpus.splits:
        raise ValueError(f"{corpus.directory} has no training split")
    mesh = mesh_lib.make()
    plan = StreamPlan(
        len(corpus.splits["train"]),
        config.streams.batch_size,
        config.streams.window,
        config.training.seed,
        config.streams.rotate_streams,
    )
    if chosen.dry_run:
        dry_run.report(config_lib.resolve(config, mesh.size), corpus, plan, mesh)
        return program.DONE

    # The run: a new one, or the one that is there.
    run_dir = Path(chosen.run_dir).expanduser()
    identity = run_directory.Identity(corpus.vocabulary, corpus.fingerprint)
    is_new = not run_directory.exists(run_dir)
    changes: list[str] = []
    if is_new:
        config = config_lib.resolve(config, mesh.size)
        step_lib.shards_per_device(config, mesh.size)  # refuses before anything is written
        run_directory.create(run_dir, config, identity, given)
    else:
        config = run_directory.continue_(run_dir, config, identity, changes.append)
        step_lib.shards_per_device(config, mesh.size)
        run_directory.check_writable(run_dir)
    log = RunLog(run_dir, silent=not mesh_lib.is_first_process())
    for change in changes:
        log.say(change)
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=config.training.keep_checkpoints, log=log.say)
    try:
        return _train(chosen, config, corpus, plan, mesh, identity, checkpoints, log)
    finally:
        checkpoints.close()
        log.close()


def _train(
    chosen: TrainFlags,
    config: Config,
    corpus: Corpus,
    plan: StreamPlan,
    mesh: mesh_lib.Mesh,
    identity: run_directory.Identity,
    checkpoints: Checkpoints,
    log: RunLog,
) -> int:
    V, last = corpus.vocabulary.size, config.training.num_steps
    train_step = step_lib.make(config, V, mesh, plan.steps_per_epoch)
    state = _initial_state(chosen, config, V, mesh, identity, checkpoints, log)
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
    began = time.monotonic()
    stopping = _stop_on_signals()
    with open_windows(
        corpus.splits["train"],
        plan,
        rows=mesh_lib.process_rows(mesh, config.streams.batch_size),
        start_step=start,
        separator=run_directory.separator(config, corpus.vocabulary),
        threads=config.streams.reader_threads,
        read_ahead=config.streams.read_ahead,
    ) as windows:
        try:
            state = trainer.train(
                config.training,
                state,
                train_step,
                lambda: mesh_lib.put(mesh, mesh_lib.BY_STREAM, meter.next_of(windows)),
                evaluate=_validation(config, corpus, mesh, meter, log),
                save=_saver(config, identity, checkpoints, meter),
                log=log,
                meter=meter,
                stopping=lambda: mesh_lib.any_process(stopping()),
            )
        except Diverged as diverged:
            log.say(f"stopped: {diverged}")
            return program.DIVERGED
    checkpoints.wait()
    if checkpoints.failed_saves:
        log.say(f"the checkpoint of step {int(state.step)} could not be written: {checkpoints.last_failure}")
        return program.NOT_SAVED
    if int(state.step) < last:
        log.say(f"stopped by a signal at step {int(state.step)}, saved; the same command goes on")
        return program.STOPPED
    log.say(f"finished: {last} steps, {duration(time.monotonic() - began)} in this process")
    return program.DONE


def _initial_state(
    chosen: TrainFlags,
    config: Config,
    V: int,
    mesh: mesh_lib.Mesh,
    identity: run_directory.Identity,
    checkpoints: Checkpoints,
    log: RunLog,
) -> TrainState:
    """The newest whole checkpoint of the run; else its first state, from another run's parameters where asked."""
    if checkpoints.steps():
        state, meta = checkpoints.restore(step_lib.abstract(config, V, mesh))
        run_directory.require_own(meta["identity"], identity, Path(chosen.run_dir))
        log.say(f"continuing from the checkpoint of step {int(state.step)}")
        return state
    state = step_lib.place(mesh, step_lib.init(config, V))
    if not chosen.initial_checkpoint:
        return state
    other = Path(chosen.initial_checkpoint).expanduser()
    step = int(other.name) if other.parent.name == "checkpoints" and other.name.isdecimal() else None
    other_dir = other.parent.parent if step is not None else other
    _, other_identity = run_directory.read(other_dir)
    if other_identity.vocabulary != identity.vocabulary:
        raise ValueError(
            f"initial_checkpoint={other_dir} has a vocabulary of {other_identity.vocabulary.size} symbols that is not the "
            f"{identity.vocabulary.size} of this corpus: parameters would mean other symbols"
        )
    with Checkpoints(other_dir / "checkpoints", writable=False, log=log.say) as source:
        params, meta = source.restore_params(step_lib.abstract(config, V, mesh).params, step=step)
    log.say(f"starting from the parameters of step {meta['step']} of {other_dir}")
    return state._replace(params=params)


def _validation(
    config: Config, corpus: Corpus, mesh: mesh_lib.Mesh, meter: Meter, log: RunLog
) -> Callable[[int, ModelParams], dict[str, Any]] | None:
    """(step, params) -> the line of metrics.jsonl of the validation split; None where there is none."""
    split = corpus.splits.get("valid")
    if split is None:
        return None
    score_split = evaluate_lib.of_split(
        config, corpus.vocabulary.size, split, mesh, run_directory.separator(config, corpus.vocabulary)
    )

    def validate(step: int, params: ModelParams) -> dict[str, Any]:
        log.status(f"step {step}: evaluating the validation split")
        began = time.monotonic()
        score = score_split(params)
        seconds = time.monotonic() - began
        meter.pause(seconds)
        log.say(f"step {step}: validation {_in_words(score)}")
        return meter.evaluation_record(step, "valid", score.bits_per_character, len(split) / seconds)

    return validate


def _in_words(score: evaluate_lib.Score) -> str:
    words = f"{score.bits_per_character:.4f} bits per character"
    return words if score.bytes == score.characters else f"{words}, {score.bits_per_byte:.4f} per byte"


def _saver(
    config: Config, identity: run_directory.Identity, checkpoints: Checkpoints, meter: Meter
) -> Callable[[TrainState, float | None], None]:
    own = run_directory.checkpoint_identity(config, identity)

    def save(state: TrainState, bits_per_character: float | None) -> None:
        began = time.monotonic()
        checkpoints.save(state, own, bits_per_character)
        meter.pause(time.monotonic() - began)

    return save


def _stop_on_signals() -> Callable[[], bool]:
    """Whether Ctrl-C or SIGTERM came since.  The first lets the step finish and be saved; a second Ctrl-C does not."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return lambda: bool(came)


if __name__ == "__main__":
    program.run("launch.train", main)
