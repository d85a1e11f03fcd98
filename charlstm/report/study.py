"""A study of settings: its trials in plain lines, and as a page of one file."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from charlstm.report import curves
from charlstm.report.page import STYLE, text
from charlstm.run.metrics import duration

STATES = ("finished", "stopped early", "failed", "unfinished")
SHOWN, DRAWN = 10, len(curves.COLORS)  # best trials in the lines, and whose curves are drawn
UNIT = "bits per symbol"


class TrialResult(NamedTuple):
    """A trial that has begun."""

    number: int
    state: str  # of STATES
    values: dict[str, Any]  # of the settings searched
    scores: dict[int, float]  # bits per symbol of its evaluations, by their numbers from 1 on
    parameters: int
    updates: int  # until its last evaluation
    seconds: float

    @property
    def best(self) -> float:
        """Its best score, which counts."""
        return min(self.scores.values())


class StudyResult(NamedTuple):
    """A study: its trials, how much each setting matters, and the best settings with other seeds."""

    name: str
    trials: list[TrialResult]
    importance: dict[str, float]  # setting -> share; empty where there are too few trials
    repeats: list[float]  # bits per symbol
    command: str  # that repeats the best trial; "" while no trial has finished

    @property
    def best_first(self) -> list[TrialResult]:
        """The trials that have a score."""
        return sorted((t for t in self.trials if t.scores), key=lambda trial: (trial.best, trial.number))

    def summary(self) -> str:
        """Counts the trials by their states."""
        counts = [f"{sum(trial.state == state for trial in self.trials)} {state}" for state in STATES]
        return f"{self.name}: {len(self.trials)} trials: {', '.join(counts)}"

    def importances(self) -> str:
        """Says how much each setting matters."""
        shown = ", ".join(f"{name} {share:.0%}" for name, share in self.importance.items())
        finished = sum(trial.state == "finished" for trial in self.trials)
        return f"importance: {shown or f'not computed from {finished} finished trials'}"

    def repeated(self) -> list[str]:
        """Says what the best settings reach with other seeds; nothing if they were not run again."""
        scores = self.repeats
        if not scores:
            return []
        mean, several = sum(scores) / len(scores), f"{len(scores)} other seed{'s' if len(scores) > 1 else ''}"
        return [f"the best settings with {several}: {mean:.4f} {UNIT} ({min(scores):.4f} to {max(scores):.4f})"]


def lines(study: StudyResult) -> str:
    """The study in plain lines: its best trials, how much each setting matters, the command of the best one."""
    if not study.command:
        return study.summary()
    best = next(trial for trial in study.best_first if trial.state == "finished")
    told = [study.summary(), f"trial  {UNIT}  parameters  updates  seconds  settings"]
    for trial in study.best_first[:SHOWN]:
        values = "  ".join(f"{name}={value}" for name, value in trial.values.items())
        measured = f"{trial.parameters:10,}  {trial.updates:7,}  {trial.seconds:7.0f}"
        end = "" if trial.state == "finished" else f"  ({trial.state})"
        told.append(f"{trial.number:5}  {trial.best:15.4f}  {measured}  {values}{end}")
    told += [study.importances(), f"the best is trial {best.number}, an ordinary run; to repeat it:"]
    return "\n".join([*told, f"    {study.command}", *study.repeated()])


def page(study: StudyResult) -> str:
    """The study as HTML: scores by trial, by setting and by evaluation, and a table of all trials.

    Raises:
      ValueError: matplotlib is not installed.
    """
    best_first = study.best_first
    by_number = sorted(best_first, key=lambda trial: trial.number)
    numbers, scores = [float(trial.number) for trial in by_number], [trial.best for trial in by_number]
    history = {"a trial's score": (numbers, scores), "the best so far": (numbers, list(accumulate(scores, min)))}
    settings = dict.fromkeys(name for trial in by_number for name in trial.values)
    slices = {
        name: ([t.values[name] for t in by_number if name in t.values], [t.best for t in by_number if name in t.values])
        for name in settings
    }
    learned = {
        f"trial {trial.number}": ([float(part) for part in trial.scores], list(trial.scores.values()))
        for trial in best_first[:DRAWN]
    }
    command = f"<pre>{text(study.command)}</pre>" if study.command else ""
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(study.name)}</title>',
        f"<style>{STYLE}</style></head><body><h1>{text(study.summary())}</h1>",
        *(f"<p>{text(line)}</p>" for line in (study.importances(), *study.repeated())),
        f"{command}<h2>Scores of the trials</h2>",
        _svg(curves.lines_svg(history, "trial", UNIT)),
        "<h2>Scores by setting</h2>",
        _svg(curves.slices_svg(slices, UNIT)),
        f"<h2>The best {len(learned)} as they learned</h2>",
        _svg(curves.lines_svg(learned, "evaluation", UNIT)),
        f"<h2>All trials, the best first</h2>{_table(study, list(settings))}</body></html>\n",
    ]
    return "\n".join(parts)


def _table(study: StudyResult, settings: Sequence[str]) -> str:
    heads = ["trial", "state", UNIT, "parameters", "updates", "time", *settings]
    unscored = [trial for trial in study.trials if not trial.scores]
    rows = []
    for trial in [*study.best_first, *unscored]:
        score = f"{trial.best:.4f}" if trial.scores else "-"
        measured = [f"{trial.parameters:,}", f"{trial.updates:,}", duration(trial.seconds)]
        rows.append([trial.number, trial.state, score, *measured, *_in_order(trial.values, settings)])
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{text(head)}</th>' for head in heads)}</tr>{body}</table>"


def _in_order(values: Mapping[str, Any], settings: Sequence[str]) -> list[Any]:
    return [values.get(name, "-") for name in settings]


def _svg(drawn: str) -> str:
    return drawn[drawn.index("<svg") :]
