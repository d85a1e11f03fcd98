"""One text and equal minutes: ours, `torch.nn.LSTM` in a script, and a small transformer in another.

    python -m benchmarks.equal_time --text=tinyshakespeare --minutes=5 --plot=equal_time.svg
    python -m benchmarks.equal_time --text=train.xz:valid.xz --flagfile=configs/large.flags --peers=lstm --minutes=10
    python -m benchmarks.equal_time --text=train.xz:valid.xz --flagfile=configs/large.flags --only=lstm --minutes=10

A text is a file, also compressed by xz, or the name of one that is downloaded (tinyshakespeare, enwik8, text8).  The
first 90 % of it are for training, the last 10 % are scored, by bytes; or there is a training and a validation text.
Ours goes first, by a flagfile, with as many steps as take about so many minutes here or, without --minutes, with its
own number; the others have the seconds that it took.  With --only=ours, lstm or transformer one goes alone, for so
many minutes.  With --also ours is trained once more, with these flags (between commas).  All seconds count from the
start of a program: imports, compiling and evaluations, eight each, are included.  Of a validation text of more than
some 260 KB pieces are scored meanwhile, and the whole at the end, when the clock has stopped; before it starts, ours
is compiled and a few steps are timed.  Ours has a logical shard for each device that is there, whatever the flagfile
says: more of them keep the bits on more devices, and take as many times as many small kernels.
"""

import json
import lzma
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
from data_pipeline import progress
from data_pipeline.atomic_files import expand_user
from data_pipeline.build import datasets, downloads
from data_pipeline.settings import CorpusSettings

PARTS = 8  # evaluations
OF_STEPS = 0.85  # part of the time that is for steps; the rest is for compiling and for evaluations
VALID = 0.1
PIECES, PIECE = 16, 16_384  # of a long validation text
PEERS = {"lstm": "PyTorch nn.LSTM", "transformer": "PyTorch transformer"}


class Text(NamedTuple):
    """Files of a text: what is trained on, what is scored meanwhile, and what is scored at the end."""

    train: Path
    valid: Path
    final: Path


class Scores(NamedTuple):
    """Bits per byte of a contestant by its seconds, and those of the whole validation text at the end."""

    seconds: list[float]
    bits: list[float]
    final: float
    symbols: int
    steps: int
    parameters: int


def run(
    rows: Rows,
    quick: bool,
    text: str,
    flagfile: str,
    also: str,
    peers: str,
    only: str,
    minutes: float,
    plot: str,
    seed: int,
    folder: str,
) -> None:
    if only not in ("", "ours", *PEERS):
        raise SystemExit(f"--only={only}: there is no {only}: use ours, {' or '.join(PEERS)}")
    if unknown := set(filter(None, peers.split(","))) - {*PEERS}:
        raise SystemExit(f"--peers={peers}: there is no {unknown.pop()}: use some of {', '.join(PEERS)}")
    minutes = 0.1 if quick else minutes
    if only in PEERS and not minutes:
        raise SystemExit(f"--only={only} has no time of ours to keep to: say how long, as --minutes=10")
    jax.config.update("jax_platforms", "cpu")  # parameters are only counted in this process
    with tempfile.TemporaryDirectory() as temporary:
        into = Path(folder or temporary)
        into.mkdir(parents=True, exist_ok=True)
        parts = write_parts(*read(text, quick), into)
        small = ["--hidden_size=32", "--num_layers=1", "--batch_size=8"] if quick else []
        found, seconds = dict[str, Scores](), 60 * minutes

        def add(name: str, scores: Scores) -> None:  # as it comes: the others take as long again
            found[name] = scores
            rows.add(**fields(name, scores, seed))

        name = f"charlstm, {flagfile}"
        if only not in PEERS:
            add(name, ours(parts, flagfile, 60 * minutes, seed, small))
            seconds = found[name].seconds[-1]
        for kind in filter(None, {"": peers, "ours": ""}.get(only, only).split(",")):
            add(PEERS[kind], peer(kind, parts, flagfile, seconds, seed, small))
        if also and only not in PEERS:
            add(f"{name} {also}", ours(parts, flagfile, 60 * minutes, seed, [*small, *also.split(",")]))
        curve = {name: (scores.seconds, scores.bits) for name, scores in found.items()}
        (into / "curves.json").write_text(json.dumps(curve))
    if plot:
        Path(plot).write_text(curves.lines_svg(curve, "seconds", "bits per byte, validation"))


def fields(name: str, scores: Scores, seed: int) -> dict[str, Any]:
    """Returns the row of a contestant."""
    return {
        "contestant": name,
        "parameters": scores.parameters,
        "steps": scores.steps,
        "seconds": round(scores.seconds[-1], 1),
        "characters_per_second": round(scores.symbols / scores.seconds[-1]),  # of all seconds, evaluations as well
        "bits_per_byte": round(scores.bits[-1], 4),
        "best": round(min(scores.bits), 4),
        "final": round(scores.final, 4),
        "seed": seed,
    }


def read(text: str, quick: bool) -> tuple[bytes, bytes]:
    """Returns the training and the validation text of TEXT or TRAIN:VALID; a megabyte of Python where none is named."""
    train, _, valid = text.partition(":")
    if valid:
        return content(train), content(valid)
    files = [] if text else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    whole = content(text) if text else b"".join(path.read_bytes() for path in files)[: 10**5 if quick else 10**6]
    border = int((1 - VALID) * len(whole))  # as nanoGPT cuts
    return whole[:border], whole[border:]


def content(path: str) -> bytes:
    """Returns the bytes of a file, unpacked, or of the text of that name."""
    if path in datasets.DOWNLOADS:
        cache = expand_user(CorpusSettings().cache_dir)
        path = str(downloads.fetch(datasets.DOWNLOADS[path], cache / "downloads", progress.bar()))
    return lzma.decompress(Path(path).read_bytes()) if path.endswith(".xz") else Path(path).read_bytes()


def write_parts(train: bytes, valid: bytes, folder: Path) -> Text:
    """Writes the texts into `folder`: of a long validation text pieces at equal distances, too."""
    starts = [n * (len(valid) - PIECE) // (PIECES - 1) for n in range(PIECES)]
    pieces = b"".join(valid[start : start + PIECE] for start in starts) if len(valid) > PIECES * PIECE else valid
    for name, part in zip(Text._fields, (train, pieces, valid), strict=True):
        (folder / f"{name}.txt").write_bytes(part)
    return Text(*(folder / f"{name}.txt" for name in Text._fields))


def ours(text: Text, flagfile: str, seconds: float, seed: int, small: list[str]) -> Scores:
    """Trains by the flagfile, as many steps as fill about `seconds`, a multiple of PARTS; 0: as many as it says."""
    command = [
        *(sys.executable, "-m", "launch.train", f"--flagfile={flagfile}", *small, f"--seed={seed}", "--corpus="),
        *(f"--train={text.train}", f"--valid={text.valid}", f"--test={text.final}"),
        *(f"--cache_dir={text.train.parent / 'cache'}", "--log_every=50"),
        *("--evaluate_symbols=0", "--sample_every=0", "--checkpoint_every=0", "--logical_shards=0"),
    ]
    steps = Config.from_flagfile(flagfile).training.num_steps
    if seconds:
        told = subprocess.run([*command, "--dry_run", "--dry_run_format=json"], check=True, stdout=subprocess.PIPE)
        steps = max(1, round(OF_STEPS * seconds / json.loads(told.stdout)["seconds_per_step"] / PARTS)) * PARTS
    run_dir = Path(tempfile.mkdtemp(prefix="run-", dir=text.train.parent)) / "run"
    flags = [f"--num_steps={steps}", f"--evaluate_every={steps // PARTS}", f"--run_dir={run_dir}"]
    began = time.monotonic()
    subprocess.run([*command, *flags], check=True)
    ended = time.monotonic() - began
    of_run = history.read(run_dir)
    within, bits = of_run.curve("valid", "bits_per_byte", "time")
    before = ended - within[-1]  # the loop's own clock begins later
    score = [
        *(sys.executable, "-m", "launch.evaluate", f"--run_dir={run_dir}", "--split=test"),
        *("--checkpoint=latest", "--format=json"),
    ]
    final = bits[-1]
    if text.final.stat().st_size > text.valid.stat().st_size:
        printed = subprocess.run(score, check=True, stdout=subprocess.PIPE, text=True).stdout
        final = json.loads(printed)["bits_per_byte"]
    streams = of_run.config.streams
    symbols = steps * streams.batch_size * streams.window
    return Scores([before + at for at in within], bits, final, symbols, steps, of_run.parameters)


def peer(kind: str, text: Text, flagfile: str, seconds: float, seed: int, small: list[str]) -> Scores:
    """Trains a PyTorch script for `seconds`, the LSTM of the flagfile's sizes, rates and batches."""
    given = Config.from_flagfile(flagfile)
    settings: dict[str, Any] = {
        **{name: getattr(given.model, name) for name in ("embedding_size", "hidden_size", "num_layers", "skip")},
        **{name: getattr(given.model, name) for name in ("layer_dropout", "output_dropout", "compute_dtype")},
        **{name: getattr(given.streams, name) for name in ("batch_size", "window")},
        **{name: getattr(given.optimizer, name) for name in ("learning_rate", "beta1", "beta2", "final_fraction")},
        "warmup_steps": given.optimizer.warmup_steps,
        **{flag[2:].partition("=")[0]: int(flag.partition("=")[2]) for flag in small},
        "began": time.time(),
        "seconds": seconds,
        "seed": seed,
    }
    command = [sys.executable, "-m", "benchmarks.peers.equal_time", kind, *map(str, text)]
    done = subprocess.run([*command, json.dumps(settings)], check=True, stdout=subprocess.PIPE, text=True)
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    at, bits = ([line[name] for line in lines] for name in ("seconds", "bits"))
    return Scores(at, bits, last["final"], last["symbols"], lines[-1]["step"], last["parameters"])


if __name__ == "__main__":
    rows_lib.main(
        "equal_time",
        run,
        text="",
        flagfile="configs/small.flags",
        also="",
        peers="lstm,transformer",
        only="",
        minutes=0.0,
        plot="",
        seed=0,
        folder="",
    )
