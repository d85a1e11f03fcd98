"""What only a GPU can show, in eight minutes: values beside float64, bits, checkpoints that cross to a CPU, speed.

    make gpu                                            # all of it
    python -m benchmarks.gpu --parts=twins,bits         # some
    python -m benchmarks.gpu --quick                    # tiny sizes, to try it on a CPU

Parts, side by side: `tests` (those marked gpu), `twins` (every backend of the LSTM beside float64), `bits` (a run begun
twice, and once killed and resumed, each with compiled programs of its own), `crossing` (a GPU's checkpoint scored on
the CPU, and the reverse).  Then, one after the other: `large` and `update` (updates beside PyTorch and flax, by `scan`
too, and with the flags that equal bits need), `program` (launch.train) and `sampling`.  All on one GPU.

Each part has its number of seconds and what those before have left over, and all together have MOST; what takes longer
has failed.  For that flax is left out at the large shape, whose memory it would double, and the GRU and the RNN, starts
and saves everywhere: they are in the benchmarks themselves.  Rows go to --file too, a line of json each, as they come.
The status is 1, and the last line names the rows, where a part has failed or a row is not ok.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

from benchmarks import rows as rows_lib
from benchmarks.rows import Rows
from benchmarks.workers import FIXED, has_gpu

SECONDS = {"tests": 150, "twins": 150, "bits": 150, "crossing": 150}
SECONDS |= {"large": 90, "update": 130, "program": 50, "sampling": 50}
MOST = 480  # seconds of all parts together
SAID = 4000  # characters of what a program said that are kept: its contestant's traceback stands before its own
# Several processes share the memory of one GPU, the first that is given.
SHARED = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0],
}
ON_CPU = {"JAX_PLATFORMS": "cpu"}
# The backend and the compute dtype of a run, and whether XLA's choice of kernels is fixed.
RUNS = [
    *((backend, dtype, False) for backend in ("scan", "fused") for dtype in ("float32", "bfloat16")),
    ("scan", "bfloat16", True),
    ("fused", "bfloat16", True),
]
Add = Callable[..., None]


class Programs:
    """Runs programs of ours in a folder, each bounded by the time that its part has left.

    Args:
      deadline: of `time.monotonic`.
      machine: what `benchmarks.gpu_twins machine` says of it.
    """

    def __init__(self, folder: Path, deadline: float, quick: bool, machine: dict[str, str]) -> None:
        self.folder, self.deadline, self.quick, self.machine = folder, deadline, quick, machine

    def run(self, *command: str, environment: dict[str, str] | None = None, until: Path | None = None) -> str:
        """What `python -m command` prints; killed as soon as the file `until` is there.

        Raises:
          RuntimeError: it failed, or took too long.
        """
        everything = os.environ | SHARED | (environment or {})
        # Into files: a pipe would be full while `until` is waited for, and its end is lost with what took too long.
        with _text_file() as out, _text_file() as words:
            process = subprocess.Popen(
                [sys.executable, "-m", *command], env=everything, stdout=out, stderr=words, start_new_session=True
            )
            try:
                while until and process.poll() is None and time.monotonic() < self.deadline:
                    if until.exists():
                        os.killpg(process.pid, signal.SIGKILL)
                        break
                    time.sleep(0.01)
                status = process.wait(timeout=max(1.0, self.deadline - time.monotonic()))
                failure = f"has ended with status {status}" if status and not (until and until.exists()) else ""
            except subprocess.TimeoutExpired:
                failure = "took longer than its part may"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            printed = _whole(out)
            if failure:  # pytest says on stdout what has failed
                raise RuntimeError(f"{command[0]} {failure}: {(printed + _whole(words))[-SAID:]}")
        return printed

    def lines(self, *command: str) -> Iterator[str]:
        """The lines that `python -m command` prints, as they come.  Raises as `run`, after those that there were."""
        with _text_file() as words:
            process = subprocess.Popen(
                [sys.executable, "-m", *command], env=os.environ | SHARED, text=True, stdout=subprocess.PIPE,
                stderr=words, start_new_session=True,
            )  # fmt: skip
            late = threading.Timer(self.deadline - time.monotonic(), os.killpg, (process.pid, signal.SIGKILL))
            late.start()
            assert process.stdout is not None
            try:
                yield from process.stdout
                process.wait()
            finally:  # also where its reader has failed: it would be timed with what comes after it
                late.cancel()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.returncode:
                said = _whole(words)[-SAID:]
                raise RuntimeError(f"{command[0]} has ended with status {process.returncode}, or took too long: {said}")

    def text(self) -> Path:
        """Two megabytes of the standard library's source."""
        path = self.folder / "text.txt"
        if not path.exists():
            files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
            path.write_bytes(b"".join(file.read_bytes() for file in files)[: 2 * 10**6])
        return path

    def train(self, run_dir: Path, *flags: str, environment: dict[str, str] | None = None, until: Path | None = None):
        """Runs launch.train, and returns the last line of its metrics."""
        H = 64 if self.quick else 256
        given = {
            "corpus": self.text(), "cache_dir": self.folder / "cache", "batch_size": 16 if self.quick else 64,
            "window": 32 if self.quick else 64, "num_layers": 2, "hidden_size": H, "embedding_size": 64,
            "layer_dropout": 0.1, "logical_shards": 4, "num_steps": 60, "log_every": 20, "checkpoint_every": 20,
            "evaluate_every": 60, "sample_every": 0, "run_dir": run_dir,
        }  # fmt: skip
        arguments = [f"--{name}={value}" for name, value in given.items()]
        self.run("launch.train", *arguments, *flags, environment=environment, until=until)
        return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1]) if until is None else {}


def _text_file() -> IO[str]:
    """Opens a file for what a program says, which may be cut within a character."""
    return tempfile.TemporaryFile("w+", errors="replace")


def _whole(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def tests(programs: Programs, add: Add) -> None:
    # Only files that have some: others may import what is not on this machine.
    marked = [str(file) for file in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()]
    chosen = ["-n", "0", "tests/run/test_digest.py"] if programs.quick else ["-n", "8", *marked]
    out = programs.run(
        "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu and not long", "--tb=line",
        "--continue-on-collection-errors", *chosen, environment={"CHARLSTM_TEST_ON_GPU": "1"},
    )  # fmt: skip
    add(said=out.strip().splitlines()[-1])


def twins(programs: Programs, add: Add) -> None:
    path = str(programs.folder / "reference.npz")
    programs.run("benchmarks.gpu_twins", "reference", path, environment=ON_CPU | {"JAX_ENABLE_X64": "1"})
    for line in programs.lines("benchmarks.gpu_twins", "compare", path):
        add(**json.loads(line))


def bits(programs: Programs, add: Add) -> None:
    """Four lives of each run: whole, whole again, killed, and resumed; all kinds of runs side by side."""

    def compare(backend: str, dtype: str, fixed: bool) -> None:
        kind = f"{backend}-{dtype}-{'fixed' if fixed else 'timed'}"
        flags = f"--lstm_backend={backend}", f"--compute_dtype={dtype}"
        add_run = partial(add, backend=backend, dtype=dtype, fixed=fixed)

        def life(name: str, number: int, until: Path | None = None) -> dict[str, Any]:
            place = programs.folder / f"{kind}-{name}"
            compiled = {"JAX_COMPILATION_CACHE_DIR": f"{place}-compiled-{number}"} | (FIXED if fixed else {})
            return programs.train(place, *flags, environment=compiled, until=until)

        try:
            whole, again = life("whole", 0), life("again", 1)
            life("killed", 2, programs.folder / f"{kind}-killed/checkpoints/40/checkpoint.json")
            resumed = life("killed", 3)
        except RuntimeError as error:  # the other kinds have their rows
            add_run(failed=" ".join(str(error).split()))
            return
        same = [whole["state_digest"] == other["state_digest"] for other in (again, resumed)]
        # Kernels that are timed anew may be others, with other bits: only fixed ones are to have the same.
        add_run(again=same[0], killed_and_resumed=same[1], ok=all(same) or not fixed)

    runs = [run for run in RUNS if run[0] in programs.machine["backends"].split(", ")]
    runs = RUNS[:1] if programs.machine["platform"] == "cpu" else runs
    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(lambda run: compare(*run), runs))


def crossing(programs: Programs, add: Add) -> None:
    """A run trained on each device, scored on both."""
    for trained, environment in {"the device": {}, "the CPU": ON_CPU}.items():
        run_dir = programs.folder / f"crossing-{trained.split()[1]}"
        programs.train(run_dir, environment=environment)
        scores, speeds = [], []
        for where in ({}, ON_CPU):
            out = programs.run(
                "launch.evaluate", f"--run_dir={run_dir}", "--split=test", "--format=json", environment=where
            )
            found = json.loads(out)
            scores.append(found["bits_per_byte"])
            speeds.append(found["bytes"] / found["seconds"])
        add(
            trained_on=trained,
            bits_per_byte=scores,
            difference=abs(scores[0] - scores[1]),
            characters_per_second=speeds,
            ok=abs(scores[0] - scores[1]) < 1e-4,
        )


def large(programs: Programs, add: Add) -> None:
    given = ["--quick"] if programs.quick else ["--shapes=5", "--rounds=3", "--turn=0.4"]
    _rows_of(programs, add, "train_step", *given, "--only=PyTorch,ours by scan,ours with fixed kernels")


def update(programs: Programs, add: Add) -> None:
    given = ["--quick"] if programs.quick else ["--shapes=1,2,3,4", "--cells=lstm", "--rounds=3", "--turn=0.4"]
    _rows_of(programs, add, "train_step", *given, "--only=PyTorch,flax,ours by scan,ours with fixed kernels")


def program(programs: Programs, add: Add) -> None:
    given = ["--quick"] if programs.quick else ["--steps=400", "--rounds=1"]
    _rows_of(programs, add, "end_to_end", *given, "--only=speed")


def sampling(programs: Programs, add: Add) -> None:
    given = ["--quick"] if programs.quick else ["--shapes=2", "--rounds=3", "--turn=0.4", "--samples=1,256"]
    _rows_of(programs, add, "sampling", *given)


def _rows_of(programs: Programs, add: Add, benchmark: str, *flags: str) -> None:
    for line in programs.lines(f"benchmarks.{benchmark}", *flags):
        if line.startswith("{"):
            row = json.loads(line)
            add(**{name: value for name, value in row.items() if name not in ("benchmark", "load")})


BESIDE = {"tests": tests, "twins": twins, "bits": bits, "crossing": crossing}  # nothing of these is timed
ALONE = {"large": large, "update": update, "program": program, "sampling": sampling}


def machine_for(quick: bool) -> dict[str, str]:
    """Asks JAX where it runs.  Raises SystemExit where that is not a GPU, and it is not to be tried `quick` either."""
    try:
        found = json.loads(Programs(Path(), time.monotonic() + 60, quick, {}).run("benchmarks.gpu_twins", "machine"))
    except RuntimeError as error:
        raise SystemExit(" ".join(str(error).split())) from None
    if quick or found["platform"] == "gpu":
        return found
    if not has_gpu():
        raise SystemExit("there is no GPU: --quick tries it on a CPU (make gpu BENCH_ARGS=--quick)")
    raise SystemExit(
        f"there is a GPU, and JAX {found['jax']} of {sys.executable} has {found['device']}: install jax[cuda13], or, "
        "for a driver older than 580, jax[cuda12] (make gpu BENCH_EXTRAS=bench,cuda12); --quick tries it on a CPU"
    )


def run(rows: Rows, quick: bool, parts: str, file: str) -> str:
    """Adds the rows of some parts.  Returns which of them are not ok, in a line; "" where all are."""
    chosen, bad, patience = parts.split(","), list[str](), 4 if quick else 1  # a CPU may be busy with other things
    end = time.monotonic() + patience * MOST
    if unknown := set(chosen) - {*BESIDE, *ALONE}:
        raise SystemExit(f"--parts={parts}: there is no {unknown.pop()}: use some of {', '.join((*BESIDE, *ALONE))}")
    machine = machine_for(quick)
    with open(file, "w") as out, tempfile.TemporaryDirectory() as folder:

        def add(**fields: Any) -> None:
            rows.add(**fields)
            print(json.dumps(fields), file=out, flush=True)
            if "failed" in fields or not fields.get("ok", True):
                bad.append(in_words(fields))

        def do(part: str) -> None:
            own, began = Path(folder, part), time.monotonic()
            own.mkdir()
            try:
                programs = Programs(own, deadline(part, chosen, began, end, patience), quick, machine)
                (BESIDE | ALONE)[part](programs, partial(add, part=part))
            except (RuntimeError, OSError, ValueError, KeyError) as error:
                add(part=part, failed=" ".join(str(error).split()))
            add(part=part, seconds=round(time.monotonic() - began, 1))

        add(part="machine", **machine)
        with ThreadPoolExecutor(len(BESIDE)) as pool:
            list(pool.map(do, [part for part in BESIDE if part in chosen]))
        for part in ALONE:
            if part in chosen:
                do(part)
    return f"not ok: {'; '.join(bad)}" if bad else ""


def deadline(part: str, chosen: list[str], began: float, end: float, patience: int) -> float:
    """When a part that `began` must have ended: after its own seconds, or when those of the later parts begin."""
    alone = list(ALONE)
    later = alone[alone.index(part) + 1 :] if part in alone else alone
    left = patience * sum(SECONDS[other] for other in later if other in chosen)
    return min(end, max(began + patience * SECONDS[part], end - left))


def in_words(row: dict[str, Any]) -> str:
    """Names a row by its part and its settings: "twins backend=fused precision=TF32"."""
    found = [f"{k}={v}" for k, v in row.items() if isinstance(v, str | int) and k not in ("part", "failed", "ok")]
    return " ".join([row["part"], *found, *(["has failed"] if "failed" in row else [])])


if __name__ == "__main__":
    rows_lib.main("gpu", run, parts=",".join((*BESIDE, *ALONE)), file="gpu.jsonl")
