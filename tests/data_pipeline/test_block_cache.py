"""The cache on disk: what is in it is not fetched again, what is wrong with it is a miss, and it keeps to its limit."""

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import block_cache
from data_pipeline.block_cache import BlockCache
from data_pipeline.shards import Split, open_corpus
from tests.conftest import ROOT
from tests.data_pipeline.faulty import no_fault, once_each, serving
from tests.data_pipeline.test_shards import make
from tests.data_pipeline.test_stores import BLOCK, IDS, WIDE

pytest.importorskip("obstore", reason="obstore is absent: pip install charlstm[remote]")

FINGERPRINT = "ab" * 32
EXTENT = 4 * BLOCK


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("corpus"), IDS, 20_000, WIDE, BLOCK)


@pytest.fixture
def server(disk, monkeypatch):
    monkeypatch.setattr(block_cache, "EXTENT_BYTES", EXTENT)  # 10 extents a shard, of which the last is short
    with serving(disk) as running:
        yield running


def train_split(server, folder: Path, limit: int = 2**30) -> Split:
    return open_corpus(server.address, patience=20, cache=folder / "cache", cache_bytes=limit).train


def read_all(split: Split) -> None:
    ids = np.empty(len(IDS), np.uint16)
    cuts = [0, 1, 5000, 20_000, 47_123, 47_124, len(IDS)]
    split.read_many([(a, ids[a:b]) for a, b in itertools.pairwise(cuts)])
    assert np.array_equal(ids, IDS)


def extents(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache").rglob("*") if path.is_file())


def fetched(server) -> int:
    """Bytes of shards that were asked for since the last call."""
    total = sum(stop - start for name, start, stop in server.requests if name.endswith(".ids"))
    server.requests.clear()
    return total


def test_what_was_read_once_is_not_fetched_again_by_another_process_either(server, tmp_path):
    read_all(train_split(server, tmp_path))
    assert fetched(server) >= 2 * len(IDS) and len(extents(tmp_path)) == 50
    assert sum(path.stat().st_size for path in extents(tmp_path)) == 2 * len(IDS)
    read_all(train_split(server, tmp_path))
    assert fetched(server) == 0
    server.stop()
    try:
        BlockCache(tmp_path / "cache", FINGERPRINT, 2**30, BLOCK).sweep()
        assert len(extents(tmp_path)) == 50, "there is room for all"
    finally:
        server.start()


def torn(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def exchanged(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [torn, emptied, flipped, exchanged, Path.unlink])
def test_an_extent_that_is_damaged_or_gone_is_fetched_again(server, tmp_path, damage):
    read_all(train_split(server, tmp_path))
    damaged = extents(tmp_path)[::7]
    for path in damaged:
        damage(path)
    fetched(server)
    read_all(train_split(server, tmp_path))
    assert 0 < fetched(server) <= 2 * len(damaged) * EXTENT  # two readings may meet in one
    read_all(train_split(server, tmp_path))
    assert fetched(server) == 0, "they are there again"


def test_a_cache_that_is_deleted_under_its_readers_changes_nothing(server, tmp_path):
    split, done = train_split(server, tmp_path), threading.Event()

    def delete() -> None:
        while not done.is_set():
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    deleting = threading.Thread(target=delete)
    deleting.start()
    try:
        for _ in range(5):
            read_all(split)
    finally:
        done.set()
        deleting.join()


def test_wrong_bytes_from_the_store_never_get_into_the_cache(server, tmp_path):
    split = train_split(server, tmp_path)
    server.fault = once_each("flip", ".ids")
    read_all(split)
    server.fault = no_fault
    fetched(server)
    read_all(train_split(server, tmp_path))
    assert fetched(server) == 0


def test_the_least_recently_used_extents_go_and_nothing_else_does(tmp_path):
    cache = BlockCache(tmp_path, FINGERPRINT, 100 * 1000, 100)
    cache.extent = 10  # 1000 bytes
    other = BlockCache(tmp_path, "cd" * 32, 100 * 1000, 100)
    other.extent = 10
    strange = [tmp_path / name for name in ("notes.txt", f"{FINGERPRINT[:16]}/train-00000.ids", "deep/er/a.ids.1-1000")]
    for path in strange:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(50_000))
    abandoned = tmp_path / FINGERPRINT[:16] / "train-00000.ids.5-1000.0123abcd.new"
    abandoned.write_bytes(b"x")
    os.utime(abandoned, (1, 1))
    for number in range(80):
        (cache if number % 2 else other).put("train-00000.ids", number, memoryview(bytes(1000)))
    begin = time.time() - 10_000
    for number in range(80):
        path = (cache if number % 2 else other)._path("train-00000.ids", number)
        os.utime(path, (begin + number, begin + number))
    assert cache.get("train-00000.ids", 1, 0, 1000) == bytes(1000)  # used, so not the oldest any more
    for number in range(80, 110):
        cache.put("train-00000.ids", number, memoryview(bytes(1000)))
    cache.sweep()
    left = {int(path.name.split(".")[2].split("-")[0]) for path in tmp_path.rglob("*-1000")} - {1000}
    assert 1 in left and 0 not in left and 2 not in left and set(range(81, 110)) <= left
    assert 80 <= len(left) <= 100
    assert all(path.exists() for path in strange) and not abandoned.exists()


def test_a_smaller_limit_holds_from_the_first_extent_on(tmp_path):
    large = BlockCache(tmp_path, FINGERPRINT, 10**9, 1000)
    large.extent = 1
    for number in range(100):
        large.put("train-00000.ids", number, memoryview(bytes(1000)))
    small = BlockCache(tmp_path, FINGERPRINT, 50_000, 1000)
    small.extent = 1
    small.put("train-00000.ids", 100, memoryview(bytes(1000)))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*-1000")) <= 45_000


def fill(folder: str, process: int) -> int:
    """Puts 400 extents of 1000 bytes; returns the most that it saw in the cache."""
    cache, most = BlockCache(Path(folder), FINGERPRINT, 160_000, 1000), 0
    cache.extent = 1
    for number in range(400):
        cache.put(f"train-{process}.ids", number, memoryview(bytes(1000)))
        most = max(most, sum(1000 for _ in os.scandir(cache._own)))
    return most


@pytest.mark.long
def test_the_cache_of_four_processes_keeps_to_its_limit_but_for_what_each_may_write_unseen(tmp_path):
    with ProcessPoolExecutor(4, get_context("spawn")) as pool:
        most = max(pool.map(fill, [str(tmp_path)] * 4, range(4)))
    assert 100_000 < most <= 160_000 * (1 + 4 / 16)
    assert len(list(tmp_path.rglob("*-1000"))) >= 100, "one sweep does not empty it"


@pytest.mark.parametrize("kind", ["a file in its place", "a full disk"])
def test_a_disk_that_takes_nothing_turns_the_cache_off_with_one_line(server, tmp_path, kind, caplog):
    if kind == "a file in its place":
        (tmp_path / "cache").write_text("")
        split = train_split(server, tmp_path)
        read_all(split)
        read_all(split)
        lines = [record.getMessage() for record in caplog.records]
        assert lines == [f"{tmp_path / 'cache'} is used no more: Not a directory"]
        return
    # A file larger than allowed fails as on a full disk.
    code = (
        "import resource, sys\n"
        "from data_pipeline.shards import open_corpus\n"
        "from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        f"split = open_corpus({server.address!r}, cache=Path({str(tmp_path)!r}), cache_bytes=2**30).train\n"
        "for _ in range(2): print(int(split.read(0, 60_000).astype(int).sum()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split() == [str(int(IDS[:60_000].astype(int).sum()))] * 2, done.stderr
    assert done.stderr == f"{tmp_path} is used no more: File too large\n"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_limit_that_is_too_small_is_refused_with_both_numbers(tmp_path):
    cache = BlockCache(tmp_path, FINGERPRINT, 10**6, 16384)
    cache.require(1)
    with pytest.raises(ValueError, match=r"cache_bytes=1000000 is less than 1048576, two extents of each of 2 streams"):
        cache.require(2)


def test_without_a_cache_nothing_is_written(server, tmp_path):
    read_all(train_split(server, tmp_path, limit=0))
    assert not (tmp_path / "cache").exists()
