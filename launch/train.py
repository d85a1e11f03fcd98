"""Trains a character-level recurrent language model; the same command again continues it.

python -m launch.train --flagfile=configs/large.flags --corpus=my_texts/ --run_dir=runs/mine
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.train")

import dataclasses
from collections.abc import Sequence

from charlstm import distributed
from charlstm.config import Config
from charlstm.run import estimate, loop, memory, run_directory
from charlstm.run import start as start_lib
from charlstm.run.metrics import Diverged
from data_pipeline.atomic_files import expand_user
from data_pipeline.settings import check_choices, setting
from launch import cli, cluster, flags, runtime
from launch.cluster import JobFlags
from launch.prometheus import MonitorFlags
from launch.services import STATUS, ProgramServices
from launch.watchdog import WatchdogFlags


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


SETTINGS = TrainFlags(), Config(), JobFlags(), WatchdogFlags(), MonitorFlags()  # at their defaults


def parse(argv: Sequence[str]) -> tuple[TrainFlags, JobFlags, ProgramServices, Config, list[str]]:
    """The settings in `argv`, and the flags given, without those that say how the process came to be one of a job."""
    (chosen, config, job, watchdog, monitor), given = flags.parse(argv, __doc__ or "", *SETTINGS)
    of_the_job = {field.name for field in dataclasses.fields(job)}
    given = [flag for flag in given if flag[2:].partition("=")[0] not in of_the_job]
    return chosen, job, ProgramServices(watchdog, monitor), config, given


def main(argv: Sequence[str]) -> int:
    chosen, job, services, config, given = parse(argv)
    if not chosen.run_dir and not chosen.dry_run:
        raise ValueError("--run_dir is required: name a directory for the run, such as --run_dir=runs/mine")
    run_dir = expand_user(chosen.run_dir) if chosen.run_dir else None
    run_directory.named("run_dir", chosen.run_dir)
    settings = run_directory.settings_of(run_dir, config) if run_dir else config
    memory.require_possible(settings, dry=chosen.dry_run)
    runtime.keep_freed_memory(estimate.estimate_temp_bytes(settings, distributed.usable_cores()))
    runtime.keep_compiled()
    choose_mesh = runtime.mesh_chooser(job)
    cluster.join(job)
    with cluster.leaving(job):
        mesh = choose_mesh(config)
        corpus, config = start_lib.open_corpus(config, given, run_dir, mesh)
        if chosen.dry_run or run_dir is None:
            print(start_lib.dry_run(config, corpus, mesh, chosen.dry_run_format, services.end))
            return cli.DONE
        run = start_lib.start(run_dir, config, corpus, choose_mesh, chosen.initial_checkpoint, services.end)
        try:
            return STATUS[loop.train(run, services, given)]
        except Diverged:
            return cli.DIVERGED


if __name__ == "__main__":
    cli.run("launch.train", main)
