"""Which files of a folder or a store are the text, and how its documents are split."""

import dataclasses
import functools
import glob
import gzip
import json
from pathlib import Path

import pytest

from charlstm import config as config_lib
from charlstm.run.corpus import open_for
from data_pipeline.atomic_files import locked
from data_pipeline.build import cache, remote_inputs
from data_pipeline.build.by_parts import prepare_by_parts
from data_pipeline.build.prepare import prepare
from data_pipeline.build.remote_inputs import RANGE, Ranges, find_remote, matches
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus
from data_pipeline.stores import Remote
from launch import prepare as launch_prepare
from tests.data_pipeline.build.test_readers import json_lines, table_arrow, table_parquet, text_of
from tests.data_pipeline.faulty import first, serving
from tests.data_pipeline.servers import each_s3, nginx, s3_environment


def made(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def at(setting, url: str) -> CorpusSettings:
    return dataclasses.replace(setting(), corpus=url)


# What a folder holds.


def test_include_and_exclude_choose_and_what_is_left_out_is_said(tmp_path, setting):
    files = {"a.txt": b"one\n", "b.md": b"two\n", "sub/c.txt": b"three\n", "sub/d.png": b"\x89PNG\r\n\x1a\n\0"}
    folder, said = made(tmp_path / "in", files), []
    (folder / "lost").symlink_to("nothing")
    for how, text in {
        ("*.txt", ""): b"one\nthree\n",
        ("*.txt,*.md", "sub/*"): b"one\ntwo\n",
        ("", "*.png"): b"one\ntwo\nthree\n",
        ("sub/c.txt", ""): b"three\n",
    }.items():
        settings = setting(folder, include=how[0], exclude=how[1], valid_fraction=0, test_fraction=0)
        open_corpus(prepare(settings, say=said.append))
        assert text_of(settings) == text
    assert said[0].endswith("in: 2 files, 10 bytes; left out: lost, a link to nothing, and 2 more")
    assert said[2].endswith("in: 3 files (2 .txt, 1 .md), 14 bytes; left out: lost, a link to nothing, and 1 more")
    with pytest.raises(ValueError, match=r"in/sub/d\.png is no text but a PNG picture: move it away, or give"):
        prepare(setting(folder))
    with pytest.raises(ValueError, match=r"in has no files left of 5 with include='\*\.json' and exclude='': change"):
        prepare(setting(folder, include="*.json"))


@pytest.mark.parametrize("form", ["parquet", "arrow", "jsonl"])
def test_a_dataset_as_it_lies_on_disk_is_its_tables(tmp_path, setting, form):
    make = {"parquet": table_parquet, "arrow": table_arrow, "jsonl": json_lines}[form]
    files = {f"data/train-{n}.{form}": make([f"text {n}", "more"]) for n in range(2)}
    beside = {"README.md": b"# card", "data/dataset_info.json": b"{}", ".gitattributes": b"x"}
    folder, said = made(tmp_path / "in", files | beside), []
    prepare(setting(folder), say=said.append)
    assert text_of(setting(folder)) == b"text 0\0more\0text 1\0more\0"
    assert "2 files, " in said[0] and "left out: README.md, beside tables, and 1 more" in said[0]
    assert b"# card" in text_of(setting(folder, include="*"))


def test_what_describes_tables_is_text_where_there_are_none_in_its_folder_or_below(tmp_path, setting):
    files = {
        "a/README.md": b"# text",
        "b/README.md": b"# card",
        "b/data/t.jsonl": json_lines(["x"]),
        "b/z/state.json": b"{}",
    }
    assert text_of(setting(made(tmp_path / "in", files))) == b"# text\nx\0{}"


INSIDE = [("**", "out"), ("*/*", "out"), ("**/*s*", "deep/out"), ("l*/**", "link/out")]
OUTSIDE = [("**/*.txt", "out"), ("*/*", "deep/out"), ("**", ".hidden/out"), ("deep/**", "out"), ("*", "../out")]


@pytest.mark.parametrize(
    ("pattern", "output", "is_inside"), [*((*one, True) for one in INSIDE), *((*one, False) for one in OUTSIDE)]
)
def test_an_output_whose_files_the_glob_of_the_input_would_match_is_refused(
    tmp_path, setting, pattern, output, is_inside
):
    folder = made(tmp_path / "in", {"a.txt": b"abc" * 30, "deep/b.txt": b"def" * 30, "link/s.txt": b"ghi" * 30})
    how = setting(folder / pattern)
    for prepares in (prepare, functools.partial(prepare_by_parts, workers=1)):
        if is_inside:
            with pytest.raises(ValueError, match=r"out lies inside of the input .*: name an output outside of it"):
                prepares(how, folder / output)
            assert not (folder / output).parent.joinpath(".out.parts").exists()
        else:
            prepares(how, folder / f"{output}-{prepares is prepare}")


def test_a_file_that_is_not_what_its_name_says_can_be_read_otherwise(tmp_path, setting):
    folder = made(tmp_path / "in", {"a.csv": b"no, table\n", "b.log": json_lines(["x"]), "c.xml": b"<html/>"})
    assert text_of(setting(folder, input_kind="text", include="*.csv,*.xml")) == b"no, table\n<html/>"
    assert text_of(setting(folder / "b.log", input_kind="jsonl")) == b"x\0"
    made(folder, {"d.log.gz": gzip.compress(json_lines(["y"]))})
    assert text_of(setting(folder / "d.log.gz", input_kind="jsonl")) == b"y\0"


# Splits by documents.


def test_a_split_by_hash_puts_equal_documents_on_one_side_whatever_file_and_order(tmp_path, setting):
    texts = [f"document {number % 300}" for number in range(600)]
    one = made(tmp_path / "one", {"a.jsonl": json_lines(texts)})
    plain = {f"{n:03d}.txt": b"\xef\xbb\xbf" * (n % 2) + text.encode() for n, text in enumerate(texts)}
    packed = {f"{n:03d}.txt.gz": gzip.compress(text.encode()) for n, text in enumerate(texts)}
    turned = made(tmp_path / "turned", {"b.jsonl": json_lines(texts[::-1][:400]), "a.jsonl": json_lines(texts[:200])})
    found = []
    for folder in (one, made(tmp_path / "plain", plain), made(tmp_path / "packed", packed), turned):
        how = setting(folder, split="hash", file_separator=r"\0", valid_fraction=0.2, test_fraction=0.1)
        corpus = open_corpus(prepare(how))
        assert corpus.split == "hash"
        found.append(
            {
                name: set(split.read(0, len(split)).tobytes().strip(b"\0").split(b"\0"))
                for name, split in corpus.splits.items()
            }
        )
    assert all(one == found[0] for one in found)
    sides = list(found[0].values())
    assert set.union(*sides) == {text.encode() for text in texts} and sum(map(len, sides)) == 300
    assert 30 < len(found[0]["valid"]) < 90 and 10 < len(found[0]["test"]) < 55


def test_a_split_by_hash_that_leaves_nothing_to_train_on_is_refused(tmp_path, setting):
    with pytest.raises(ValueError, match="has no text for training to prepare"):
        prepare(setting(made(tmp_path, {"a.txt": b"x"}) / "a.txt", split="hash", valid_fraction=0.998, test_fraction=0))


def test_a_run_takes_the_separator_that_its_corpus_records_and_refuses_another_split(tmp_path, setting):
    path = made(tmp_path, {"in.jsonl": json_lines(["one", "two"] * 50)}) / "in.jsonl"
    out = prepare(setting(path, document_separator="<|>", split="hash"), tmp_path / "out")
    config = config_lib.replace(config_lib.Config(), corpus=str(out), cache_dir=str(tmp_path / "cache"))
    assert open_for(config, [])[1].corpus.document_separator == "<|>"
    chosen = config_lib.replace(config, document_separator=r"\n")
    assert open_for(chosen, [r"--document_separator=\n"])[1].corpus.document_separator == r"\n"
    with pytest.raises(ValueError, match=r"--split=contiguous was given and .*out is prepared with hash: leave it out"):
        open_for(config, ["--split=contiguous"])


def test_a_mixture_takes_the_one_separator_that_its_corpora_record_and_of_several_none(tmp_path, setting):
    def mixed(separators: dict[str, str], given: tuple[str, ...] = (), **values) -> str:
        spec = ",".join(f"{tmp_path / name}:1" for name in (*separators, "plain"))
        for name, separator in separators.items():
            path = made(tmp_path, {f"{name}.jsonl": json_lines([f"{name} {n}" for n in range(50)])}) / f"{name}.jsonl"
            prepare(setting(path, document_separator=separator), tmp_path / name)
        config = config_lib.replace(config_lib.Config(), mixture=spec, cache_dir=str(tmp_path / "cache"), **values)
        return open_for(config, given)[1].corpus.document_separator

    prepare(setting(made(tmp_path, {"plain.txt": b"a plain text " * 30}) / "plain.txt"), tmp_path / "plain")
    assert mixed({"one": "<|>"}) == "<|>"
    assert mixed({"two": r"\n\n", "three": r"\x0a\n"}, reset_state="document") == r"\n\n"
    both = {"one": "<|>", "two": r"\n\n"}
    assert mixed(both) == r"\x00"
    assert mixed(both, ("--document_separator=#",), document_separator="#", reset_state="document") == "#"
    with pytest.raises(ValueError, match=r"different separators of documents \(one '<\|>', two '\\\\n\\\\n'\)"):
        mixed(both, reset_state="document")


# Object stores.


@pytest.mark.parametrize(
    ("name", "pattern", "does"),
    [
        ("a/b.txt", "a/*.txt", True),
        ("a/b/c.txt", "a/*.txt", False),
        ("a/b/c.txt", "**/*.txt", True),
        ("c.txt", "**/*.txt", True),
        ("a/c.txt", "[ab]/?.txt", True),
        ("a/c.txt", "a", False),
        ("._a.txt", "*.txt", False),
        ("._a.txt", "._*", True),
        (".git/a.txt", "**/*.txt", False),
        ("b/.git/a.txt", "**/a.txt", False),
        ("b/.git/a.txt", "**/.git/*", True),
    ],
)
def test_a_glob_of_a_store_is_matched_part_by_part_as_on_a_disk(name, pattern, does, tmp_path):
    assert matches(name.split("/"), pattern.split("/")) is does
    made(tmp_path, {name: b"text"})
    assert (name in glob.glob(pattern, root_dir=tmp_path, recursive=True)) is does


@each_s3
def test_texts_in_a_store_give_the_corpus_that_they_give_on_disk(s3, tmp_path, setting, monkeypatch):
    files = {
        "a.jsonl.gz": gzip.compress(json_lines(["one", "two"] * 9)),
        "b.txt": b"three\n",
        "sub/c d.parquet": table_parquet(["four", "five"]),
        "sub/large.txt": b"0123456789abcde\n" * (RANGE // 16) + b"more than a range\n",
    }
    folder = made(tmp_path / "in", files)
    remote_inputs._store.cache_clear()  # of the server before
    with s3(tmp_path / "server") as endpoint:
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        store = Remote("s3://raw/in")
        for name in files:
            store.upload(name, folder / name)
        here = open_corpus(prepare(setting(folder)))
        for spec in ("s3://raw/in", "s3://raw/in/", "s3://raw/in/**/*"):
            assert open_corpus(prepare(at(setting, spec))).fingerprint == here.fingerprint, spec
        assert text_of(at(setting, "s3://raw/in/b.txt")) == b"three\n"
        source = open_corpus(prepare(at(setting, "s3://raw/in/b.txt"))).read_sources()[0]
        assert source.name == "b.txt" and source.sha256 is None and source.etag
        for spec, complaint in {
            "s3://raw/in/*.csv": r"in/\*\.csv has no files: name an object, a directory or a quoted glob",
            "s3://*/in": "has a wildcard in the name of the bucket",
            "s3://raw/in/nothing": "has no files",
        }.items():
            with pytest.raises(ValueError, match=complaint):
                find_remote(spec, 5.0)
        (large,) = find_remote("s3://raw/in/sub/large.txt", 5.0).files
        with Ranges(large, 5.0) as opened:
            store.upload("sub/large.txt", folder / "b.txt")
            with pytest.raises(ValueError, match=r"sub/large\.txt was changed while it was read"):
                opened.read(100)
        store.upload("corpus/manifest.json", folder / "b.txt")
        with pytest.raises(ValueError, match="s3://raw/in/corpus is a prepared corpus, not text"):
            find_remote("s3://raw/in/corpus", 5.0)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "blind")
        with pytest.raises(ValueError, match=r"s3://raw/in\S* is refused with these credentials"):
            find_remote("s3://raw/in/*.txt", 6.0)  # another patience, another connection


def test_a_prepared_corpus_in_a_store_is_not_taken_for_text(tmp_path, setting, bucket):
    files = {path.name: path.read_bytes() for path in prepare(setting("abc" * 100), tmp_path / "out").iterdir()}
    store = Remote(bucket)
    for name, content in {"a.txt": b"text", "b/b.txt": b"text", **files}.items():
        store.create(f"b/corpus/{name}" if name in files else name, content)
    for spec in (bucket, f"{bucket}/**"):
        text = find_remote(spec, 1.0)
        assert [file.name for file in text.files] == ["a.txt", "b/b.txt"]
        assert text.left_out == ("b/corpus, a prepared corpus",)
    for name, content in files.items():
        store.create(name, content)
    for spec in (bucket, f"{bucket}/*.ids"):
        with pytest.raises(ValueError, match=r"s3://bucket is a prepared corpus, not text: name it with --corpus"):
            find_remote(spec, 1.0)


def test_a_file_of_a_web_server_is_read_and_a_directory_refused(tmp_path, setting):
    folder = made(tmp_path / "in", {"b.jsonl": json_lines(["one", "two"])})
    with nginx(tmp_path / "nginx", folder) as address:
        assert text_of(at(setting, f"{address}/b.jsonl")) == b"one\0two\0"
        for name in ("*.jsonl", "none.jsonl"):
            with pytest.raises(ValueError, match=r"cannot be: name one file|does not exist: check"):
                prepare(at(setting, f"{address}/{name}"))


def test_a_web_server_without_ranges_is_refused(tmp_path, setting):
    made(tmp_path / "in", {"b.jsonl": json_lines(["one", "two"])})
    with serving(tmp_path / "in") as server:
        server.fault = first(99, "whole")
        with pytest.raises(ValueError, match=r"b\.jsonl: the server answers without ranges: copy the corpus to a disk"):
            prepare(at(setting, f"{server.address}/b.jsonl"))


def test_a_manifest_does_not_grow_with_the_number_of_files(tmp_path, setting):
    sizes = []
    for count in (3, 300):
        folder = made(tmp_path / str(count), {f"{n:04d}.txt": b"text\n" for n in range(count)})
        out = prepare(setting(folder, valid_fraction=0, test_fraction=0))
        sizes.append((out / "manifest.json").stat().st_size)
        assert json.loads((out / "manifest.json").read_text())["sources"]["files"] == count
    assert sizes[1] - sizes[0] < 20
    for line in (out / "sources.jsonl").read_bytes().splitlines():
        assert json.loads(line)["documents"] == 1
    (out / "sources.jsonl").write_bytes((out / "sources.jsonl").read_bytes().replace(b"0001", b"0002"))
    with pytest.raises(ValueError, match=r"sources\.jsonl is damaged or of another corpus"):
        open_corpus(out).read_sources()


# The cache.


def test_the_cache_is_listed_and_cleared_but_for_downloads_and_what_is_being_prepared(tmp_path, setting, capsys):
    how = setting(b"text " * 500)
    out, directory = prepare(how), tmp_path / "cache"
    made(
        directory,
        {
            "downloads/enwik8": b"x" * 70,
            "blocks/ab/train.ids.0-1": b"y" * 30,
            "corpora/.b.partial/key": b"k",
            "parts/tmp1/shard": b"s",
            "parts/tmp2/shard": b"of a process that was killed",
        },
    )
    arguments = ["launch.prepare", f"--cache_dir={directory}"]
    assert launch_prepare.main([*arguments, "--cache=list"]) == 0
    said = capsys.readouterr().out
    assert str(out) in said and "downloads" in said and "corpora/.b.partial" in said
    assert cache.entries(directory)[0].path == directory / "corpora" / ".b.partial"
    in_use = [directory / "corpora" / ".b.lock", directory / "parts" / ".tmp1.lock"]
    with locked(in_use[0], lambda: None), locked(in_use[1], lambda: None):
        assert launch_prepare.main([*arguments, "--cache=clear"]) == 0
    said = capsys.readouterr().err
    assert "corpora/.b.partial is being prepared, and stays" in said
    assert "parts/tmp1 is being prepared, and stays" in said
    left = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert left == {"downloads/enwik8", "corpora/.b.partial/key", "parts/tmp1/shard"}
    launch_prepare.main([*arguments, "--cache=clear"])
    assert [path.name for path in directory.rglob("*") if path.is_file()] == ["enwik8"]
    assert prepare(how) == out
    launch_prepare.main(["launch.prepare", f"--cache_dir={tmp_path}/none", "--cache=clear"])
    with pytest.raises(ValueError, match="--cache=clear is given with something to prepare or verify: leave one out"):
        launch_prepare.main([*arguments, "--cache=clear", "--input=x"])


def test_settings_that_cannot_be_meant_are_refused():
    with pytest.raises(
        ValueError, match=r"document_separator='\\\\xff' is not UTF-8: with vocabulary=characters write"
    ):
        CorpusSettings(document_separator=r"\xff", vocabulary="characters").document_separator_bytes()
    with pytest.raises(ValueError, match="split='hashes' is neither contiguous, hash nor columns:BxT"):
        CorpusSettings(split="hashes")
