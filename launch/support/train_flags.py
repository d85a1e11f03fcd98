"""The settings of a training run by their flags, and those of a run that goes on."""

import contextlib
import dataclasses
from collections.abc import Sequence

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.config.flagfile import quote
from charlstm.run import run_directory
from data_pipeline.atomic_files import expand_user
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
        False,
        "Print sizes, arithmetic, memory, traffic and an ETA from timed steps; make no run.  A text that is not "
        "prepared is prepared first.",
    )
    dry_run_format: str = setting(
        "text", "dry_run: a table, or one line of json for another program.", choices=("text", "json")
    )

    def __post_init__(self) -> None:
        check_choices(self)


TEXTS = {"corpus", "train", "mixture"}  # whose values may change in a run: as places
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


def parse_for_run(
    argv: Sequence[str], *, doc: str | None = ""
) -> tuple[TrainFlags, JobFlags, ProgramServices, Config, list[str]]:
    """Returns what `parse` does; what is not given, --initial_checkpoint too, is that of the run in --run_dir, if any.

    Only what is given counts if that run has no checkpoint yet, and --initial_checkpoint or a setting that may not
    change is given.

    Raises:
      ValueError: there is no run in --run_dir, and nothing that a new one would be made of is given.
    """
    values = flags.given_in(argv, doc or "", *SETTINGS)
    flat = config_lib.flatten(Config())
    fixed = [name for name in values if name in flat and not flat[name][1].metadata["mutable"]]
    own, before = None, None
    if values.get("run_dir"):
        run_dir = expand_user(values["run_dir"])
        with contextlib.suppress(ValueError):  # told of when the run is opened
            own, before = run_directory.read(run_dir)[0], run_directory.read_initial(run_dir)
        if own is None and not fixed and not TEXTS & values.keys() and not run_directory.exists(run_dir):
            raise ValueError(
                f"run_dir={run_dir} is no run to go on with: a new one wants a text, such as --corpus=my.txt, or "
                "--corpus=python for a first look"
            )
    if own is None:
        return parse(argv, doc=doc)
    if not run_directory.has_checkpoint(run_dir) and (fixed or values.get("initial_checkpoint")):
        return parse(argv, doc=doc)
    chosen, job, services, config, given = parse(argv, own, doc=doc)
    if "document_separator" not in values:  # the run's own counts as given, and not what its corpus records
        given.append(f"--document_separator={quote(own.corpus.document_separator)}")
    initial = chosen.initial_checkpoint or (before.named if before else "")
    return dataclasses.replace(chosen, initial_checkpoint=initial), job, services, config, given
