"""What flagfiles reach: each with several seeds, scored on validation and test; the mean, and the lowest and highest.

    python -m benchmarks.seeds --flagfiles=small,quickstart --corpora=tinyshakespeare --folder=studies/seeds

A corpus belongs to each flagfile, in their order; where there is none, as in --corpora=,tinyshakespeare, it is the
flagfile's own.  --also has more flags for all of them, with commas.  Every run is an ordinary run directory below
--folder: the same command again goes on with what was cut short, and prints the table; one of other settings or another
corpus is refused.  A score is that of the checkpoint that is best on validation.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

from benchmarks import rows as rows_lib
from benchmarks import runs
from benchmarks.rows import Rows
from charlstm.report import history

CONFIGS = Path(__file__).parent.parent / "configs"
QUICK = "--hidden_size=16", "--num_layers=1", "--num_steps=8", "--evaluate_every=4", "--sample_every=0"


def run(rows: Rows, quick: bool, flagfiles: str, corpora: str, folder: str, seeds: str, also: str) -> None:
    more = [*(QUICK if quick else ()), *filter(None, also.split(","))]
    names, of_each = flagfiles.split(","), corpora.split(",")
    if len(of_each) > len(names) or len(set(names)) < len(names):
        raise SystemExit(
            f"--flagfiles={flagfiles} --corpora={corpora}: name each flagfile once, its corpus in its place"
        )
    for name, corpus in itertools.zip_longest(names, of_each):
        flags = [f"--flagfile={CONFIGS / name}.flags", *([f"--corpus={corpus}"] if corpus else []), *more]
        made = {seed: Path(folder, "quick" if quick else "") / f"{name}-{seed}" for seed in seeds.split(",")}
        for seed, run_dir in made.items():
            runs.train([*flags, f"--seed={seed}"], run_dir)
        report(rows, name, [*made.values()])


def report(rows: Rows, name: str, run_dirs: list[Path]) -> None:
    """Adds the row of a flagfile: bits per symbol of the vocabulary, and minutes of each run, evaluations included."""
    of_seeds = [history.read(run_dir) for run_dir in run_dirs]
    config, figures = of_seeds[0].config, [one.row("bits_per_symbol") for one in of_seeds]
    scores = {"validation": [figure["best"] for figure in figures]}
    if config.corpus.test or (not config.corpus.train and config.corpus.test_fraction):
        scores["test"] = [score(one.run_dir) for one in of_seeds]
    row = {"flagfile": name, "parameters": of_seeds[0].parameters, "steps": config.training.num_steps}
    for split, bits in scores.items():
        row |= {split: round(mean(bits), 4), f"{split}_range": (round(min(bits), 4), round(max(bits), 4))}
    rows.add(**row, seeds=len(of_seeds), minutes=tuple(round(figure["seconds"] / 60, 1) for figure in figures))


def score(run_dir: Path) -> float:
    """Returns the bits per symbol of the test split."""
    command = [sys.executable, "-m", "launch.evaluate", f"--run_dir={run_dir}", "--split=test", "--format=json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)["bits_per_symbol"]


if __name__ == "__main__":
    rows_lib.main("seeds", run, flagfiles="small", corpora="", folder="studies/seeds", seeds="0,1,2", also="")
