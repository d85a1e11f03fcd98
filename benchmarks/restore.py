"""What 1 to 8 processes read of a checkpoint when a run goes on, and how long it takes them.

    python -m benchmarks.restore [--quick] [--most=8] [--rounds=3]

Real processes of this machine, of one CPU device each, restore a checkpoint that another one has written: a share of
its files to verify them, then the arrays.  "dealt" is the program: of arrays that lie whole on every device, a process
reads its share and gets the others over the devices.  "whole" has each process read all of them, as one alone must.

Bytes are those that a process asks of the file system, by the kernel's count.  The files are in memory and the
processes share this machine's cores, so that the seconds say what dividing costs, not what a slow file system gains.
"""

import contextlib
import multiprocessing
import os
import socket
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks import rows as rows_lib
from benchmarks.peers.ours import config_of
from benchmarks.rows import Rows
from benchmarks.scaling import simulated
from benchmarks.shapes import QUICK, SHAPES, Shape
from charlstm import distributed
from charlstm.run import array_files
from charlstm.run.checkpoint import Checkpoints
from charlstm.training import train_state
from data_pipeline.worker_process import end_with_parent

COUNTS = (1, 2, 4, 8)
WAYS = ("dealt", "whole")
PATIENCE = 120  # seconds that a process may be silent: all share a few cores

SPAWN = multiprocessing.get_context("spawn")


class Cost(NamedTuple):
    """Of one restore, in one process."""

    seconds: float  # until the last process is done
    bytes_read: int


def run(rows: Rows, quick: bool, most: int, rounds: int) -> None:
    shape, counts = (QUICK, (1, 2)) if quick else (SHAPES[2], tuple(count for count in COUNTS if count <= most))
    if not counts:
        raise SystemExit(f"--most={most}: there is no number of processes below {COUNTS[0]}")
    os.environ |= simulated(1)
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, SPAWN, end_with_parent) as pool:
            pool.submit(save, shape, folder).result()
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        kinds = [(n, way) for n in counts for way in WAYS if n > 1 or way == WAYS[0]]
        jobs = {(n, way): partial(job, shape, folder, n, way) for n, way in kinds}
        for (n, way), rounds_of_it in rows_lib.alternate(jobs, 1 if quick else rounds).items():
            taken = rows_lib.spread([max(cost.seconds for cost in found) for found in rounds_of_it])
            read = [[cost.bytes_read for cost in found] for found in rounds_of_it]
            rows.add(
                shape=str(shape),
                processes=n,
                arrays=way,
                checkpoint_megabytes=size / 1e6,
                megabytes_of_a_process=rows_lib.spread([max(found) / 1e6 for found in read]).median,
                megabytes_of_all=rows_lib.spread([sum(found) / 1e6 for found in read]).median,
                seconds=taken.median,
                quartiles=taken.quartiles,
            )


def save(shape: Shape, folder: str) -> None:
    """Saves the state that a model of this shape begins with."""
    config, mesh = config_of(shape), distributed.make()
    with Checkpoints(Path(folder), log=print) as checkpoints:
        checkpoints.save(train_state.place(mesh, train_state.init(config, shape.V)), {}, None)


def job(shape: Shape, folder: str, count: int, way: str) -> list[Cost]:
    """The cost of a restore for each of `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(count, SPAWN, end_with_parent) as pool:
        return list(pool.map(partial(member, shape, folder, count, way, port), range(count)))


def member(shape: Shape, folder: str, count: int, way: str, port: int, index: int) -> Cost:
    """The cost for process number `index`."""
    if count > 1:
        distributed.join(f"127.0.0.1:{port}", count, index, PATIENCE)
    abstract = train_state.abstract(config_of(shape), shape.V, distributed.make())
    whole: Any = mock.patch.object(array_files, "_readers", lambda wanted: {})
    with Checkpoints(Path(folder), writable=False, log=print) as checkpoints:
        distributed.all_gather_str("")
        began, before = time.perf_counter(), _bytes_read()
        with whole if way == "whole" else contextlib.nullcontext():
            checkpoints.restore(abstract)
        distributed.all_gather_str("")
        return Cost(time.perf_counter() - began, _bytes_read() - before)


def _bytes_read() -> int:
    """By all system calls of this process so far, from the disk or from memory."""
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    rows_lib.main("restore", run, most=8, rounds=3)
