"""From text to a prepared corpus."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build import encode, sources, utf8
from data_pipeline.build.prepare import prepare
from data_pipeline.build.sources import find_text
from data_pipeline.build.splits import cut, shard_spans
from data_pipeline.build.utf8 import StartCount
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import Corpus, open_corpus

ROOT = Path(__file__).resolve().parents[3]
POEM = "Ein Grün, ein Blau — 漢字 🙂\n" * 40


def text_of(corpus: Corpus, split: str) -> bytes:
    ids = corpus.splits[split].read(0, len(corpus.splits[split]))
    return corpus.vocabulary.decode_bytes(ids)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_example_of_the_documentation_is_what_is_written(tmp_path, setting):
    page = (ROOT / "docs" / "data_format.md").read_text()
    source = bytes.fromhex(re.search(r"\n    (6e c3.*)\n", page)[1])
    (tmp_path / "verse.txt").write_bytes(source)
    how = setting(tmp_path / "verse.txt", vocabulary="characters", valid_fraction=0.2, test_fraction=0.2)
    files = files_of(prepare(how, tmp_path / "out", shard_bytes=4, block_bytes=2))
    said = {
        name: bytes.fromhex(row)
        for name, row in re.findall(r"\n    (\S+\.(?:ids|crc)) +((?:[0-9a-f]{2} ?)+)(?=\n)", page)
    }
    said["manifest.json"] = re.search(r"```json\n(.*?)```", page, re.DOTALL)[1].encode()
    said["sources.jsonl"] = re.search(r"\n    (\{\"bytes.*\}\n)", page)[1].encode()
    assert len(said) == 10 and files == said
    ids = {
        "train-00000.ids": [3, 4, 1, 2],
        "train-00001.ids": [3, 1],
        "valid-00000.ids": [3, 4],
        "test-00000.ids": [0, 2, 3],
    }
    assert {name: list(files[name]) for name in ids} == ids


@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_the_splits_together_are_the_text(setting, vocabulary):
    corpus = open_corpus(prepare(setting(POEM, vocabulary=vocabulary), shard_bytes=100, block_bytes=16))
    assert b"".join(text_of(corpus, split) for split in ("train", "valid", "test")) == POEM.encode()
    symbols = len(POEM) if vocabulary == "characters" else len(POEM.encode())
    assert sum(map(len, corpus.splits.values())) == symbols
    assert len(corpus.splits["train"]) == symbols * 9 // 10
    for split in corpus.splits:
        assert corpus.splits[split].bytes == len(text_of(corpus, split))


def test_the_vocabulary_is_of_the_training_split_alone(setting):
    how = setting("aab" * 30 + "éa" * 5, vocabulary="characters", valid_fraction=0, test_fraction=0.1)
    corpus = open_corpus(prepare(how))
    assert corpus.vocabulary.characters == "ab"
    assert text_of(corpus, "test").decode() == "\N{REPLACEMENT CHARACTER}a" * 5
    assert corpus.splits["test"].bytes == len("éa".encode()) * 5


@pytest.mark.parametrize("split", ["contiguous", "columns:3x7"])
@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_the_characters_of_each_split_are_counted_wherever_it_is_cut(setting, vocabulary, split):
    # Shards of 7 bytes or fewer symbols cut within characters of 2, 3 and 4 bytes, as do splits and columns.
    text = "سلام 漢字 🙂 näe é" * 20
    how = setting(text, vocabulary=vocabulary, split=split, valid_fraction=0.3, test_fraction=0.2)
    corpus = open_corpus(prepare(how, shard_bytes=7 if vocabulary == "bytes" else 8, block_bytes=2))
    for name, held in corpus.splits.items():
        starts = sum(byte & 0xC0 != 0x80 for byte in text_of(corpus, name))
        assert held.characters == (starts if vocabulary == "bytes" else len(held)) < held.bytes
    if vocabulary == "bytes" and split == "contiguous":
        assert sum(held.characters for held in corpus.splits.values()) == len(text)


@pytest.mark.parametrize(
    "bad", ["café".encode("latin-1"), "é".encode() + b"\xa9", b"\xed\xa0\x80", b"\xa9" * 4, b"\xc3\n"]
)
def test_characters_of_what_is_not_utf8_are_not_counted(tmp_path, setting, bad):
    (tmp_path / "text").write_bytes("é".encode() * 50 + bad + b" " * 50)
    corpus = open_corpus(prepare(setting(tmp_path / "text", valid_fraction=0.1, test_fraction=0.1)))
    assert corpus.splits["train"].characters is None
    assert corpus.splits["test"].characters == len(corpus.splits["test"])


@given(st.lists(st.sampled_from(["a", "é", "漢", "🙂"]), max_size=30), st.data())
def test_a_count_of_starts_does_not_depend_on_chunks_or_where_stretches_are_cut(text, data):
    content, starts, begun = "".join(text).encode(), StartCount(), 0
    for stop in [*sorted(data.draw(st.sets(st.integers(0, len(content))))), len(content)]:
        starts.add(content[begun:stop])
        if data.draw(st.booleans()):
            starts.begin()
        begun = stop
    starts.begin()
    assert starts.characters == len(text)


def test_a_preparation_that_goes_on_has_the_counts_of_the_shards_that_were_there(setting, tmp_path, monkeypatch):
    how = setting("abcé" * 21 + "zé" * 8, vocabulary="characters", valid_fraction=0, test_fraction=0.16)
    expected = files_of(prepare(how, tmp_path / "whole", shard_bytes=4))
    written = []

    def fails(task, write=encode._write_once):
        if len(written) == 23:  # of 25
            raise OSError("the disk is gone")
        written.append(write(task))
        return written[-1]

    monkeypatch.setattr(encode, "_write_once", fails)
    with pytest.raises(OSError):
        prepare(how, tmp_path / "out", shard_bytes=4, workers=1)
    monkeypatch.undo()
    assert files_of(prepare(how, tmp_path / "out", shard_bytes=4)) == expected
    test = open_corpus(tmp_path / "out").splits["test"]
    assert (test.unknown, test.characters, len(test)) == (8, 16, 16)


def test_min_count_makes_rare_characters_unknown(setting):
    how = setting("a" * 50 + "b" * 3 + "c" * 2 + "a" * 45, vocabulary="characters", min_count=3)
    assert open_corpus(prepare(how)).vocabulary.characters == "ab"


def test_columns_hold_out_the_last_windows_of_each_column(setting):
    # 3 columns of 10 windows of 4 symbols, and a rest of 7 that is in no split.
    text = "".join(f"{column}{window}xy" for column in "ABC" for window in range(10)) + "restres"
    corpus = open_corpus(
        prepare(setting(text, split="columns:3x4", valid_fraction=0.2, test_fraction=0.1), shard_bytes=10)
    )

    def windows(numbers) -> bytes:
        return "".join(f"{column}{window}xy" for column in "ABC" for window in numbers).encode()

    assert text_of(corpus, "train") == windows(range(7))
    assert text_of(corpus, "valid") == windows((7, 8))
    assert text_of(corpus, "test") == windows((9,))


def test_columns_of_characters_are_counted_in_characters(setting):
    text = "aéaé" + "ßb🙂b" + "漢cßc"
    corpus = open_corpus(
        prepare(setting(text, vocabulary="characters", split="columns:3x2", valid_fraction=0.5, test_fraction=0))
    )
    assert text_of(corpus, "train").decode() == "aéßb漢c"
    assert len(corpus.splits["valid"]) == 6 and corpus.splits["valid"].bytes == len("aé🙂bßc".encode())


def test_tinyshakespeare_is_split_as_char_rnn_does(corpora, setting):
    how = setting(corpora / "tinyshakespeare.txt", vocabulary="characters", split="columns:50x50", test_fraction=0)
    corpus = open_corpus(prepare(how))
    assert {name: len(split) for name, split in corpus.splits.items()} == {
        "train": 50 * 423 * 50,
        "valid": 50 * 23 * 50,
    }
    text = (corpora / "tinyshakespeare.txt").read_bytes()
    assert text_of(corpus, "train")[423 * 50 :][:1000] == text[446 * 50 :][:1000]
    assert text_of(corpus, "valid")[:1150] == text[423 * 50 : 446 * 50]
    assert corpus.vocabulary.size == 66


@given(st.integers(1, 10**6), st.integers(0, 99), st.integers(0, 99), st.sampled_from(["contiguous", "columns:3x7"]))
def test_splits_are_the_exact_fractions_and_miss_nothing(symbols, valid, test, how):
    if valid + test >= 100:
        return
    columns, window = (1, 1) if how == "contiguous" else (3, 7)
    windows = symbols // (columns * window)
    try:
        splits = cut(symbols, CorpusSettings(valid_fraction=valid / 100, test_fraction=test / 100, split=how))
    except ValueError:
        assert windows * (100 - valid - test) < 100
        return
    spans = sorted(span for part in splits.values() for span in part)
    assert spans[0][0] == 0 and spans[-1][1] == windows * columns * window
    assert all(first[1] == second[0] for first, second in itertools.pairwise(spans))
    assert sum(b - a for a, b in splits["train"]) == windows * (100 - valid - test) // 100 * columns * window
    held_out = sum(b - a for a, b in splits.get("valid", []))
    rest = windows - windows * (100 - valid - test) // 100
    assert held_out == (windows * valid // 100 if test else rest) * columns * window


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 40))
def test_shards_are_full_but_for_the_last(lengths, size):
    starts = np.cumsum([0, *lengths]).tolist()
    shards = shard_spans(list(itertools.pairwise(starts)), size)
    filled = [sum(b - a for a, b in shard) for shard in shards]
    assert all(n == size for n in filled[:-1]) and 0 < filled[-1] <= size
    assert [i for shard in shards for a, b in shard for i in range(a, b)] == list(range(starts[-1]))


def test_directories_and_globs_are_their_files_sorted_one_after_the_other(tmp_path, setting):
    for name, text in {
        "b.txt": "two",
        "a/z.txt": "one",
        "c.md": "three",
        ".hidden": "no",
        ".git/x": "no",
        "d": "",
    }.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)

    def made_from(spec: Path) -> tuple[bytes, list[str]]:
        corpus = open_corpus(prepare(setting(spec, valid_fraction=0, test_fraction=0)))
        return text_of(corpus, "train"), [source.name for source in corpus.read_sources()]

    assert made_from(tmp_path / "in") == (b"one\ntwo\nthree", ["a/z.txt", "b.txt", "c.md", "d"])
    assert made_from(tmp_path / "in" / "*.txt") == (b"two", ["b.txt"])
    assert made_from(tmp_path / "in" / "**" / "*.txt") == (b"one\ntwo", ["a/z.txt", "b.txt"])
    with pytest.raises(ValueError, match=r"lies inside of the input .*/in: name an output outside of it"):
        prepare(setting(tmp_path / "in"), tmp_path / "in" / "out")


def test_explicit_files_are_the_splits(tmp_path, setting):
    for split, text in {"train": "abab", "valid": "bb", "test": "ac"}.items():
        (tmp_path / split).write_text(text)
    specs = {split: str(tmp_path / split) for split in ("train", "valid", "test")}
    corpus = open_corpus(prepare(setting(**specs, vocabulary="characters")))
    assert [text_of(corpus, s).decode() for s in specs] == ["abab", "bb", "a\N{REPLACEMENT CHARACTER}"]
    assert list(open_corpus(prepare(setting(train=specs["train"]))).splits) == ["train"]
    with pytest.raises(ValueError, match="split=columns:2x2 cuts one text: it cannot be used with explicit --train"):
        prepare(setting(**specs, split="columns:2x2"))


@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_any_number_of_workers_writes_the_same_files(tmp_path, setting, monkeypatch, vocabulary):
    monkeypatch.setattr("data_pipeline.build.encode.SMALL", 0)
    monkeypatch.setattr("data_pipeline.build.prepare.SMALL", 0)  # so that processes are started even for little
    how = setting(POEM * 20, vocabulary=vocabulary)
    made = [files_of(prepare(how, tmp_path / f"by{n}", workers=n, shard_bytes=4000)) for n in (1, 2)]
    assert len(made[0]) > 10 and made[0] == made[1]


@pytest.mark.parametrize("region, chunk", [(4, 1), (5, 3), (7, 1000), (64, 2)])
def test_characters_are_found_wherever_regions_and_chunks_cut_them(tmp_path, monkeypatch, region, chunk):
    monkeypatch.setattr(utf8, "REGION", region)
    monkeypatch.setattr(sources, "CHUNK", chunk)
    pieces = ["a🙂é漢" * 5, "", "é", "🙂🙂🙂", "plain"]
    for number, piece in enumerate(pieces):
        (tmp_path / str(number)).write_text(piece)
    text, joined = find_text(str(tmp_path)), "".join(pieces)
    index = utf8.index_characters(text, map)
    offsets = [len(joined[:n].encode()) for n in range(len(joined) + 1)]
    assert index.characters == len(joined)
    assert index.byte_offsets(range(len(joined) + 1)) == dict(enumerate(offsets))
    start, stop = 3, len(joined) - 2
    counts = utf8.count_all(index, [(offsets[start], offsets[stop])], map)
    assert counts == {ord(c): joined[start:stop].count(c) for c in set(joined[start:stop])}


BAD = [b"\xff", b"\xc3", b"\xe6\xbc", b"\x80", b"\xc0\x80", b"\xed\xa0\x80", b"\xf0\x9f\x99"]


@pytest.mark.parametrize("region, chunk", [(4, 1), (5, 3), (1 << 20, 1 << 20)])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at_end", [True, False])
def test_the_first_bad_sequence_is_named_with_its_file_and_offset(
    tmp_path, setting, monkeypatch, bad, region, chunk, at_end
):
    monkeypatch.setattr(utf8, "REGION", region)
    monkeypatch.setattr(sources, "CHUNK", chunk)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("ééé")
    (tmp_path / "in" / "b.txt").write_bytes("aé漢🙂x".encode() + bad + (b"" if at_end else b"abc\xff"))
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8 text: bad sequence at byte 11; .* --vocabulary=bytes"):
        prepare(setting(tmp_path / "in", vocabulary="characters"))
    prepare(setting(tmp_path / "in", vocabulary="bytes"))


def test_what_cannot_be_prepared_is_refused_in_one_sentence(tmp_path, setting):
    (tmp_path / "empty").mkdir()
    for spec, complaint in {
        tmp_path / "none.txt": "none.txt does not exist: name a text file, a directory or a quoted glob",
        tmp_path / "*.none": "*.none has no files: name a text file",
        tmp_path / "empty": "empty has no files: name a text file",
        Path("/dev/null"): "/dev/null is not a regular file",
        Path("enwik9"): "enwik9 does not exist: name a text file, a directory or a quoted glob (or did you mean",
    }.items():
        with pytest.raises(ValueError) as caught:
            prepare(setting(spec))
        assert complaint in str(caught.value)
    with pytest.raises(ValueError, match=r"text\.txt is empty: there is no text to prepare"):
        prepare(setting(b""))
    with pytest.raises(ValueError, match="the text has 5 symbols, too few for a training split with split=columns:3x2"):
        prepare(setting("abcde", split="columns:3x2"))
    assert not list((tmp_path / "cache").glob("corpora/*/manifest.json"))


def test_a_second_preparation_reads_nothing_and_a_changed_text_is_another_corpus(tmp_path, setting):
    how, told = setting(POEM), []
    first = prepare(how, progress=lambda *what: told.append(what[0]))
    assert set(told) == {"hashing", "writing"} and first.parent == tmp_path / "cache" / "corpora"
    told.clear()
    assert prepare(how, progress=lambda *what: told.append(what[0])) == first and not told
    stamp = (tmp_path / "text.txt").stat()
    (tmp_path / "text.txt").write_text(POEM.replace("B", "b"))
    os.utime(tmp_path / "text.txt", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert prepare(how) != first
    others = ({}, {"valid_fraction": 0.1}, {"vocabulary": "characters"}, {"vocabulary": "characters", "min_count": 2})
    assert len({prepare(setting(POEM, **values)) for values in others}) == len(others)


def test_an_output_that_holds_something_else_is_left_alone(tmp_path, setting):
    out = prepare(setting("abc" * 20), tmp_path / "out")
    before = files_of(out)
    with pytest.raises(
        ValueError, match=r"out is a corpus of another text or other settings .*delete it or name another"
    ):
        prepare(setting("abd" * 20), out)
    assert files_of(out) == before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(ValueError, match="home exists and is not a prepared corpus: delete it or name another output"):
        prepare(setting("abc" * 20), tmp_path / "home")
    assert files_of(tmp_path / "home") == {"letter": b"dear"}


def test_the_manifest_says_what_the_corpus_was_made_from_and_not_where_it_lay(tmp_path, setting):
    out = prepare(setting(POEM), tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sources"]["files"] == 1 and [one.name for one in open_corpus(out).read_sources()] == ["text.txt"]
    assert str(tmp_path) not in (out / "manifest.json").read_text() + (out / "sources.jsonl").read_text()


def test_memory_does_not_grow_with_the_text(tmp_path, setting):
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from data_pipeline.build.prepare import prepare\n"
        "from data_pipeline.settings import CorpusSettings\n"
        "settings = CorpusSettings(corpus=sys.argv[1], vocabulary='characters', cache_dir=sys.argv[2])\n"
        "prepare(settings, workers=1)\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10)\n"
    )
    peaks = []
    for size in (4, 40):
        path = tmp_path / f"{size}.txt"
        path.write_text((POEM * 1000)[: 1 << 18] * (size * 2))
        command = [sys.executable, "-c", code, str(path), str(tmp_path / "cache")]
        peaks.append(int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 12, f"{peaks} MiB"
