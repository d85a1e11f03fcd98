"""A process with one contestant: `python -m benchmarks.worker MAKER ARGUMENTS`, as benchmarks.workers starts it.

It says in json what it is once it is made and warm; then, for each number of runs that it reads, how long one took,
after one that is not timed, and how much memory there was at most.  It ends with its input, so it does not outlive the
benchmark.
"""

import ctypes
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

WARM_UP = 3  # runs; the first one compiles


class Contestant(NamedTuple):
    """What is timed."""

    run: Callable[[], object]  # does it once, and comes back when it is done
    device_memory: Callable[[], int] | None = None  # the most bytes held so far, on a device with memory of its own
    device: str = ""  # where it runs, in words


def main(maker: str, arguments: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    module, _, function = maker.rpartition(".")
    make = getattr(importlib.import_module(module), function)
    before = _memory("VmRSS")
    contestant: Contestant = make(**json.loads(arguments))
    seconds = [_timed(contestant.run, 1) for _ in range(WARM_UP)]
    _forget_the_peak()

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    answer(seconds=min(seconds), device=contestant.device)
    for line in sys.stdin:
        runs = int(line)
        if runs:
            contestant.run()  # what lay idle while others had their turns is cold, and a training run never is
        taken = _timed(contestant.run, runs) if runs else 0.0
        peak = _memory("VmHWM")
        memory = contestant.device_memory() if contestant.device_memory else peak and before and peak - before
        answer(seconds=taken, memory=memory)


def _timed(run: Callable[[], object], runs: int) -> float:
    """Seconds of one of `runs`."""
    began = time.perf_counter()
    for _ in range(runs):
        run()
    return (time.perf_counter() - began) / runs


def _memory(field: str) -> int | None:
    """Bytes of this process as the system tells them, or None where it does not."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def _forget_the_peak() -> None:
    """What it took to compile is no part of a step: the memory is given back, and the peak counted from here on."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return  # another system than Linux; the peak is then that of compiling, too


if __name__ == "__main__":
    main(*sys.argv[1:])
