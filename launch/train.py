"""Trains a character-level recurrent language model.  The same command, or its --run_dir alone, resumes the run.

python -m launch.train --flagfile=configs/large.flags --corpus=my_texts/ --run_dir=runs/mine
python -m launch.train --run_dir=runs/mine --num_steps=20000
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.train")

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.run import estimate, loop, memory, run_directory
from charlstm.run import start as start_lib
from charlstm.run.metrics import Diverged
from data_pipeline.atomic_files import expand_user
from data_pipeline.settings import check_choices, setting
from launch.support import cli, cluster, flags, jax_setup
from launch.support.cluster import JobFlags
from launch.support.event_files import TensorboardFlags
from launch.support.prometheus import MonitorFlags
from launch.support.services import STATUS, ProgramServices
from launch.support.watchdog import WatchdogFlags


@dataclasses.dataclass(frozen=True)
class TrainFlags:
    """The run directory."""

    run_dir: str = setting("", "Where the run lives, or is to live: config, log, metrics, checkpoints.  Required.")
    initial_checkpoint: str = setting(
        "",
        "A run directory (or its checkpoints/STEP) whose parameters a new run starts from; nothing else is taken.  "
        "If this run has other symbols, wider layers or more of them, the model is grown.",
    )
    dry_run: bool = setting(
        False, "Print sizes, arithmetic, memory, traffic and an ETA from timed steps; change nothing."
    )
    dry_run_format: str = setting(
        "text", "dry_run: a table, or one line of json for another program.", choices=("text", "json")
    )

    def __post_init__(self) -> None:
        check_choices(self)


SETTINGS = TrainFlags(), Config(), JobFlags(), WatchdogFlags(), MonitorFlags(), TensorboardFlags()  # at their defaults


def parse(
    argv: Sequence[str], otherwise: Config | None = None
) -> tuple[TrainFlags, JobFlags, ProgramServices, Config, list[str]]:
    """Returns the settings in `argv`, and the flags given, without those of the job (`JobFlags`).

    Args:
      otherwise: values of the settings that are not given; None: the defaults that --help shows.
    """
    groups = [otherwise if otherwise and isinstance(group, Config) else group for group in SETTINGS]
    (chosen, config, job, watchdog, monitor, tensorboard), given = flags.parse(argv, __doc__ or "", *groups)
    of_the_job = {field.name for field in dataclasses.fields(job)}
    given = [flag for flag in given if flag[2:].partition("=")[0] not in of_the_job]
    return chosen, job, ProgramServices(watchdog, monitor, tensorboard), config, given


def of_the_run(
    run_dir: Path, argv: Sequence[str], given: Sequence[str], config: Config, initial: str
) -> tuple[Config, str]:
    """Returns (settings, --initial_checkpoint): those of the run in `run_dir`, overridden by those given.

    Only those given count if there is no run, or if it has no checkpoint yet and --initial_checkpoint or a setting that
    may not change is given.
    """
    try:
        own, _ = run_directory.read(run_dir)
        mixed, flat = parse(argv, own)[3], config_lib.flatten(own)
        before = run_directory.read_initial(run_dir)
    except ValueError:  # told of when the run is opened
        return config, initial
    fixed = [
        name for flag in given if (name := flag[2:].partition("=")[0]) in flat and not flat[name][1].metadata["mutable"]
    ]
    if not run_directory.has_checkpoint(run_dir) and (fixed or initial):
        return config, initial
    return mixed, initial or (before.named if before else "")


def main(argv: Sequence[str]) -> int:
    chosen, job, services, config, given = parse(argv)
    if not chosen.run_dir and not chosen.dry_run:
        raise ValueError("--run_dir is required: name a directory for the run, such as --run_dir=runs/mine")
    run_dir = expand_user(chosen.run_dir) if chosen.run_dir else None
    run_directory.named("run_dir", chosen.run_dir)
    initial = chosen.initial_checkpoint
    if run_dir:
        config, initial = of_the_run(run_dir, argv, given, config, initial)
    settings = run_directory.settings_of(run_dir, config) if run_dir else config
    memory.require_possible(settings, dry=chosen.dry_run)
    jax_setup.keep_freed_memory(estimate.estimate_temp_bytes(settings, distributed.usable_cores()))
    jax_setup.keep_compiled()
    choose_mesh = jax_setup.mesh_chooser(job)
    cluster.join(job)
    with cluster.leaving(job):
        mesh = choose_mesh(config)
        corpus, config = start_lib.open_corpus(config, given, run_dir, mesh)
        if chosen.dry_run or run_dir is None:
            print(start_lib.dry_run(config, corpus, mesh, chosen.dry_run_format, services.end))
            return cli.DONE
        run = start_lib.start(run_dir, config, corpus, choose_mesh, initial, services.end)
        try:
            return STATUS[loop.train(run, services, given)]
        except Diverged:
            return cli.DIVERGED


if __name__ == "__main__":
    cli.run("launch.train", main)
