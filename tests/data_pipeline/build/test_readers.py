"""Documents of files: every form, every compression, and what is refused."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build import documents, tables, texts
from data_pipeline.build.decompress import Decompressed
from data_pipeline.build.documents import BadDocuments
from data_pipeline.build.prepare import prepare
from data_pipeline.build.tables import READERS
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus
from tests.fuzzing import damaged, fuzzed, sentence

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is absent: pip install 'charlstm[inputs]'")
zstd = pytest.importorskip("backports.zstd", reason="backports.zstd is absent: pip install 'charlstm[inputs]'")
from pyarrow import parquet  # noqa: E402

COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}
DOCUMENTS = ["Ein Grün,\nein Blau", 'he said "a, b"', "", "漢字 🙂 \r\n\ttab", "x" * 3000]


def json_lines(texts: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": n, "text": one}, ensure_ascii=n % 2 == 0) + "\n" for n, one in enumerate(texts)
    ).encode()


def table_csv(texts: list[str]) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["id", "text"], *enumerate(texts)])
    return out.getvalue().encode()


def table_parquet(texts: list[str]) -> bytes:
    out = io.BytesIO()
    table = pyarrow.table({"other": list(range(len(texts))), "text": texts})
    parquet.write_table(table, out, compression="zstd", row_group_size=2, write_page_checksum=True)
    return out.getvalue()


def table_arrow(texts: list[str], as_file: bool = False) -> bytes:
    out, table = io.BytesIO(), pyarrow.table({"n": list(range(len(texts))), "text": texts})
    with (pyarrow.ipc.new_file if as_file else pyarrow.ipc.new_stream)(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return out.getvalue()


def dump(texts: list[str]) -> bytes:
    pages = "".join(
        f"<page><title>Page {n}</title><revision><text>an older one</text></revision><revision><text bytes='1'>"
        + one.replace("&", "&amp;").replace("<", "&lt;").replace("\r", "&#13;")
        + "</text><content><role>other</role><text>of another slot</text></content><sha1>0</sha1></revision></page>\n"
        for n, one in enumerate(texts)
    )
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/"><siteinfo/>{pages}</mediawiki>'.encode()


FORMS = {"jsonl": json_lines, "csv": table_csv, "parquet": table_parquet, "arrow": table_arrow, "xml": dump}


def text_of(settings: CorpusSettings) -> bytes:
    corpus = open_corpus(prepare(settings))
    return b"".join(corpus.vocabulary.decode_bytes(split.read(0, len(split))) for split in corpus.splits.values())


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_its_documents_whatever_it_is_compressed_with(tmp_path, setting, form):
    expected = b"".join(one.encode() + b"\0" for one in DOCUMENTS if one)
    for compression, compress in COMPRESS.items():
        path = tmp_path / f"in.{form}{compression}"
        path.write_bytes(compress(FORMS[form](DOCUMENTS)))
        assert text_of(setting(path, vocabulary="bytes")) == expected, compression
    corpus = open_corpus(prepare(setting(path)))
    assert (corpus.sources.documents, corpus.document_separator) == (4, r"\x00")
    assert [one.documents for one in corpus.read_sources()] == [4]


@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_a_compressed_text_is_that_text(tmp_path, setting, vocabulary):
    text = "Ein Grün, ein Blau — 漢字 🙂\n" * 99
    (tmp_path / "text.txt").write_text(text, "utf-8")
    plain = open_corpus(prepare(setting(tmp_path / "text.txt", vocabulary=vocabulary)))
    for compression, compress in COMPRESS.items():
        packed = tmp_path / f"in{compression}"
        packed.mkdir()
        half = len(text) // 2
        members = compress(b"\xef\xbb\xbf" + text[:half].encode()) + compress(b"") + compress(text[half:].encode())
        (packed / f"text.txt{compression}").write_bytes(members + b"\0" * 512 * (compression in (".gz", ".xz")))
        found = open_corpus(prepare(setting(packed, vocabulary=vocabulary)))
        assert found.fingerprint == plain.fingerprint and found.document_separator == "", compression


def test_files_of_all_kinds_together_are_told_apart(tmp_path, setting):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in {
        "a.txt": b"one",
        "b.txt.gz": gzip.compress(b"two\n"),
        "c.jsonl": json_lines(["three", "four"]),
        "d.txt": b"five",
        "e.txt.xz": lzma.compress(b""),
        "f.csv.zst": zstd.compress(table_csv(["six"])),
        "g.txt.bz2": bz2.compress(b"seven"),
        "h.txt.bz2": bz2.compress(b"eight\n"),
        "i.md": b"nine",
    }.items():
        (folder / name).write_bytes(content)
    said: list[str] = []
    how = setting(folder, valid_fraction=0, test_fraction=0, document_separator="<|>", vocabulary="characters")
    corpus = open_corpus(prepare(how, say=said.append))
    split = corpus.splits["train"]
    text = corpus.vocabulary.decode_bytes(split.read(0, len(split)))
    assert text == b"one\ntwo\nthree<|>four<|>five\nsix<|>seven\neight\nnine"
    assert [one.documents for one in corpus.read_sources()] == [1, 1, 2, 1, 0, 1, 1, 1, 1]
    assert corpus.sources.documents == 9 and corpus.document_separator == "<|>"
    assert "9 files (2 .txt, 2 .txt.bz2, 1 .txt.gz, 1 .jsonl, 1 .txt.xz, 2 more kinds)" in said[0]


def test_many_small_files_and_a_kill_give_the_same_text(tmp_path, setting, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02d}.txt.gz").write_bytes(gzip.compress(f"text {number}".encode()))
    whole = text_of(setting(folder))
    assert whole == b"\n".join(f"text {number}".encode() for number in range(20))
    from data_pipeline.build import decode

    monkeypatch.setattr(decode, "TOGETHER", 100)  # a few files each
    how, broken = setting(folder, min_count=2, vocabulary="characters"), KeyboardInterrupt
    with monkeypatch.context() as once, pytest.raises(broken):
        once.setattr("data_pipeline.build.prepare.write_splits", lambda *_: (_ for _ in ()).throw(broken))
        prepare(how, tmp_path / "out")
    partial = tmp_path / ".out.partial"
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("text-*") if path.suffix != ".json"}
    assert len(before) > 3
    decoded = []
    with monkeypatch.context() as seen:
        seen.setattr(decode, "decode_file", lambda *_: decoded.append(1))
        prepare(how, tmp_path / "out")
    assert not decoded, "what was decoded is not decoded again"
    assert {path.name for path in (tmp_path / "out").iterdir()} & set(before) == set()
    assert open_corpus(tmp_path / "out").sources.documents == 20


# What is refused.

LINES = json_lines(["one", "two", "three"])
TABLE = table_parquet(["one", "two", "three"])
BAD: list[tuple[str, bytes, str]] = [
    ("a.jsonl", LINES[:-6], "a.jsonl, line 3: not JSON (Unterminated string"),
    ("a.jsonl", LINES + b"[1]\n", "line 4: a JSON value that is no object with fields, begins '[1]"),
    ("a.jsonl", b'{"body": "x", "id": 1}\n', "line 1: no field 'text' but 'body', 'id' (--text_field chooses), begins"),
    ("a.jsonl", b'{"text": null}\n', "line 1: field 'text' is not a string, begins"),
    ("a.jsonl", b'\n{"text": "a\xff"}\n', "line 2: not UTF-8 at byte 11 of the line"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: no text that UTF-8 can have"),
    ("a.jsonl", b'{"text": "a\\u0000b"}\n', r"line 1: the document has the separator '\x00' within"),
    ("a.jsonl", b'{"text": ' + b"[" * 200_000 + b"\n", "line 1: not JSON (nested too deeply)"),
    ("a.jsonl", b"\xff\xfe{\0}\0", "line 1: not UTF-8 at byte 0 of the line"),
    ("a.csv", b"id,body\n1,x\n", "a.csv has no column 'text' but 'id', 'body': name the column with --text_field"),
    ("a.csv", b"", "a.csv is empty"),
    ("a.csv", b'text,id\n"a\nb",1\nx,2,3\n', "a.csv, line 4: 3 values where the first row has 2, begins 'x,2,3'"),
    ("a.csv", b'text\none\n"two\n', "a.csv, line 3: no row of values (unexpected end of data): mend its quotes"),
    ("a.csv", b'text\none\n"two"2\n', "a.csv, line 3: no row of values ("),
    ("a.csv", b"text\n\xff\n", "a.csv, line 2: not UTF-8 at byte 0 of the line"),
    ("a.parquet", TABLE[:-9], "a.parquet is damaged or no such table ("),
    ("a.parquet", b"PAR1", "a.parquet is damaged or no such table ("),
    ("a.parquet", table_parquet(["a\0b"]), r"a.parquet, row 1: the document has the separator '\x00' within"),
    ("a.arrow", table_arrow(["a", "b"])[:-40], "a.arrow is damaged or no such table ("),
    ("a.xml", dump(["one"])[:-20], "a.xml, line 1: no whole XML ("),
    ("a.xml", b"<html/>", "a.xml, line 1: begins with <html>, as no dump of MediaWiki does: read it as it is with"),
    ("a.xml", b'<!DOCTYPE m [<!ENTITY a "b">]><mediawiki/>', "a.xml, line 1: declares a document type"),
    ("a.txt.gz", gzip.compress(b"text" * 99)[:-9], "a.txt.gz ends in the middle of its gz data, at byte"),
    ("a.txt.bz2", bz2.compress(b"text" * 99)[:-9], "a.txt.bz2 ends in the middle of its bz2 data, at byte"),
    ("a.txt.xz", lzma.compress(b"text" * 99)[:-9], "a.txt.xz ends in the middle of its xz data, at byte"),
    ("a.txt.zst", zstd.compress(b"text" * 99)[:-1], "a.txt.zst ends in the middle of its zst data, at byte"),
    ("a.txt.gz", gzip.compress(b"text" * 99) + b"more", "a.txt.gz has something else after its gz data, before byte"),
    ("a.txt.bz2", bz2.compress(b"text" * 99) + b"more", "a.txt.bz2 has something else after its bz2 data"),
    ("a.txt.zst", zstd.compress(b"text" * 99) + b"more", "a.txt.zst has something else after its zst data"),
    ("a.txt.xz", lzma.compress(b"text" * 99) + b"more" * 9, "a.txt.xz has something else after its xz data"),
    *((f"a.txt{end}", b"text" * 99, f"a.txt{end} is no {end[1:]} data, or damaged") for end in COMPRESS if end),
    ("a.txt.gz", gzip.compress(b"\x89PNG\r\n\x1a\n" * 9), "a.txt.gz has no text within but a PNG picture: leave"),
    ("a.txt.gz", gzip.compress(bytes(90 << 20)), "a.txt.gz has no text within but mostly NUL bytes"),
    ("a.txt.gz", gzip.compress(b"a" * (90 << 20)), "a.txt.gz expands to more than 500 times its size by byte"),
    ("a.jsonl.gz", gzip.compress(b""), "a.jsonl has no text to prepare"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "complaint"), BAD, ids=[f"{n} {name}" for n, (name, _, _) in enumerate(BAD)]
)
def test_what_is_no_such_file_is_refused_in_one_sentence_and_nothing_stays(tmp_path, setting, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        prepare(setting(tmp_path / name, text_field="text"), tmp_path / "out")
    assert complaint in sentence(caught.value) and str(tmp_path) in str(caught.value) + str(tmp_path)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_column_must_be_there_and_have_strings(tmp_path, setting, form):
    path = tmp_path / f"in.{form}"
    path.write_bytes(FORMS[form](["one", "two"]))
    first = "other" if form == "parquet" else "n"
    for field, complaint in {
        "body": f"has no column 'body'; its columns are '{first}', 'text': name one with --text_field",
        first: f"column '{first}' has int64, no strings: name another with --text_field",
    }.items():
        with pytest.raises(ValueError) as caught:
            prepare(setting(path, text_field=field))
        assert complaint in sentence(caught.value)


def test_strings_of_all_types_are_read_and_a_null_is_refused(tmp_path, setting):
    for kind in ("large_string", "string_view", "binary", "dictionary"):
        column = pyarrow.array(["one", "two", "one"])
        column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
        for form in ("parquet", "arrow"):
            path = tmp_path / f"{kind}.{form}"
            table = pyarrow.table({"text": column})
            if form == "parquet":
                parquet.write_table(table, path)
            else:
                with pyarrow.ipc.new_file(path, table.schema) as writer:
                    writer.write_table(table)
            assert text_of(setting(path)) == b"one\0two\0one\0", path
    parquet.write_table(pyarrow.table({"text": ["one", None]}), tmp_path / "null.parquet")
    with pytest.raises(ValueError, match=r"null\.parquet, row 2: no value \(null\): mend it"):
        prepare(setting(tmp_path / "null.parquet"))


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_strings_that_are_not_utf8_are_bad_documents(tmp_path, setting, kind):
    column = pyarrow.array([b"one", b"\xff", b"three"], pyarrow.binary()).view("string")
    if kind == "dictionary":
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1, 2]), column)
    elif kind != "string":
        column = column.view("binary").cast(kind.replace("string", "binary")).view(kind)
    table = pyarrow.table({"text": column})
    with pyarrow.ipc.new_file(tmp_path / "in.arrow", table.schema) as writer:
        writer.write_table(table)
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in.parquet")
    # Of Parquet's, pyarrow looks at the strings of a dictionary as a whole, and refuses the file.
    for form in ("arrow",) if kind == "dictionary" else ("arrow", "parquet"):
        with pytest.raises(ValueError, match=rf"in\.{form}, row 2: no text that UTF-8 can have"):
            prepare(setting(tmp_path / f"in.{form}"))


def test_bad_documents_are_dropped_and_counted_where_they_are_few(tmp_path, setting, monkeypatch):
    path, said = tmp_path / "in.jsonl", []
    lines = json_lines([f"document {number}" for number in range(2000)]).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:700], b"torn\n", *lines[700:], b'{"text": "a\\u0000b"}\n']))
    corpus = open_corpus(prepare(setting(path, bad_documents="drop"), tmp_path / "out", say=said.append))
    assert corpus.sources.documents == 2000
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["bad_documents"] == 2
    assert "left out 2 bad documents, the first: " in said[1] and "in.jsonl, line 701: not JSON" in said[1]
    path.write_bytes(path.read_bytes() + b"3\n")
    with pytest.raises(ValueError, match=r"^3 of 2,003 documents are bad, more than 1 in 1,000: .*line 701: not JSON"):
        prepare(setting(path, bad_documents="drop"))


def test_a_line_or_a_document_that_has_no_end_is_bounded(tmp_path, setting, monkeypatch):
    for module in (documents, texts):
        monkeypatch.setattr(module, "DOCUMENT_BYTES", 100)
    for name, content in {
        "a.jsonl": LINES + b'{"text": "' + b"x" * 250 + b'"}\n' + LINES,
        "a.csv": b'text\n"' + b"line\n" * 50,
        "a.xml": dump(["one", "x" * 150, "two"]),
        "b.csv": "text\n" + "é" * 80 + "\n",  # bytes are counted, not characters
        "b.xml": dump(["one", "é" * 80, "two"]),
    }.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=r"of more than 100 bytes|field larger than field limit \(100\)"):
            prepare(setting(tmp_path / name))
    bad = BadDocuments("a.jsonl", "line", drop=True)
    with (tmp_path / "a.jsonl").open("rb") as file:
        assert [text for _, text in READERS["jsonl"].read(file, "a.jsonl", "text", bad)] == ["one", "two", "three"] * 2
    assert bad.count == 1


def test_text_that_is_not_utf8_is_named_with_its_place_in_the_text(tmp_path, setting):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("Grün ".encode() * 300_000 + b"\xff"))
    prepare(setting(tmp_path / "a.txt.gz"))
    with pytest.raises(
        ValueError, match=r"a\.txt\.gz is not UTF-8 text: bad sequence at byte 1800000 of the text in it"
    ):
        prepare(setting(tmp_path / "a.txt.gz", vocabulary="characters"))


# Damage.


@pytest.mark.parametrize("compression", [one for one in COMPRESS if one])
@fuzzed(60)
@given(st.data())
def test_a_damaged_compressed_file_gives_its_text_or_a_sentence(compression, data):
    noise = random.Random(5).randbytes(400)
    members = [b"some text, " * 40, noise, b""]
    checked = {zstd.CompressionParameter.checksum_flag: 1}  # others have their checksums anyway
    compress = COMPRESS[compression] if compression != ".zst" else lambda one: zstd.compress(one, options=checked)
    whole = b"".join(map(compress, members))
    document = data.draw(damaged(whole, st.binary(max_size=4)))
    # Which members are there twice, or not at all, no decoder can know; headers have fields that are not checked.
    allowed = {b"".join(found) for n in range(5) for found in itertools.product(members, repeat=n)}
    try:
        with io.BufferedReader(Decompressed(io.BytesIO(document), compression, "a.txt")) as stream:
            assert stream.read() in allowed
    except ValueError as error:
        assert sentence(error).startswith("a.txt ")


@pytest.mark.parametrize("form", [*FORMS, "arrow file"])
@fuzzed(60)
@given(st.data())
def test_a_damaged_file_of_documents_gives_documents_or_a_sentence(form, data):
    whole = table_arrow(DOCUMENTS, as_file=True) if form == "arrow file" else FORMS[form](DOCUMENTS)
    document = data.draw(damaged(whole, st.binary(max_size=4)))
    bad = BadDocuments("a", "line", drop=False)
    try:
        for number, text in READERS[form.partition(" ")[0]].read(io.BytesIO(document), "a", "text", bad):
            assert number > 0 and isinstance(text, str | bytes) and len(text) <= len(document) + 4000
    except ValueError as error:
        assert sentence(error).startswith(("a ", "a:", "a,"))


def test_a_flat_file_of_any_length_takes_no_memory(tmp_path):
    """The decoder holds one block of what it reads, however long the stream is."""
    source = Path(tmp_path / "long.gz")
    rng = random.Random(0)
    line = json.dumps({"text": "".join(rng.choices("abcdefgh ", k=2000))}).encode() + b"\n"
    with gzip.open(source, "wb", 1) as out:
        for _ in range(20_000):
            out.write(line)
    with source.open("rb") as raw, io.BufferedReader(Decompressed(raw, ".gz", "long.gz"), 1 << 16) as stream:
        tracemalloc.start()
        count = sum(1 for _ in READERS["jsonl"].read(stream, "long.gz", "text", BadDocuments("long.gz", "line", False)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert count == 20_000 and peak < 1 << 20


@pytest.mark.parametrize("kind", ["parquet", "arrow", "dictionary"])
def test_few_rows_of_long_documents_are_read_at_a_time(tmp_path, monkeypatch, kind):
    texts = [f"{number:04d}" * 1024 for number in range(2000)]
    column = pyarrow.array(texts)
    table = pyarrow.table({"text": column.dictionary_encode() if kind == "dictionary" else column})
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "in", row_group_size=1500, write_batch_size=16, data_page_size=1)
    else:
        with pyarrow.ipc.new_file(tmp_path / "in", table.schema) as writer:
            writer.write_table(table)
    monkeypatch.setattr(tables, "BATCH_BYTES", 256 << 10)
    reader = READERS["arrow" if kind == "dictionary" else kind]
    del table, column
    before, held = pyarrow.total_allocated_bytes(), []
    with (tmp_path / "in").open("rb") as file:
        tracemalloc.start()
        for number, text in reader.read(file, "in", "text", BadDocuments("in", "row", False)):
            assert text.decode() == texts[number - 1]
            held.append(pyarrow.total_allocated_bytes() - before)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    of_batch = 0 if kind == "parquet" else 8_300_000  # of Arrow all records of a batch are in memory
    assert len(held) == 2000 and peak < of_batch + 5_000_000 and max(held) < 4_000_000


def test_many_rows_of_short_documents_are_read_at_a_time():
    assert tables._fitting(100_000, 100_000 * 100) == tables._fitting(1000, 0) == tables.ROWS
    assert tables._fitting(1, 1 << 40) == tables._fitting(0, 0) == 1
