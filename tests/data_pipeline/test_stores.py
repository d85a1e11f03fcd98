"""Corpora in object stores: the same bits as from a disk, or one sentence, whatever the server does."""

import logging
import pickle
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import blocks, stores
from data_pipeline.build.upload import upload
from data_pipeline.eval_chunks import ChunkPlan, read_chunks
from data_pipeline.loader import open_windows
from data_pipeline.shards import Split, open_corpus, verify_corpus
from data_pipeline.stores import Unreachable, open_store
from data_pipeline.streams import StreamPlan
from launch import prepare as prepare_program
from tests.data_pipeline import servers
from tests.data_pipeline.faulty import PASSING, SILENT, first, no_fault, serving, some
from tests.data_pipeline.test_shards import WIDE, make

pytest.importorskip("obstore", reason="obstore is absent: pip install charlstm[remote]")

BLOCK = 1024
IDS = np.random.default_rng(1).integers(0, WIDE.size, 100_000).astype(np.uint16)


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    """A corpus of 5 shards of 39 blocks, the last one of which is short."""
    root = tmp_path_factory.mktemp("root")
    (root / "bucket" / "corpus").mkdir(parents=True)
    return make(root / "bucket" / "corpus", IDS, 20_000, WIDE, BLOCK)


@pytest.fixture
def server(disk, monkeypatch):
    monkeypatch.setattr(stores, "BACKOFF", (0.01, 0.05))
    monkeypatch.setattr(stores, "REQUEST_SECONDS", 1)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(disk.parents[1]) as running:
        yield running


def url(server) -> str:
    return f"{server.address}/bucket/corpus"


def train_split(server, patience: float = 20) -> Split:
    return open_corpus(url(server), patience=patience).train


def read_everywhere(split: Split) -> None:
    """Reads ranges of all kinds, side by side and alone, and compares them with the ids."""
    random = np.random.default_rng(3)
    starts = [*random.integers(0, len(IDS) - 9000, 12).tolist(), 0, 19_999, 20_000, len(IDS) - 9000]
    places = [(int(start), np.empty(length, np.uint16)) for start in starts for length in (1, 700, 9000)]
    split.read_many(places)
    for start, found in places:
        assert np.array_equal(found, IDS[start : start + len(found)])
    assert np.array_equal(split.read(0, len(IDS)), IDS)


@contextmanager
def upload_to(kind: str, disk: Path, folder: Path, monkeypatch):
    """Yields the URL of the corpus, put into a real server."""
    if kind == "nginx":
        with servers.nginx(folder, disk.parents[1]) as address:
            yield f"{address}/bucket/corpus"
        return
    if kind == "gcs":
        with servers.fake_gcs(folder) as address:
            for path in disk.iterdir():
                servers.put_into_gcs(address, f"corpus/{path.name}", path.read_bytes())
            for name, value in servers.gcs_environment(address, folder).items():
                monkeypatch.setenv(name, value)
            yield "gs://bucket/corpus"
        return
    with {"s3": servers.seaweedfs, "ceph": servers.ceph}[kind](folder) as address:
        for name, value in servers.s3_environment(address).items():
            monkeypatch.setenv(name, value)
        assert upload(disk, "s3://bucket/corpus") and not upload(disk, "s3://bucket/corpus")
        yield "s3://bucket/corpus"


@pytest.mark.parametrize("kind", ["nginx", "gcs", "s3", pytest.param("ceph", marks=pytest.mark.long)])
def test_a_corpus_is_read_from_a_real_server_and_what_is_missing_there_is_said(kind, disk, tmp_path, monkeypatch):
    with upload_to(kind, disk, tmp_path / "server", monkeypatch) as place:
        corpus = open_corpus(place + "/", patience=20)
        assert corpus.directory == place and corpus.fingerprint == open_corpus(disk).fingerprint
        read_everywhere(corpus.train)
        verify_corpus(place)
        store = open_store(place)
        assert store.size("train-00000.crc") == (disk / "train-00000.crc").stat().st_size
        for refused, words in (
            (lambda: open_corpus(place + "s"), "manifest.json does not exist"),
            (lambda: store.read("train-00000.ids", 50_000, 50_010), "shorter than the manifest says"),
            (lambda: store.read("train-00000.ids", 39_999, 40_010), "ends at byte 40000 of 40010"),
        ):
            with pytest.raises(ValueError, match=words):
                refused()
        if kind in ("s3", "ceph"):
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
            with pytest.raises(ValueError, match="is refused with these credentials"):
                open_corpus(place)


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_changes_nothing(server, fault, scheme, monkeypatch):
    for name, value in servers.s3_environment(server.address).items():
        monkeypatch.setenv(name, value)
    place = url(server) if scheme == "http" else "s3://bucket/corpus"
    server.fault = first(2, fault, "manifest") if fault != "other" else server.fault
    split = open_corpus(place, patience=30).train
    server.fault = first(3, fault)
    read_everywhere(split)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("403", "is refused with these credentials"),
        ("401", "is refused with these credentials"),
        ("404", "train-00000.ids does not exist"),
        ("412", "was changed while it was read"),
        ("416", "is shorter than the manifest says"),
        ("400", "400 Bad Request"),
        ("whole", "answers without ranges"),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_what_will_not_pass_is_refused_at_once_in_one_sentence(server, fault, words, scheme, monkeypatch):
    for name, value in servers.s3_environment(server.address).items():
        monkeypatch.setenv(name, value)
    split = open_corpus(url(server) if scheme == "http" else "s3://bucket/corpus", patience=60).train
    server.requests.clear()
    server.fault = first(99, fault, ".ids")
    with pytest.raises(ValueError, match=words) as refused:
        split.read(0, 10)
    assert "\n" not in str(refused.value)
    assert server.names() == ["train-00000.ids"], "was tried again"


def test_a_store_that_stays_silent_ends_the_reading_after_the_patience_and_says_so_on_the_way(
    server, monkeypatch, caplog
):
    monkeypatch.setattr(stores, "TOLD_AFTER", 0.2)
    split = train_split(server, patience=1.5)
    server.fault = first(10**6, "503")
    said = []

    def watch() -> None:
        while not any("503" in words for words in said) and time.monotonic() < began + 20:
            said.append(split._blocks.store.waiting())
            time.sleep(0.02)

    began, watching = time.monotonic(), threading.Thread(target=watch)
    watching.start()
    with caplog.at_level(logging.WARNING), pytest.raises(Unreachable, match=r"not answered for 2 s \(status 503\)"):
        split.read_many([(0, np.empty(9000, np.uint16)), (50_000, np.empty(9000, np.uint16))])
    watching.join()
    assert 1 < time.monotonic() - began < 30
    assert said[-1].startswith(f"{url(server)} does not answer (status 503), ")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and lines[0].startswith(f"{url(server)} does not answer (status 503)")
    while split._blocks.store._traffic.begun and time.monotonic() < began + 30:
        time.sleep(0.02)
    assert split._blocks.store.waiting() == ""


def test_a_server_that_is_killed_and_comes_back_changes_nothing(server):
    split = train_split(server)
    server.fault = first(1, "killed", ".ids")
    threading.Timer(1.0, lambda: server.start()).start()
    read_everywhere(split)


@pytest.mark.parametrize("fault", SILENT)
@pytest.mark.parametrize("name", [".ids", ".crc"])
def test_wrong_bytes_are_fetched_again_and_never_handed_over(server, fault, name, caplog):
    split = train_split(server)
    server.fault = first(2, fault, name)
    read_everywhere(split)
    assert name == ".crc" or "does not match its checksum as it came" in caplog.text


def test_a_block_that_stays_damaged_is_named_with_its_offset_and_where_it_was_damaged(server, disk, tmp_path):
    shutil.copytree(disk, tmp_path / "bucket" / "corpus")
    path = tmp_path / "bucket" / "corpus" / "train-00001.ids"
    content = bytearray(path.read_bytes())
    content[5 * BLOCK + 7] ^= 1
    path.write_bytes(content)
    split = train_split(server)
    split.read(0, 10), split.read(20_000, 20_010)
    server.root = tmp_path
    with pytest.raises(
        ValueError, match=rf"{url(server)}/train-00001\.ids is damaged at the source: the block at byte 5120"
    ):
        split.read(20_000, 30_000)
    assert np.array_equal(split.read(20_000, 22_000), IDS[20_000:22_000]), "the blocks before it are whole"
    server.fault = first(10**6, "flip", "train-00000.ids")
    with pytest.raises(
        ValueError, match=rf"{url(server)}/train-00000\.ids is damaged on the way: the block at byte \d+"
    ):
        split.read(3000, 13_000)
    server.fault = first(10**6, "flip", "train-00002.crc")
    with pytest.raises(ValueError, match=r"train-00002\.ids may be of another text"):
        split.read(40_000, 40_010)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_reading_gives_the_right_symbols_or_one_sentence(server, seed):
    split = train_split(server, patience=10)
    server.fault = some(0.2, (*PASSING[:4], "other", *SILENT), seed)
    read, random = 0, np.random.default_rng(seed)
    for _ in range(25):
        start = int(random.integers(0, len(IDS) - 5000))
        ids = [np.empty(5000, np.uint16), np.empty(10, np.uint16)]
        try:
            split.read_many([(start, ids[0]), (99_990 - start, ids[1])])
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)
            continue
        read += 1
        assert np.array_equal(ids[0], IDS[start : start + 5000])
        assert np.array_equal(ids[1], IDS[99_990 - start : 100_000 - start])
    assert read


def test_only_the_manifest_is_fetched_to_open_and_then_what_is_read(server, monkeypatch):
    corpus = open_corpus(url(server))
    assert server.names() == ["manifest.json"]
    corpus.train.read(30_000, 30_010)
    assert server.requests[1:] == [("train-00001.ids", 19 * BLOCK, 20 * BLOCK), ("train-00001.crc", 0, 160)]
    corpus.train.read(30_010, 30_020)
    assert len(server.requests) == 3, "the block is kept"
    monkeypatch.setattr(blocks, "RANGE_BYTES", 8 * BLOCK)
    monkeypatch.setattr(blocks, "extent_blocks", lambda block_bytes: 1)
    server.requests.clear()
    assert np.array_equal(open_corpus(url(server)).train.read(100, 45_000), IDS[100:45_000])
    ranges = [(start, stop) for name, start, stop in server.requests if name.endswith(".ids")]
    assert max(stop - start for start, stop in ranges) == 8 * BLOCK
    assert all(start % BLOCK == 0 for start, _ in ranges)


@pytest.mark.parametrize("step", [0, 137, 10**7 + 5])
def test_the_windows_and_the_chunks_are_those_of_the_disk(server, disk, step):
    near, far = open_corpus(disk).train, train_split(server)
    plan = StreamPlan(len(IDS), 8, 50, seed=3)
    here, there = (open_windows(split, plan, rows=range(2, 6), start_step=step) for split in (near, far))
    with here, there:
        for _ in range(300):
            assert all(np.array_equal(a, b) for a, b in zip(next(here), next(there), strict=True))
    chunks = ChunkPlan(len(IDS), 3000, 200, 8, 50)
    for (a, scored_a), (b, scored_b) in zip(
        read_chunks(near, chunks, range(8)), read_chunks(far, chunks, range(8)), strict=True
    ):
        assert np.array_equal(scored_a, scored_b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_windows_are_closed_at_once_while_the_store_does_not_answer(server):
    split = train_split(server, patience=600)
    server.fault = first(10**6, "503", ".ids")
    windows = open_windows(split, StreamPlan(len(IDS), 8, 50), rows=range(8))
    failed: list[Exception] = []

    def wait() -> None:
        try:
            next(windows)
        except (OSError, ValueError) as error:
            failed.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not split._blocks.store._traffic.begun:
        time.sleep(0.02)
    began = time.monotonic()
    windows.close()
    deadline = began + 20
    while split._blocks.store._traffic.begun and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not split._blocks.store._traffic.begun, "somebody still waits"
    waiting.join(20)
    assert len(failed) == 1
    server.fault = no_fault
    assert np.array_equal(split.read(5, 9000), IDS[5:9000]), "only the windows were closed"


@servers.each_s3
def test_a_corpus_is_prepared_into_a_store_with_its_manifest_last_and_never_over_another_one(
    s3, tmp_path, monkeypatch, capsys
):
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 40)
    flags = ["prepare", f"--input={text}", f"--cache_dir={tmp_path / 'cache'}", "--output=s3://bucket/made"]
    with s3(tmp_path / "server") as address:
        for name, value in servers.s3_environment(address).items():
            monkeypatch.setenv(name, value)
        store = open_store("s3://bucket/made")
        with pytest.raises(stores.Missing):
            store.read("manifest.json")
        broken = monkeypatch.context()
        with broken as patched, pytest.raises(ZeroDivisionError):
            create = stores.Remote.create
            patched.setattr(stores.Remote, "create", lambda *put: create(*put) if put[1] != "manifest.json" else 1 / 0)
            prepare_program.main(flags)
        assert store.size("train-00000.ids") == 9216
        with pytest.raises(stores.Missing):
            store.read("manifest.json")
        for words in ("prepared and verified: s3://bucket/made", "already prepared and verified"):
            assert prepare_program.main([*flags, "--verify"]) == 0
            assert words in capsys.readouterr().err
        assert open_corpus("s3://bucket/made").train.read(0, 256).tobytes() == bytes(range(256))
        with pytest.raises(ValueError, match=r"s3://bucket/made/manifest\.json is of another text or settings"):
            prepare_program.main([*flags, "--valid_fraction=0.2"])
        if s3 is servers.ceph:  # SeaweedFS makes buckets
            with pytest.raises(ValueError, match=r"s3://none/made/\.writable: there is no such bucket"):
                prepare_program.main([*flags, "--output=s3://none/made"])
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
        assert open_corpus("s3://bucket/made").train.read(0, 256).tobytes() == bytes(range(256))
        monkeypatch.setattr(prepare_program, "prepare", lambda *_, **__: 1 / 0)  # it is refused before the work
        for way in ([], ["--engine=local"], ["--part=0/1"]):
            with pytest.raises(ValueError, match=r"s3://bucket/other\S* is refused with these credentials \("):
                prepare_program.main([*flags, "--output=s3://bucket/other", *way])


@pytest.mark.long
@servers.each_s3
def test_of_many_that_create_an_object_at_once_one_does(s3, tmp_path, monkeypatch):
    with s3(tmp_path / "server") as address:
        for name, value in servers.s3_environment(address).items():
            monkeypatch.setenv(name, value)
        store = stores.Remote("s3://bucket/race")
        with ThreadPoolExecutor(16) as at_once:
            for turn in range(4):
                done = list(at_once.map(lambda n: store.create(f"{turn}", b"%d" % n), range(16)))  # noqa: B023
                assert sum(done) == 1 and int(bytes(store.read(f"{turn}"))) == done.index(True)


def test_a_split_of_a_store_can_be_pickled(server):
    assert np.array_equal(pickle.loads(pickle.dumps(train_split(server))).read(5, 50), IDS[5:50])


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("https://me:secret@host/corpus", "https://host/corpus is given with a user"),
        ("https://secret@host/corpus", "https://host/corpus is given with a user"),
        ("s3://bucket/corpus?X-Amz-Signature=secret", "s3://bucket/corpus is given with"),
        ("https://host/corpus#secret", "https://host/corpus is given with"),
        ("s3://", "names no bucket or host"),
        ("az://container/corpus", "ccount must be specified"),
    ],
)
def test_a_url_that_is_malformed_or_has_a_secret_in_it_is_refused_without_repeating_it(place, words, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ValueError, match=words) as refused:
        open_corpus(place)
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)


def test_without_obstore_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ValueError, match=r"needs obstore: pip install 'charlstm\[remote\]'"):
        open_corpus("s3://bucket/corpus")
