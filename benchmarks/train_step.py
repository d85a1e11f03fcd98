"""A full update (embedding, stack, softmax, clipping, Adam): ours beside PyTorch, flax, dm-haiku and autodiff.

    python -m benchmarks.train_step [--quick] [--shapes=1,2] [--cells=lstm] [--rounds=7] [--turn=2] [--only=PyTorch]

Every contestant is a process of its own.  It first runs in each of a few environments (allocator settings, and for
ours a simulated device for every core) and keeps the fastest; then all take turns, and a figure is the median over the
rounds, a ratio the median of the rounds' ratios, each with its quartiles.  The machine's rate of matrix products is
measured in the same rounds, as the better of what JAX and PyTorch reach.  Memory is what an update holds at most beyond
the libraries themselves.  On a GPU ours also runs with the flags that equal bits need there (`workers.FIXED`).
"""

import dataclasses
import os
from statistics import median

from benchmarks import rows as rows_lib
from benchmarks import workers as workers_lib
from benchmarks.rows import Rows
from benchmarks.shapes import LARGE, QUICK, SHAPES, Shape
from benchmarks.workers import FIXED, Worker

PEERS = {
    "ours": "benchmarks.peers.ours.training",
    "PyTorch": "benchmarks.peers.pytorch.training",
    "flax": "benchmarks.peers.autodiff.flax",
    "haiku": "benchmarks.peers.autodiff.haiku",
    "textbook twin": "benchmarks.peers.autodiff.twin",
}
VARIANTS = ("ours by scan", "ours in float32", "ours with fixed kernels")
RATES = ("benchmarks.peers.ours.matrix_product", "benchmarks.peers.pytorch.matrix_product")


def shapes_of(numbers: str, gpu: bool) -> list[Shape]:
    """Those with these numbers, from 1 on; also GRU and RNN at the second, and bfloat16 where it counts."""
    chosen = []
    for number in map(int, numbers.split(",")):
        shape = (*SHAPES, LARGE)[number - 1]
        chosen.append(shape)
        if number == 2:
            chosen += [dataclasses.replace(shape, cell=cell) for cell in ("gru", "rnn")]
        if number == (5 if gpu else 2):
            chosen.append(dataclasses.replace(shape, dtype="bfloat16"))
    return chosen


def run(rows: Rows, quick: bool, shapes: str, cells: str, rounds: int, turn: float, only: str) -> None:
    workers_lib.TURN = turn
    gpu, names = workers_lib.has_gpu(), only.split(",") if only else []
    if unknown := set(names) - {*PEERS, *VARIANTS}:
        raise SystemExit(f"--only={only}: there is no {unknown.pop()}: use some of {', '.join((*PEERS, *VARIANTS))}")
    for shape in [QUICK] if quick else shapes_of(shapes or ("1,2,3,4,5" if gpu else "1,2,3,4"), gpu):
        if shape.cell in cells.split(","):
            compare(rows, shape, 2 if quick else rounds, gpu, quick, names)


def compare(rows: Rows, shape: Shape, rounds: int, gpu: bool, quick: bool, only: list[str]) -> None:
    """Adds a row for each contestant at this shape: ours, and of the others those in `only`; all where it is empty."""
    choice = workers_lib.environments(quick)
    matches: dict[str, tuple[str, Shape, dict[str, str]]] = {name: (maker, shape, {}) for name, maker in PEERS.items()}
    if shape.dtype == "bfloat16":
        matches = {name: matches[name] for name in ("ours", "PyTorch")}
        matches["ours in float32"] = PEERS["ours"], dataclasses.replace(shape, dtype="float32"), {}
    if gpu and shape.cell == "lstm":
        matches["ours by scan"] = PEERS["ours"], shape, {"lstm_backend": "scan"}
    if gpu or "ours with fixed kernels" in only:
        matches["ours with fixed kernels"] = PEERS["ours"], shape, {}
    matches = {name: match for name, match in matches.items() if name == "ours" or not only or name in only}
    workers: dict[str, Worker] = {}
    settings = {}
    for name, (maker, own_shape, options) in matches.items():
        own = choice | per_core(choice) if name.startswith("ours") and not (quick or gpu) else choice
        if name == "ours with fixed kernels":
            own = {setting: environment | FIXED for setting, environment in choice.items()}
        settings[name], workers[name] = workers_lib.fastest(
            maker, {"shape": dataclasses.asdict(own_shape)} | options, own, wait=False
        )
    size = 256 if quick else 8192 if gpu else 2048
    for maker in RATES:
        kept_pages = [*choice.values()][-1]
        workers[maker] = Worker(maker, {"size": size, "dtype": shape.dtype}, kept_pages, wait=False)
    for worker in workers.values():
        worker.warm()
    seconds = rows_lib.alternate({name: worker.seconds for name, worker in workers.items()}, rounds)
    rate = max(2 * size**3 / median(seconds[maker]) for maker in RATES)
    for name in matches:
        memory, typical = workers[name].memory, median(seconds[name])
        rows.add(
            shape=str(shape),
            contestant=name,
            environment=settings[name],
            device=workers[name].device,
            **rows_lib.compared(shape.symbols, seconds[name], seconds["ours"]),
            milliseconds=1000 * typical,
            of_matrix_rate=shape.flops / typical / rate,
            gigaflops=rate / 1e9,
            megabytes=memory and round(memory / 1e6, 1),
        )
    for worker in workers.values():
        worker.close()


def per_core(choice: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The environments of `choice` with a simulated device for every core, which computes its own streams' gradient."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={os.cpu_count()}"
    return {f"{name}, a device a core": env | {"XLA_FLAGS": flags} for name, env in choice.items()}


if __name__ == "__main__":
    rows_lib.main("train_step", run, shapes="", cells="lstm,gru,rnn", rounds=7, turn=workers_lib.TURN, only="")
