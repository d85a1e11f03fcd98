"""A preparation by parts has one result, whoever prepares them, in whatever order, and however often."""

import gzip
import json
import random
from pathlib import Path

import pytest

from data_pipeline.build.by_parts import Sizes, prepare_by_parts
from data_pipeline.build.prepare import prepare
from data_pipeline.manifest import read_manifest
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus, verify_corpus
from tests.data_pipeline.build.test_prepare import POEM, text_of

SIZES = Sizes(part=1024, shard=700, block=64)
SPLITS = ("train", "valid", "test")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Texts of all kinds: with and without a line feed at the end, empty, marked, compressed, of documents."""
    draw = random.Random(5)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(POEM)
    (texts / "b.txt").write_bytes(b"\xef\xbb\xbf" + POEM[:100].encode())
    (texts / "c.txt").touch()
    documents = ["".join(draw.choice("abc dé漢\n🙂") for _ in range(draw.randrange(120))) for _ in range(150)]
    (texts / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (texts / "e.txt.gz").write_bytes(gzip.compress(b"no line feed at its end", mtime=0))
    (texts / "f.txt.gz").write_bytes(gzip.compress(b"", mtime=0))
    (texts / "g.txt").write_text("Ende" * 400)
    (texts / "h.txt.gz").write_bytes(gzip.compress(b"", mtime=0))
    return texts


def settings_of(folder: Path, **values) -> CorpusSettings:
    held_out = {"valid_fraction": 0.2, "test_fraction": 0.1}
    values = {"corpus": str(folder), "cache_dir": str(folder.parent / "cache")} | held_out | values
    return CorpusSettings(**values)


def by_files(folder: Path) -> dict[str, str]:
    return {"train": f"{folder}/[a-f]*", "test": f"{folder}/[gh]*"}


def fingerprint(directory: Path) -> str:
    return read_manifest(directory).fingerprint


@pytest.mark.parametrize("split", ["contiguous", "columns:3x7", "hash", "files"])
@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
@pytest.mark.parametrize("separator", [r"\n", r"\n\n", ""])
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
