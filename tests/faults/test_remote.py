"""A corpus in a real object store, through a proxy that spoils its answers: the bits of the run from the disk.

Each run is a process of launch.train (or several of launch.local) that reads over S3, from SeaweedFS, and the last ones
from Ceph's gateway.  The proxy hands signed requests on, and the store's answers back, but for those that a test has it
spoil.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from data_pipeline.build.prepare import prepare
from data_pipeline.build.upload import upload
from data_pipeline.settings import CorpusSettings
from launch.support import cli
from tests.compiling import xla_flags
from tests.data_pipeline import servers
from tests.data_pipeline.faulty import Proxy, no_fault
from tests.faults.conftest import SeenOfStore
from tests.jobs import ROOT, has_saved, last_line, wait_for
from tests.launch.conftest import SMALL, TINY

pytest.importorskip("obstore", reason="obstore is absent: pip install charlstm[remote]")

# Runs and extents so small that a run asks the store all the way through, and a stalled answer costs 2 s, not 30.
SMALL_READS = """
from data_pipeline import block_cache, stores, symbols
block_cache.EXTENT_BYTES, stores.REQUEST_SECONDS, symbols.REMOTE_RUN_SYMBOLS = 512, 2, 64
"""
MIXED = "first={}:0.7,second={}:0.3"
STORES = {
    "SeaweedFS": (servers.seaweedfs_process, servers.seaweedfs_process),
    "Ceph's gateway": (servers.ceph_process, servers.ceph_gateway),
}  # how each is started, and started again with what it had
WEIGHTS = ("--segment=256", "--mixture_from=100:first:1,second:1;200:second:1")


class Stored(NamedTuple):
    """Two corpora in a store, and on the disk."""

    folder: Path  # has text and second, the same corpora
    name: str  # of the store
    proxy: Proxy
    process: subprocess.Popen  # the one that answers
    environment: dict[str, str]

    def train(self, *flags: str, devices: int = 1) -> subprocess.CompletedProcess:
        """launch.train in a process of its own, to its end."""
        environment = self.environment | {"XLA_FLAGS": xla_flags(devices)}
        command = [sys.executable, "-m", "launch.train", *flags]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )


@pytest.fixture(scope="module", params=["SeaweedFS"])
def stored(request, tmp_path_factory) -> Iterator[Stored]:
    folder = tmp_path_factory.mktemp("stored")
    for name, power in (("text", 2), ("second", 3)):
        (folder / f"{name}.txt").write_text("".join(f"line {n**power} of a text\n" for n in range(330)))
        settings = CorpusSettings(corpus=str(folder / f"{name}.txt"), cache_dir=str(folder / "cache"))
        prepare(settings, folder / name, block_bytes=64, shard_bytes=2048)
    damaged = shutil.copytree(folder / "text", folder / "damaged")
    content = bytearray((damaged / "train-00001.ids").read_bytes())
    content[700] ^= 4
    (damaged / "train-00001.ids").write_bytes(content)
    (folder / "path").mkdir()
    (folder / "path" / "sitecustomize.py").write_text(SMALL_READS)
    begin, _ = STORES[request.param]
    with begin(folder / "server") as (address, process), pytest.MonkeyPatch.context() as patch:
        for name, value in servers.s3_environment(address).items():
            patch.setenv(name, value)
        for name in ("text", "second", "damaged"):
            upload(folder / name, f"s3://bucket/{name}")
        proxy = Proxy(address).start()
        path = {"PYTHONPATH": f"{folder / 'path'}:{ROOT}"}
        environment = {**os.environ, **servers.s3_environment(proxy.address), **path}
        yield Stored(folder, request.param, proxy, process, environment)
        with contextlib.suppress(OSError):
            proxy.stop()


@pytest.fixture(scope="module")
def flags() -> tuple[str, ...]:
    often = ("--log_every=80", "--checkpoint_every=80", "--num_steps=240")
    return (TINY, *SMALL, "--logical_shards=8", *often)


@pytest.fixture(scope="module")
def from_disk(stored, flags) -> str:
    """The digest at the end of the run from the disk."""
    run_dir = stored.folder / "from_disk"
    done = stored.train(*flags, f"--corpus={stored.folder / 'text'}", f"--run_dir={run_dir}", devices=8)
    assert done.returncode == cli.DONE, done.stderr
    return last_line(run_dir)["state_digest"]


@pytest.fixture
def command(stored, flags, tmp_path) -> Iterator[list[str]]:
    """The flags of a run from the store, without a cache."""
    stored.proxy.fault, stored.proxy.requests = no_fault, []
    yield [*flags, "--corpus=s3://bucket/text", "--cache_bytes=0", f"--run_dir={tmp_path / 'run'}"]
    stored.proxy.fault = no_fault


class Spoiling:
    """Spoils every few answers about shards, or all for a while; and counts them."""

    def __init__(self, fault: str, every: int = 1, after: int = 0, seconds: float = 1e9) -> None:
        self.spoiled = self.asked = 0
        self._how, self._lock, self._until = (fault, every, after, seconds), threading.Lock(), 0.0

    def __call__(self, name: str, start: int, stop: int) -> str:
        fault, every, after, seconds = self._how
        with self._lock:
            self.asked += ".ids" in name or ".crc" in name
            if self.asked <= after or self.asked % every or "manifest" in name:
                return ""
            self._until = self._until or time.monotonic() + seconds
            if time.monotonic() > self._until:
                return ""
            self.spoiled += 1
            return fault


def said(done: subprocess.CompletedProcess) -> str:
    """The last line on stderr; there is no traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "fault", "how"),
    [
        ("503, of every 5th request", "503", {"every": 5}),
        ("503 to all for 5 s", "503", {"after": 200, "seconds": 5}),
        ("connections reset, every 7th", "reset", {"every": 7}),
        ("answers cut, every 7th", "cut", {"every": 7}),
        ("answers that stall until the timeout", "stall", {"every": 97}),
        ("a bit flipped in every 31st answer", "flip", {"every": 31}),
        ("another range than asked for, and saying so", "other", {"every": 31}),
        ("another range than asked for, in silence", "lie", {"every": 31}),
    ],
)
def test_a_run_through_spoiled_answers_ends_as_the_one_from_the_disk(
    name, fault, how, stored, command, from_disk, store_table, tmp_path
):
    stored.proxy.fault = spoiling = Spoiling(fault, **how)
    done = stored.train(*command)
    assert done.returncode == cli.DONE, done.stderr
    equal = last_line(tmp_path / "run")["state_digest"] == from_disk
    store_table.append(SeenOfStore(name, f"{spoiling.spoiled} of {spoiling.asked} answers", str(equal)))
    assert equal and spoiling.spoiled > 1


def test_a_server_without_ranges_and_a_damaged_object_end_it_with_a_sentence(stored, command, store_table, tmp_path):
    stored.proxy.fault = Spoiling("whole", after=100)
    done = stored.train(*command)
    assert done.returncode == 2
    assert said(done).endswith("the server answers without ranges: copy the corpus to a disk or another store")
    store_table.append(SeenOfStore("200 for a range, from the 100th on", "all", "status 2, one sentence"))
    stored.proxy.fault = no_fault
    done = stored.train(*command, "--corpus=s3://bucket/damaged", f"--run_dir={tmp_path / 'damaged'}")
    assert done.returncode == 2
    assert "s3://bucket/damaged/train-00001.ids" in said(done) and "at the source" in said(done)
    store_table.append(SeenOfStore("a bit flipped in the object itself", 1, "status 2, one sentence with the offset"))


@contextlib.contextmanager
def killed_after(proxy: Proxy, requests: int, meanwhile: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Kills the server after so many requests, and then does what is to be done; it happens within the block."""
    killing, killed = Spoiling("killed", after=requests), threading.Event()

    def fault(name: str, start: int, stop: int) -> str:
        if killed.is_set() or not killing(name, start, stop):
            return ""
        killed.set()
        return "killed"

    def wait() -> None:
        if killed.wait(200):
            meanwhile()

    proxy.fault = fault
    waiting = threading.Thread(target=wait)
    waiting.start()
    try:
        yield
        assert killed.is_set()
    finally:
        waiting.join()


def test_a_server_that_is_gone_for_5_s_is_waited_for_and_one_that_stays_away_ends_the_run_with_a_status_of_its_own(
    stored, command, from_disk, store_table, tmp_path
):
    def back() -> None:
        time.sleep(5)
        stored.proxy.start()

    with killed_after(stored.proxy, 300, back):
        done = stored.train(*command)
    assert done.returncode == cli.DONE, done.stderr
    equal = last_line(tmp_path / "run")["state_digest"] == from_disk
    store_table.append(SeenOfStore("the server gone for 5 s", 1, str(equal)))
    assert equal

    again = [*command, "--remote_patience=3", f"--run_dir={tmp_path / 'again'}", "--checkpoint_every=20"]
    with killed_after(stored.proxy, 300):
        done = stored.train(*again)
    assert done.returncode == cli.UNREACHABLE, done.stderr
    assert "s3://bucket/text has not answered for 3 s" in said(done) and "the same command goes on" in said(done)
    stored.proxy.fault = no_fault
    stored.proxy.start()
    done = stored.train(*again)
    assert done.returncode == cli.DONE and "continuing from the checkpoint of step" in done.stderr, done.stderr
    equal = last_line(tmp_path / "again")["state_digest"] == from_disk
    words = f"status {cli.UNREACHABLE}, one sentence; the same command again: {equal}"
    store_table.append(SeenOfStore("the server gone for longer than --remote_patience", 1, words))
    assert equal


def test_with_a_cache_that_is_cold_warm_torn_or_deleted_under_it(stored, command, from_disk, store_table, tmp_path):
    blocks, done = tmp_path / "cache" / "blocks", threading.Event()

    def tear() -> None:
        for path in blocks.rglob("*.ids.*"):
            os.truncate(path, path.stat().st_size // 2)

    def delete() -> None:
        while not done.wait(0.01):
            shutil.rmtree(blocks, ignore_errors=True)

    def asked(name: str) -> int:
        stored.proxy.requests = []
        own = [*command, "--cache_bytes=1000000", f"--cache_dir={tmp_path / 'cache'}", f"--run_dir={tmp_path / name}"]
        ended = stored.train(*own)
        assert ended.returncode == cli.DONE, ended.stderr
        equal = last_line(tmp_path / name)["state_digest"] == from_disk
        requests = len([name for name in stored.proxy.names() if name.endswith(".ids")])
        store_table.append(SeenOfStore(f"cache {name}", f"{requests} requests for text", str(equal)))
        assert equal
        return requests

    cold, extents = asked("cold"), len(list(blocks.rglob("*.ids.*")))
    assert extents > 5 and asked("warm") == 0
    tear()
    assert 0 < asked("torn") <= cold
    deleting = threading.Thread(target=delete)
    deleting.start()
    try:
        assert asked("deleted all the while") > cold
    finally:
        done.set()
        deleting.join()


def test_a_mixture_killed_and_gone_on_with_on_other_processes_and_devices(stored, flags, store_table, tmp_path):
    def mixed(where: object) -> list[str]:
        return [*flags, *WEIGHTS, f"--mixture={MIXED.format(f'{where}/text', f'{where}/second')}"]

    done = stored.train(*mixed(stored.folder), f"--run_dir={tmp_path / 'from_disk'}", devices=8)
    assert done.returncode == cli.DONE, done.stderr
    expected = last_line(tmp_path / "from_disk")["state_digest"]
    spoiling = [Spoiling("503", every=11), Spoiling("flip", every=13), Spoiling("cut", every=17)]
    stored.proxy.fault = lambda *asked: next(filter(None, [fault(*asked) for fault in spoiling]), "")
    run_dir = tmp_path / "run"
    command = [*mixed("s3://bucket"), f"--cache_dir={tmp_path / 'cache'}", "--checkpoint_every=20"]
    command += [f"--run_dir={run_dir}", "--heartbeat_timeout=10"]
    for processes, devices, until in ((2, 1, 60), (1, 4, 140)):
        own = [f"--processes={processes}", f"--devices_per_process={devices}", "--grace=5"]
        job = [sys.executable, "-m", "launch.local", *own, "--", *command]
        environment = stored.environment | {"XLA_FLAGS": xla_flags()}
        with subprocess.Popen(job, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as running:
            reading = threading.Thread(target=running.communicate)
            reading.start()
            wait_for(lambda: has_saved(run_dir, until)() or running.poll() is not None)  # noqa: B023
            running.send_signal(signal.SIGKILL)
            reading.join()
        assert running.returncode == -signal.SIGKILL
    done = stored.train(*command, devices=2)
    assert done.returncode == cli.DONE and "continuing from the checkpoint of step" in done.stderr, done.stderr
    equal = last_line(run_dir)["state_digest"] == expected
    words = "a mixture whose weights change, killed (2 x 1, then 1 x 4, then 1 x 2 devices); 503, flips and cuts"
    spoiled = sum(one.spoiled for one in spoiling)
    store_table.append(SeenOfStore(words, f"2; {spoiled} of {spoiling[0].asked} answers", str(equal)))
    assert equal


CEPH = pytest.param("Ceph's gateway", marks=pytest.mark.long)


@pytest.mark.parametrize("stored", [CEPH], indirect=True)
def test_a_run_from_another_server_ends_as_the_one_from_the_disk(stored, command, from_disk, store_table, tmp_path):
    done = stored.train(*command)
    assert done.returncode == cli.DONE, done.stderr
    equal = last_line(tmp_path / "run")["state_digest"] == from_disk
    store_table.append(SeenOfStore(f"none: a run from {stored.name}", 0, str(equal)))
    assert equal


@pytest.mark.parametrize("stored", ["SeaweedFS", CEPH], indirect=True)
def test_the_store_itself_is_killed_and_started_again(stored, command, from_disk, store_table, tmp_path):
    """The last one of each store: afterwards it is another process."""
    with contextlib.ExitStack() as opened:

        def kill() -> None:
            stored.process.kill()
            stored.process.wait()
            time.sleep(3)
            _, again = STORES[stored.name]
            stored.proxy.upstream, _ = opened.enter_context(again(stored.folder / "server"))

        told = Spoiling("reset", after=300, seconds=0.2)
        stored.proxy.fault = told
        killing = threading.Thread(target=lambda: (wait_for(lambda: told.spoiled), kill()))
        killing.start()
        done = stored.train(*command)
        killing.join()
        assert done.returncode == cli.DONE, done.stderr
        equal = last_line(tmp_path / "run")["state_digest"] == from_disk
        store_table.append(SeenOfStore(f"{stored.name} killed (kill -9) and started again after 3 s", 1, str(equal)))
        assert equal
