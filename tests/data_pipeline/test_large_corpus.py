"""A corpus of 64 GB costs no more memory and no more time to open than one of 1 MB."""

import hashlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from data_pipeline.manifest import BLOCK_BYTES, SHARD_BYTES, Manifest, Shard, SplitRecord, write_manifest
from data_pipeline.vocabulary import Vocabulary
from tests.conftest import ROOT

MEGABYTE = 2**20
END = b"and so it ended."
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured in /proc")


def sparse_corpus(directory, shard_count, shard_bytes):
    """A corpus of zeros that takes next to no disk; its last symbols are END."""
    zeros = hashlib.sha256()
    for _ in range(shard_bytes // MEGABYTE - 1):
        zeros.update(bytes(MEGABYTE))
    zeros_sha, last_sha = zeros.copy(), zeros
    zeros_sha.update(bytes(MEGABYTE))
    last_sha.update(bytes(MEGABYTE - len(END)) + END)
    checksum = zlib.crc32(bytes(BLOCK_BYTES)).to_bytes(4, "little")
    last_checksum = zlib.crc32(bytes(BLOCK_BYTES - len(END)) + END).to_bytes(4, "little")
    checksums = checksum * (shard_bytes // BLOCK_BYTES - 1)

    shards = []
    for number in range(shard_count):
        last = number == shard_count - 1
        own = checksums + (last_checksum if last else checksum)
        digests = (last_sha if last else zeros_sha).hexdigest(), hashlib.sha256(own).hexdigest()
        shard = Shard(f"train-{number:05}.ids", shard_bytes, *digests)
        with (directory / shard.file).open("wb") as file:
            file.truncate(shard_bytes)
            if last:
                file.seek(-len(END), os.SEEK_END)
                file.write(END)
        (directory / shard.checksums).write_bytes(own)
        shards.append(shard)
    symbols = shard_count * shard_bytes
    write_manifest(directory, Manifest(Vocabulary("bytes"), {"train": SplitRecord(symbols, symbols, tuple(shards))}))
    return directory


PROGRAM = """
import json, sys, time

import grain  # what opening windows imports, so that it is not timed below

from data_pipeline.loader import open_windows
from data_pipeline.shards import open_corpus
from data_pipeline.streams import StreamPlan

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

directory, batch_size, window, count = sys.argv[1], *map(int, sys.argv[2:])
begun = time.perf_counter()
split = open_corpus(directory).splits["train"]
plan = StreamPlan(len(split), batch_size, window, rotate=False)
with open_windows(split, plan, rows=range(batch_size), start_step=plan.steps_per_epoch - 1) as windows:
    last = next(windows)
    seconds, resident = time.perf_counter() - begun, memory("VmRSS")
    for _ in range(count):
        next(windows)
    report = dict(
        symbols=len(split),
        last_symbols=bytes(last.inputs[-1]).decode(),
        seconds=seconds,
        resident=resident,
        resident_after=memory("VmRSS"),
        peak=memory("VmHWM"),
        position=windows.position - plan.steps_per_epoch,
    )
print(json.dumps(report))
"""


def measure(directory, *arguments):
    """Runs PROGRAM on a corpus; returns its report."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, directory, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return sparse_corpus(tmp_path_factory.mktemp("large"), 256, SHARD_BYTES)


def test_64_gigabytes_open_and_resume_at_their_end_within_100_megabytes_of_a_corpus_of_1_megabyte(large, tmp_path):
    small = measure(sparse_corpus(tmp_path, 1, MEGABYTE), 64, 16, 1)
    big = measure(large, 64, 16, 1)
    print(f"1 MB: {small}\n64 GB: {big}")
    assert (small["symbols"], big["symbols"]) == (MEGABYTE, 64 * 1024 * MEGABYTE)
    assert small["last_symbols"] == big["last_symbols"] == END.decode()
    assert big["resident"] - small["resident"] < 100 * MEGABYTE
    assert big["peak"] - small["peak"] < 100 * MEGABYTE


def test_resident_memory_does_not_grow_with_the_text_read(large):
    streams, window, count = 64, 2**14, 300  # 300 MB of text
    report = measure(large, streams, window, count)
    assert report["position"] == count
    assert report["resident_after"] - report["resident"] < 64 * MEGABYTE
