"""Three models on one text for equal minutes: ours, `torch.nn.LSTM` in a script, and a small transformer in another.

    python -m benchmarks.equal_time --text=tinyshakespeare.txt --minutes=5 --plot=equal_time.svg

The first 90 % of the text are for training, the last 10 % are scored, by bytes.  Ours goes first, by
configs/small.flags with as many steps as take about so many minutes here; the others have the seconds that it took.
All seconds count from the start of a program: imports, compiling and evaluations, eight each, are included.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import rows as rows_lib
from benchmarks.rows import Rows
from charlstm.config import Config
from charlstm.report import curves, history

PARTS = 8  # evaluations
OF_STEPS = 0.85  # part of the time that is for steps; the rest is for compiling and for evaluations
VALID = 0.1
OURS = "charlstm, configs/small.flags"
PEERS = {"PyTorch nn.LSTM": "lstm", "PyTorch transformer": "transformer"}


class Text(NamedTuple):
    """A text on disk: whole, and its two parts."""

    whole: Path
    train: Path
    valid: Path


class Scores(NamedTuple):
    """Bits per byte of a contestant by its seconds."""

    seconds: list[float]
    bits: list[float]
    steps: int
    parameters: int


def run(rows: Rows, quick: bool, text: str, minutes: float, plot: str, seed: int) -> None:
    jax.config.update("jax_platforms", "cpu")  # parameters are only counted in this process
    minutes = 0.1 if quick else minutes
    with tempfile.TemporaryDirectory() as folder:
        parts = split(Path(text).read_bytes() if text else standard_library()[: 10**5 if quick else None], Path(folder))
        small = ["--hidden_size=32", "--num_layers=1", "--batch_size=8"] if quick else []
        found = {OURS: ours(parts, 60 * minutes, seed, small)}
        rows.add(**fields(OURS, found[OURS], seed))  # as it comes: the others take as long again
        for name, kind in PEERS.items():
            found[name] = peer(kind, parts, found[OURS].seconds[-1], seed, small)
            rows.add(**fields(name, found[name], seed))
    if plot:
        lines = {name: (scores.seconds, scores.bits) for name, scores in found.items()}
        Path(plot).write_text(curves.lines_svg(lines, "seconds", "bits per byte, validation"))


def fields(name: str, scores: Scores, seed: int) -> dict[str, Any]:
    """Returns the row of a contestant."""
    return {
        "contestant": name,
        "parameters": scores.parameters,
        "steps": scores.steps,
        "seconds": round(scores.seconds[-1], 1),
        "bits_per_byte": round(scores.bits[-1], 4),
        "best": round(min(scores.bits), 4),
        "seed": seed,
    }


def standard_library() -> bytes:
    """A megabyte of Python, where no text is named."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return b"".join(path.read_bytes() for path in files)[: 10**6]


def split(content: bytes, folder: Path) -> Text:
    """Writes the text and its parts into `folder`."""
    border = int((1 - VALID) * len(content))  # as nanoGPT cuts
    parts = {"whole": content, "train": content[:border], "valid": content[border:]}
    for name, part in parts.items():
        (folder / f"{name}.txt").write_bytes(part)
    return Text(*(folder / f"{name}.txt" for name in Text._fields))


def ours(text: Text, seconds: float, seed: int, small: list[str]) -> Scores:
    """Trains by configs/small.flags, as many steps as fill about `seconds`, a multiple of PARTS."""
    command = [
        *(sys.executable, "-m", "launch.train", "--flagfile=configs/small.flags", *small, f"--seed={seed}"),
        *(f"--train={text.train}", f"--valid={text.valid}", f"--cache_dir={text.whole.parent / 'cache'}"),
        *("--evaluate_symbols=0", "--sample_every=0", "--checkpoint_every=0"),
    ]
    told = subprocess.run([*command, "--dry_run", "--dry_run_format=json"], check=True, stdout=subprocess.PIPE)
    steps = max(1, round(OF_STEPS * seconds / json.loads(told.stdout)["seconds_per_step"] / PARTS)) * PARTS
    run_dir = text.whole.parent / "run"
    flags = [f"--num_steps={steps}", f"--evaluate_every={steps // PARTS}", f"--run_dir={run_dir}"]
    began = time.monotonic()
    subprocess.run([*command, *flags], check=True)
    of_run = history.read(run_dir)
    within, bits = of_run.curve("valid", "bits_per_byte", "time")
    before = time.monotonic() - began - within[-1]  # the loop's own clock begins later
    return Scores([before + at for at in within], bits, steps, of_run.parameters)


def peer(kind: str, text: Text, seconds: float, seed: int, small: list[str]) -> Scores:
    """Trains a PyTorch script for `seconds`."""
    preset = Config.recipe("small")
    settings: dict[str, Any] = {
        **{name: getattr(preset.model, name) for name in ("embedding_size", "hidden_size", "num_layers")},
        **{name: getattr(preset.streams, name) for name in ("batch_size", "window")},
        **{flag[2:].partition("=")[0]: int(flag.partition("=")[2]) for flag in small},
        "learning_rate": preset.optimizer.learning_rate,
        "dropout": preset.model.layer_dropout,
        "began": time.time(),
        "seconds": seconds,
        "seed": seed,
    }
    command = [sys.executable, "-m", "benchmarks.peers.equal_time", kind, str(text.train), str(text.valid)]
    done = subprocess.run([*command, json.dumps(settings)], check=True, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    last = lines[-1]
    return Scores(
        [line["seconds"] for line in lines], [line["bits"] for line in lines], last["step"], last["parameters"]
    )


if __name__ == "__main__":
    rows_lib.main("equal_time", run, text="", minutes=5.0, plot="", seed=0)
