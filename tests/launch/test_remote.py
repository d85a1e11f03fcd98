"""A run from an object store is the run from the disk, to the bit, whatever becomes of the store and the cache."""

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipeline import block_cache, stores
from data_pipeline.build import corpora
from data_pipeline.build.prepare import prepare
from data_pipeline.settings import CorpusSettings
from launch import evaluate, train
from launch.support import cli
from tests.data_pipeline.faulty import serving, some
from tests.data_pipeline.test_stores import upload_to
from tests.launch.conftest import process, refusal

pytest.importorskip("obstore", reason="obstore is absent: pip install charlstm[remote]")


@pytest.fixture(scope="module")
def prepared(folder) -> Path:
    """The corpus, in `root/bucket/corpus`."""
    found = corpora.resolve(CorpusSettings(corpus=str(folder / "text.txt"), cache_dir=str(folder / "cache")))
    return shutil.copytree(found, folder / "root" / "bucket" / "corpus")


@pytest.fixture
def server(prepared, monkeypatch):
    monkeypatch.setattr(stores, "BACKOFF", (0.01, 0.05))
    monkeypatch.setattr(stores, "REQUEST_SECONDS", 1)
    with serving(prepared.parents[1]) as running:
        yield running


def digest(run_dir: Path) -> str:
    """The digest of the state at the end."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return next(record["state_digest"] for record in map(json.loads, reversed(lines)) if "state_digest" in record)


@pytest.fixture
def run(arguments, tmp_path):
    """Trains from a place, by default twenty steps and then the rest; gives the digest at the end."""

    def trained(place: object, name: str = "run", stops: tuple[int, ...] = (20, 40), **how: object) -> str:
        flags = [*arguments, f"--corpus={place}", f"--cache_dir={tmp_path / 'cache'}", f"--run_dir={tmp_path / name}"]
        flags += [f"--{key}={value}" for key, value in how.items()]
        for steps in stops:
            assert train.main(["train", *flags, f"--num_steps={steps}"]) == cli.DONE
        return digest(tmp_path / name)

    return trained


def test_a_run_from_a_faulty_store_ends_with_the_state_of_one_from_the_disk(run, trained, server, tmp_path, capsys):
    server.fault = some(0.3, ("503", "reset", "cut", "other", "flip"), 1)
    place = f"{server.address}/bucket/corpus"
    assert run(place, "there", stops=(40,)) == digest(trained)
    assert json.loads((tmp_path / "there" / "config.json").read_text())["corpus"]["corpus"] == place
    assert list((tmp_path / "cache" / "blocks").rglob("*.ids.*"))
    scores = []
    for run_dir in (tmp_path / "there", trained):
        assert evaluate.main(["evaluate", f"--run_dir={run_dir}", "--split=test", "--format=json"]) == cli.DONE
        scores.append(json.loads(capsys.readouterr().out.splitlines()[-1]) | {"seconds": 0})
    assert scores[0] == scores[1]


def test_a_cache_too_small_for_the_streams_is_refused_before_anything_is_written(arguments, server, tmp_path):
    flags = (*arguments, f"--corpus={server.address}/bucket/corpus", f"--run_dir={tmp_path / 'run'}")
    assert "cache_bytes=1000 is less than 8388608, two extents of each of 16 streams" in refusal(
        train.main, *flags, "--cache_bytes=1000"
    )
    assert "cache_bytes=-1 must be 0 or more" in refusal(train.main, *flags, "--cache_bytes=-1")
    assert not (tmp_path / "run").exists()


SLOW_TO_ANSWER = """
import sys
from data_pipeline import stores
from launch import train
from launch.support import cli
stores.TOLD_AFTER, stores.REQUEST_SECONDS, stores.BACKOFF = 0.5, 1, (0.05, 0.2)
from data_pipeline import symbols
symbols.REMOTE_RUN_SYMBOLS = 16  # so that every step asks the store
cli.run("launch.train", train.main)
"""


@pytest.mark.parametrize("patience", [4, pytest.param(60, marks=pytest.mark.long)])
def test_waiting_for_a_store_is_no_hang_and_ends_with_a_status_of_its_own(folder, arguments, tmp_path, patience):
    settings = CorpusSettings(corpus=str(folder / "text.txt"), cache_dir=str(tmp_path))
    prepare(settings, tmp_path / "root" / "corpus", block_bytes=64)
    asked: list[float] = []

    def fault(name: str, start: int, stop: int) -> str:
        asked.append(time.monotonic())
        return "503" if len(asked) > 100 and asked[-1] - asked[100] < (1000 if patience < 10 else 5) else ""

    with serving(tmp_path / "root") as server:
        place, server.fault = f"{server.address}/corpus", fault
        flags = (
            *(f"--corpus={place}", f"--run_dir={tmp_path / 'run'}", "--cache_bytes=0", "--num_steps=27"),
            *("--step_timeout_least=1", "--step_timeout_factor=0.01", f"--remote_patience={patience}"),
        )
        done = process(sys.executable, "-c", SLOW_TO_ANSWER, *arguments, *flags)
    lines = done.stderr.splitlines()
    assert len(asked) > 101
    if patience < 10:
        assert done.returncode == cli.UNREACHABLE == 69, done.stderr[-2000:]
        words = f"launch.train: {place} has not answered for 4 s (status 503): the same command goes on"
        assert lines[-1].startswith(words), lines[-1]
    else:
        assert done.returncode == cli.DONE, done.stderr[-2000:]
    assert f"{place} does not answer (status 503)" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["nginx", "gcs", "s3"])
def test_a_run_is_the_same_from_every_store_with_any_cache(kind, run, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(block_cache, "EXTENT_BYTES", 16384)
    here = run(prepared, "here")
    blocks = tmp_path / "cache" / "blocks"
    with upload_to(kind, prepared, tmp_path / "server", monkeypatch) as place:
        assert run(place, "none", cache_bytes=0) == here and not blocks.exists()
        assert run(place, "cold") == here and list(blocks.rglob("*.ids.*"))
        assert run(place, "warm") == here
        for path in blocks.rglob("*.ids.*"):
            os.truncate(path, path.stat().st_size // 2)
        assert run(place, "torn") == here
        done = threading.Event()

        def delete() -> None:
            while not done.is_set():
                shutil.rmtree(blocks, ignore_errors=True)
                time.sleep(0.01)

        deleting = threading.Thread(target=delete)
        deleting.start()
        try:
            assert run(place, "deleted") == here
        finally:
            done.set()
            deleting.join()
