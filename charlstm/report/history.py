"""Reads what a run has measured, while it runs or afterwards; starts no device and changes nothing."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.inference.score import FIGURES
from charlstm.run import estimate, run_directory
from charlstm.run.services import HEARTBEATS
from charlstm.run.step_directory import StepDirectory

SILENT = 15.0  # seconds without a heartbeat after which a run counts as stopped
BY = {"steps": "step", "symbols": "symbols read", "time": "seconds"}  # what curves are drawn by -> its name


class History(NamedTuple):
    """A run: its settings, the lines of metrics.jsonl and of samples.jsonl."""

    name: str
    run_dir: Path
    config: Config
    parameters: int
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    state: str  # running, finished or stopped

    @property
    def symbols_per_step(self) -> float:
        """Symbols that an update reads, on average."""
        streams = self.config.streams
        return streams.batch_size * streams.window * (1 - streams.short_window_probability / 2)

    def curve(self, split: str, figure: str, by: str = "steps") -> tuple[list[float], list[float]]:
        """The points (x, y) of `figure` of a split, such as bits_per_byte.

        Args:
          by: steps, symbols (read in training) or time (seconds over all starts).
        """
        lines = [line for line in self.records if line["split"] == split and line[figure] is not None]
        if by == "time":
            return [line["seconds"] for line in lines], [line[figure] for line in lines]
        scale = self.symbols_per_step if by == "symbols" else 1
        return [line["step"] * scale for line in lines], [line[figure] for line in lines]

    def row(self, figure: str) -> dict[str, Any]:
        """The run in figures: a row of the table of `launch.compare`; null where there is none yet.

        The best is of the lines that compare with the last: by the checkpoints, which know the settings of evaluation
        that each was scored with; where they name none of them, of the lines that scored as many symbols as the last.
        """
        last = self.records[-1] if self.records else {}
        scored = [line for line in self.records if line["split"] == "valid" and line[figure] is not None]
        alike = [line for line in scored if line.get("scored_symbols") == scored[-1].get("scored_symbols")]
        scores = [(line[figure], line["step"]) for line in alike]
        trained = [line for line in self.records if line["split"] == "train"]
        checkpoints = StepDirectory(self.run_dir / "checkpoints")
        best_steps = checkpoints.by_score()[:1]
        of_best = [score for score in scores if score[1] in best_steps]
        best, best_step = min(of_best[-1:] or scores, default=(None, None))
        # A run that was stopped between two lines has saved a later step than the last one has.
        step = max([last.get("step", 0), *checkpoints.steps()])
        return {
            "run": self.name,
            "state": self.state,
            "step": step,
            "num_steps": self.config.training.num_steps,
            "best": best,
            "best_step": best_step,
            "last": scores[-1][0] if scores else None,
            "train": trained[-1][figure] if trained else None,
            "symbols": round(step * self.symbols_per_step),
            "symbols_per_second": trained[-1]["symbols_per_second"] if trained else None,
            "parameters": self.parameters,
            "seconds": last.get("seconds"),
        }


def read(run_dir: Path, name: str = "") -> History:
    """Reads the run in `run_dir`.  Raises ValueError where there is none or it is damaged."""
    config, identity = run_directory.read(run_dir)
    records = _lines(run_dir / "metrics.jsonl")
    parameters = estimate.count_parameters(config, identity.vocabulary.size)
    state = "stopped"
    # A run that goes on to more steps has the last line of its first end until it writes another one.
    is_last = config.training.stop_after > 0 or any(r["step"] >= config.training.num_steps for r in records[-1:])
    if is_last and any("state_digest" in record for record in records[-1:]):
        state = "finished"
    elif time.time() - _last_heartbeat(run_dir) < SILENT:
        state = "running"
    return History(name or str(run_dir), run_dir, config, parameters, records, _lines(run_dir / "samples.jsonl"), state)


def read_all(run_dirs: Sequence[Path]) -> list[History]:
    """Reads several runs, named as by `names`.  Raises ValueError as `read`."""
    return [read(path, name) for path, name in zip(run_dirs, names(run_dirs), strict=True)]


def names(run_dirs: Sequence[Path]) -> list[str]:
    """Returns names of runs: those of their directories, as briefly as tells them apart."""
    last = [run_directory.name_of(path) for path in run_dirs]
    return [name if last.count(name) == 1 else str(path) for path, name in zip(run_dirs, last, strict=True)]


def common_figure(runs: Sequence[History]) -> str:
    """The figure by which all of `runs` can be compared: per byte if they have it, else per character, else per symbol.

    Bits per symbol of different vocabularies are not the same unit.  Where all are of characters, it is per character,
    which lines of training have, too.
    """
    lines = [record for run in runs for record in run.records if record["split"] == "valid"]
    lines = lines or [record for run in runs for record in run.records]
    order = ["bits_per_byte", "bits_per_character", "bits_per_symbol"]
    if all(run.config.corpus.vocabulary == "characters" for run in runs):
        order[:2] = order[1::-1]
    return next((figure for figure in order if all(line[figure] is not None for line in lines)), FIGURES[0])


def differing_settings(runs: Sequence[History]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs: name -> their values, in the order of the runs."""
    found = {}
    for name, (section, _) in config_lib.flatten(Config()).items():
        values = [getattr(getattr(run.config, section), name) for run in runs]
        if any(value != values[0] for value in values):
            found[name] = values
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may be being written, those that are JSON objects."""
    text = path.read_text("utf-8", "replace") if path.exists() else ""
    found = []
    for line in text.split("\n")[:-1]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # half a line of a process that was killed
            continue
        found += [value] if isinstance(value, dict) else []
    return found


def _last_heartbeat(run_dir: Path) -> float:
    """Unix seconds of the newest heartbeat; 0 where there is none."""
    newest = 0.0
    for path in (run_dir / HEARTBEATS).glob("process-*.json"):
        try:
            newest = max(newest, float(json.loads(path.read_text("utf-8"))["time"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return newest
