"""A preparation by parts that is killed, overtaken or spoiled on the way ends with the same corpus, or is refused."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import stores
from data_pipeline.build import by_parts, parts, places
from data_pipeline.build.by_parts import Sizes, prepare_by_parts
from data_pipeline.build.encode import parallel_map
from data_pipeline.build.engines import engine
from data_pipeline.build.plan import Share
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus, verify_corpus
from tests.conftest import ROOT
from tests.data_pipeline.build.conftest import SIZES, fingerprint, settings_of
from tests.data_pipeline.build.test_prepare import files_of
from tests.data_pipeline.servers import each_s3, s3_environment

KILLED = """
import os, signal, sys
from pathlib import Path
from data_pipeline.build import by_parts, places
from data_pipeline.build.by_parts import Sizes, prepare_by_parts
from data_pipeline.build.engines import engine
from data_pipeline.build.plan import Share
from data_pipeline.settings import CorpusSettings
by_parts.HELP_AFTER = by_parts.POLL = 0
left = int(sys.argv[1])
def dying(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call
for module, name in ((os, "replace"), (os, "fsync"), (os, "stat"), (os, "unlink"), (os, "rmdir")):
    setattr(module, name, dying(getattr(module, name)))
share = Share.parse(sys.argv[2]) if sys.argv[2] else None
prepare_by_parts({how!r}, Path({out!r}), share=share, workers=1, sizes=Sizes(1024, 700, 64))
"""


def killed(how: CorpusSettings, out: Path, after: int, share: str = "") -> int:
    """The status of a preparation that is killed at its `after`-th call of the system that matters."""
    code = KILLED.replace("{how!r}", repr(how)).replace("{out!r}", repr(str(out)))
    return subprocess.run([sys.executable, "-c", code, str(after), share], cwd=ROOT, timeout=300).returncode


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.long)])
def test_workers_that_are_killed_anywhere_and_started_again_give_the_same_fingerprint(folder, kills):
    how, draw = settings_of(folder, vocabulary="characters"), random.Random(11)
    out, seen = folder.parent / "out", 0
    prepare_by_parts(how, folder.parent / "local", sizes=SIZES, workers=1)
    while seen < kills:
        status = killed(how, out, draw.randrange(1, 400), draw.choice(["0/2", "1/2", "0/1", ""]))
        assert status in (0, -signal.SIGKILL)
        seen += status != 0
        if status == 0 and out.exists():
            assert files_of(out) == files_of(folder.parent / "local")
            shutil.rmtree(out)
    assert prepare_by_parts(how, out, sizes=SIZES, workers=1)
    assert files_of(out) == files_of(folder.parent / "local")


def test_two_of_one_share_at_a_time_do_no_harm(folder):
    how, out = settings_of(folder, vocabulary="characters"), folder.parent / "out"
    code = KILLED.replace("{how!r}", repr(how)).replace("{out!r}", repr(str(out)))
    command = [sys.executable, "-c", code, "0", "0/1"]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
    assert [one.communicate()[1] for one in both] == [b"", b""]
    prepare_by_parts(how, folder.parent / "local", sizes=SIZES, workers=1)
    assert files_of(out) == files_of(folder.parent / "local")
    assert {path.name for path in folder.parent.iterdir()} == {"texts", "cache", "out", "local"}


def test_a_shard_that_another_process_puts_there_while_the_corpus_is_published_is_no_part_of_it(folder, monkeypatch):
    def late(directory: Path, output: Path) -> None:
        (directory / "text-00099-00000.ids").touch()
        rename(directory, output)

    rename = places.rename
    monkeypatch.setattr(places, "rename", late)
    assert prepare_by_parts(settings_of(folder), folder.parent / "out", sizes=SIZES, workers=1)
    assert "text-00099-00000.ids" not in files_of(folder.parent / "out")


def test_a_join_that_was_killed_before_the_corpus_had_its_name_is_ended_by_another(folder, monkeypatch):
    how, out = settings_of(folder), folder.parent / "out"
    prepare_by_parts(how, folder.parent / "local", sizes=SIZES, workers=1)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(places, "rename", interrupt)
        prepare_by_parts(how, out, sizes=SIZES, workers=1)
    assert prepare_by_parts(how, out, only_join=True, sizes=SIZES, workers=1)
    assert files_of(out) == files_of(folder.parent / "local")
    assert {path.name for path in folder.parent.iterdir()} == {"texts", "cache", "out", "local"}


@pytest.mark.parametrize("remote", [False, True])
def test_what_a_join_left_that_was_killed_after_the_corpus_had_its_name_is_deleted(folder, bucket, monkeypatch, remote):
    how, out, local = settings_of(folder), bucket if remote else folder.parent / "out", folder.parent / "local"
    prepare_by_parts(how, local, sizes=SIZES, workers=1)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(places.RemotePlace, "_delete", interrupt)
        killed.setattr(places.LocalPlace, "abandon", interrupt)
        prepare_by_parts(how, out, sizes=SIZES, workers=1)
    assert prepare_by_parts(how, out, sizes=SIZES, workers=1)
    there = {one.name for one in stores.Remote(bucket).objects()} if remote else set(files_of(out))
    assert there == set(files_of(local)) and not list(folder.parent.glob(".*"))


def interrupt(*arguments, **named) -> None:
    raise KeyboardInterrupt


def test_an_input_that_changes_while_its_part_is_prepared_is_refused(folder, monkeypatch):
    how, decoded = settings_of(folder), parts.decode_file

    def change(file, *arguments):
        result = decoded(file, *arguments)
        if file.name == "g.txt":
            os.utime(folder / "g.txt", ns=(1, 1))
        return result

    monkeypatch.setattr(parts, "decode_file", change)
    with pytest.raises(ValueError, match=r"g\.txt was changed while it was prepared"):
        prepare_by_parts(how, folder.parent / "out", sizes=SIZES, workers=1)
    assert {path.name for path in folder.parent.iterdir()} == {"texts", "cache"}


def test_a_shard_that_somebody_has_deleted_is_made_again(folder):
    how, out = settings_of(folder), folder.parent / "out"
    prepare_by_parts(how, out, share=Share(0, 2), sizes=SIZES, workers=1)
    next((folder.parent / ".out.parts").rglob("text-00002-00000.ids")).unlink()
    prepare_by_parts(how, out, share=Share(0, 2), sizes=SIZES, workers=1)
    assert prepare_by_parts(how, out, share=Share(1, 2), sizes=SIZES, workers=1)
    verify_corpus(out)


@each_s3
@pytest.mark.parametrize("values", [{}, {"vocabulary": "characters"}], ids=str)
def test_parts_in_an_object_store_are_the_corpus_on_the_disk(s3, folder, tmp_path, impatient, monkeypatch, values):
    pytest.importorskip("obstore", reason="obstore is absent: pip install charlstm[remote]")
    from data_pipeline.stores import Remote

    how = settings_of(folder, **values)
    prepare_by_parts(how, tmp_path / "local", sizes=SIZES, workers=1)
    with s3(tmp_path / "server") as endpoint:
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        url = "s3://bucket/out"
        with monkeypatch.context() as dying, pytest.raises(KeyboardInterrupt):
            dying.setattr(places.RemotePlace, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            for number in (1, 0):
                prepare_by_parts(how, url, share=Share(number, 2), sizes=SIZES, workers=1)
        with pytest.raises(ValueError, match=r"another plan \(the sizes of parts differ\)"):
            prepare_by_parts(how, url, share=Share(0, 2), sizes=Sizes(2048), workers=1)
        assert prepare_by_parts(how, url, only_join=True, sizes=SIZES, workers=1)
        assert prepare_by_parts(how, url, share=Share(0, 2), sizes=SIZES, workers=1)
        assert open_corpus(url).fingerprint == fingerprint(tmp_path / "local")
        verify_corpus(url)
        names = {one.name for one in Remote(url).objects()}
        assert names == set(files_of(tmp_path / "local"))
        with pytest.raises(ValueError, match="is of another text or settings"):
            prepare_by_parts(how, url, sizes=Sizes(2048), workers=1)
        (folder / "bad.jsonl").write_text("[]\n")
        with pytest.raises(ValueError, match=r"bad\.jsonl, line 1"):
            prepare_by_parts(how, "s3://bucket/bad", sizes=SIZES, workers=1)
        assert not Remote("s3://bucket/bad").objects()
    assert not list((tmp_path / "cache" / "parts").iterdir())


@pytest.mark.parametrize("share", [None, Share(0, 1)])
@pytest.mark.parametrize("at", ["join_parts", "missing_counts"])
def test_a_corpus_that_another_process_publishes_meanwhile_is_taken_as_it_is(
    folder, bucket, impatient, monkeypatch, at, share
):
    how, own = settings_of(folder, vocabulary="characters"), getattr(by_parts, at)

    def beaten(*arguments):
        monkeypatch.setattr(by_parts, at, own)
        assert prepare_by_parts(how, bucket, sizes=SIZES, workers=1)
        return own(*arguments)

    monkeypatch.setattr(by_parts, at, beaten)
    assert prepare_by_parts(how, bucket, sizes=SIZES, workers=1, share=share)
    verify_corpus(bucket)
    prepare_by_parts(how, folder.parent / "local", sizes=SIZES, workers=1)
    assert {one.name for one in stores.Remote(bucket).objects()} == set(files_of(folder.parent / "local"))


def test_what_a_kill_after_the_join_has_left_is_removed_by_the_same_command(folder, bucket, monkeypatch):
    how, out = settings_of(folder), folder.parent / "out"
    with monkeypatch.context() as killed:
        for place, last in ((places.LocalPlace, "abandon"), (places.RemotePlace, "_delete")):
            killed.setattr(place, last, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        for output in (out, bucket):
            with pytest.raises(KeyboardInterrupt):
                prepare_by_parts(how, output, sizes=SIZES, workers=1)
    assert (folder.parent / ".out.parts").exists()
    for output in (out, bucket):
        assert prepare_by_parts(how, output, sizes=SIZES, workers=1)
        verify_corpus(output)
    assert not (folder.parent / ".out.parts").exists()
    assert {one.name for one in stores.Remote(bucket).objects()} == set(files_of(out))


def test_a_corpus_in_a_store_is_not_abandoned_once_it_is_published(folder, bucket):
    prepare_by_parts(settings_of(folder), bucket, sizes=SIZES, workers=1)
    places.RemotePlace(bucket, "0" * 64, 1.0, folder).abandon()
    verify_corpus(bucket)


@pytest.mark.long
@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_dask_gives_the_fingerprint_of_this_machine_although_its_workers_are_killed(folder, tmp_path, vocabulary):
    distributed = pytest.importorskip("distributed", reason="distributed is absent: pip install charlstm[cluster]")
    how = settings_of(folder, vocabulary=vocabulary)
    prepare_by_parts(how, tmp_path / "local", sizes=SIZES, workers=1)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        victim = next(iter(cluster.workers.values())).process.pid
        seen: list[int] = []

        def kill(doing: str, done: int, total: int) -> None:
            if doing == "writing" and done >= 1 and not seen:
                os.kill(victim, signal.SIGKILL)
                seen.append(done)

        name = f"dask:{cluster.scheduler_address}"
        assert prepare_by_parts(how, tmp_path / "dask", kill, name=name, sizes=SIZES)
        assert seen
        assert files_of(tmp_path / "dask") == files_of(tmp_path / "local")
        (folder / "bad.jsonl").write_text("[]\n")
        with pytest.raises(ValueError, match=r"bad\.jsonl, line 1"):
            prepare_by_parts(how, tmp_path / "bad", name=name, sizes=SIZES)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "bad"))]


@pytest.mark.parametrize("opened", [lambda: engine("local", 2, True, None), lambda: parallel_map(2, True, None)])
def test_a_process_that_is_killed_ends_the_preparation_in_a_sentence(opened):
    with (
        pytest.raises(ChildProcessError, match="was killed, perhaps for want of memory: the same command goes on"),
        opened() as parallel,
    ):
        list(parallel("preparing")(os._exit, [1]))
