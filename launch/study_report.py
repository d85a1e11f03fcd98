"""What a study has found: its best trials, how much each setting matters, and the command of the best."""

from pathlib import Path
from typing import Any

from launch import trials

BEST = 10  # trials in the table
FEW = 4  # finished trials: of fewer, nothing is said of importance


def report(study: Any, study_dir: Path) -> str:
    """The report on an Optuna study whose trials live in `study_dir`."""
    import optuna

    states = optuna.trial.TrialState
    names = {
        states.COMPLETE: "finished", states.PRUNED: "stopped early", states.FAIL: "failed", states.RUNNING: "unfinished"
    }  # fmt: skip
    there = [trial for trial in study.get_trials(deepcopy=False) if trial.state in names]
    counts = [f"{sum(trial.state == state for trial in there)} {name}" for state, name in names.items()]
    lines = [f"{study_dir}: {len(there)} trials: {', '.join(counts)}"]
    scored = sorted((trial for trial in there if trial.value is not None), key=_best_score)
    finished = [trial for trial in scored if trial.state == states.COMPLETE]
    if not finished:
        return lines[0]
    searched = list(finished[0].user_attrs["values"])
    rows = [["trial", "bits per symbol", "parameters", "updates", "seconds", *searched, ""]]
    for trial in scored[:BEST]:
        facts = trial.user_attrs
        updates = max(step for step, _ in trials.evaluations(trials.run_dir(study_dir, trial.number)))
        values = [str(facts["values"][name]) for name in searched]
        measured = [f"{facts['parameters']:,}", f"{updates:,}", f"{facts['seconds']:.0f}"]
        end = "" if trial.state == states.COMPLETE else names[trial.state]
        rows.append([str(trial.number), f"{_best_score(trial):.4f}", *measured, *values, end])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"importance: {_importance(study, finished)}")
    best = trials.run_dir(study_dir, finished[0].number)
    lines += [
        f"the best is trial {finished[0].number}, a run like any other; made anew:",
        f"    python -m launch.train --flagfile={best}/flags.txt --run_dir=runs/best",
    ]
    return "\n".join(lines)


def _best_score(trial: Any) -> float:
    return min(trial.intermediate_values.values())


def _importance(study: Any, finished: list[Any]) -> str:
    """Of each setting, for whether a trial is among the best (PED-ANOVA, Watanabe et al. 2023, arXiv:2304.10255)."""
    import optuna

    if len(finished) < FEW:
        return f"not said of {len(finished)} finished trials"
    shares = optuna.importance.get_param_importances(study)
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
