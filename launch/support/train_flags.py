"""The settings of a training run by their flags, and those of a run that goes on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.run import run_directory
from data_pipeline.settings import check_choices, setting
from launch.support import flags
from launch.support.cluster import JobFlags
from launch.support.event_files import TensorboardFlags
from launch.support.prometheus import MonitorFlags
from launch.support.services import ProgramServices
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
    argv: Sequence[str], otherwise: Config | None = None, *, doc: str | None = ""
) -> tuple[TrainFlags, JobFlags, ProgramServices, Config, list[str]]:
    """Returns the settings in `argv`, and the flags given, without those of the job (`JobFlags`).

    Args:
      otherwise: values of the settings that are not given; None: the defaults that --help shows.
      doc: what --help says of the program.
    """
    groups = [otherwise if otherwise and isinstance(group, Config) else group for group in SETTINGS]
    (chosen, config, job, watchdog, monitor, tensorboard), given = flags.parse(argv, doc or "", *groups)
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
