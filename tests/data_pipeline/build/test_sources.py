"""Which files a text consists of."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.build import utf8
from data_pipeline.build.corpora import resolve
from data_pipeline.build.datasets import standard_library
from data_pipeline.build.prepare import prepare
from data_pipeline.build.sources import find_text
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus


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
    assert len(find_text(str(out)).files) == 7  # somebody's text after all


def test_a_prepared_corpus_in_a_folder_or_matched_by_a_glob_is_not_taken_for_text(tmp_path, setting):
    made(tmp_path, {"in/a.txt": "abc" * 100, "in/b/b.txt": "def" * 100, "in/web/manifest.json": "{}"})
    corpus = prepare(setting(tmp_path / "in", valid_fraction=0, test_fraction=0), tmp_path / "out")
    shutil.copytree(corpus, tmp_path / "in" / "b" / "corpus")
    for spec in (tmp_path / "in", tmp_path / "in" / "**", tmp_path / "in" / "**" / "*"):
        assert names_of(spec) == ["a.txt", "b/b.txt", "web/manifest.json"]
        assert find_text(str(spec)).left_out == ("b/corpus, a prepared corpus",)
    said: list[str] = []
    prepare(setting(tmp_path / "in", include="*.txt"), say=said.append)
    assert said[0].endswith("in: 2 files, 600 bytes; left out: b/corpus, a prepared corpus, and 1 more")
    with pytest.raises(ValueError, match=r"out/\* has no files but those of a prepared corpus: name"):
        find_text(str(corpus / "*"))


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


# Links, and files found twice.


def made(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def names_of(spec: Path | str) -> list[str]:
    return [file.name for file in find_text(str(spec)).files]


def test_a_link_to_a_folder_is_followed_as_one_to_a_file_is(tmp_path):
    made(tmp_path, {"in/a.txt": "a", "elsewhere/b.txt": "b", "elsewhere/deep/c.txt": "c", "elsewhere/.d": "no"})
    (tmp_path / "in" / "folder").symlink_to("../elsewhere")
    (tmp_path / "in" / "file").symlink_to("../elsewhere/b.txt")
    (tmp_path / "link").symlink_to("in")
    for spec in ("in", "link"):
        assert names_of(tmp_path / spec) == ["a.txt", "file", "folder/deep/c.txt"]
    (tmp_path / "in" / "file").unlink()
    assert names_of(tmp_path / "in") == ["a.txt", "folder/b.txt", "folder/deep/c.txt"]


def test_links_that_lead_in_circles_or_to_each_other_end_and_each_folder_is_read_once(tmp_path):
    folders = [f"f{number}" for number in range(12)]
    made(tmp_path, {f"in/{folder}/{folder}.txt": folder for folder in folders})
    for folder in folders:
        (tmp_path / "in" / folder / "up").symlink_to("..")
        (tmp_path / "in" / folder / "itself").symlink_to(".")
        for other in folders:
            (tmp_path / "in" / folder / f"to-{other}").symlink_to(f"../{other}")
    text = find_text(str(tmp_path / "in"))
    assert [file.name for file in text.files] == sorted(f"{folder}/{folder}.txt" for folder in folders)
    assert len(text.repeated) == 12 * 14 and ("f3/to-f7", "f7") in text.repeated and ("f3/up", ".") in text.repeated


def test_a_file_that_has_several_names_is_read_once_under_the_first_and_this_is_said(tmp_path, setting):
    made(tmp_path, {"in/b.txt": "text\n" * 20, "in/c.txt": "other\n" * 20})
    (tmp_path / "in" / "a.txt").symlink_to("b.txt")
    os.link(tmp_path / "in" / "c.txt", tmp_path / "in" / "d.txt")
    said: list[str] = []
    how = setting(tmp_path / "in", valid_fraction=0, test_fraction=0)
    sources = open_corpus(prepare(how, say=said.append)).read_sources()
    assert [source.name for source in sources] == ["a.txt", "c.txt"]
    assert said == [
        f"preparing {tmp_path}/in: 2 files, 220 bytes; read once: b.txt, which is a.txt too, and 1 more such name"
    ]


@pytest.mark.parametrize("pattern", ["d/**/**/*.txt", "d/*/../*/*.txt", "d/[ab]/*.tx[t]", "d/**/*.txt"])
def test_a_glob_that_matches_a_file_twice_reads_it_once(tmp_path, monkeypatch, pattern):
    made(tmp_path, {"d/a/one.txt": "1", "d/b/two.txt": "2"})
    monkeypatch.chdir(tmp_path)
    assert find_text(pattern).bytes == 2


@pytest.mark.parametrize("held_out", ["valid", "test"])
@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_a_file_that_is_trained_on_may_not_be_held_out_as_well(tmp_path, setting, held_out, link):
    made(tmp_path, {"d/a.txt": "abc" * 100, "d/b.txt": "abc" * 100})
    other = tmp_path / "d" / "b.txt"
    if link:
        other = tmp_path / "other.txt"
        link(tmp_path / "d" / "b.txt", other)
    with pytest.raises(ValueError) as caught:
        prepare(setting(train=str(tmp_path / "d" / "*.txt"), **{held_out: str(other)}))
    assert str(caught.value) == (
        f"{other} of --{held_out} is {tmp_path}/d/b.txt of --train as well: name it in one of them only"
    )
    other.unlink()
    other.write_text("abc" * 100)  # a copy is another file
    prepare(setting(train=str(tmp_path / "d" / "a.txt"), **{held_out: str(other)}))


def test_a_corpus_may_not_be_made_in_a_folder_that_a_link_leads_to(tmp_path, setting):
    made(tmp_path, {"in/a.txt": "a" * 100, "elsewhere/b.txt": "b" * 100})
    (tmp_path / "in" / "link").symlink_to("../elsewhere")
    with pytest.raises(
        ValueError, match=r"elsewhere/out lies inside of the input .*/elsewhere: name an output outside"
    ):
        prepare(setting(tmp_path / "in"), tmp_path / "elsewhere" / "out")


# What stands between files.


def text_made_from(folder: Path, setting, **how) -> bytes:
    corpus = open_corpus(prepare(setting(folder, valid_fraction=0, test_fraction=0, **how), shard_bytes=16))
    split = corpus.splits["train"]
    return corpus.vocabulary.decode_bytes(split.read(0, len(split)))


@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
@pytest.mark.parametrize(
    "separator, joined",
    [
        (r"\n", "one\ntwo\n\n\nthree"),
        ("", "one\ntwo\n\n\nthree".replace("one\n", "one")),
        (r"\0", "one\0two\n\n\n\0three"),
        (r"\n\n", "one\n\ntwo\n\n\nthree"),
        ("<|endoftext|>", "one<|endoftext|>two\n\n\n<|endoftext|>three"),
        ("—", "one—two\n\n\n—three"),
    ],
)
def test_files_end_with_the_separator_where_another_one_follows(tmp_path, setting, vocabulary, separator, joined):
    made(
        tmp_path, {"in/a": "one", "in/b": "two\n\n\n", "in/c": "", "in/d": "\ufeff", "in/e": "\ufeffthree", "in/f": ""}
    )
    assert text_made_from(tmp_path / "in", setting, vocabulary=vocabulary, file_separator=separator) == joined.encode()


def test_the_part_of_the_separator_that_a_file_ends_with_is_not_put_twice(tmp_path, setting):
    made(tmp_path, {"in/a": "one\n", "in/b": "two\n--", "in/c": "three\n--\n", "in/d": "four"})
    found = text_made_from(tmp_path / "in", setting, file_separator=r"\n--\n")
    assert found == b"one\n--\ntwo\n--\nthree\n--\nfour"


def test_the_separator_is_part_of_what_a_corpus_is(tmp_path, setting):
    made(tmp_path, {"in/a": "one" * 9, "in/b": "two" * 9})
    found = {prepare(setting(tmp_path / "in", file_separator=separator)) for separator in (r"\n", r"\0", "", "\n")}
    assert len(found) == 3
    (tmp_path / "in" / "b").unlink()  # of one file it is none
    assert len({prepare(setting(tmp_path / "in", file_separator=separator)) for separator in (r"\n", r"\0", "")}) == 1


@pytest.mark.parametrize("separator", [r"\x", r"\N{no such name}", "\\"])
def test_a_separator_that_cannot_be_read_is_refused(separator):
    with pytest.raises(ValueError, match=r"^file_separator="):
        CorpusSettings(file_separator=separator)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 9])
def test_a_byte_order_mark_is_no_text_and_offsets_in_messages_are_those_of_the_file(
    tmp_path, setting, size, monkeypatch
):
    monkeypatch.setattr(utf8, "REGION", size)
    made(tmp_path, {"in/a": "\ufeffGrün\n", "in/b": "\ufeff\ufeff漢\n"})  # a second one is
    for vocabulary in ("bytes", "characters"):
        assert text_made_from(tmp_path / "in", setting, vocabulary=vocabulary) == "Grün\n\ufeff漢\n".encode()
    (tmp_path / "in" / "b").write_bytes("\ufeff".encode() + b"\x80x")
    (tmp_path / "in" / "c").write_bytes(b"\xff")  # comes after it
    with pytest.raises(ValueError, match="b is not UTF-8 text: bad sequence at byte 3;"):
        text_made_from(tmp_path / "in", setting, vocabulary="characters")


# What is said.


def test_the_line_of_a_preparation_has_its_files_and_bytes_and_names_what_looks_binary(tmp_path, setting):
    made(tmp_path, {"in/a.txt": "one\n" * 300, "in/b.txt": "two" * 100, "t.txt": "three" * 10})
    (tmp_path / "in" / "c.mid").write_bytes(b"MThd\0\0\0\x06\0\x01\0\x01\1\x02" + b"\x07\x02\x03\x0e\x12q" * 50)
    said: list[str] = []
    for _ in range(2):  # the second time there is nothing to prepare
        prepare(setting(tmp_path / "in"), say=said.append)
    prepare(setting(train=f"{tmp_path}/in/*.txt", test=f"{tmp_path}/t.txt"), say=said.append)
    assert said == [
        f"preparing {tmp_path}/in: 3 files (2 .txt, 1 .mid), 1,814 bytes; c.mid looks binary",
        f"prepared before: {tmp_path}/in: 3 files (2 .txt, 1 .mid), 1,814 bytes; c.mid looks binary",
        "preparing train: 2 files, 1,500 bytes; test: 1 file, 50 bytes",
    ]


def test_all_files_that_are_no_text_are_counted(tmp_path, setting):
    made(tmp_path, {"in/a.txt": "one\n"})
    for number in range(3):
        (tmp_path / "in" / f"b {number}.bin").write_bytes(b"\x1f\x8b\x08\0\0")
    with pytest.raises(ValueError) as caught:
        prepare(setting(tmp_path / "in"))
    assert str(caught.value) == (
        f"{tmp_path}/in/b 0.bin is no text but gzip-compressed data (nor are 2 more of 4 files): decompress it "
        f"(`gzip -d '{tmp_path}/in/b 0.bin'`), or give --binary=allow to learn bytes as they are"
    )
