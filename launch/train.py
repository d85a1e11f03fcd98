"""Trains a character-level recurrent language model; the same command again continues it.

python -m launch.train --flagfile=configs/large.flags --corpus=my_texts/ --run_dir=runs/mine
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from charlstm import config as config_lib
from charlstm import mesh as mesh_lib
from charlstm import step as step_lib
from charlstm.checkpoint import Checkpoints
from charlstm.config import Config
from charlstm.file_manifest import StepDirectory
from charlstm.run_log import RunLog
from charlstm.types import ModelParams
from data_pipeline.files import at_home
from data_pipeline.settings import check_choices, setting
from data_pipeline.streams import StreamPlan
from launch import (
    allocator,
    chosen_corpus,
    compilation,
    cores,
    dry_run,
    flags,
    job,
    memory,
    monitor,
    program,
    recurrence,
    run_directory,
)
from launch import run as run_lib
from launch.job import JobFlags
from launch.monitor import MonitorFlags
from launch.run import Around, Run
from launch.watchdog import Watchdog, WatchdogFlags


@dataclasses.dataclass(frozen=True)
class TrainFlags:
    """The run directory."""

    run_dir: str = setting("", "Where the run lives, or is to live: config, log, metrics, checkpoints.  Required.")
    initial_checkpoint: str = setting(
        "", "A run directory (or its checkpoints/STEP) whose parameters a new run starts from; nothing else is taken."
    )
    dry_run: bool = setting(
        False, "Print sizes, arithmetic, memory, traffic and an ETA from timed steps; change nothing."
    )
    dry_run_format: str = setting(
        "text", "dry_run: a table, or one line of json for another program.", choices=("text", "json")
    )

    def __post_init__(self) -> None:
        check_choices(self)


def parse(argv: Sequence[str]) -> tuple[TrainFlags, JobFlags, WatchdogFlags, MonitorFlags, Config, list[str]]:
    """The settings in `argv`, and the flags given, without those that say how the process came to be one of a job."""
    groups = TrainFlags(), Config(), JobFlags(), WatchdogFlags(), MonitorFlags()
    (chosen, config, joined, watching, telling), given = flags.parse(argv, __doc__ or "", *groups)
    of_the_job = {field.name for field in dataclasses.fields(joined)}
    given = [flag for flag in given if flag[2:].partition("=")[0] not in of_the_job]
    return chosen, joined, watching, telling, config, given


def main(argv: Sequence[str]) -> int:
    chosen, joined, watching, telling, config, given = parse(argv)
    if not chosen.run_dir and not chosen.dry_run:
        raise ValueError("--run_dir is required: name a directory for the run, such as --run_dir=runs/mine")
    settings = _settings_there(chosen.run_dir, config)
    memory.require_possible(settings, dry=chosen.dry_run)
    allocator.keep(dry_run.temporaries(settings, cores.usable()))
    compilation.keep()
    mesh_of = cores.mesh_of(joined)
    job.join(joined)
    try:
        return _run(chosen, watching, telling, config, given, mesh_of)
    except (ValueError, OSError, RuntimeError) as error:
        if joined.has_others and mesh_lib.tells_of_a_lost_process(error):
            job.leave(error)
        if joined.has_others:
            job.leave_alone(error)
        raise


def _settings_there(run_dir: str, config: Config) -> Config:
    """Those of the run that is there, which need not all be given again; else `config`."""
    with contextlib.suppress(ValueError, OSError):  # told of when the run is opened
        return run_directory.read(at_home(run_dir))[0]
    return config


def _run(
    chosen: TrainFlags,
    watching: WatchdogFlags,
    telling: MonitorFlags,
    config: Config,
    given: list[str],
    mesh_of: Callable[[Config], Mesh],
) -> int:
    # The devices, and the text.  All that can be refused is refused before anything is written.
    mesh = mesh_of(config)
    step_lib.shards_per_device(config_lib.resolve(config, mesh.size), mesh.size)  # a text may take hours to prepare
    run_dir = at_home(chosen.run_dir)
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
        config.streams.window_deviation,
        config.streams.short_window_probability,
    )
    if (flag := config.optimizer.goes_by_validation) and "valid" not in corpus.splits:
        raise ValueError(f"{flag} goes by validation scores, and {corpus.directory} has no valid split: give one")
    run_directory.separator(config, corpus.vocabulary)
    memory.require_possible(config, corpus.vocabulary.size, chosen.dry_run)
    if chosen.dry_run:
        config, _ = recurrence.chosen(config_lib.resolve(config, mesh.size), corpus, plan, mesh)
        dry_run.report(config, corpus, plan, mesh, chosen.dry_run_format)
        return program.DONE

    # The run: a new one, or the one that is there.
    identity = run_directory.Identity(corpus.vocabulary, corpus.fingerprint)
    remarks: list[str] = []
    is_there = mesh_lib.any_process(run_directory.exists(run_dir))
    if is_there:
        config, remarks = mesh_lib.together(lambda: run_directory.continued(run_dir, config, identity))
        mesh = mesh_of(config)
        step_lib.shards_per_device(config, mesh.size, fixed=True)
    else:
        config = config_lib.resolve(config, mesh.size)
    config, remark = recurrence.chosen(config, corpus, plan, mesh)
    remarks += [remark] if remark else []
    run = Run(run_dir, config, identity, corpus, plan, mesh)
    train_step = step_lib.make(config, corpus.vocabulary.size, mesh, plan.steps_per_epoch)
    remarks += _require_memory(run, train_step)
    params = _initial_params(run, chosen.initial_checkpoint, remarks.append)
    with contextlib.ExitStack() as held:
        mesh_lib.once(lambda: held.enter_context(run_directory.held(run_dir)))
        told = held.enter_context(monitor.of_this_process(telling))
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
        return run_lib.train(run, train_step, params, Around(checkpoints, log, watch, told))


def _require_memory(run: Run, train_step: step_lib.TrainStep) -> list[str]:
    """A remark where the memory is short, before anything is made.  Raises ValueError where an update cannot run."""

    def update() -> memory.Update:
        sizes = run.identity.vocabulary.size, run.corpus.splits["train"].dtype
        found = memory.compiled_update(train_step, run.config, *sizes, run.mesh)
        if why := memory.too_much(found, run.config, run.mesh):
            raise ValueError(why)
        return found

    remark = memory.close(mesh_lib.together(update), run.mesh)
    return [remark] if remark else []


def _initial_params(run: Run, initial_checkpoint: str, say: Callable[[str], None]) -> ModelParams | None:
    """The parameters of --initial_checkpoint, for a run that has no checkpoint of its own yet."""
    if not initial_checkpoint or mesh_lib.any_process(bool(StepDirectory(run.run_dir / "checkpoints").steps())):
        return None
    other = at_home(initial_checkpoint)
    step = int(other.name) if other.parent.name == "checkpoints" and other.name.isdecimal() else None
    other_dir = other.parent.parent if step is not None else other
    other_config, other_identity = run_directory.read(other_dir)
    if other_identity.vocabulary != run.identity.vocabulary:
        raise ValueError(
            f"initial_checkpoint={other_dir} has {other_identity.vocabulary_in_short} and this corpus "
            f"{run.identity.vocabulary_in_short}: its parameters would mean other symbols"
        )
    with Checkpoints(other_dir / "checkpoints", writable=False, log=say) as source:
        abstract = step_lib.abstract(run.config, run.identity.vocabulary.size, run.mesh).params
        item = other_config.optimizer.evaluated
        params, meta = source.restore_params(abstract, step=step, item=item)
    what = "the average of the parameters" if item == "average" else "the parameters"
    say(f"starting from {what} of step {meta['step']} of {other_dir}")
    return params


if __name__ == "__main__":
    program.run("launch.train", main)
