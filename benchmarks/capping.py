"""Does a bound on the cell state help?  A grid of short runs: texts, bounds, layers, types, how far state is carried.

    python -m benchmarks.capping --texts=tinyshakespeare,books=train.txt:valid.txt --folder=studies/capping

A text is a corpus's name or path, or a training and a validation text, and may be given a NAME.  All models of a grid
have as many parameters, whatever their cell and layers, and make the same updates of the same symbols; the rate falls
as a cosine.  Every run is an ordinary run directory below --folder: the same command again skips what is finished, goes
on with what was cut short, and prints the table of all that is there.  With --minutes no run is begun after these.
"""

import bisect
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax

from benchmarks import rows as rows_lib
from benchmarks import runs
from benchmarks.rows import Rows
from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.report import history
from charlstm.run import estimate

BATCH, WINDOW, EMBEDDING = 32, 64, 64
# Coupled gates are the GRU's: what is let in and what is kept add up to one.
BOUNDS = {
    "plain": ["--cell=lstm"],
    "capped": ["--cell=lstm", "--cap_input_gate"],
    "gru": ["--cell=gru"],
    "layer norm": ["--cell=layer_norm_lstm"],
}
IN_BFLOAT16 = ("plain", "capped")
# Windows before the state of a stream is reset, on average; 0: never.
CARRIED = {"short": 4, "long": 0}


class Cell(NamedTuple):
    """One run of the grid."""

    text: str
    dtype: str
    layers: int
    carried: str
    bound: str

    @property
    def directory(self) -> str:
        return "-".join(map(str, self)).replace(" ", "_")


def run(
    rows: Rows,
    quick: bool,
    texts: str,
    folder: str,
    layers: str,
    parameters: int,
    steps: int,
    minutes: float,
    seed: int,
) -> None:
    jax.config.update("jax_platforms", "cpu")  # parameters are only counted in this process
    named = dict(name_of(one) for one in texts.split(","))
    counts = [int(count) for count in layers.split(",")]
    if quick:
        counts, parameters, steps = counts[:1], 40_000, 8
    cells, last = grid(list(named), counts), time.monotonic() + 60 * minutes if minutes else None
    into = Path(folder) / f"{parameters}-{steps}-{seed}"
    try:
        for cell in cells:
            if last and time.monotonic() > last:
                break
            train(cell, named[cell.text], parameters, steps, seed, into / cell.directory)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on; what is finished:", file=sys.stderr)
    report(rows, cells, into)


def name_of(spec: str) -> tuple[str, list[str]]:
    """Returns the name of a text, and the flags that name it."""
    name, _, where = spec.rpartition("=")
    corpus, _, valid = where.partition(":")
    flags = [f"--train={corpus}", f"--valid={valid}"] if valid else [f"--corpus={corpus}"]
    return name or Path(corpus).name.partition(".")[0], flags


def grid(texts: list[str], layers: list[int]) -> list[Cell]:
    """Returns the runs, in the order in which they are made: what tells most comes first."""
    return [
        Cell(text, dtype, count, carried, bound)
        for dtype in ("float32", "bfloat16")
        for carried in reversed(CARRIED)
        for text in texts
        for count in layers
        for bound in (BOUNDS if dtype == "float32" else IN_BFLOAT16)
    ]


def settings(cell: Cell, parameters: int) -> list[str]:
    """Returns the flags of a run's model, as wide as `parameters` allow with bytes as symbols."""
    reset = 1 / CARRIED[cell.carried] if CARRIED[cell.carried] else 0
    kind = BOUNDS[cell.bound][0].partition("=")[2]
    model = config_lib.replace(Config(), cell=kind, num_layers=cell.layers, embedding_size=EMBEDDING)

    def count(width: int) -> int:
        return estimate.count_parameters(config_lib.replace(model, hidden_size=width), 256)

    width = bisect.bisect(range(1, 8192), parameters, key=count)
    return [
        *(
            *BOUNDS[cell.bound],
            f"--num_layers={cell.layers}",
            f"--hidden_size={width}",
            f"--compute_dtype={cell.dtype}",
        ),
        *(
            f"--embedding_size={EMBEDDING}",
            f"--batch_size={BATCH}",
            f"--window={WINDOW}",
            f"--reset_probability={reset}",
        ),
    ]


def train(cell: Cell, text: list[str], parameters: int, steps: int, seed: int, run_dir: Path) -> None:
    flags = [
        *(*settings(cell, parameters), *text, "--vocabulary=bytes"),
        *("--optimizer=adam", "--learning_rate=4e-3", "--schedule=cosine", "--warmup_steps=50", "--clip_norm=1"),
        *(f"--num_steps={steps}", f"--checkpoint_every={max(1, steps // 4)}", "--evaluate_every=0", "--sample_every=0"),
        *("--logical_shards=2", "--keep_checkpoints=1", f"--seed={seed}"),
    ]
    if not runs.is_finished(run_dir):
        runs.train(flags, run_dir)


def report(rows: Rows, cells: list[Cell], into: Path) -> None:
    """Adds a row for all that differs but the bound, with the last score of each bound; None: not run yet."""
    for one in dict.fromkeys(cell._replace(bound="") for cell in cells):
        directories = {bound: into / one._replace(bound=bound).directory for bound in BOUNDS}
        made = {bound: history.read(path) for bound, path in directories.items() if runs.is_finished(path)}
        if made:
            scores = {bound: round(made[bound].row("bits_per_byte")["last"], 3) for bound in made}
            rows.add(
                text=one.text,
                dtype=one.dtype,
                layers=one.layers,
                carried=one.carried,
                steps=next(iter(made.values())).config.training.num_steps,
                parameters=max(run.parameters for run in made.values()),
                **{bound.replace(" ", "_"): scores.get(bound) for bound in BOUNDS},
            )


if __name__ == "__main__":
    rows_lib.main(
        "capping",
        run,
        texts="tinyshakespeare",
        folder="studies/capping",
        layers="1,2,4",
        parameters=400_000,
        steps=2000,
        minutes=0.0,
        seed=0,
    )
