"""Which files a text consists of."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.corpora import resolve
from data_pipeline.named import standard_library
from data_pipeline.prepare import prepare
from data_pipeline.settings import CorpusSettings
from data_pipeline.texts import find_text


def test_a_corpus_that_has_lost_its_manifest_is_not_taken_for_text(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 100)
    cache = str(tmp_path / "cache")
    out = prepare(CorpusSettings(corpus=str(tmp_path / "a.txt"), cache_dir=cache), tmp_path / "out")
    (out / "manifest.json").unlink()
    complaint = r"out has shards but no manifest\.json: it is not whole, prepare it again"
    with pytest.raises(ValueError, match=complaint):
        resolve(CorpusSettings(corpus=str(out), cache_dir=cache))
    with pytest.raises(ValueError, match=complaint):
        find_text(str(out))
    for checksums in out.glob("*.crc"):
        checksums.rename(checksums.with_stem(f"not-{checksums.stem}"))
    assert len(find_text(str(out)).files) == 6  # somebody's text after all


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As root, who may read everything, the block runs as nobody."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(me)


@pytest.mark.parametrize("find", [find_text, lambda spec: standard_library(Path(spec))], ids=["directory", "python"])
@pytest.mark.parametrize("hidden", ["in", "in/sub"])
def test_a_folder_that_cannot_be_read_is_refused_and_not_left_out(
    tmp_path, monkeypatch, find: Callable[[str], object], hidden
):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a.py", "sub/b.py"):
        (tmp_path / "in" / name).write_text("text")
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # nobody may not go through the folders above
    Path(hidden).chmod(0)
    with unprivileged(), pytest.raises(ValueError) as caught:
        find("in")
    Path(hidden).chmod(0o755)
    assert str(caught.value) == f"{hidden} cannot be read (Permission denied): make it readable or move it away"


def test_a_file_that_cannot_be_looked_at_is_refused_and_a_link_to_nothing_left_out(tmp_path, monkeypatch):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / "in" / name).write_text("text")
    (tmp_path / "in" / "link").symlink_to("nothing")
    assert [file.name for file in find_text(str(tmp_path / "in")).files] == ["a.txt", "sub/b.txt"]
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    Path("in/sub").chmod(0o444)  # it has names, of which nothing can be learned
    with unprivileged(), pytest.raises(ValueError, match=r"^in/sub/b\.txt cannot be read \(Permission denied\)"):
        find_text("in")
    Path("in/sub").chmod(0o755)
