"""A .bz2 file of many streams is cut at any byte into spans that have its documents once each, or it is refused."""

import bz2
import dataclasses
import io
import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build import bz2_spans, decompress, remote_inputs, texts
from data_pipeline.build.by_parts import Sizes, prepare_by_parts
from data_pipeline.build.bz2_spans import MARK, first_stream
from data_pipeline.build.documents import kind_of_name
from data_pipeline.build.inputs import find_texts
from data_pipeline.build.plan import make_plan
from data_pipeline.build.prepare import decoding, prepare
from data_pipeline.build.remote_inputs import find_remote
from data_pipeline.build.sources import TextFile, find_text
from data_pipeline.build.texts import TextOutput, decode_file
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus
from tests.data_pipeline.build.test_prepare import text_of
from tests.data_pipeline.faulty import serving
from tests.fuzzing import damaged, fuzzed, sentence

HEAD = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/"><siteinfo/>\n'
LETTERS = st.sampled_from(["a", "b ", "\n", "é", "漢", "<page>", "</page>", "&", "BZh9"])
TEXTS = st.lists(st.lists(LETTERS, max_size=12).map("".join), max_size=12)


def page(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return f"  <page>\n<title>t</title><revision><text>{escaped}</text></revision></page>\n"


def written(form: str, documents: list[str]) -> bytes:
    if form == "jsonl":
        return "".join(json.dumps({"text": one}) + "\n" for one in documents).encode()
    return (HEAD + "".join(map(page, documents)) + "</mediawiki>\n").encode()


def streams(text: bytes, cuts: Iterable[int]) -> list[bytes]:
    """The text in streams that end at these bytes of it; equal ones give an empty stream."""
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [bz2.compress(text[start:stop]) for start, stop in itertools.pairwise(ends)]


def read(path: Path, span: tuple[int, int] | None, **values) -> list[str]:
    """The documents of a file, or of a span of it."""
    (file,) = find_text(str(path)).files
    return read_file(dataclasses.replace(file, kind=kind_of_name(path.name)), span, **values)


def read_file(file: TextFile, span: tuple[int, int] | None, **values) -> list[str]:
    found = bytearray()
    how = decoding(CorpusSettings(corpus="x", **values))
    decode_file(dataclasses.replace(file, span=span), how, Path(), lambda _: TextOutput(found.extend, how))
    return bytes(found).decode().split("\0")[:-1]


def spans(size: int, cuts: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(sorted({0, size, *(cut for cut in cuts if cut < size)})))


@pytest.mark.parametrize("form", ["jsonl", "xml"])
@fuzzed(60)
@given(data=st.data())
def test_spans_have_each_document_once_in_order_wherever_files_are_cut_and_streams_end(form, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("in") / f"a.{form}.bz2"
    documents = data.draw(TEXTS, "documents")
    text = written(form, documents)
    if form == "jsonl" and data.draw(st.booleans(), "without its last line feed"):
        text = text.removesuffix(b"\n")
    if data.draw(st.booleans(), "small streams"):
        cuts = list(range(0, len(text), data.draw(st.integers(1, 20), "bytes of a stream")))
    else:
        cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8), "where streams end")
    path.write_bytes(b"".join(streams(text, cuts)) or bz2.compress(b""))
    size = path.stat().st_size
    if data.draw(st.booleans(), "equal spans"):
        places = list(range(0, size, data.draw(st.integers(max(size // 40, 3), max(size, 5)), "bytes of a span")))
    else:
        places = data.draw(st.lists(st.integers(0, size), max_size=12), "where spans end")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bz2_spans, "CHUNK", data.draw(st.sampled_from([7, 1 << 20]), "bytes read at a time"))
        found = [document for span in spans(size, places) for document in read(path, span)]
    assert found == [one for one in documents if one] == read(path, None)


@pytest.mark.parametrize("form", ["jsonl", "xml"])
def test_spans_of_one_byte_have_each_document_once(form, tmp_path):
    path, documents = tmp_path / f"a.{form}.bz2", ["one", "two\n", "<page>", "four"]
    text = written(form, documents)
    for step in (11, 40, len(text)):
        path.write_bytes(b"".join(streams(text, list(range(step, len(text), step)))))
        size = path.stat().st_size
        assert [one for span in spans(size, list(range(size))) for one in read(path, span)] == documents


def test_a_byte_order_mark_is_left_out_of_the_first_line_alone(tmp_path):
    path, line = tmp_path / "a.jsonl.bz2", b'\xef\xbb\xbf{"text": "marked"}\n'
    path.write_bytes(b"".join(map(bz2.compress, (line, written("jsonl", ["one"]), line, written("jsonl", ["two"])))))
    size = path.stat().st_size
    for cut in range(1, size):
        found = [one for span in spans(size, [cut]) for one in read(path, span, bad_documents="drop")]
        assert found == ["marked", "one", "two"], cut


def test_a_dump_is_cut_into_parts_of_about_the_same_size_and_a_plain_text_is_not(tmp_path):
    draw = random.Random(3)
    pages = ["".join(draw.choices("abcdefgh ", k=300)) for _ in range(200)]
    dump, text = tmp_path / "a.xml.bz2", tmp_path / "b.txt.bz2"
    dump.write_bytes(b"".join(multistream(pages)))
    text.write_bytes(b"".join(streams(b"some text\n" * 900, [50] * 99)))
    parts = {path: planned(path) for path in (dump, text)}
    counts = [len(read(dump, span)) for span in parts[dump]]
    assert len(counts) == -(-dump.stat().st_size // 4096) and sum(counts) == 200
    assert max(counts) < 2 * 200 / len(counts), counts
    assert parts[text] == [None]


def planned(path: Path) -> list[tuple[int, int] | None]:
    """The spans of the parts of a text of one file."""
    how = CorpusSettings(corpus=str(path), cache_dir=str(path.parent / "cache"))
    plan = make_plan(find_texts(how, path.parent / "cache", 1, None)[0], how, None, Sizes(part=4096))
    return [file.span for part in plan.parts for file in part.files]


def multistream(pages: list[str], size: int = 10) -> list[bytes]:
    """The streams of a multistream dump: what comes before the pages, pages, what comes after them."""
    blocks = ["".join(map(page, pages[start : start + size])) for start in range(0, len(pages), size)]
    return [bz2.compress(text.encode()) for text in (HEAD, *blocks, "</mediawiki>\n")]


def test_the_first_stream_is_found_wherever_chunks_of_the_file_end(monkeypatch):
    content = b"BZh9" * 3 + bz2.compress(b"one") + bz2.compress(b"")
    places = [match.start() for match in MARK.finditer(content)]
    assert len(places) == 2
    for chunk in (*range(10, 25), 1000):
        monkeypatch.setattr(bz2_spans, "CHUNK", chunk)
        for start, stop in itertools.combinations(range(len(content) + 1), 2):
            expected = next((place for place in places if start <= place < stop), stop)
            assert first_stream(io.BytesIO(content), start, stop) == expected, (chunk, start, stop)


# What is damaged, or is not what it seems.


@pytest.fixture
def dump(tmp_path):
    draw = random.Random(4)
    parts = multistream(["".join(draw.choices("abcdefgh ", k=400)) for _ in range(60)])
    path = tmp_path / "a.xml.bz2"
    path.write_bytes(b"".join(parts))
    return path, parts


def by_parts(path: Path, out: Path, **values) -> None:
    how = CorpusSettings(corpus=str(path), cache_dir=str(path.parent / "cache"), **values)
    prepare_by_parts(how, out, workers=1, sizes=Sizes(part=1024))


def test_a_damaged_stream_is_named_with_file_and_byte_wherever_the_damage_and_the_cut_are(dump):
    path, parts = dump
    whole, out = path.read_bytes(), path.parent / "out"
    begins = len(parts[0]) + len(parts[1]) + len(parts[2])
    for at in (begins + 4, begins + 11, begins + 200, begins + len(parts[3]) - 3):  # its mark, checksum, text and end
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
        with pytest.raises(
            ValueError, match=r"a\.xml\.bz2 (is damaged: its|has something else after its) bz2"
        ) as error:
            by_parts(path, out)
        byte = int(sentence(error.value).partition("before byte ")[2].split()[0])
        assert at < byte <= len(whole)
        for low in range(begins - 3, begins + len(parts[3]) + 3, 40):  # nor do spans lose it in silence
            with pytest.raises(ValueError):
                for span in spans(len(whole), [low]):
                    read(path, span)
    path.write_bytes(whole[: begins + 100])
    with pytest.raises(ValueError, match=r"a\.xml\.bz2 ends in the middle of its bz2 data, at byte"):
        by_parts(path, out)
    path.write_bytes(whole[:begins])
    with pytest.raises(ValueError, match=r"a\.xml\.bz2.*no whole XML \(no element found\): copy it again"):
        by_parts(path, out)
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match=r"a\.xml\.bz2 has something else after its bz2 data"):
        by_parts(path, out)
    assert not list(path.parent.glob("*out*"))


@pytest.mark.parametrize("form", ["jsonl", "xml"])
@fuzzed(40)
@given(data=st.data())
def test_a_file_damaged_anywhere_gives_the_same_documents_in_spans_or_is_refused(form, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("in") / f"a.{form}.bz2"
    text = written(form, ["one", "two\n", "", "<page>", "five" * 9])
    parts = streams(text, range(31, len(text), 31))
    if data.draw(st.booleans(), "whole streams lost, moved and doubled"):
        content = b"".join(data.draw(st.lists(st.sampled_from(parts), min_size=1, max_size=len(parts) + 2)))
    else:
        content = data.draw(damaged(b"".join(parts), st.one_of(st.binary(max_size=4), st.just(bz2.compress(b"\n")))))
    path.write_bytes(content)
    found: list[list[str] | None] = []
    for places in ([], data.draw(st.lists(st.integers(0, len(content)), max_size=6), "where spans end")):
        try:
            found.append([one for span in spans(len(content), places) for one in read(path, span if places else None)])
        except ValueError as error:
            assert sentence(error).startswith(str(path))
            found.append(None)
    assert found[0] == found[1]


def with_bytes_within(stream: bytes, wanted: bytes) -> bytes:
    """A stream of one block that gives the same text, with bytes among its selectors that no decoder has a use for."""
    bits = "".join(f"{byte:08b}" for byte in stream)
    at = 32 + 48 + 32 + 1 + 24  # the header; of the block its mark, checksum, a flag and the place of its end
    at += 16 + 16 * bits[at : at + 16].count("1")  # the bytes that there are
    tables, count = int(bits[at : at + 3], 2), int(bits[at + 3 : at + 18], 2)
    end = at + 18
    for _ in range(count):  # each is some ones and a zero
        end = bits.index("0", end) + 1
    more = "0" * (-end % 8) + "".join(f"{byte:08b}" for byte in wanted) + "0"
    assert tables == 6 and "111111" not in more
    bits = bits[: at + 3] + f"{count + more.count('0'):015b}" + bits[at + 18 : end] + more + bits[end:]
    last = bits.rindex(f"{0x177245385090:048b}") + 48 + 32
    bits = bits[:last] + "0" * (-last % 8)
    return bytes(int(bits[place : place + 8], 2) for place in range(0, last, 8))


def stream_without_runs_of_ones() -> bytes:
    """A whole stream that can stand within another one."""
    for number in range(100_000):
        found = bz2.compress(f"{number}\n".encode())
        if "111111" not in "0" + "".join(f"{byte:08b}" for byte in found) + "0":
            return found
    raise AssertionError


@pytest.mark.parametrize("form", ["jsonl", "xml"])
def test_the_mark_of_a_stream_within_another_one_is_no_cut(form, tmp_path):
    draw = random.Random(5)
    documents = ["".join(draw.choices("abcdefghijklmnop ", k=900)) for _ in range(9)]
    text = written(form, documents)
    parts = streams(text, [len(text) // 3, len(text) * 2 // 3])
    false = with_bytes_within(parts[1], b"BZh91AY&SY")
    assert bz2.decompress(false) == bz2.decompress(parts[1]) and len(MARK.findall(false)) == 2
    path = tmp_path / f"a.{form}.bz2"
    path.write_bytes(parts[0] + false + parts[2])
    place = len(parts[0]) + false.rindex(b"BZh9")
    for cut in (len(parts[0]), place - 1, place, place + 1):
        assert [one for span in spans(path.stat().st_size, [cut]) for one in read(path, span)] == documents


def test_a_whole_stream_within_another_one_is_refused_and_never_text(tmp_path):
    draw = random.Random(5)
    documents = ["".join(draw.choices("abcdefghijklmnop ", k=900)) for _ in range(9)]
    inner = stream_without_runs_of_ones()
    parts = streams(written("jsonl", documents), [3000, 6000])
    false = with_bytes_within(parts[1], inner)
    path = tmp_path / "a.jsonl.bz2"
    path.write_bytes(parts[0] + false + parts[2])
    size, place = path.stat().st_size, len(parts[0]) + false.index(inner)
    with path.open("rb") as raw:
        assert first_stream(raw, place - 5, size) == place, "the stream within is whole"
    assert read(path, None) == documents
    for cut in (len(parts[0]) + 1, place):
        with pytest.raises(
            ValueError, match=rf"a\.jsonl\.bz2 cannot be cut at byte {place}, where .*another --part_by"
        ):
            read(path, (0, cut))
    assert [one for span in spans(size, [place + 1]) for one in read(path, span)] == documents


def test_marks_of_pages_where_no_dump_has_them_are_refused_and_never_other_text(tmp_path):
    path = tmp_path / "a.xml.bz2"
    for odd in ("<!-- <page> -->", "<page><page></page></page>", "<?x <page> ?>"):
        text = (HEAD + page("one") * 9 + odd + page("two") * 9 + "</mediawiki>").encode()
        parts = streams(text, [*range(40, len(text), 40), text.index(odd.encode()) + 3])
        path.write_bytes(b"".join(parts))
        expected, refused = read(path, None), 0
        for cut in range(5, path.stat().st_size, 20):
            try:
                assert [one for span in spans(path.stat().st_size, [cut]) for one in read(path, span)] == expected
            except ValueError as error:
                assert "no whole XML" in sentence(error)
                refused += 1
        assert 0 < refused < 12, odd
    path.write_bytes(bz2.compress(b'<?xml version="1.0" encoding="latin1"?>' + written("xml", ["one"])))
    with pytest.raises(ValueError, match="declares the encoding latin1, as no dump of MediaWiki does"):
        read(path, None)


# Object stores.


def test_parts_of_an_object_are_read_in_ranges_and_give_the_text_on_disk(tmp_path, monkeypatch):
    pytest.importorskip("obstore", reason="obstore is absent: pip install charlstm[remote]")
    monkeypatch.setattr(remote_inputs, "RANGE", 1 << 12)
    monkeypatch.setattr(texts, "RANGE", 1 << 12)
    monkeypatch.setattr(bz2_spans, "CHUNK", 1 << 10)
    monkeypatch.setattr(bz2_spans, "INPUT", 1 << 10)
    monkeypatch.setattr(decompress, "INPUT", 1 << 10)
    draw = random.Random(6)
    pages = ["".join(draw.choices("abcdefgh 漢é", k=900)) for _ in range(600)]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.xml.bz2").write_bytes(b"".join(multistream(pages, 3)))
    size = (folder / "a.xml.bz2").stat().st_size
    with serving(folder) as server:
        url = f"{server.address}/a.xml.bz2"
        (file,) = find_remote(url, 5.0).files
        file = dataclasses.replace(file, kind=kind_of_name(url))
        found = []
        for span in spans(size, [size // 3, size // 2]):
            server.requests.clear()
            found += read_file(file, span)
            asked = [(start, stop) for _, start, stop in server.requests if stop - start < size]
            assert min(start for start, _ in asked) == span[0]
            assert max(stop for _, stop in asked) < span[1] + (1 << 14) or span[1] == size
        assert found == pages
        how = {"vocabulary": "characters", "cache_dir": str(tmp_path / "cache"), "valid_fraction": 0.2}
        here = CorpusSettings(corpus=str(folder / "a.xml.bz2"), **how)
        once = open_corpus(prepare(here, tmp_path / "once"))
        sizes = Sizes(size // 5, 1 << 16, 1 << 12)
        prepare_by_parts(here, tmp_path / "here", workers=1, sizes=sizes)
        prepare_by_parts(CorpusSettings(corpus=url, **how), tmp_path / "there", workers=1, sizes=sizes)
        corpora = [open_corpus(tmp_path / name) for name in ("here", "there")]
        assert corpora[0].fingerprint == corpora[1].fingerprint
        assert all(text_of(corpora[0], split) == text_of(once, split) for split in once.splits)
