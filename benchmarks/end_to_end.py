"""`launch.train` itself beside a plain PyTorch script that does the same job: same model, same text.

    python -m benchmarks.end_to_end [--quick] [--steps=200] [--rounds=3] [--only=speed,start,stall]

Speed is read from the lines that both write of their steps, from the first line on, so that compiling is no part of
it; each runs with two allocator settings, all taking turns.  The time to the first step is that from the start of the
process to its line, with an empty compilation cache and with what that start left.  A checkpoint's stall is what a save
holds the loop up, and how much longer the steps take while it is written: the half after it beside the half after that.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks import rows as rows_lib
from benchmarks.peers.recipe import CLIP, LEARNING_RATE
from benchmarks.rows import Rows
from benchmarks.shapes import QUICK, SHAPES, Shape
from benchmarks.workers import environments

FIFTY_MILLION = Shape(256, 256, 1312, 4, 4, 8)  # parameters; short windows, so that saves come soon
QUICK_OF_BYTES = replace(QUICK, V=256)
BETWEEN_SAVES = 40  # steps, of some .3 seconds: a save is to be written before the next one comes
MINUTE = 60.0
MEASURES = ("speed", "start", "stall")
Lines = list[dict[str, Any]]


class Job:
    """The text, and where runs of it live."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self._folder, self._text, self._numbers = folder, folder / "text.txt", count()
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(path.read_bytes() for path in files)
        self._text.write_bytes((text * 10)[: megabytes * 10**6])
        command = [
            sys.executable,
            "-m",
            "launch.prepare",
            f"--input={self._text}",
            f"--output={folder}/corpus",
        ]
        subprocess.run([*command, "--valid_fraction=0", "--test_fraction=0"], check=True, stderr=subprocess.PIPE)

    def ours(
        self, shape: Shape, environment: dict[str, str], steps: int, every: int, save: int, processes: int = 0
    ) -> Lines:
        """launch.train's lines, or launch.local's where a number of processes is given, of two logical shards then."""
        flags = {
            "corpus": self._folder / "corpus", "batch_size": shape.B, "window": shape.T, "hidden_size": shape.H,
            "num_layers": shape.L, "embedding_size": shape.E, "clip_norm": CLIP, "learning_rate": LEARNING_RATE,
            "num_steps": steps, "log_every": every, "checkpoint_every": save, "evaluate_every": 0, "sample_every": 0,
        }  # fmt: skip
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self._folder / "compiled")} | environment
        run_dir = self._run_dir()
        program = ["launch.train"]
        if processes:
            program = [
                "launch.local",
                f"--processes={processes}",
                "--devices_per_process=1",
                "--",
                "--logical_shards=2",
            ]
        arguments = [f"--run_dir={run_dir}", *(f"--{name}={value}" for name, value in flags.items())]
        return _run([*program, *arguments], run_dir, cache)

    def pytorch(self, shape: Shape, environment: dict[str, str], steps: int, every: int, save: int) -> Lines:
        settings = {"shape": asdict(shape), "num_steps": steps, "log_every": every, "checkpoint_every": save}
        run_dir = self._run_dir()
        command = ["benchmarks.peers.pytorch_train", str(self._text), str(run_dir), json.dumps(settings)]
        return _run(command, run_dir, environment)

    def cold(self, shape: Shape) -> Lines:
        """Our first steps with an empty cache."""
        empty = tempfile.mkdtemp(dir=self._folder)
        return self.ours(shape, {"JAX_COMPILATION_CACHE_DIR": empty}, steps=2, every=1, save=0)

    def _run_dir(self) -> Path:
        return self._folder / f"run-{next(self._numbers)}"


def _run(command: list[str], run_dir: Path, environment: dict[str, str]) -> Lines:
    """Runs a program to its end: its lines; the first has the seconds until it `appeared` after the program's start."""
    began, metrics, appeared = time.monotonic(), run_dir / "metrics.jsonl", None
    with subprocess.Popen(
        [sys.executable, "-m", *command], env=os.environ | environment, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and appeared is None:
            time.sleep(0.005)
            if metrics.exists() and metrics.stat().st_size:
                appeared = time.monotonic() - began
        _, words = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{command[0]} has ended with status {process.returncode}: {words}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[0]["appeared"] = appeared
    return lines


def run(rows: Rows, quick: bool, steps: int, rounds: int, only: str) -> None:
    chosen = only.split(",")
    if unknown := set(chosen) - set(MEASURES):
        raise SystemExit(f"--only={only}: there is no {unknown.pop()}: use some of {', '.join(MEASURES)}")
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), 1 if quick else 8)
        shape = QUICK_OF_BYTES if quick else SHAPES[1]
        if quick:
            steps, rounds = 20, 1
        if "speed" in chosen:
            compare_speed(rows, job, shape, steps, rounds, environments(quick))
        if "start" in chosen:
            first_steps(rows, job, shape, rounds)
        if "stall" in chosen:
            stalls(rows, job, shape if quick else FIFTY_MILLION, 1 if quick else 5)


def compare_speed(
    rows: Rows, job: Job, shape: Shape, steps: int, rounds: int, choice: dict[str, dict[str, str]]
) -> None:
    programs = {"ours": job.ours, "PyTorch": job.pytorch}
    timed = {
        (name, setting): partial(start, shape, environment, steps, max(1, steps // 10), 0)
        for setting, environment in choice.items()
        for name, start in programs.items()
    }
    found = rows_lib.alternate(timed, rounds)
    seconds = {key: [seconds_a_step(lines) for lines in runs] for key, runs in found.items()}
    best = {name: min((s for n, s in timed if n == name), key=lambda s: median(seconds[name, s])) for name in programs}
    for (name, setting), own in seconds.items():
        waits = [line["input_wait"] for lines in found[name, setting] for line in lines[1:]] if name == "ours" else []
        rows.add(
            shape=str(shape),
            contestant=name,
            environment=setting + (", the better" if setting == best[name] else ""),
            steps=steps,
            **rows_lib.compared(shape.symbols, own, seconds["ours", best["ours"]]),
            input_wait=mean(waits) if waits else None,
        )


def seconds_a_step(lines: Lines) -> float:
    first, last = lines[0], lines[-1]
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def first_steps(rows: Rows, job: Job, shape: Shape, rounds: int) -> None:
    job.ours(shape, {}, steps=2, every=1, save=0)  # fills the cache
    timed = {
        "ours, cache empty": partial(job.cold, shape),
        "ours, cache warm": partial(job.ours, shape, {}, steps=2, every=1, save=0),
        "PyTorch": partial(job.pytorch, shape, {}, steps=2, every=1, save=0),
    }
    for name, runs in rows_lib.alternate(timed, rounds).items():
        spread = rows_lib.spread([lines[0]["appeared"] for lines in runs])
        rows.add(shape=str(shape), contestant=name, seconds_to_first_step=spread.median, quartiles=spread.quartiles)


def stalls(rows: Rows, job: Job, shape: Shape, saves: int) -> None:
    """The first interval warms up; each save is that at the beginning of another one."""
    for name, start in {"ours": job.ours, "PyTorch": job.pytorch}.items():
        lines = start(shape, {}, BETWEEN_SAVES * (saves + 1), 1, BETWEEN_SAVES)
        held, slowed = [], []
        for first in range(BETWEEN_SAVES, len(lines), BETWEEN_SAVES):
            own = lines[first - 1 : first + BETWEEN_SAVES]
            passed = [after["seconds"] - before["seconds"] for before, after in pairwise(own)]
            rate = own[1].get("symbols_per_second")  # of ours: without the time held up
            held.append(passed[0] - shape.symbols / rate if rate else own[1]["saving"])
            passed[0] -= held[-1]
            half = BETWEEN_SAVES // 2
            slowed.append(sum(passed[:half]) - sum(passed[half:]))
        stall = rows_lib.spread([h + s for h, s in zip(held, slowed, strict=True)])
        rows.add(
            shape=str(shape),
            parameters=shape.parameters,
            contestant=name,
            saves=saves,
            seconds_held_up=median(held),
            seconds_slowed_after=median(slowed),
            stall_seconds=stall.median,
            quartiles=stall.quartiles,
            of_a_minute=stall.median / MINUTE,
        )


if __name__ == "__main__":
    rows_lib.main("end_to_end", run, steps=200, rounds=3, only=",".join(MEASURES))
