"""Trains a character-level recurrent language model; the same command again continues it.

python -m launch.train --flagfile=configs/large.flags --corpus=my_texts/ --run_dir=runs/mine
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.train")

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jax.sharding import Mesh

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.run import backend, estimate, initial_checkpoint, memory, run_directory
from charlstm.run import corpus as corpus_lib
from charlstm.run.checkpoint import Checkpoints
from charlstm.run.log import RunLog
from charlstm.run.step_directory import StepDirectory
from charlstm.training import schedules
from charlstm.training import step as step_lib
from data_pipeline.atomic_files import expand_user
from data_pipeline.settings import check_choices, setting
from launch import cli, cluster, flags, prometheus, runtime
from launch import run as run_lib
from launch.cluster import JobFlags
from launch.prometheus import MonitorFlags
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
    if chosen.run_dir:
        run_directory.named("run_dir", chosen.run_dir)
    settings = _settings_there(chosen.run_dir, config)
    memory.require_possible(settings, dry=chosen.dry_run)
    runtime.keep_freed_memory(estimate.estimate_temp_bytes(settings, runtime.usable_cores()))
    runtime.keep_compiled()
    mesh_of = runtime.mesh_chooser(joined)
    cluster.join(joined)
    try:
        return _run(chosen, watching, telling, config, given, mesh_of)
    except (ValueError, OSError, RuntimeError) as error:
        if joined.has_others and distributed.is_peer_failure(error):
            cluster.exit_peer_lost(error)
        if joined.has_others:
            cluster.exit_alone(error)
        raise


def _settings_there(run_dir: str, config: Config) -> Config:
    """Those of the run that is there, which need not all be given again; else `config`."""
    with contextlib.suppress(ValueError, OSError):  # told of when the run is opened
        return run_directory.read(expand_user(run_dir))[0]
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
    step_lib.shards_per_device(
        config_lib.fill_automatic(config, mesh.size), mesh.size
    )  # a text may take hours to prepare
    run_dir = expand_user(chosen.run_dir)
    if chosen.run_dir:
        corpus_lib.refuse_inside(run_dir, config.corpus)
    corpus, config = corpus_lib.open_for(config, given)
    plan = corpus_lib.plan_for(config, corpus)
    if (flag := config.optimizer.validation_driven_by) and "valid" not in corpus.splits:
        raise ValueError(f"{flag} goes by validation scores, and {corpus.directory} has no valid split: give one")
    run_directory.separator(config, corpus.vocabulary)
    memory.require_possible(config, corpus.vocabulary.size, chosen.dry_run)
    if chosen.dry_run:
        config = config_lib.fill_automatic(config, mesh.size)
        config, _ = backend.chosen(config, corpus, plan, mesh, cli.end_if_out_of_memory)
        estimate.report(config, corpus, plan, mesh, chosen.dry_run_format, cli.end_if_out_of_memory)
        return cli.DONE

    # The run: a new one, or the one that is there.
    identity = run_directory.Identity(corpus.vocabulary, corpus.fingerprint)
    initial = str(run_directory.named("initial_checkpoint", flag)) if (flag := chosen.initial_checkpoint) else ""
    goes_on, config, mesh, remarks = _settings_of_the_run(run_dir, config, identity, initial, mesh, mesh_of)
    config, remark = backend.chosen(config, corpus, plan, mesh, cli.end_if_out_of_memory)
    remarks += [remark] if remark else []
    separator = run_directory.separator(config, corpus.vocabulary)
    remarks += corpus_lib.remarks_on_separator(config, corpus, separator)
    remarks += schedules.remarks(config.optimizer, config.training, plan.steps_per_epoch, begun=goes_on)
    run = Run(run_dir, config, identity, corpus, plan, mesh)
    train_step = step_lib.make(config, corpus.vocabulary.size, mesh, plan.steps_per_epoch)
    remarks += _require_memory(run, train_step)
    params = started_from = None
    if not distributed.any_process(bool(StepDirectory(run_dir / "checkpoints").steps())):
        if goes_on and (started_from := run_directory.read_initial(run_dir)):
            params = initial_checkpoint.take_again(run_dir, started_from, config, identity, mesh, remarks.append)
        elif initial:
            params, started_from = initial_checkpoint.take(initial, config, identity, mesh, remarks.append)
    with contextlib.ExitStack() as held:
        distributed.run_on_first(lambda: held.enter_context(run_directory.lock_run_directory(run_dir)))
        told = held.enter_context(prometheus.of_this_process(telling))
        if not goes_on:
            distributed.run_on_first(lambda: run_directory.create(run_dir, config, identity, given, started_from))
        watch = Watchdog(watching, distributed.process_number(), run_dir / "heartbeats")
        held.callback(watch.stop)
        log = RunLog(run_dir, sys.stderr, silent=not distributed.is_first_process())
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

    remark = memory.close(distributed.run_on_all(update), run.mesh)
    return [remark] if remark else []


def _settings_of_the_run(
    run_dir: Path,
    wanted: Config,
    identity: run_directory.Identity,
    initial: str,
    mesh: Mesh,
    mesh_of: Callable[[Config], Mesh],
) -> tuple[bool, Config, Mesh, list[str]]:
    """Whether the run that is there goes on, or a new one begins; its settings, its devices, and what to say of them.

    A run that is there without a checkpoint, as its first try has failed, does not stand in the way of other settings.
    """
    remarks: list[str] = []
    if distributed.any_process(run_directory.exists(run_dir)):
        has_checkpoint = distributed.any_process(run_directory.has_checkpoint(run_dir))
        try:
            config, remarks = distributed.run_on_all(
                lambda: run_directory.resume_config(run_dir, wanted, identity, initial)
            )
        except run_directory.OtherRun as refused:
            if has_checkpoint:
                raise
            remarks = [f"begun anew, as there was no checkpoint yet: {str(refused).partition(': give ')[0]}"]
        else:
            own_mesh = mesh_of(config)
            step_lib.shards_per_device(config, own_mesh.size, fixed=True)
            return True, config, own_mesh, remarks
    return False, config_lib.fill_automatic(wanted, mesh.size), mesh, remarks


if __name__ == "__main__":
    cli.run("launch.train", main)
