"""A preparation by parts has one result, whoever prepares them, in whatever order, and however often."""

import contextlib
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.build import by_parts
from data_pipeline.build.by_parts import Sizes, prepare_by_parts
from data_pipeline.build.plan import Share
from data_pipeline.build.prepare import prepare
from data_pipeline.manifest import read_manifest
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus, verify_corpus
from tests.conftest import ROOT
from tests.data_pipeline.build.conftest import SIZES, fingerprint, settings_of
from tests.data_pipeline.build.test_prepare import POEM, files_of, text_of

SPLITS = ("train", "valid", "test")


def by_files(folder: Path) -> dict[str, str]:
    return {"train": f"{folder}/[a-f]*", "test": f"{folder}/[gh]*"}


@pytest.mark.parametrize("split", ["contiguous", "columns:3x7", "hash", "files"])
@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
@pytest.mark.parametrize("separator", [r"\n\n", *(pytest.param(one, marks=pytest.mark.long) for one in (r"\n", ""))])
def test_the_symbols_are_those_of_a_preparation_at_once(folder, vocabulary, split, separator):
    values = {"vocabulary": vocabulary, "file_separator": separator, "min_count": 2}
    how = settings_of(folder, **values, **(by_files(folder) if split == "files" else {"split": split}))
    once = open_corpus(prepare(how, folder.parent / "once"))
    assert prepare_by_parts(how, folder.parent / "parts", sizes=SIZES, workers=1)
    verify_corpus(folder.parent / "parts")
    found = open_corpus(folder.parent / "parts")
    assert found.vocabulary == once.vocabulary and found.splits.keys() == once.splits.keys()
    for name, expected in once.splits.items():
        got = found.splits[name]
        assert text_of(found, name) == text_of(once, name), name
        assert (got.bytes, got.characters, got.unknown) == (expected.bytes, expected.characters, expected.unknown), name
    manifests = [read_manifest(folder.parent / name) for name in ("once", "parts")]
    for field in ("split", "document_separator", "bad_documents"):
        assert getattr(manifests[0], field) == getattr(manifests[1], field)
    documents = [[(one.name, one.bytes, one.documents) for one in corpus.read_sources()] for corpus in (once, found)]
    assert documents[0] == documents[1]
    assert {path.name for path in folder.parent.iterdir()} == {"texts", "cache", "once", "parts"}


def test_a_plain_text_before_a_file_that_is_cut_before_its_first_document_is_separated(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a plain text")
    lines = "\n" * 3000 + "".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(90))
    (texts / "b.jsonl").write_text(lines)
    how = settings_of(texts)
    once = open_corpus(prepare(how, tmp_path / "once"))
    assert prepare_by_parts(how, tmp_path / "parts", sizes=SIZES, workers=1)
    assert text_of(open_corpus(tmp_path / "parts"), "train") == text_of(once, "train")


def test_a_byte_order_mark_with_which_a_part_begins_is_refused_as_it_is_without_parts(tmp_path):
    lines = [json.dumps({"text": f"{number:036d}"}).encode() + b"\n" for number in range(40)]
    assert {len(line) for line in lines} == {49}
    lines[21] = b"\xef\xbb\xbf" + lines[21]  # the first one of the second part
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    how = settings_of(tmp_path / "a.jsonl")
    for line, prepared_by in (
        ("line 22", prepare),
        (r"from byte \d+ on, line 1", lambda how, out: prepare_by_parts(how, out, sizes=SIZES)),
    ):
        with pytest.raises(ValueError, match=rf"{line}: not JSON \(Unexpected UTF-8 BOM"):
            prepared_by(how, tmp_path / "out")


@pytest.mark.parametrize("prepared_by", [prepare, prepare_by_parts])
def test_a_vocabulary_of_characters_has_the_separator_or_it_is_said(prepared_by, tmp_path):
    (tmp_path / "plain.txt").write_text("ab\n" * 999)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "ab" * 40}) + "\n" for _ in range(50)))
    plain = prepare(settings_of(tmp_path / "plain.txt", vocabulary="characters"), tmp_path / "plain")
    said: list[str] = []
    for name, how in (
        ("counted", {"min_count": 60}),
        ("taken", {"vocabulary_of": str(plain)}),
        ("other", {"vocabulary_of": str(plain), "document_separator": r"\n"}),
    ):
        how = settings_of(tmp_path / "a.jsonl", vocabulary="characters", **how)
        prepared_by(how, tmp_path / name, say=lambda line, name=name: said.append(f"{name}: {line}"))
    assert open_corpus(tmp_path / "counted").vocabulary.characters == "\0ab"
    (line,) = [line for line in said if "document_separator" in line]
    assert line.startswith(r"taken: document_separator='\\x00': '\x00' (U+0000) at position 0 is not in the vocabulary")


@pytest.mark.parametrize("values", [{}, {"vocabulary": "characters"}, {"split": "hash"}], ids=str)
def test_a_large_table_is_cut_between_its_groups_of_rows(values, impatient, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is absent: pip install charlstm[inputs]")
    from pyarrow import parquet

    draw = random.Random(6)
    rows = ["".join(draw.choices("abc dé漢\n🙂", k=draw.randrange(90))) for _ in range(300)]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(POEM)
    table = pyarrow.table({"n": range(300), "text": rows})
    parquet.write_table(table, tmp_path / "texts" / "b.parquet", row_group_size=20)
    how, said = settings_of(tmp_path / "texts", **values), []
    once = open_corpus(prepare(how, tmp_path / "once"))
    sizes = Sizes(4096, 700, 64)
    prepare_by_parts(how, tmp_path / "parts", sizes=sizes, workers=1, say=said.append)
    count = int(said[0].rpartition("; ")[2].split()[0])
    found = open_corpus(tmp_path / "parts")
    assert count > 4 and len({shard.split("-")[1] for shard in files_of(tmp_path / "parts") if "ids" in shard}) > 2
    assert {name: text_of(found, name) for name in found.splits} == {name: text_of(once, name) for name in once.splits}
    assert found.sources.documents == once.sources.documents == 1 + sum(map(bool, rows))
    assert prepare_by_parts(how, tmp_path / "again", share=Share(0, 2), sizes=sizes, workers=1) is False
    assert prepare_by_parts(how, tmp_path / "again", share=Share(1, 2), sizes=sizes, workers=1)
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "parts")


@pytest.mark.parametrize("values", [{}, {"vocabulary": "characters"}, {"split": "hash"}], ids=str)
def test_workers_in_any_order_and_twice_give_one_fingerprint(folder, impatient, values):
    how, draw = settings_of(folder, **values), random.Random(7)
    prepare_by_parts(how, folder.parent / "local", sizes=SIZES, workers=2)
    for round, count in enumerate((2, 5)):
        out = folder.parent / f"out{round}"
        numbers = list(range(count)) * 2
        draw.shuffle(numbers)
        there = [prepare_by_parts(how, out, share=Share(number, count), sizes=SIZES, workers=1) for number in numbers]
        assert there == sorted(there) and there[-1], "once the corpus is there it stays there"
        assert files_of(out) == files_of(folder.parent / "local")
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_a_text_of_one_part_has_the_fingerprint_of_a_preparation_at_once(folder):
    for n, values in enumerate(({}, {"vocabulary": "characters"}, {"split": "hash"}, by_files(folder))):
        how = settings_of(folder, **values)
        once = prepare(how, folder.parent / f"once{n}")
        prepare_by_parts(how, folder.parent / f"parts{n}", workers=1)
        assert fingerprint(folder.parent / f"parts{n}") == fingerprint(once), values


def test_standard_library_is_prepared_by_parts_with_the_symbols_of_one(tmp_path, monkeypatch):
    source = tmp_path / "lib"
    source.mkdir()
    for name, text in {"a": "import b\n", "b": "", "c": "x = 1", "test": "assert x"}.items():
        (source / f"{name}.py").write_text(text * 200)
    monkeypatch.setattr("data_pipeline.build.datasets.sysconfig.get_path", lambda _: str(source))
    how = CorpusSettings(corpus="python", cache_dir=str(tmp_path / "cache"))
    once = open_corpus(prepare(how, tmp_path / "once"))
    prepare_by_parts(how, tmp_path / "parts", sizes=SIZES, workers=1)
    assert [text_of(open_corpus(tmp_path / "parts"), split) for split in SPLITS] == [
        text_of(once, split) for split in SPLITS
    ]


def tree(folder: Path) -> dict[str, bytes | None]:
    found = (path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts)
    return {str(path): path.read_bytes() for path in found}


def test_what_is_refused_is_refused_in_a_sentence_and_leaves_nothing_behind(folder):
    how, out = settings_of(folder), folder.parent / "out"
    before = tree(folder.parent)

    def refusal(how: CorpusSettings = how, **values) -> str:
        with pytest.raises(ValueError) as refused:
            prepare_by_parts(how, out, **({"sizes": SIZES, "workers": 1} | values))
        return str(refused.value)

    for wrong in ("2/2", "3/2", "-1/2", "1", "a/b", "1/0", ""):
        with pytest.raises(ValueError, match="is not i/n with i from 0 to n - 1"):
            Share.parse(wrong)
    assert "is neither local nor dask:ADDRESS" in refusal(name="ray")
    assert "part_bytes=3 must be at least 1024" in refusal(sizes=Sizes(part=3))
    assert "has begun at" in refusal(only_join=True)
    (folder / "bad.jsonl").write_text('{"text": "good"}\n' * 99 + "[]\n")
    assert "bad.jsonl from byte 843 on, line 50: a JSON value that is no object" in refusal()
    (folder / "bad.jsonl").unlink()
    assert tree(folder.parent) == before
    assert not list(folder.parent.glob(".out*"))

    assert not prepare_by_parts(how, out, share=Share(1, 2), sizes=SIZES, workers=1)
    begun = tree(folder.parent)
    assert "parts are missing (0, 2, 4" in refusal(only_join=True)
    assert "has another plan (the sizes of parts differ)" in refusal(sizes=Sizes(2048), share=Share(0, 2))
    assert "has another plan (the settings differ)" in refusal(settings_of(folder, split="hash"), share=Share(0, 2))
    assert tree(folder.parent) == begun
    text = (folder / "g.txt").read_text()
    (folder / "g.txt").write_text(text[::-1])
    said = refusal(share=Share(0, 2))
    assert "has another plan (g.txt was changed): give the same command again, with the inputs as they were" in said
    (folder / "i.txt").write_text("new")
    (folder / "g.txt").unlink()
    assert "(i.txt was added)" in refusal(share=Share(0, 2))
    (folder / "i.txt").unlink()
    assert "(g.txt is gone)" in refusal(share=Share(0, 2))
    assert {name for name in tree(folder.parent) if ".out" in name} == {name for name in begun if ".out" in name}


@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
@pytest.mark.parametrize("empty", ["train", "test", "corpus"])
def test_a_text_without_documents_is_refused_as_without_parts(tmp_path, vocabulary, empty):
    (tmp_path / "full.jsonl").write_text('{"text": "a document"}\n' * 99)
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    names = ("corpus",) if empty == "corpus" else ("train", "test")
    values = {name: str(tmp_path / f"{'none' if name == empty else 'full'}.jsonl") for name in names}
    how = settings_of(tmp_path / "in", vocabulary=vocabulary, **values)
    for prepares in (prepare, prepare_by_parts):
        with pytest.raises(ValueError, match=r"^none(\.jsonl)? has no text to prepare$"):
            prepares(how, tmp_path / "out", workers=1)


def test_bad_documents_are_left_out_and_counted_over_all_parts(folder, tmp_path):
    lines = [json.dumps({"text": f"document {n} " * 3}) for n in range(2500)]
    lines[1234] = lines[2222] = "[]"
    (folder / "d.jsonl").write_text("\n".join(lines))
    how, said = settings_of(folder, bad_documents="drop"), []
    once = prepare(how, tmp_path / "once")
    prepare_by_parts(how, tmp_path / "out", sizes=Sizes(20_000), workers=1, say=said.append)
    assert read_manifest(tmp_path / "out").bad_documents == read_manifest(once).bad_documents == 2
    assert "left out 2 bad documents, the first: " in said[-1]
    lines[5] = lines[6] = "[]"
    (folder / "d.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="documents are bad, more than 1 in 1,000"):
        prepare_by_parts(how, tmp_path / "other", sizes=Sizes(20_000), workers=1)


def test_workers_in_another_directory_find_a_text_that_is_named_by_a_relative_path(folder, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def elsewhere(*_):
        def mapped(function, items):
            with contextlib.chdir(folder):
                return [function(item) for item in items]

        yield lambda doing: mapped

    prepare_by_parts(settings_of(folder), tmp_path / "local", sizes=SIZES, workers=1)
    monkeypatch.setattr(by_parts, "engine", elsewhere)
    monkeypatch.chdir(tmp_path)
    assert prepare_by_parts(settings_of(folder, corpus="texts"), Path("out"), sizes=SIZES)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "local"), "the key, too, is the same"


def test_a_scheduler_that_is_not_there_is_named(folder, tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason="distributed is absent: pip install charlstm[cluster]")
    monkeypatch.setattr("data_pipeline.build.engines.CONNECT_SECONDS", 0.2)
    for address, reason in (
        (tmp_path / "none.json", r"none\.json is no scheduler file: start `dask scheduler"),
        ("tcp://127.0.0.1:1", "no Dask scheduler answers at tcp://127.0.0.1:1"),
    ):
        with pytest.raises((ValueError, OSError), match=reason):
            prepare_by_parts(settings_of(folder), tmp_path / "out", name=f"dask:{address}", sizes=SIZES)
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "cache"}


PEAK = """
import resource, sys
from pathlib import Path
from data_pipeline.build.by_parts import prepare_by_parts
from data_pipeline.settings import CorpusSettings
prepare_by_parts(CorpusSettings(corpus=sys.argv[1], cache_dir=sys.argv[2], vocabulary="characters"),
                 Path(sys.argv[3]), workers=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_a_part(tmp_path):
    line = json.dumps({"text": POEM * 4}) + "\n"
    peaks = []
    for megabytes in (8, 80):
        text = tmp_path / f"{megabytes}.jsonl.gz"
        with gzip.open(text, "wt", compresslevel=1) as out:
            for _ in range((megabytes << 20) // len(line)):
                out.write(line)
        command = [sys.executable, "-c", PEAK, str(text), str(tmp_path / "cache"), str(tmp_path / f"out{megabytes}")]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 16 * 1024, f"{peaks} KiB"
