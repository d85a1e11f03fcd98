"""Searches settings with Optuna: each trial is a run of launch.train that differs in the settings searched.

    python -m launch.tune --flagfile=configs/tiny.flags --space=my.toml --study_dir=studies/mine --trials=20

The flags are those of launch.train; charlstm/run/search_space.py describes the file of a space.  The first trial has
the values of the flags themselves, if they lie in the space; later ones are drawn by Optuna's tree-structured Parzen
estimator.  A trial is scored ten times on the validation split, its best score counts, and it is stopped early if it is
worse than the median of the others.  The same command in another terminal is another worker of the same study; the same
command again continues it, with the trials that were interrupted.

    study_dir/journal.log       settings and scores, by Optuna; written by all workers, read by optuna-dashboard
    study_dir/trials/0007/      an ordinary run directory
    study_dir/repeats/0007-2/   the best trial's settings with another seed, with --repeat_best
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.tune")

import contextlib
import dataclasses
import importlib.util
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax

from charlstm import config as config_lib
from charlstm.config import Config, flagfile
from charlstm.report import curves
from charlstm.report import study as report_lib
from charlstm.report.study import StudyResult, TrialResult
from charlstm.run import corpus as corpus_lib
from charlstm.run import estimate, run_directory, search_space
from data_pipeline import signals
from data_pipeline.atomic_files import expand_user, locked
from data_pipeline.settings import check_choices, setting
from launch.support import cli, flags, trials
from launch.support.trials import PARTS, evaluations, is_whole

with contextlib.suppress(ImportError):  # an extra, which main asks for
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState


@dataclasses.dataclass(frozen=True)
class TuneFlags:
    """The study."""

    space: str = setting("", "A TOML file of the settings to search and their values.  Required.")
    study_dir: str = setting("", "Directory of the study: a journal, and a run for each trial.  Required.")
    trials: int = setting(20, "Trials of the whole study, by all its workers; 0 begins none, and prints the report.")
    seconds_per_trial: float = setting(
        0.0, "Every trial makes as many updates as take so many seconds here, by a few timed ones; 0: --num_steps."
    )
    pruner: str = setting(
        "median",
        "Trials stopped early: those worse than the median of the others (median, after four whole trials), those not "
        "among the best third of those that came as far (asha, for many trials), or none.",
        choices=("median", "asha", "none"),
    )
    repeat_best: int = setting(0, "At the end the best settings are trained so many times again, with other seeds.")
    report: str = setting("", "Write this .html file at the end: scores by trial, setting and evaluation.")
    device: str = setting("", "Number of the NVIDIA GPU that this worker's trials use; if empty, all.")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.report and not self.report.endswith(".html"):
            raise ValueError(f"report={self.report} is not a .html file")
        if self.device and not self.device.isdecimal():
            raise ValueError(f"device={self.device!r} is not the number of a GPU, such as 0")
        for name in ("trials", "seconds_per_trial", "repeat_best"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")


# Statuses after which the same command goes on, as docs/operations.md has them.
GO_ON = (cli.NOT_SAVED, cli.UNREACHABLE, cli.HANGS, cli.LOST, cli.IN_USE)


def run_dir(study_dir: Path, number: int) -> Path:
    return study_dir / "trials" / f"{number:04d}"


def _refuse() -> None:
    raise BlockingIOError("another worker has the trial")


class Study:
    """An Optuna study (`optuna`) in a directory, whose trials are runs of launch.train."""

    def __init__(self, chosen: TuneFlags, config: Config, given: list[str]) -> None:
        """Opens or begins the study.  Raises ValueError if it was begun with other flags or another space."""
        self._space = search_space.read(chosen.space, config)
        corpus, self._config = corpus_lib.open_for(config, given)
        if "valid" not in corpus.splits:
            raise ValueError(f"{corpus.name} has no validation split to score trials on: give a --valid_fraction")
        self._given, self._chosen, self._vocabulary_size = given, chosen, corpus.vocabulary.size
        self.directory = expand_user(chosen.study_dir)
        self.optuna = open_study(self.directory, chosen.pruner)
        self._environment = {"CUDA_VISIBLE_DEVICES": chosen.device} if chosen.device else {}
        terms = {"flags": given, "space": self._space._asdict(), "seconds_per_trial": chosen.seconds_per_trial}
        with locked(self.directory / ".taking.lock", lambda: None):
            if "terms" not in self.optuna.user_attrs:
                self.optuna.enqueue_trial(search_space.own_values(self._space, self._config))
                self.optuna.set_user_attr("terms", terms)
        begun = self.optuna.user_attrs["terms"]
        if other := " and ".join(name for name in terms if terms[name] != begun[name]):
            raise ValueError(
                f"study_dir={self.directory} was begun with another {other}: give its own, or another study_dir"
            )

    @contextlib.contextmanager
    def next_trial(self) -> Iterator["optuna.Trial | None"]:
        """Yields a trial that this worker alone has: one that a dead worker left unfinished, else a new one.

        None if --trials have begun and other workers have the unfinished ones.
        """
        begun_trials = partial(self.optuna.get_trials, deepcopy=False)
        trial: optuna.Trial | None = None
        with contextlib.ExitStack() as held:

            def take(number: int) -> bool:
                with contextlib.suppress(BlockingIOError):
                    held.enter_context(locked(self.directory / f".trial-{number}.lock", _refuse))
                    return True
                return False

            def unfinished(number: int) -> bool:
                return begun_trials()[number].state == TrialState.RUNNING

            with locked(self.directory / ".taking.lock", lambda: None):
                begun = sum(trial.state != TrialState.WAITING for trial in begun_trials())
                # Asked again once its lock is ours: its worker may have finished it before.
                left = (n for n in range(begun) if unfinished(n) and take(n) and unfinished(n))
                if (number := next(left, None)) is not None:
                    # There is no public way to resume.
                    trial = optuna.Trial(self.optuna, begun_trials()[number]._trial_id)
                elif begun < self._chosen.trials and take(begun):
                    trial = self.optuna.ask()
            yield trial

    def prepare(self, trial: "optuna.Trial") -> list[str]:
        """Draws a trial's settings; returns the arguments of launch.train, the same at every start.

        Raises ValueError if the settings contradict each other, or launch.train refuses them.
        """
        if "arguments" in trial.user_attrs:
            return trial.user_attrs["arguments"]
        # One seed per trial, so that two workers do not draw the same.
        seed = self._config.training.seed + trial.number
        self.optuna.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        values = search_space.draw(trial, self._space, self._config, self._vocabulary_size)
        config, directory = config_lib.replace(self._config, **values), run_dir(self.directory, trial.number)
        arguments = [flagfile.as_argument(line) for line in self._given]
        arguments += [f"--{name}={value}" for name, value in values.items()]
        steps = max(1, config.training.num_steps // PARTS) * PARTS
        if seconds := self._chosen.seconds_per_trial:
            signals.say(f"trial {trial.number}: compiling, and timing a few updates")
            steps = trials.num_steps_within(seconds, arguments, directory.with_suffix(".txt"), self._environment)
        arguments += [f"--num_steps={steps}", f"--evaluate_every={steps // PARTS}"]
        if not any(flag.startswith("--sample_every=") for flag in arguments):
            arguments.append("--sample_every=0")
        parameters = estimate.count_parameters(config, self._vocabulary_size)
        facts = {"values": values, "parameters": parameters, "num_steps": steps, "arguments": arguments}
        for name, fact in facts.items():
            trial.set_user_attr(name, fact)
        return arguments

    def run(self, trial: "optuna.Trial") -> int:
        """Runs a trial, or resumes it, and reports to Optuna.  Raises ValueError if launch.train refuses it.

        Returns:
          DONE if the worker goes on with another trial; else the exit status with which it ends.
        """
        number = trial.number
        try:
            arguments = self.prepare(trial)
        except ValueError:
            self.optuna.tell(trial, state=TrialState.FAIL)
            raise
        directory, num_steps = run_dir(self.directory, number), trial.user_attrs["num_steps"]
        show = trials.following(f"trial {number}", directory, num_steps)
        reported = set(self.optuna.get_trials(deepcopy=False)[number].intermediate_values)

        def hopeless() -> bool:
            for step, bits in evaluations(directory).items():
                if (part := step * PARTS // num_steps) not in reported:
                    trial.report(bits, part)
                    reported.add(part)
            show()
            return bool(reported) and max(reported) < PARTS and trial.should_prune()

        signals.say(f"trial {number}: {trial.user_attrs['values']}, {num_steps} updates")
        began = time.monotonic()
        log = directory.with_suffix(".txt")
        here = [*arguments, f"--run_dir={directory}"]  # not in what is kept: a study may be moved
        ended = trials.run_child(here, log, hopeless=hopeless, environment=self._environment)
        hopeless()  # reports the last scores
        trial.set_user_attr("seconds", trial.user_attrs.get("seconds", 0.0) + round(time.monotonic() - began, 1))
        scores = list(evaluations(directory).values())
        interrupted = ended.stopped_by or (ended.status == cli.STOPPED and not ended.pruned)
        if interrupted or ended.status in GO_ON:
            signals.say(f"trial {number}: {ended.last_words}; launch.tune goes on with it")
            return cli.STOPPED if ended.stopped_by else ended.status
        if ended.status == cli.DONE:
            state, outcome = TrialState.COMPLETE, f"{min(scores):.4f} bits per symbol"
        elif ended.pruned or ended.status == cli.DIVERGED:
            why = "the others do better" if ended.pruned else ended.last_words
            state, outcome = TrialState.PRUNED, f"stopped early after {len(scores)} of {PARTS} scores: {why}"
        else:
            state, outcome = TrialState.FAIL, f"failed, exit status {ended.status}: {ended.last_words}"
        self.optuna.tell(trial, min(scores) if state == TrialState.COMPLETE else None, state)
        if ended.status == cli.MISTAKE:
            raise ValueError(f"launch.train refuses trial {number}: {ended.last_words}")
        signals.say(f"trial {number}: {outcome}")
        return cli.DONE

    def repeat_best(self) -> int:
        """Trains the best settings again with other seeds, once no trial is left; returns an exit status, as `run`."""
        found = self.optuna.get_trials(deepcopy=False)
        whole = [trial for trial in found if trial.state == TrialState.COMPLETE]
        if not whole or any(trial.state == TrialState.RUNNING for trial in found):
            return cli.DONE
        best = min(whole, key=lambda trial: (trial.value, trial.number))
        with contextlib.suppress(BlockingIOError), locked(self.directory / ".repeating.lock", _refuse):
            for repeat in range(1, self._chosen.repeat_best + 1):
                directory = self.directory / "repeats" / f"{best.number:04d}-{repeat}"
                if is_whole(directory):
                    continue
                seed = self._config.training.seed + repeat
                signals.say(f"trial {best.number} again, with seed {seed}")
                arguments = [*best.user_attrs["arguments"], f"--seed={seed}", f"--run_dir={directory}"]
                show = trials.following(f"seed {seed}", directory, best.user_attrs["num_steps"])
                ended = trials.run_child(arguments, directory.with_suffix(".txt"), None, show, self._environment)
                if ended.status != cli.DONE:
                    signals.say(f"{directory}: {ended.last_words}")
                if ended.status not in (cli.DONE, cli.DIVERGED):  # one that diverges has no score, and the others have
                    return cli.STOPPED if ended.stopped_by else ended.status
        return cli.DONE


def open_study(directory: Path, pruner: str = "median") -> "optuna.Study":
    """Opens the Optuna study in `directory`, made if absent; it has the directory's name."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory.mkdir(parents=True, exist_ok=True)
    # Its lock is a link to it, and one to a relative path would dangle.
    storage = JournalStorage(JournalFileBackend(str(directory.absolute() / "journal.log")))
    there = optuna.get_all_study_names(storage)  # it keeps its name where the directory was renamed
    pruners = {
        # After 4 whole trials, and not before a trial's second score.
        "median": optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2),
        "asha": optuna.pruners.SuccessiveHalvingPruner(reduction_factor=3),
        "none": optuna.pruners.NopPruner(),
    }
    name = there[0] if there else directory.resolve().name
    return optuna.create_study(storage=storage, study_name=name, pruner=pruners[pruner], load_if_exists=True)


def result(study: "optuna.Study", study_dir: Path) -> StudyResult:
    """Returns what is known of a study."""
    names = {
        TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped early",
        TrialState.FAIL: "failed", TrialState.RUNNING: "unfinished",
    }  # fmt: skip
    found = []
    for trial in study.get_trials(deepcopy=False, states=tuple(names)):
        facts, updates = trial.user_attrs, max(evaluations(run_dir(study_dir, trial.number)), default=0)
        measured = facts.get("parameters", 0), updates, facts.get("seconds", 0.0)
        values = facts.get("values", {})
        found.append(TrialResult(trial.number, names[trial.state], values, trial.intermediate_values, *measured))
    finished = [trial for trial in found if trial.state == "finished"]
    # PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255): how much a setting decides whether a trial is among the best.
    shares = optuna.importance.get_param_importances(study) if len(finished) >= 4 else {}
    if not finished:
        return StudyResult(str(study_dir), found, {}, [], "")
    best = min(finished, key=lambda trial: (trial.best, trial.number)).number
    command = f"python -m launch.train --flagfile={run_dir(study_dir, best) / 'flags.txt'} --run_dir=runs/best"
    others = sorted((study_dir / "repeats").glob(f"{best:04d}-*/"))
    repeated = [min(evaluations(directory).values()) for directory in others if is_whole(directory)]
    return StudyResult(str(study_dir), found, shares, repeated, command)


def main(argv: Sequence[str]) -> int:
    (chosen, config), given = flags.parse(argv, __doc__ or "", TuneFlags(), Config())
    if not chosen.space or not chosen.study_dir:
        raise ValueError("--space and --study_dir are required: name a TOML file, and a directory for the study")
    run_directory.named("study_dir", chosen.study_dir)
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("launch.tune needs Optuna, which is not installed: pip install 'charlstm[tune]'")
    if chosen.report:
        cli.output_file("report", chosen.report)
        curves.check_installed()
    given = [flag for flag in given if flag[2:].partition("=")[0] not in dataclasses.asdict(chosen)]
    jax.config.update("jax_platforms", "cpu")  # models are only counted here; the devices are for the trials
    study, status = Study(chosen, config, given), cli.DONE
    journal = study.directory / "journal.log"
    signals.say(f"study {study.optuna.study_name}: optuna-dashboard {journal} shows it meanwhile")
    while status == cli.DONE:
        with study.next_trial() as trial:
            if trial is None:
                break
            status = study.run(trial)
    if status == cli.DONE:
        status = study.repeat_best()
    if status == cli.DONE:
        found = result(study.optuna, study.directory)
        print(report_lib.lines(found))
        if chosen.report:
            cli.write_output(chosen.report, report_lib.page(found))
    return status


if __name__ == "__main__":
    cli.run("launch.tune", main)
