"""The same update on 1, 2, 4 and 8 simulated devices, and in 1 and 2 processes: what is communicated, what is serial.

    python -m benchmarks.scaling [--quick] [--rounds=5]

The devices share this machine's cores, so times show what dividing the work costs, not what more devices bring; for
that see benchmarks.cost_model.  Serial is what every device does alike: the update of a window of one symbol, nearly
all of which is summing, clipping and Adam.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import rows as rows_lib
from benchmarks.end_to_end import QUICK_OF_BYTES, Job, seconds_a_step
from benchmarks.rows import Rows
from benchmarks.shapes import SHAPES, Shape
from benchmarks.workers import Worker

COUNTS = (1, 2, 4, 8)
TRAINING = "benchmarks.peers.ours.training"


def run(rows: Rows, quick: bool, rounds: int) -> None:
    shape, rounds = (QUICK_OF_BYTES, 2) if quick else (SHAPES[1], rounds)
    by_devices(rows, shape, COUNTS[:2] if quick else COUNTS, rounds)
    by_processes(rows, shape, 20 if quick else 40, 1 if quick else rounds)


def by_devices(rows: Rows, shape: Shape, counts: tuple[int, ...], rounds: int) -> None:
    """Adds a row for each number of devices and reduction."""
    command = [sys.executable, "-m", "benchmarks.collectives", json.dumps(asdict(shape)), json.dumps(counts)]
    communicated = json.loads(subprocess.check_output(command, env=os.environ | simulated(max(counts))))
    workers = {
        (n, how): Worker(TRAINING, {"shape": asdict(shape), "reduction": how}, simulated(n))
        for n in counts
        for how in ("exact", "fast")
    }
    serial = Worker(TRAINING, {"shape": asdict(replace(shape, T=1))}, simulated(1))
    timed: dict[Any, Any] = {key: worker.seconds for key, worker in workers.items()}
    seconds = rows_lib.alternate(timed | {"serial": serial.seconds}, rounds)
    for n, how in workers:
        spread = rows_lib.spread([1000 * s for s in seconds[n, how]])
        ratio = rows_lib.ratios(seconds[n, how], seconds[1, how])
        rows.add(
            shape=str(shape),
            devices=n,
            reduction=how,
            milliseconds=spread.median,
            quartiles=spread.quartiles,
            faster_than_one_device_by=ratio.median,
            ratio_quartiles=ratio.quartiles,
            serial_milliseconds=rows_lib.spread([1000 * s for s in seconds["serial"]]).median,
            gradient_bytes=4 * shape.parameters,
            **communicated[f"{n} {how}"],
        )
    for worker in (*workers.values(), serial):
        worker.close()


def by_processes(rows: Rows, shape: Shape, steps: int, rounds: int) -> None:
    """Adds a row for one process and one for two, each of one device, of the same two logical shards."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), 8)
        timed = {n: partial(job.ours, shape, {}, steps, steps // 4, 0, processes=n) for n in (1, 2)}
        found = rows_lib.alternate(timed, rounds)
    seconds = {n: [seconds_a_step(lines) for lines in runs] for n, runs in found.items()}
    for n, own in seconds.items():
        speed, ratio = rows_lib.spread([shape.symbols / s for s in own]), rows_lib.ratios(own, seconds[1])
        rows.add(
            shape=str(shape),
            processes=n,
            characters_per_second=speed.median,
            quartiles=speed.quartiles,
            faster_than_one_process_by=ratio.median,
            ratio_quartiles=ratio.quartiles,
        )


def simulated(devices: int) -> dict[str, str]:
    """The environment with so many devices on CPUs."""
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


if __name__ == "__main__":
    rows_lib.main("scaling", run, rounds=5)
