"""A corpus of zeros as large as one likes, which takes next to no disk, and what it costs to open one.

    python -m benchmarks.sparse_corpus DIRECTORY STREAMS WINDOW COUNT [start] [cache=DIRECTORY]

opens a corpus, of a directory or a URL, seeks to the last window of the epoch that has step 10^9 (or to the first
window of all), and reads COUNT windows more.
"""

import hashlib
import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from data_pipeline.manifest import BLOCK_BYTES, SHARD_BYTES, Manifest, Shard, SplitRecord, write_manifest
from data_pipeline.vocabulary import Vocabulary

END = b"and so it ended."
MEGABYTE = 2**20
RESUMED = 10**9  # the step whose epoch is resumed at its end


def make(directory: Path, shard_count: int, shard_bytes: int = SHARD_BYTES) -> Path:
    """Fills `directory` with a corpus of `shard_count` shards; its last symbols are END.  Gives it back.

    All shards but the last are alike, so their digests are computed once.
    """
    zeros = hashlib.sha256()
    for _ in range(shard_bytes // MEGABYTE - 1):
        zeros.update(bytes(MEGABYTE))
    last = zeros.copy()
    zeros.update(bytes(MEGABYTE))
    last.update(bytes(MEGABYTE - len(END)) + END)
    checksum = zlib.crc32(bytes(BLOCK_BYTES)).to_bytes(4, "little")
    last_checksum = zlib.crc32(bytes(BLOCK_BYTES - len(END)) + END).to_bytes(4, "little")
    most = checksum * (shard_bytes // BLOCK_BYTES - 1)
    kinds = [(zeros, most + checksum)] * (shard_count - 1) + [(last, most + last_checksum)]
    digests = {checksums: hashlib.sha256(checksums).hexdigest() for _, checksums in kinds[-2:]}
    shards = []
    for number, (content, checksums) in enumerate(kinds):
        shard = Shard(f"train-{number:05}.ids", shard_bytes, content.hexdigest(), digests[checksums])
        with (directory / shard.file).open("wb") as file:
            file.truncate(shard_bytes)
            if content is last:
                file.seek(-len(END), os.SEEK_END)
                file.write(END)
        (directory / shard.checksums).write_bytes(checksums)
        shards.append(shard)
    symbols = shard_count * shard_bytes
    record = SplitRecord(symbols, symbols, symbols, 0, tuple(shards))
    write_manifest(directory, Manifest(Vocabulary("bytes"), {"train": record}))
    return directory


def opened(
    directory: str, streams: int, window: int, count: int, at_start: bool, cache: Path | None = None
) -> dict[str, Any]:
    """Seconds from the directory's name to a window; bytes of memory then, and `count` windows later.

    Of those windows, the seconds and the seconds of the processor.
    """
    import grain  # noqa: F401, what opening windows imports, so that it is not timed

    from data_pipeline.loader import open_windows
    from data_pipeline.shards import open_corpus
    from data_pipeline.streams import StreamPlan

    began = time.perf_counter()
    split = open_corpus(directory, cache=cache, cache_bytes=2**33 if cache else 0).splits["train"]
    plan = StreamPlan(len(split), streams, window, rotate=False)
    epochs = RESUMED // plan.steps_per_epoch + 1
    first = 0 if at_start else epochs * plan.steps_per_epoch - 1
    with open_windows(split, plan, rows=range(streams), start_step=first) as windows:
        batch = next(windows)
        seconds, resident = time.perf_counter() - began, _memory("VmRSS")
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            next(windows)
        return {
            "reading_seconds": time.perf_counter() - began,
            "cpu": time.process_time() - cpu,
            "symbols": len(split),
            "last_symbols": bytes(batch.inputs[-1]).decode("latin-1"),
            "seconds": seconds,
            "resident": resident,
            "resident_after": _memory("VmRSS"),
            "peak": _memory("VmHWM"),
            "position": windows.position - first - 1,
        }


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    where, *sizes = sys.argv[1:5]
    streams, window, count = map(int, sizes)
    caches = [Path(word.removeprefix("cache=")) for word in sys.argv[5:] if word.startswith("cache=")]
    print(json.dumps(opened(where, streams, window, count, "start" in sys.argv[5:], *caches)))
