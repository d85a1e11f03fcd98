"""Searches settings with Optuna: each trial is a run of launch.train that differs in the settings searched.

    python -m launch.tune --flagfile=configs/tiny.flags --space=my.toml --study_dir=studies/mine --trials=20

The flags are those of launch.train; charlstm/run/search_space.py describes the file of a space.  The first trial has
the values of the flags themselves, if they lie in the space; later ones are drawn by Optuna's tree-structured Parzen
estimator.  A trial is scored ten times on the validation split, its best score counts, and it is stopped early if it is
worse than the median of the others.  The same command in another terminal is another worker of the same study; the same
command again continues it, with the trials that were interrupted.

    study_dir/journal.log       settings and scores, by Optuna; written by all workers
    study_dir/trials/0007/      an ordinary run directory
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.tune")

import contextlib
import dataclasses
import importlib.util
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.run import corpus as corpus_lib
from charlstm.run import estimate, run_directory, search_space
from data_pipeline import signals
from data_pipeline.atomic_files import expand_user, locked
from data_pipeline.progress import bar
from data_pipeline.settings import setting
from launch import cli, flags
from launch.local import TRAIN, ChildProcesses

with contextlib.suppress(ImportError):  # an extra, which main asks for
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

PARTS = 10  # evaluations of a trial, at equal distances; trials are compared after equally many
LOOK_EVERY = 0.5  # seconds between two looks at a trial


@dataclasses.dataclass(frozen=True)
class TuneFlags:
    """The study."""

    space: str = setting("", "A TOML file of the settings to search and their values.  Required.")
    study_dir: str = setting("", "Directory of the study: a journal, and a run for each trial.  Required.")
    trials: int = setting(20, "Trials of the whole study, by all its workers; 0 only prints the report.")
    seconds_per_trial: float = setting(
        0.0, "Every trial makes as many updates as take so many seconds here, by a few timed ones; 0: --num_steps."
    )

    def __post_init__(self) -> None:
        for name in ("trials", "seconds_per_trial"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")


class Ended(NamedTuple):
    """End of launch.train: `status` as in cli.py, or -N for signal N; `last_words`, the last line it wrote."""

    status: int
    told_to_stop: bool  # by a signal to this program
    pruned: bool  # by this program
    last_words: str


def run_child(
    arguments: Sequence[str], log: Path, stdout: Any = None, hopeless: Callable[[], bool] = lambda: False
) -> Ended:
    """Runs launch.train as a child process, and stops it once `hopeless()`; adds its output to `log`, or `stdout`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    children, pruned = ChildProcesses(), False
    with log.open("ab") as file, children.signals_passed_on():
        child = children.start([*TRAIN, *arguments], stdin=subprocess.DEVNULL, stdout=stdout or file, stderr=file)
        while child.poll() is None:
            time.sleep(LOOK_EVERY)
            if not pruned and not children.told_to_stop and hopeless():
                pruned = True
                children.send(signal.SIGTERM)
    if children.killed:
        signals.leave(signal.SIGINT)
    lines = log.read_text("utf-8", "replace").splitlines()
    return Ended(child.returncode, children.told_to_stop, pruned, lines[-1] if lines else "stopped")


def num_steps_within(seconds: float, arguments: Sequence[str], log: Path) -> int:
    """Returns how many updates take `seconds` here, by a dry run: a multiple of PARTS.

    Raises KeyboardInterrupt if this program is told to stop, ValueError if launch.train refuses the arguments.
    """
    answer = log.with_suffix(".json")
    answer.parent.mkdir(parents=True, exist_ok=True)
    with answer.open("wb") as file:
        ended = run_child([*arguments, "--dry_run", "--dry_run_format=json"], log, file)
    if ended.told_to_stop:
        raise KeyboardInterrupt
    if ended.status != cli.DONE:
        raise ValueError(f"launch.train refuses the trial: {ended.last_words}")
    per_step = json.loads(answer.read_text("utf-8"))["seconds_per_step"]
    answer.unlink()
    if per_step is None:
        raise ValueError("the trial does not fit in memory: search smaller models or batches")
    return max(1, round(seconds / per_step / PARTS)) * PARTS


def run_dir(study_dir: Path, number: int) -> Path:
    return study_dir / "trials" / f"{number:04d}"


def evaluations(directory: Path) -> dict[int, float]:
    """Returns step -> bits per symbol of the evaluations that a run has made of its validation split."""
    path = directory / "metrics.jsonl"
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []  # the last one may be half written
    return {line["step"]: line["bits_per_symbol"] for line in map(json.loads, lines) if line["split"] == "valid"}


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
        self.optuna = open_study(self.directory)
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
        trials = partial(self.optuna.get_trials, deepcopy=False)
        trial: optuna.Trial | None = None
        with contextlib.ExitStack() as held:

            def take(number: int) -> bool:
                with contextlib.suppress(BlockingIOError):
                    held.enter_context(locked(self.directory / f".trial-{number}.lock", _refuse))
                    return True
                return False

            def unfinished(number: int) -> bool:
                return trials()[number].state == TrialState.RUNNING

            with locked(self.directory / ".taking.lock", lambda: None):
                begun = sum(trial.state != TrialState.WAITING for trial in trials())
                # Asked again once its lock is ours: its worker may have finished it before.
                left = (n for n in range(begun) if unfinished(n) and take(n) and unfinished(n))
                if (number := next(left, None)) is not None:
                    trial = optuna.Trial(self.optuna, trials()[number]._trial_id)  # there is no public way to resume
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
        arguments = self._given + [f"--{name}={value}" for name, value in values.items()]
        steps = max(1, config.training.num_steps // PARTS) * PARTS
        if seconds := self._chosen.seconds_per_trial:
            steps = num_steps_within(seconds, arguments, directory.with_suffix(".txt"))
        arguments += [f"--num_steps={steps}", f"--evaluate_every={steps // PARTS}", f"--run_dir={directory}"]
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
        show = bar()
        reported = set(self.optuna.get_trials(deepcopy=False)[number].intermediate_values)

        def hopeless() -> bool:
            for step, bits in evaluations(directory).items():
                if (part := step * PARTS // num_steps) not in reported:
                    trial.report(bits, part)
                    reported.add(part)
            show(f"trial {number}", max(reported, default=0), PARTS)
            return bool(reported) and max(reported) < PARTS and trial.should_prune()

        signals.say(f"trial {number}: {trial.user_attrs['values']}, {num_steps} updates")
        began = time.monotonic()
        ended = run_child(arguments, directory.with_suffix(".txt"), hopeless=hopeless)
        hopeless()  # reports the last scores
        trial.set_user_attr("seconds", trial.user_attrs.get("seconds", 0.0) + round(time.monotonic() - began, 1))
        scores = list(evaluations(directory).values())
        interrupted = ended.told_to_stop or (ended.status == cli.STOPPED and not ended.pruned)
        if interrupted or ended.status == cli.NOT_SAVED:
            signals.say(f"trial {number}: {ended.last_words}; launch.tune goes on with it")
            return cli.STOPPED if ended.told_to_stop else ended.status
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


def open_study(directory: Path) -> "optuna.Study":
    """Opens the Optuna study in `directory`, made if absent."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory.mkdir(parents=True, exist_ok=True)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(directory / "journal.log"))),
        study_name="study",
        # After 4 whole trials, and not before a trial's second score.
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2),
        load_if_exists=True,
    )


def report(study: "optuna.Study", study_dir: Path) -> str:
    """Returns a report on a study: its best trials, how much each setting matters, the command of the best one."""
    names = {
        TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped early",
        TrialState.FAIL: "failed", TrialState.RUNNING: "unfinished",
    }  # fmt: skip
    trials = study.get_trials(deepcopy=False, states=tuple(names))
    counts = [f"{sum(trial.state == state for trial in trials)} {name}" for state, name in names.items()]
    lines = [f"{study_dir}: {len(trials)} trials: {', '.join(counts)}"]
    best_first = sorted((min(t.intermediate_values.values()), t.number, t) for t in trials if t.intermediate_values)
    finished = [number for _, number, trial in best_first if trial.state == TrialState.COMPLETE]
    if not finished:
        return lines[0]
    lines.append("trial  bits per symbol  parameters  updates  seconds  settings")
    for score, number, trial in best_first[:10]:
        updates, facts = max(evaluations(run_dir(study_dir, number))), trial.user_attrs
        values = "  ".join(f"{name}={value}" for name, value in facts["values"].items())
        measured = f"{facts['parameters']:10,}  {updates:7,}  {facts.get('seconds', 0):7.0f}"
        end = "" if trial.state == TrialState.COMPLETE else f"  ({names[trial.state]})"
        lines.append(f"{number:5}  {score:15.4f}  {measured}  {values}{end}")
    # PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255): how much a setting decides whether a trial is among the best.
    shares = optuna.importance.get_param_importances(study) if len(finished) >= 4 else {}
    shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    lines.append(f"importance: {shown or f'not computed from {len(finished)} finished trials'}")
    lines.append(f"the best is trial {finished[0]}, an ordinary run; to repeat it:")
    flagfile = run_dir(study_dir, finished[0]) / "flags.txt"
    return "\n".join([*lines, f"    python -m launch.train --flagfile={flagfile} --run_dir=runs/best"])


def main(argv: Sequence[str]) -> int:
    (chosen, config), given = flags.parse(argv, __doc__ or "", TuneFlags(), Config())
    if not chosen.space or not chosen.study_dir:
        raise ValueError("--space and --study_dir are required: name a TOML file, and a directory for the study")
    run_directory.named("study_dir", chosen.study_dir)
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("launch.tune needs Optuna, which is not installed: pip install 'charlstm[tune]'")
    given = [flag for flag in given if flag[2:].partition("=")[0] not in dataclasses.asdict(chosen)]
    jax.config.update("jax_platforms", "cpu")  # models are only counted here; the devices are for the trials
    study, status = Study(chosen, config, given), cli.DONE
    while status == cli.DONE:
        with study.next_trial() as trial:
            if trial is None:
                print(report(study.optuna, study.directory))
                break
            status = study.run(trial)
    return status


if __name__ == "__main__":
    cli.run("launch.tune", main)
