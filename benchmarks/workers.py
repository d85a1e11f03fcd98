"""Contestants in processes of their own, each with its own environment, timed in turn through pipes."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.rows import alternate

TURN = 2.0  # seconds that a turn takes, about; an update of some shapes takes one

# glibc gives large blocks back to the system when they are freed, and the next step's temporaries are page-faulted
# anew.  Kept, and of huge pages, they cost less.  Peers gain by it as well: each is given both, and keeps the better.
KEPT_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
# XLA's choice of a GPU's kernels, made without timing them: what equal bits rest on there.
FIXED = {"XLA_FLAGS": "--xla_gpu_exclude_nondeterministic_ops=true --xla_gpu_autotune_level=0"}
HEATS = 3  # turns of a contestant in each environment, before it keeps one


def has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def environments(quick: bool) -> dict[str, dict[str, str]]:
    """Allocator settings to try; on a GPU none, and several processes must share its memory."""
    if has_gpu():
        return {"plain": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}}
    return {"plain": {}} if quick else {"plain": {}, "huge pages": {"GLIBC_TUNABLES": KEPT_PAGES}}


class Worker:
    """A process that makes a contestant, warms it up, and waits to be told how often to run it."""

    def __init__(
        self, maker: str, arguments: dict[str, Any], environment: dict[str, str], *, wait: bool = True
    ) -> None:
        """Of the function `maker`, such as "benchmarks.peers.pytorch.training", called with `arguments`.

        Args:
          wait: until it is warm; if not, what is first asked of it waits.

        Raises:
          RuntimeError: here and below: the process has died; why stands on its stderr, which is ours.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", maker, json.dumps(arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment,
        )  # fmt: skip
        self._maker = maker
        if wait:
            self.warm()

    @functools.cached_property
    def _made(self) -> dict[str, Any]:
        return self._answer()

    @property
    def device(self) -> str:
        """Where the contestant runs, in words."""
        return self._made["device"]

    def warm(self) -> None:
        """Waits until it is warm."""
        assert self._made

    def seconds(self) -> float:
        """Seconds of one run, over a turn of as many as fill it."""
        return self.ask(max(1, round(TURN / self._made["seconds"])))["seconds"]

    @property
    def memory(self) -> int | None:
        """Most bytes that it held since it was warm, beyond what its imports take; None if that is not told."""
        return self.ask(0)["memory"]

    def ask(self, runs: int) -> dict[str, Any]:
        assert self._made and self._process.stdin is not None
        self._process.stdin.write(f"{runs}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._maker} has died with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()  # which ends it
        self._process.wait()
        self._process.stdout.close()


def fastest(
    maker: str, arguments: dict[str, Any], choice: dict[str, dict[str, str]], *, wait: bool = True
) -> tuple[str, Worker]:
    """The contestant in the environment, of those in `choice`, in which it is fastest; and the name of that.

    They take turns alternately, and their medians count.  The others are ended.  Where there is one environment alone,
    it need not `wait` until it is warm.
    """
    wait = wait or len(choice) > 1
    workers = {name: Worker(maker, arguments, environment, wait=wait) for name, environment in choice.items()}
    name = next(iter(workers))
    if len(choice) > 1:
        seconds = alternate({name: worker.seconds for name, worker in workers.items()}, HEATS)
        name = min(seconds, key=lambda name: median(seconds[name]))
    for other in workers.keys() - {name}:
        workers[other].close()
    return name, workers[name]
