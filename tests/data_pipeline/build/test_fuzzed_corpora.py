"""A prepared corpus, and the text that it is made of, damaged and altered: read as it is, or refused in one line.

As in tests/run/test_fuzzed_borders.py: what may come back is written down in each test, and what may be raised is
ValueError, whose message is one line.
"""

import shutil
import tempfile
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build import sources, utf8
from data_pipeline.build.prepare import prepare
from data_pipeline.build.splits import cut
from data_pipeline.manifest import NAME, Manifest, read_manifest
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus, verify_corpus
from data_pipeline.vocabulary import UNKNOWN
from launch.prepare import main
from launch.support import cli
from tests.fuzzing import TOO_DEEP, damaged, fuzzed, replaced, sentence, spoiled, standing

# A prepared corpus.

POEM = "Ein Grün, ein Blau — 漢字 🙂\n" * 8


@pytest.fixture(scope="module", params=["bytes", "characters"])
def corpus(request, tmp_path_factory) -> Path:
    """Three splits, of several shards of one size, so that one could be taken for another.  Its manifest is spoiled."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(POEM, "utf-8")
    chosen = CorpusSettings(
        str(folder / "text.txt"), request.param, cache_dir=str(folder), valid_fraction=0.3, test_fraction=0.3
    )
    return prepare(chosen, folder / "corpus", shard_bytes=16, block_bytes=8)


def contents(directory: Path) -> tuple[Manifest, dict[str, list[int]]]:
    """All that a prepared corpus says; the bytes of a split, which bits per byte are made with, are in the manifest."""
    splits = open_corpus(directory).splits
    return read_manifest(directory), {name: split.read(0, len(split)).tolist() for name, split in splits.items()}


@fuzzed()
@given(st.data())
def test_a_manifest_is_read_as_it_was_written_or_refused(corpus, data):
    whole, document = contents(corpus), data.draw(spoiled((corpus / NAME).read_bytes()))
    with standing(corpus / NAME, document):
        try:
            assert contents(corpus) == whole
        except ValueError as error:
            assert str(corpus / NAME) in sentence(error)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", TOO_DEEP),
        ("", "1" * 5000),
        ('"bytes": 1', '"bytes": 2'),  # bits per byte would be another figure
        ('"key": "', '"key": "0'),
        ('"documents": 1', '"documents": 2'),
        ('"block_bytes": 8', '"block_bytes": 1000000'),
        ("train-00000.ids", "train-00001.ids"),  # of the same size: another text
        ('"format_version": 4', '"format_version": "a\\nb"'),
        ('"dtype": "', '"dtype": "\\n'),
        ('"kind"', '"a\\nb"'),
    ],
    ids=range(10),
)
def test_a_manifest_of_these_is_refused(corpus, old, new):
    path = corpus / NAME
    with standing(path, replaced(path.read_bytes(), old, new)), pytest.raises(ValueError) as caught:
        contents(corpus)
    said = sentence(caught.value)
    assert str(path) in said and (said.endswith("prepare it again") or "not the manifest" in said)


@fuzzed(20)
@given(st.data())
def test_shards_and_their_checksums_are_read_as_they_were_written_or_refused(corpus, data):
    path = data.draw(st.sampled_from(sorted(set(corpus.iterdir()) - {corpus / NAME})))
    whole, document = contents(corpus), data.draw(damaged(path.read_bytes(), st.binary(max_size=4)))
    with standing(path, document):
        try:
            assert contents(corpus) == whole
        except ValueError as error:
            assert path.stem in sentence(error)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[CorpusSettings, Path, dict[Path, bytes], Any]:
    """A preparation stopped when all shards were written, its folder, what it left there, and what comes of it."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "text.txt").write_text(POEM, "utf-8")
    chosen = CorpusSettings(str(folder / "text.txt"), "characters", cache_dir=str(folder))

    def stop(doing: str, done: int, total: int) -> None:
        if (doing, done) == ("writing", total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(chosen, folder / "out", stop, workers=1, shard_bytes=64, block_bytes=16)
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / "text.txt"]
    left = {path: path.read_bytes() for path in paths}
    straight = contents(prepare(chosen, folder / "straight", shard_bytes=64, block_bytes=16))
    return chosen, folder, left, straight


@fuzzed(20)
@given(st.data())
def test_what_a_stopped_preparation_has_left_is_used_as_it_was_written_or_made_again(stopped, data):
    chosen, folder, left, straight = stopped
    path = data.draw(st.sampled_from(sorted(left)))
    spoil = {path: data.draw(damaged(left[path], st.binary(max_size=4)))}
    try:
        assert gone_on(chosen, folder, left | spoil) == straight
    except ValueError as error:  # a shard that is no longer what it was: found when it is read
        assert path.suffix in (".ids", ".crc") and path.stem in sentence(error)


def gone_on(chosen: CorpusSettings, folder: Path, left: dict[Path, bytes]) -> Any:
    """The contents of what is made where `left` was left."""
    for path, document in left.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(document)
    try:
        return contents(prepare(chosen, folder / "out", workers=1, shard_bytes=64, block_bytes=16))
    finally:
        shutil.rmtree(folder / "out")


@pytest.mark.parametrize("pattern", ["memo/*.json", ".out.partial/*.ids.json", ".out.partial/key"])
def test_what_a_stopped_preparation_has_left_of_these_is_made_again(stopped, pattern):
    chosen, folder, left, straight = stopped
    path = next(path for path in left if path.match(pattern))
    digit = left[path].index(b'"sha256":"') + 12 if b'"sha256"' in left[path] else 8
    other = bytes([left[path][digit] ^ 1])  # a digest of the same form, and wrong
    for document in (b"", b"\xff", left[path][:digit] + other + left[path][digit + 1 :]):
        assert gone_on(chosen, folder, left | {path: document}) == straight


# A text.

ANY_FILE = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=30).map(str.encode),
    st.text(max_size=30).map(lambda text: BOM_UTF8 + text.encode()),
    st.text(min_size=1, max_size=30).flatmap(lambda text: damaged(text.encode(), st.binary(min_size=1, max_size=4))),
)


def as_one_text(contents: list[bytes], separator: bytes) -> bytes:
    """The files' contents, as docs/data_format.md puts them together."""
    filled = [content for content in (content.removeprefix(BOM_UTF8) for content in contents) if content]
    for number, content in enumerate(filled[:-1]):
        there = max(n for n in range(len(separator) + 1) if content.endswith(separator[:n]))
        filled[number] = content + separator[there:]
    return b"".join(filled)


@fuzzed()
@given(
    st.dictionaries(st.sampled_from(["a", "b.txt", "c/d", "not UTF-8 \udcff"]), ANY_FILE, min_size=1),
    st.sampled_from(["bytes", "characters"]),
    st.sampled_from([(0.0, 0.0, "contiguous"), (0.2, 0.1, "contiguous"), (0.0, 0.3, "columns:2x3")]),
    st.sampled_from([(1, 5), (3, 16), (1 << 20, 16 << 20)]),
    st.sampled_from([(r"\n", b"\n"), ("", b""), (r"\0", b"\0"), (r"\n--é\n", "\n--é\n".encode())]),
)
def test_a_text_is_prepared_as_it_is_or_refused_naming_file_and_byte(files, kind, how, pieces, separator):
    valid, test, split = how
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK", pieces[0])
        patch.setattr(utf8, "REGION", pieces[1])
        for name, content in files.items():
            (Path(folder) / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / "in" / name).write_bytes(content)
        chosen = CorpusSettings(
            str(Path(folder) / "in"),
            kind,
            valid_fraction=valid,
            test_fraction=test,
            split=split,
            file_separator=separator[0],
            binary="allow",
            cache_dir=folder,
        )
        try:
            directory = prepare(chosen, Path(folder) / "out", workers=2, shard_bytes=8, block_bytes=4)
        except ValueError as error:
            said, directory = sentence(error), None
        else:
            verify_corpus(directory)
            corpus = open_corpus(directory)
            decode = corpus.vocabulary.decode_bytes
            shown = {name: decode(part.read(0, len(part))) for name, part in corpus.splits.items()}
            sizes = {name: part.bytes for name, part in corpus.splits.items()}
        assert directory or not list(Path(folder).glob("*out*"))
    contents = [content for _, content in sorted(files.items())]
    text: bytes | str = as_one_text(contents, separator[1])
    if not text:
        assert "is empty" in said
        return
    if kind == "characters":
        for name, content in sorted(files.items()):
            try:
                content.decode()
            except UnicodeDecodeError as error:
                assert f"{name} is not UTF-8 text: bad sequence at byte {error.start};" in said
                return
        text = text.decode()
    try:
        spans = cut(len(text), chosen)
    except ValueError as error:
        assert said == str(error)
        return
    parts = {name: text[:0].join(text[start:stop] for start, stop in part) for name, part in spans.items()}
    if isinstance(text, str):
        assert sizes == {name: len(part.encode()) for name, part in parts.items()}
        known = set(parts["train"])
        parts = {name: "".join(c if c in known else UNKNOWN for c in part).encode() for name, part in parts.items()}
    assert shown == parts


def test_a_file_whose_name_has_a_line_break_is_refused_in_one_line(tmp_path, capfd, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a\nb").write_bytes(b"\xff")
    options = f"--input={tmp_path}/in", f"--output={tmp_path}/out", f"--cache_dir={tmp_path}", "--vocabulary=characters"
    monkeypatch.setattr("sys.argv", ["launch.prepare", *options])
    with pytest.raises(SystemExit) as left:
        cli.run("launch.prepare", main)
    said = capfd.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 2 and "a b is not UTF-8 text: bad sequence at byte 0" in said
