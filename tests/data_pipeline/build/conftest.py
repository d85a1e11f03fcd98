"""Texts of all kinds, which are prepared by parts."""

import gzip
import json
import random
from pathlib import Path

import pytest

from data_pipeline.build import by_parts
from data_pipeline.build.by_parts import Sizes
from data_pipeline.manifest import read_manifest
from data_pipeline.settings import CorpusSettings
from tests.data_pipeline.build.test_bz2_spans import multistream, streams
from tests.data_pipeline.build.test_prepare import POEM

SIZES = Sizes(part=1024, shard=700, block=64)


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
    (texts / "da.xml.bz2").write_bytes(b"".join(multistream(documents, 9)))
    lines = "".join(json.dumps({"text": text[::-1]}) + "\n" for text in documents).encode()
    (texts / "db.jsonl.bz2").write_bytes(b"".join(streams(lines, range(700, len(lines), 700))))
    (texts / "e.txt.gz").write_bytes(gzip.compress(b"no line feed at its end", mtime=0))
    (texts / "f.txt.gz").write_bytes(gzip.compress(b"", mtime=0))
    (texts / "g.txt").write_text("漢" * 1000 + "é")  # cut within a character
    (texts / "h.txt.gz").write_bytes(gzip.compress(b"", mtime=0))
    return texts


def settings_of(folder: Path, **values) -> CorpusSettings:
    held_out = {"valid_fraction": 0.2, "test_fraction": 0.1}
    values = {"corpus": str(folder), "cache_dir": str(folder.parent / "cache")} | held_out | values
    return CorpusSettings(**values)


def fingerprint(directory: Path) -> str:
    return read_manifest(directory).fingerprint


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(by_parts, "HELP_AFTER", 0)
    monkeypatch.setattr(by_parts, "POLL", 0)
