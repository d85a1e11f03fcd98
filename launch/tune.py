"""Searches settings: each trial is a run of launch.train, of all that the flags do not search the same.

    python -m launch.tune --flagfile=configs/tiny.flags --space=my.toml --study_dir=studies/mine --trials=20

The flags are those of launch.train; launch/search_space.py says what stands in a space.  The first trial has the values
of the flags themselves, where they lie in the space; those after it are drawn by Optuna's tree-structured Parzen
estimator.  A trial is scored ten times on the validation split, its best score counts, and it is stopped early where it
is worse than the median of the others.  The same command in another terminal is another worker of the same study; the
same command again goes on with it, and with the trials that were cut short.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.tune")

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.run import corpus as corpus_lib
from charlstm.run import estimate, run_directory
from data_pipeline.atomic_files import expand_user, locked
from data_pipeline.settings import setting
from launch import cli, flags, search_space, study_report, trials
from launch.trials import PARTS, Child, Ended


@dataclasses.dataclass(frozen=True)
class TuneFlags:
    """The study."""

    space: str = setting("", "A TOML file of the settings to search and their values.  Required.")
    study_dir: str = setting(
        "", "Where the study lives, or is to live: a journal, and a run for each trial.  Required."
    )
    trials: int = setting(20, "Trials of the whole study, by all its workers; 0 only tells what was found.")
    seconds_per_trial: float = setting(
        0.0, "Every trial makes as many updates as take so many seconds here, by a few timed ones; 0: --num_steps."
    )

    def __post_init__(self) -> None:
        for name in ("trials", "seconds_per_trial"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")


class Study:
    """What the trials of a study have in common.

    Attributes:
      directory: where it lives.
      optuna: the study as Optuna has it.
    """

    def __init__(self, chosen: TuneFlags, config: Config, given: list[str]) -> None:
        """Raises ValueError where the study that is there is another one."""
        self._space = search_space.read(chosen.space, config)
        corpus, self._config = corpus_lib.open_for(config, given)
        if "valid" not in corpus.splits:
            raise ValueError(f"{corpus.directory} has no validation split to score trials on: give a --valid_fraction")
        self._given, self._seconds, self._vocabulary_size = given, chosen.seconds_per_trial, corpus.vocabulary.size
        self.directory = expand_user(chosen.study_dir)
        self.optuna = opened(self.directory)
        self._hold_to(
            {
                "flags": given,
                "space": json.loads(json.dumps(dataclasses.asdict(self._space))),
                "seconds_per_trial": chosen.seconds_per_trial,
            }
        )

    def _hold_to(self, terms: dict[str, Any]) -> None:
        """Begins the study on `terms`; raises ValueError where it was begun on others."""
        with locked(self.directory / ".taking.lock", lambda: None):
            begun = self.optuna.user_attrs.get("terms")
            if begun is None:
                self.optuna.enqueue_trial(search_space.own_values(self._space, self._config))
                self.optuna.set_user_attr("terms", terms)
        if begun not in (None, terms):
            other = " and ".join(name for name in terms if terms[name] != begun[name])
            raise ValueError(
                f"study_dir={self.directory} was begun with another {other}: give its own, or another study_dir"
            )

    def arguments(self, trial: Any) -> list[str]:
        """Of launch.train for an Optuna trial: drawn when it begins, and the same when it goes on.

        Raises:
          ValueError: what was drawn does not go together, or launch.train refuses it.
        """
        if "arguments" in trial.user_attrs:
            return trial.user_attrs["arguments"]
        # Each trial has a seed of its own, so that two workers do not draw the same.
        self.optuna.sampler = _sampler(self._config.training.seed + trial.number)
        values = search_space.values_of(trial, self._space, self._config, self._vocabulary_size)
        config = config_lib.replace(self._config, **values)
        arguments = self._given + [f"--{name}={value}" for name, value in values.items()]
        run_dir = trials.run_dir(self.directory, trial.number)
        steps = max(1, config.training.num_steps // PARTS) * PARTS
        if self._seconds:
            steps = trials.num_steps_within(self._seconds, arguments, run_dir.with_suffix(".txt"))
        arguments += [f"--num_steps={steps}", f"--evaluate_every={steps // PARTS}", f"--run_dir={run_dir}"]
        for name, what in (
            ("values", values),
            ("parameters", estimate.count_parameters(config, self._vocabulary_size)),
            ("symbols_per_step", config.streams.batch_size * config.streams.window),
            ("num_steps", steps),
            ("arguments", arguments),
        ):
            trial.set_user_attr(name, what)
        return arguments

    def run(self, trial: Any) -> int:
        """Runs an Optuna trial, or goes on with it; the status of program.py with which the worker goes on, or ends."""
        import optuna

        failed = optuna.trial.TrialState.FAIL
        try:
            arguments = self.arguments(trial)
        except ValueError:
            self.optuna.tell(trial, state=failed)
            raise
        run_dir, num_steps = trials.run_dir(self.directory, trial.number), trial.user_attrs["num_steps"]
        reported = set(self.optuna.get_trials(deepcopy=False)[trial.number].intermediate_values)

        def hopeless() -> bool:
            for step, bits in trials.evaluations(run_dir):
                part = step * PARTS // num_steps
                if part not in reported:
                    trial.report(bits, part)
                    reported.add(part)
            return bool(reported) and max(reported) < PARTS and trial.should_prune()

        _say(f"trial {trial.number}: {trial.user_attrs['values']}, {num_steps} updates")
        ended = Child(arguments, run_dir.with_suffix(".txt")).wait(hopeless)
        hopeless()  # the last scores
        seconds = trials.training_seconds(run_dir, trial.user_attrs["symbols_per_step"])
        trial.set_user_attr("seconds", round(seconds, 1))
        stopped = ended.told_to_stop or (ended.status == cli.STOPPED and not ended.pruned)
        if stopped or ended.status == cli.NOT_SAVED:
            _say(f"trial {trial.number}: {ended.last_words}; launch.tune goes on with it")
            return cli.STOPPED if stopped else cli.NOT_SAVED
        self._tell(trial, ended, run_dir)
        return cli.DONE

    def _tell(self, trial: Any, ended: Ended, run_dir: Path) -> None:
        """Tells Optuna how a trial ended.  Raises ValueError where launch.train refused it."""
        import optuna

        states, number = optuna.trial.TrialState, trial.number
        scores = [bits for _, bits in trials.evaluations(run_dir)]
        if ended.status == cli.DONE:
            self.optuna.tell(trial, min(scores))
            _say(f"trial {number}: {min(scores):.4f} bits per symbol")
        elif ended.pruned or ended.status == cli.DIVERGED:
            self.optuna.tell(trial, state=states.PRUNED)
            why = "the others do better" if ended.pruned else ended.last_words
            _say(f"trial {number}: stopped early after {len(scores)} of {PARTS} scores: {why}")
        else:
            self.optuna.tell(trial, state=states.FAIL)
            if ended.status == cli.MISTAKE:
                raise ValueError(f"launch.train refuses trial {number}: {ended.last_words}")
            _say(f"trial {number}: failed, exit status {ended.status}: {ended.last_words}")


def _sampler(seed: int) -> Any:
    import optuna

    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def opened(directory: Path) -> Any:
    """The Optuna study that lives in `directory`, which is made if need be: for a closer look than the report's."""
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(directory / "journal.log"))
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="study",
        # After 4 whole trials, and not before a trial's second score.
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2),
        load_if_exists=True,
    )


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ValueError("launch.tune needs Optuna, which is not installed: pip install 'charlstm[tune]'") from None
    return optuna


def main(argv: Sequence[str]) -> int:
    (chosen, config), given = flags.parse(argv, __doc__ or "", TuneFlags(), Config())
    if not chosen.space or not chosen.study_dir:
        raise ValueError("--space and --study_dir are required: name a TOML file, and a directory for the study")
    run_directory.named("study_dir", chosen.study_dir)
    _optuna()
    own = {field.name for field in dataclasses.fields(chosen)}
    given = [flag for flag in given if flag[2:].partition("=")[0] not in own]
    jax.config.update("jax_platforms", "cpu")  # here models are only counted; the devices are for the trials
    study = Study(chosen, config, given)
    while True:
        with trials.next_trial(study.optuna, study.directory, chosen.trials) as trial:
            if trial is None:
                break
            status = study.run(trial)
        if status != cli.DONE:
            return status
    print(study_report.report(study.optuna, study.directory))
    return cli.DONE


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run("launch.tune", main)
