"""Preparations that are killed, stopped, refused, or there twice."""

import errno
import fcntl
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline import stores
from data_pipeline.build import prepare as prepare_module
from data_pipeline.build.by_parts import Sizes, prepare_by_parts
from data_pipeline.build.prepare import prepare
from data_pipeline.shards import open_corpus, verify_corpus
from tests.conftest import ROOT
from tests.data_pipeline.build.test_prepare import POEM, files_of, text_of


def test_a_text_that_changes_while_it_is_prepared_is_refused(tmp_path, setting):
    how = setting(POEM)

    def change(doing: str, done: int, total: int) -> None:
        if doing == "writing":  # the file is never shorter, not even for a moment
            (tmp_path / "other.txt").write_text(POEM[::-1])
            (tmp_path / "other.txt").replace(tmp_path / "text.txt")

    with pytest.raises(ValueError, match=r"text\.txt was changed while it was prepared"):
        prepare(how, tmp_path / "out", change)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text.txt"]


def test_what_was_written_of_a_text_that_changed_is_not_used_when_it_is_as_before(tmp_path, setting):
    how = setting("abc" * 100)

    def change(doing: str, done: int, total: int) -> None:
        if doing == "hashing":  # so that every shard is of the other text
            (tmp_path / "other.txt").write_text("xyz" * 100)
            (tmp_path / "other.txt").replace(tmp_path / "text.txt")

    with pytest.raises(ValueError, match=r"text\.txt was changed while it was prepared"):
        prepare(how, tmp_path / "out", change, shard_bytes=50)
    (tmp_path / "text.txt").write_text("abc" * 100)
    assert text_of(open_corpus(prepare(how, tmp_path / "out", shard_bytes=50)), "train") == b"abc" * 90


@pytest.mark.parametrize(
    "text, values", [(POEM, {"min_count": 99_999}), (b"text\xff", {}), ("abc", {"split": "columns:9x9"})]
)
def test_a_preparation_that_is_refused_leaves_nothing(tmp_path, setting, text, values):
    with pytest.raises(ValueError):
        prepare(setting(text, vocabulary="characters", **values), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text.txt"]


@pytest.mark.parametrize("fault", ["is refused with these credentials", "needs backports.zstd"])
@pytest.mark.parametrize("by_parts", [False, True])
def test_what_is_finished_stays_where_the_text_is_not_at_fault(tmp_path, setting, bucket, monkeypatch, fault, by_parts):
    zstd = pytest.importorskip("backports.zstd", reason="backports.zstd is absent: pip install charlstm[inputs]")
    lines = b"".join(b'{"text": "document %d"}\n' % number for number in range(90))
    stores.Remote(bucket).create("a.jsonl", lines)
    stores.Remote(bucket).create("b.jsonl.zst", zstd.compress(lines))
    how, read, asked = replace(setting(), corpus=f"{bucket}/*"), stores.Remote.read, []
    monkeypatch.setattr("data_pipeline.build.decode.TOGETHER", 0)
    refused = {"b.jsonl.zst"} if "credentials" in fault else set()

    def asking(store, name, *arguments) -> memoryview:
        asked.append(name)
        if name in refused:
            store._reason(name, PermissionError("non-2xx status code: 403"))
        return read(store, name, *arguments)

    def run() -> None:
        asked.clear()
        if by_parts:
            prepare_by_parts(how, tmp_path / "out", workers=1, sizes=Sizes(len(lines)))
        else:
            prepare(how, tmp_path / "out", workers=1)

    monkeypatch.setattr(stores.Remote, "read", asking)
    with monkeypatch.context() as lacking, pytest.raises(ValueError, match=fault):
        for name in () if refused else ("backports", "compression"):
            lacking.setitem(sys.modules, name, None)
        run()
    assert "a.jsonl" in asked
    refused.clear()
    run()
    assert "a.jsonl" not in asked
    verify_corpus(tmp_path / "out")


@pytest.mark.parametrize("locks", [True, False])
def test_what_was_being_written_at_a_kill_is_removed_with_locks_and_without(tmp_path, setting, monkeypatch, locks):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def stop(doing: str, done: int, total: int) -> None:
        if doing == "writing":
            raise KeyboardInterrupt

    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    how, seen = setting("abc" * 100), []
    with pytest.raises(KeyboardInterrupt):
        prepare(how, tmp_path / "out", stop, shard_bytes=50)
    partial = tmp_path / ".out.partial"
    torn = partial / "train-00001.ids.0badf00d.new"
    torn.write_bytes(b"torn")
    prepare(how, tmp_path / "out", lambda doing, done, total: seen.append(torn.exists()), shard_bytes=50)
    assert set(seen) == {False}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "text.txt"]


@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_a_killed_preparation_leaves_no_corpus_and_is_continued(tmp_path, setting, vocabulary):
    how = setting(POEM * 10, vocabulary=vocabulary)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from data_pipeline.build.prepare import prepare\n"
        "from data_pipeline.settings import CorpusSettings\n"
        "def kill(doing, done, total):\n"
        "    if doing == 'writing' and done == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"prepare({how!r}, Path({str(tmp_path / 'out')!r}), kill, workers=1, shard_bytes=1000, block_bytes=100)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    # A shard whose note is missing may be torn, and is written again; one that has a note is kept.
    kept, torn = partial / "train-00000.ids", partial / "train-00002.ids"
    inode = kept.stat().st_ino
    (partial / "train-00002.ids.json").unlink()
    torn.write_bytes(b"torn")
    out = prepare(how, tmp_path / "out", workers=1, shard_bytes=1000, block_bytes=100)
    assert (out / "train-00000.ids").stat().st_ino == inode
    assert files_of(out) == files_of(prepare(how, tmp_path / "straight", shard_bytes=1000, block_bytes=100))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "straight", "text.txt"]


def test_a_kill_while_a_corpus_is_published_loses_no_work_and_leaves_nothing_else_in_it(tmp_path, setting, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"text": "a document"}\n' * 99)
    how, out = setting(tmp_path / "in.jsonl"), tmp_path / "out"
    run = functools.partial(prepare, how, out, workers=1, shard_bytes=500)
    straight = files_of(run())
    for after in itertools.count():
        shutil.rmtree(out)
        left = None  # calls of the system until the kill, once the shards are written

        def begin(*arguments, own=prepare_module.write_sources, after=after) -> None:
            nonlocal left
            left = after
            own(*arguments)

        def dying(own, *arguments, **named):
            nonlocal left
            if left == 0:  # the dead do not tidy up
                raise KeyboardInterrupt
            left = None if left is None else left - 1
            return own(*arguments, **named)

        with monkeypatch.context() as killed:
            killed.setattr(prepare_module, "write_sources", begin)
            for name in ("replace", "fsync", "unlink", "open"):
                killed.setattr(os, name, functools.partial(dying, getattr(os, name)))
            try:
                run()
            except KeyboardInterrupt:
                pass
            else:
                assert after > 10
                break
        assert not out.exists() or files_of(out) == straight
        written = (out if out.exists() else tmp_path / ".out.partial") / "train-00000.ids"
        before = written.stat()
        with monkeypatch.context() as seen:
            seen.setattr("data_pipeline.build.decode.decode_file", None)  # what was decoded is not decoded again
            assert files_of(run()) == straight
        now = (out / "train-00000.ids").stat()
        assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert {path.name for path in tmp_path.iterdir()} - {".out.lock"} == {"cache", "in.jsonl", "out"}


@pytest.mark.parametrize("lost", ["train-00000.ids", "sources.jsonl"])
def test_a_complete_corpus_that_was_deleted_in_part_is_not_published(tmp_path, setting, monkeypatch, lost):
    how = setting("abc" * 1000)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(prepare_module, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(how, tmp_path / "out")
    (tmp_path / ".out.partial" / lost).unlink()
    verify_corpus(prepare(how, tmp_path / "out"))


def by_parts(*arguments) -> Path:
    prepare_by_parts(*arguments, workers=1)
    return arguments[1]


@pytest.mark.parametrize("prepares", [prepare, by_parts])
@pytest.mark.parametrize("exists", [True, False])
def test_an_output_that_is_a_link_is_made_where_it_leads_to(tmp_path, setting, prepares, exists):
    (tmp_path / "elsewhere").mkdir()
    if exists:
        (tmp_path / "elsewhere" / "real").mkdir()
    (tmp_path / "out").symlink_to("elsewhere/real")
    prepares(setting("abc" * 1000), tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    verify_corpus(tmp_path / "out")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["real"]


@pytest.mark.parametrize("prepares", [prepare, by_parts])
def test_a_mount_point_is_refused_before_the_work_and_one_that_has_the_corpus_is_taken(
    tmp_path, setting, monkeypatch, prepares
):
    how, out = setting("abc" * 1000), tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    with monkeypatch.context() as idle, pytest.raises(ValueError, match=r"out is a mount point, .*: name one inside"):
        idle.setattr("data_pipeline.build.texts.decode_file", None)
        prepares(how, out)
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "cache", "out"} and not list(out.iterdir())
    prepares(how, out / "inside")
    for file in (out / "inside").iterdir():
        file.rename(out / file.name)
    prepares(how, out)


@pytest.mark.parametrize("prepares", [prepare, by_parts])
def test_the_directory_that_one_is_in_is_refused_and_not_replaced(tmp_path, setting, monkeypatch, prepares):
    how, here = setting("abc" * 1000), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(ValueError, match=r"is the directory that you are in, .*: name one inside"):
        prepares(how, Path("."))
    assert here.samefile(".") and not list(here.iterdir())


@pytest.mark.parametrize("prepares", [prepare, by_parts])
def test_an_output_that_cannot_be_made_at_the_end_is_named_and_the_work_is_kept(
    tmp_path, setting, monkeypatch, prepares
):
    how, out, replace_file = setting("abc" * 1000), tmp_path / "out", os.replace

    def refuse(source, target) -> None:
        if Path(target) == out:
            raise OSError(errno.EBUSY, "Device or resource busy", str(source), None, str(target))
        replace_file(source, target)

    with monkeypatch.context() as busy, pytest.raises(OSError) as caught:
        busy.setattr(os, "replace", refuse)
        prepares(how, out)
    assert caught.value.filename == str(out) and caught.value.filename2 is None
    (written,) = (path for path in tmp_path.rglob("*00000.ids") if path.stat().st_size == 2700)
    inode = written.stat().st_ino
    assert inode in {path.stat().st_ino for path in prepares(how, out).iterdir()}


def test_what_another_preparation_left_is_not_used(tmp_path, setting):
    with pytest.raises(KeyboardInterrupt):

        def stop(doing: str, done: int, total: int) -> None:
            if doing == "writing":
                raise KeyboardInterrupt

        prepare(setting("abc" * 1000), tmp_path / "out", stop, shard_bytes=100)
    assert (tmp_path / ".out.partial" / "train-00000.ids").exists()
    out = prepare(setting("xyz" * 1000), tmp_path / "out", shard_bytes=100)
    assert text_of(open_corpus(out), "train") == b"xyz" * 900


def test_preparations_at_the_same_time_write_one_corpus(tmp_path, setting):
    how, told, lock = setting(POEM * 50), [], threading.Lock()

    def tell(doing: str, done: int, total: int) -> None:
        time.sleep(0.01)
        with lock:
            told.append((doing, done))

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: prepare(how, tmp_path / "out", tell, shard_bytes=5000), range(4)))
    assert set(made) == {tmp_path / "out"}
    assert told.count(("writing", 1)) == 1, "more than one has written"
    verify_corpus(tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))
