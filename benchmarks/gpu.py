"""What only a GPU can show, in eight minutes: values beside float64, bits, checkpoints that cross to a CPU, speed.

    make gpu                                            # all of it
    python -m benchmarks.gpu --parts=twins,bits         # some
    python -m benchmarks.gpu --quick                    # tiny sizes, to try it on a CPU

Parts, each within its number of seconds: `tests` (those marked gpu), `twins` (every backend of the LSTM beside
float64), `bits` (a run begun twice, and once killed and resumed, each with compiled programs of its own), `crossing`
(a GPU's checkpoint scored on the CPU, and the reverse), and then, one after the other, `update`, `program` and
`sampling`: the benchmarks of these names, beside PyTorch and flax.  Rows go to --file too, a line of json each, as
they come.
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
from pathlib import Path
from typing import Any

from benchmarks import rows as rows_lib
from benchmarks.rows import Rows
from benchmarks.workers import has_gpu

SECONDS = {"tests": 120, "twins": 150, "bits": 200, "crossing": 150, "update": 200, "program": 120, "sampling": 60}
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # several processes share the GPU's memory
ON_CPU = {"JAX_PLATFORMS": "cpu"}
# The backend and the compute dtype of a run, and whether XLA's choice of kernels is fixed.
RUNS = [
    *((backend, dtype, False) for backend in ("scan", "fused") for dtype in ("float32", "bfloat16")),
    ("scan", "bfloat16", True),
    ("fused", "bfloat16", True),
]
FIXED = {"XLA_FLAGS": "--xla_gpu_exclude_nondeterministic_ops=true --xla_gpu_autotune_level=0"}
Add = Callable[..., None]


class Programs:
    """Runs programs of ours in a folder, each bounded by the time that its part has left."""

    def __init__(self, folder: Path, seconds: float, quick: bool) -> None:
        self.folder, self.quick, self._deadline = folder, quick, time.monotonic() + seconds

    def run(self, *command: str, environment: dict[str, str] | None = None, until: Path | None = None) -> str:
        """What `python -m command` prints; killed as soon as the file `until` is there.

        Raises:
          RuntimeError: it failed, or took too long.
        """
        everything = os.environ | SHARED | (environment or {})
        process = subprocess.Popen(
            [sys.executable, "-m", *command], env=everything, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        try:
            while until and process.poll() is None and time.monotonic() < self._deadline:
                if until.exists():
                    os.killpg(process.pid, signal.SIGKILL)
                    break
                time.sleep(0.01)
            out, words = process.communicate(timeout=max(1.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{command[0]} took longer than its part may") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode and not (until and until.exists()):
            raise RuntimeError(f"{command[0]} has ended with status {process.returncode}: {words[-600:]}")
        return out

    def lines(self, *command: str) -> Iterator[str]:
        """The lines that `python -m command` prints, as they come.  Raises as `run`, after those that there were."""
        with tempfile.TemporaryFile("w+") as words:
            process = subprocess.Popen(
                [sys.executable, "-m", *command], env=os.environ | SHARED, text=True, stdout=subprocess.PIPE,
                stderr=words, start_new_session=True,
            )  # fmt: skip
            late = threading.Timer(self._deadline - time.monotonic(), os.killpg, (process.pid, signal.SIGKILL))
            late.start()
            assert process.stdout is not None
            yield from process.stdout
            late.cancel()
            if process.wait():
                words.seek(0)
                said = words.read()[-600:]
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


def tests(programs: Programs, add: Add) -> None:
    flags = [] if programs.quick else ["-m", "gpu"]
    out = programs.run(
        "pytest", "-n", "0", "-p", "no:cacheprovider", *flags, "tests/model/ops/test_lstm_pallas.py",
        "tests/run/test_digest.py",
        environment={"CHARLSTM_TEST_ON_GPU": "1"} if has_gpu() else {},
    )  # fmt: skip
    add(said=out.strip().splitlines()[-1])


def twins(programs: Programs, add: Add) -> None:
    path = str(programs.folder / "reference.npz")
    programs.run("benchmarks.gpu_twins", "reference", path, environment=ON_CPU | {"JAX_ENABLE_X64": "1"})
    for line in programs.run("benchmarks.gpu_twins", "compare", path).splitlines():
        add(**json.loads(line))


def bits(programs: Programs, add: Add) -> None:
    """Four lives of each run: whole, whole again, killed, and resumed; all kinds of runs side by side."""

    def digests(backend: str, dtype: str, fixed: bool) -> dict[str, Any]:
        kind = f"{backend}-{dtype}-{'fixed' if fixed else 'timed'}"
        flags = f"--lstm_backend={backend}", f"--compute_dtype={dtype}"

        def life(name: str, number: int, until: Path | None = None) -> dict[str, Any]:
            place = programs.folder / f"{kind}-{name}"
            compiled = {"JAX_COMPILATION_CACHE_DIR": f"{place}-compiled-{number}"} | (FIXED if fixed else {})
            return programs.train(place, *flags, environment=compiled, until=until)

        whole, again = life("whole", 0), life("again", 1)
        life("killed", 2, programs.folder / f"{kind}-killed/checkpoints/40/checkpoint.json")
        resumed = life("killed", 3)
        same = whole["state_digest"] == again["state_digest"], whole["state_digest"] == resumed["state_digest"]
        return {
            "backend": backend,
            "dtype": dtype,
            "fixed": fixed,
            "again": same[0],
            "killed_and_resumed": same[1],
            "ok": all(same),
        }

    runs = RUNS if has_gpu() else [("scan", "float32", False)]
    with ThreadPoolExecutor(len(runs)) as pool:
        for future in [pool.submit(digests, *run) for run in runs]:
            add(**future.result())


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


def update(programs: Programs, add: Add) -> None:
    given = ["--quick"] if programs.quick else ["--shapes=1,2,5", "--rounds=3", "--turn=0.4", "--only=PyTorch,flax"]
    _rows_of(programs, add, "train_step", *given)


def program(programs: Programs, add: Add) -> None:
    _rows_of(programs, add, "end_to_end", *(["--quick"] if programs.quick else ["--steps=400", "--rounds=1"]))


def sampling(programs: Programs, add: Add) -> None:
    given = ["--quick"] if programs.quick else ["--shapes=2", "--rounds=3", "--samples=1,256"]
    _rows_of(programs, add, "sampling", *given)


def _rows_of(programs: Programs, add: Add, benchmark: str, *flags: str) -> None:
    for line in programs.lines(f"benchmarks.{benchmark}", *flags):
        if line.startswith("{"):
            row = json.loads(line)
            add(**{name: value for name, value in row.items() if name not in ("benchmark", "load")})


BESIDE = {"tests": tests, "twins": twins, "bits": bits, "crossing": crossing}  # nothing of these is timed
ALONE = {"update": update, "program": program, "sampling": sampling}


def run(rows: Rows, quick: bool, parts: str, file: str) -> None:
    chosen = parts.split(",")
    if unknown := set(chosen) - {*BESIDE, *ALONE}:
        raise SystemExit(f"--parts={parts}: there is no {unknown.pop()}: use some of {', '.join((*BESIDE, *ALONE))}")
    with open(file, "w") as out, tempfile.TemporaryDirectory() as folder:

        def do(part: str) -> None:
            def add(**fields: Any) -> None:
                rows.add(part=part, **fields)
                print(json.dumps({"part": part, **fields}), file=out, flush=True)

            own, began = Path(folder, part), time.monotonic()
            own.mkdir()
            try:
                (BESIDE | ALONE)[part](Programs(own, SECONDS[part], quick), add)
            except (RuntimeError, OSError, ValueError, KeyError) as error:
                add(failed=" ".join(str(error).split()))
            add(seconds=round(time.monotonic() - began, 1))

        with ThreadPoolExecutor(len(BESIDE)) as pool:
            list(pool.map(do, [part for part in BESIDE if part in chosen]))
        for part in ALONE:
            if part in chosen:
                do(part)


if __name__ == "__main__":
    rows_lib.main("gpu", run, parts=",".join((*BESIDE, *ALONE)), file="gpu.jsonl")
