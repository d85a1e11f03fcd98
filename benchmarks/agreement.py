"""What it costs processes to agree: functions of charlstm.distributed, called by real processes of this machine.

    python -m benchmarks.agreement [--quick] [--most=128] [--agreements=1000] [--rounds=3]

The processes are light: each joins the coordination service as that of a run does, but starts no devices.  All share
this machine's cores, so the time of an agreement is the time that they need together.  The processor time of the first
process, which has the service, grows with the processes of a cluster alike: a line through it estimates 1,024.

Calls are those of a process to the service.  Milliseconds are the first process's, of its processor on all threads.
"""

import multiprocessing
import socket
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import linear_regression, median
from typing import Any, NamedTuple
from unittest import mock

import jax

from benchmarks import rows as rows_lib
from benchmarks.rows import Rows
from charlstm import distributed
from data_pipeline.worker_process import end_with_parent

COUNTS = (2, 4, 8, 16, 32, 64, 128)
FUNCTIONS = ("all_gather_str", "latest_of_all")
LEAST = 20  # agreements of a job, however many processes it has
COUNTED = 5  # calls of a function before it is timed, whose own calls are counted
PATIENCE = 120  # seconds that a process may be silent: all share a few cores

SERVER = multiprocessing.get_context("forkserver")  # imports JAX once, for all processes


class Cost(NamedTuple):
    """Of one call of a function, in one process."""

    calls: float  # to the coordination service
    seconds: float  # median
    processor: float  # seconds of all threads, mean


class Counted:
    """A client of the coordination service that counts the calls to it."""

    def __init__(self, client: Any) -> None:
        self._client, self.calls = client, 0

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self._client, name)


def run(rows: Rows, quick: bool, most: int, agreements: int, rounds: int) -> None:
    counts = (2, 3) if quick else tuple(count for count in COUNTS if count <= most)
    if len(counts) < 2:
        raise SystemExit(f"--most={most}: a line needs two counts of processes: use {COUNTS[1]} or more")
    times = {count: LEAST if quick else max(LEAST, agreements // count) for count in counts}
    SERVER.set_forkserver_preload(["charlstm.distributed", "concurrent.futures.process"])
    jobs = rows_lib.alternate({n: partial(job, n, times[n]) for n in counts}, 1 if quick else rounds)
    for function in FUNCTIONS:
        line = []
        for count in counts:
            members = [[costs[function] for costs in found] for found in jobs[count]]
            taken = rows_lib.spread([1000 * first.seconds for first, *_ in members])
            processor = rows_lib.spread([1000 * first.processor for first, *_ in members])
            line.append(processor.median)
            rows.add(
                function=function,
                processes=count,
                calls=max(cost.calls for found in members for cost in found),
                milliseconds=taken.median,
                quartiles=taken.quartiles,
                processor_milliseconds=processor.median,
                processor_quartiles=processor.quartiles,
                of_another_process=1000 * median(cost.processor for _, *others in members for cost in others),
            )
        slope, least = linear_regression(counts, line)
        estimates = {f"processor_milliseconds_of_{n}": least + slope * n for n in (8, 128, 1024)}
        rows.add(function=function, milliseconds_a_process=slope, besides=least, **estimates)


def job(count: int, times: int) -> list[dict[str, Cost]]:
    """The costs of each function, for each of `count` processes, which call it so many `times`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # One that outlived the benchmark would wait for the others: JAX catches SIGTERM.
    with ProcessPoolExecutor(count, SERVER, end_with_parent) as pool:
        return list(pool.map(partial(member, count=count, port=port, times=times), range(count)))


def member(index: int, count: int, port: int, times: int) -> dict[str, Cost]:
    """The costs of each function for process number `index`."""
    # JAX asks its devices for these two; to start them would take memory, and half a second.
    with mock.patch.multiple(jax, process_count=lambda: count, process_index=lambda: index):
        distributed.join(f"127.0.0.1:{port}", count, index, PATIENCE)
        agree = cost(lambda: distributed.all_gather_str("yes"), times)
        publish = cost(lambda: distributed.latest_of_all("wait", index), times)
        distributed.distributed.global_state.shutdown()
    return dict(zip(FUNCTIONS, (agree, publish), strict=True))


def cost(call: Callable[[], object], times: int) -> Cost:
    """The cost of a `call`, which all processes make side by side so many `times`."""
    state = distributed.distributed.global_state
    call()  # the first has nothing to clear away
    client, state.client = state.client, (counted := Counted(state.client))
    for _ in range(COUNTED):
        call()
    state.client = client
    distributed.all_gather_str("")
    taken, before = list[float](), time.process_time()
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    distributed.all_gather_str("")  # the first process answers until the last one has called
    processor = (time.process_time() - before) / times
    return Cost(counted.calls / COUNTED, median(taken), processor)


if __name__ == "__main__":
    rows_lib.main("agreement", run, most=128, agreements=1000, rounds=3)
