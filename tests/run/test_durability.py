"""What a loss of power leaves: a name stands for content that is on disk, and what depends on a name comes after it."""

import hashlib
import http.server
import threading
from pathlib import Path

import pytest

import charlstm as cl
from charlstm.config import Config, replace
from charlstm.run import run_directory
from charlstm.run.checkpoint import Checkpoints
from charlstm.run.log import Lines
from data_pipeline.atomic_files import atomic_write
from data_pipeline.build import downloads
from data_pipeline.build.downloads import Download
from data_pipeline.build.prepare import prepare
from data_pipeline.settings import CorpusSettings
from data_pipeline.vocabulary import Vocabulary
from tests.disk import watched
from tests.run.test_checkpoint import IDENTITY, make_state


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path.resolve()


def test_the_watch_itself_sees_what_comes_too_early_and_what_is_left_out(root):
    with watched(root) as disk:
        (root / "unsynced").write_text("content")
        (root / "unsynced").replace(root / "file")
        assert disk.faults == ["file was named before unsynced in it was on disk"] and disk.lost == ["file"]
        with atomic_write(root / "other") as file:
            file.write(b"content")
        assert len(disk.faults) == 1 and disk.lost == [] and disk.named == ["file", "other"]


def test_a_prepared_corpus_is_named_when_its_shards_and_its_manifest_are_on_disk(root):
    text, output = root / "text.txt", root / "corpora" / "corpus"
    text.write_text("".join(f"line {n * n} of a text\n" for n in range(3000)))
    with watched(root) as disk:
        prepare(CorpusSettings(corpus=str(text)), output, workers=1, shard_bytes=16384)
    assert disk.faults == [] and disk.lost == []
    shards = [name for name in disk.named if name.endswith(".ids")]
    assert len(shards) > 3 and disk.named[-2:] == ["manifest.json", "corpus"]
    for shard in shards:  # the note says that the shard is whole, so it is the last of its files
        assert disk.named.index(f"{shard}.json") == max(n for n, name in enumerate(disk.named) if shard in name)


def test_a_checkpoint_is_named_when_its_files_and_its_seal_are_on_disk(root):
    (root / "checkpoints").mkdir()
    with watched(root) as disk, Checkpoints(root / "checkpoints", keep=1, log=print) as checkpoints:
        for step in (1, 2, 2):
            checkpoints.save(make_state(step), IDENTITY, None)
            checkpoints.wait()
            assert checkpoints.failed_saves == 0
            assert disk.faults == [] and disk.lost == []
    assert disk.named == ["checkpoint.json", "1", "checkpoint.json", "2", "checkpoint.json", "2"]


def test_of_a_new_run_the_config_is_on_disk_last(root):
    identity = run_directory.Identity(Vocabulary("bytes"), "f" * 64)
    initial = run_directory.Initial("other", "other", 3, "params", "0" * 64)
    with watched(root) as disk:
        run_directory.create(root / "run", Config(), identity, ["--seed=1"], initial)
        run_directory.write_config(root / "run", Config())
    assert disk.faults == [] and disk.lost == []
    names = ["initial_checkpoint.json", "flags.txt", "identity.json", "config.json", "config.json"]
    assert disk.named == names


def test_metrics_that_are_cut_are_on_disk_before_they_take_the_place_of_the_others(root):
    lines = Lines(root / "metrics.jsonl")
    lines.add("one")
    with watched(root) as disk:
        lines.replace("another\n")
    assert disk.faults == [] and disk.named == ["metrics.jsonl"]


def test_what_led_to_a_checkpoint_is_on_disk_before_it(root, monkeypatch):
    text = "".join(f"line {n * n} of a text\n" for n in range(300))
    config, corpus = cl.Config.from_flagfile("configs/tiny.flags"), cl.load_corpus(text)
    saves, save = [], Checkpoints.save

    def saved(*arguments) -> None:
        paths = [root / "run" / name for name in ("metrics.jsonl", "samples.jsonl")]
        saves.append([path.exists() and disk.has(path) for path in paths])
        save(*arguments)

    monkeypatch.setattr(Checkpoints, "save", saved)
    with watched(root) as disk:
        often = {"num_steps": 6, "log_every": 2, "evaluate_every": 4, "checkpoint_every": 2, "sample_every": 2}
        cl.train(replace(config, **often), corpus, run_dir=root / "run")
    assert saves == [[True, True]] * 3 and disk.lost == []


def test_a_download_is_on_disk_before_it_has_its_name(root):
    content = b"some text\n" * 1000

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server, watched(root) as disk:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, digest = f"http://127.0.0.1:{server.server_address[1]}/text", hashlib.sha256(content).hexdigest()
        item = Download("text", url, len(content), len(content), "sha256", digest)
        assert downloads.fetch(item, root / "downloads").read_bytes() == content
        server.shutdown()
    assert disk.faults == [] and disk.lost == [] and disk.named == ["text"]
