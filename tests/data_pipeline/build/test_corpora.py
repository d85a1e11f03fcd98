"""What --corpus names: prepared directories, texts, names; and downloads, from a real server on this machine."""

import contextlib
import hashlib
import http.server
import io
import os
import socket
import sysconfig
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build import datasets
from data_pipeline.build.corpora import resolve
from data_pipeline.build.datasets import DOWNLOADS, standard_library
from data_pipeline.build.downloads import Download, fetch
from data_pipeline.build.utf8 import count_all, index_characters
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus

TEXT = np.random.default_rng(0).integers(97, 123, 600_000, np.uint8).tobytes()


def zipped(text: bytes, member: str = "tiny") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, text)
    return packed.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`; of the k-th answer, `server.cuts[k]` bytes at most, then it hangs up."""

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        body = server.content[start:]
        self.send_response(206 if asked and server.ranges else 200)
        if asked and server.ranges:
            size = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if server.announce:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that has seen enough
            self.wfile.write(body[: server.cuts.pop(0) if server.cuts else None])

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.cuts, server.asked, server.ranges, server.announce = TEXT, [], [], True, True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def item_at(server, name: str = "tiny.txt") -> Download:
    return Download(
        name="tiny",
        url=f"http://127.0.0.1:{server.server_address[1]}/{name}",
        url_bytes=len(server.content),
        bytes=len(TEXT),
        algorithm="sha256",
        digest=hashlib.sha256(TEXT).hexdigest(),
    )


def test_a_text_is_downloaded_once(server, tmp_path):
    told = []
    for _ in range(2):
        path = fetch(item_at(server), tmp_path, lambda *what: told.append(what))
        assert path == tmp_path / "tiny" and path.read_bytes() == TEXT
    assert server.asked == [None]
    assert told[-1] == ("downloading tiny", len(TEXT), len(TEXT))
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("announce", [True, False])
def test_a_download_that_was_cut_off_goes_on_where_it_was(server, tmp_path, announce):
    server.cuts, server.announce = [300_000, 0, 200_000], announce
    assert fetch(item_at(server), tmp_path).read_bytes() == TEXT
    starts = [0 if asked is None else int(asked[6:-1]) for asked in server.asked]
    assert len(starts) == 4 and starts == sorted(starts)
    assert 0 < starts[1] == starts[2] <= 300_000 and starts[1] < starts[3] < len(TEXT)


def test_what_an_earlier_program_got_is_not_fetched_again(server, tmp_path):
    (tmp_path / "tiny.part").write_bytes(TEXT[:123_456])
    assert fetch(item_at(server), tmp_path).read_bytes() == TEXT
    assert server.asked == ["bytes=123456-"]


def test_a_server_that_knows_no_ranges_starts_again(server, tmp_path):
    server.ranges = False
    (tmp_path / "tiny.part").write_bytes(b"?" * 1000)
    assert fetch(item_at(server), tmp_path).read_bytes() == TEXT


def test_an_archive_is_unpacked(server, tmp_path):
    server.content, server.cuts = zipped(TEXT), [100_000]
    assert fetch(item_at(server, "tiny.zip"), tmp_path).read_bytes() == TEXT
    assert len(server.asked) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny", "tiny.zip"]


def test_another_text_of_the_same_size_is_refused(server, tmp_path):
    server.content = TEXT[:-1] + b"!"
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"is not tiny, its sha256 is .* instead of .*: delete tiny and start again"
        ):
            fetch(item_at(server), tmp_path)
    assert len(server.asked) == 1
    server.content = zipped(TEXT[:-1] + b"!")
    (tmp_path / "tiny").unlink()
    with pytest.raises(ValueError, match=r"is not tiny, .*: delete tiny and tiny\.zip and start again"):
        fetch(item_at(server, "tiny.zip"), tmp_path)


@pytest.mark.parametrize("announce", [True, False])
def test_a_text_of_another_size_is_refused(server, tmp_path, announce):
    server.announce = announce
    longer = replace(item_at(server), url_bytes=len(TEXT) - 1)
    complaint = f"has {len(TEXT)} bytes instead of the {len(TEXT) - 1} of tiny" if announce else "has more than the"
    with pytest.raises(ValueError, match=complaint):
        fetch(longer, tmp_path)
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"no archive" * 1000, "is not the archive of tiny"),
        (zipped(TEXT, "other"), "is not the archive of tiny"),
        (zipped(TEXT + b"x"), f"holds more than the {len(TEXT)} bytes of tiny"),
        (zipped(TEXT[:-1]), f"has {len(TEXT) - 1} bytes instead of {len(TEXT)}, it is not tiny"),
        (zipped(TEXT)[:200_000] + b"!" + zipped(TEXT)[200_001:], "is not the archive of tiny"),
    ],
)
def test_a_damaged_or_wrong_archive_is_refused(server, tmp_path, content, complaint):
    server.content = content
    with pytest.raises(ValueError, match=complaint):
        fetch(item_at(server, "tiny.zip"), tmp_path)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_without_a_server_one_line_says_where_to_put_the_file(server, tmp_path):
    gone = replace(item_at(server), url=f"http://127.0.0.1:{closed_port()}/tiny.txt")
    with pytest.raises(ValueError) as caught:
        fetch(gone, tmp_path)
    said = str(caught.value)
    assert "tiny could not be downloaded from" in said and "Connection refused" in said and "\n" not in said
    assert f"put the file by hand at {tmp_path / 'tiny'} ({len(TEXT)} bytes)" in said
    (tmp_path / "tiny").write_bytes(TEXT)  # as it says
    assert fetch(gone, tmp_path).read_bytes() == TEXT


def test_an_archive_put_there_by_hand_is_checked_as_well(server, tmp_path):
    server.content = zipped(TEXT)
    gone = replace(item_at(server), url=f"http://127.0.0.1:{closed_port()}/tiny.zip")
    (tmp_path / "tiny.zip").write_bytes(zipped(TEXT)[:-1])
    with pytest.raises(ValueError, match=r"tiny\.zip has \d+ bytes instead of \d+: delete it and start again"):
        fetch(gone, tmp_path)
    (tmp_path / "tiny.zip").write_bytes(zipped(TEXT))
    assert fetch(gone, tmp_path).read_bytes() == TEXT


def test_downloads_at_the_same_time_are_one_download(server, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: fetch(item_at(server), tmp_path).read_bytes(), range(4)))
    assert made == [TEXT] * 4 and len(server.asked) == 1


def test_a_name_is_downloaded_and_prepared(server, tmp_path, monkeypatch):
    monkeypatch.setitem(DOWNLOADS, "text8", replace(item_at(server), name="text8"))
    directory = resolve(CorpusSettings(corpus="text8", cache_dir=str(tmp_path)))
    assert directory.parent == tmp_path / "corpora" and directory.name.startswith("text8-")
    assert open_corpus(directory).splits["train"].read(0, 100).tobytes() == TEXT[:100]


def test_tinyshakespeare_put_there_by_hand_is_the_known_one(corpora, tmp_path):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "tinyshakespeare").write_bytes((corpora / "tinyshakespeare.txt").read_bytes())
    corpus = open_corpus(resolve(CorpusSettings(corpus="tinyshakespeare", cache_dir=str(tmp_path))))
    assert sum(map(len, corpus.splits.values())) == 1_115_394


def test_python_is_the_source_of_the_standard_library_with_a_nul_after_each_file(tmp_path):
    corpus = open_corpus(resolve(CorpusSettings(corpus="python", cache_dir=str(tmp_path))))
    names = [source.name for source in corpus.read_sources()]
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not folders & {"encodings", "pydoc_data"}
    data = b"".join(split.read(0, len(split)).tobytes() for split in corpus.splits.values())
    first = Path(sysconfig.get_path("stdlib"), names[0]).read_bytes()
    assert data.startswith(first + b"\0")
    assert data.count(b"\0") == len(names) and data.endswith(b"\0")
    assert 8e6 < len(data) < 30e6 and len(data) == corpus.sources.bytes + len(names)


def test_the_nul_after_each_file_is_a_character_too(tmp_path):
    sources = {"b/c.py": "", "b/d.py": "e = 2\n", "a.py": "π = 3\n"}  # in the order of the hashes of their names
    (tmp_path / "lib" / "b").mkdir(parents=True)
    for name, text in sources.items():
        (tmp_path / "lib" / name).write_text(text)
    index = index_characters(standard_library(tmp_path / "lib"), map)
    joined = "".join(text + "\0" for text in sources.values())
    assert index.characters == len(joined)
    assert index.byte_offsets(range(len(joined) + 1)) == {n: len(joined[:n].encode()) for n in range(len(joined) + 1)}
    assert count_all(index, [(0, index.text.bytes)], map) == {ord(c): joined.count(c) for c in joined}


def test_a_python_without_source_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"this Python has no source in .*: name another corpus"):
        standard_library(tmp_path)


def test_a_prepared_directory_is_used_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 100)
    prepared = resolve(CorpusSettings(corpus=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache")))
    moved = tmp_path / "elsewhere"
    prepared.rename(moved)
    (tmp_path / "a.txt").unlink()
    unused = tmp_path / "unused"
    settings = CorpusSettings(corpus=str(moved), vocabulary="characters", cache_dir=str(unused))
    assert resolve(settings) == moved and not unused.exists()
    next(moved.glob("*.ids")).unlink()
    with pytest.raises(ValueError, match="is missing"):
        resolve(settings)


def test_where_a_text_lies_is_free_as_equal_texts_have_one_fingerprint(tmp_path):
    splits = ("train", "valid", "test")
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for split in splits:
            (tmp_path / folder / split).write_text(split * 10)
    here, there = (
        CorpusSettings(cache_dir=str(tmp_path / folder / "cache"), **{s: str(tmp_path / folder / s) for s in splits})
        for folder in ("here", "there")
    )
    assert open_corpus(resolve(here)).fingerprint == open_corpus(resolve(there)).fingerprint
    moved = [field for field in fields(here) if getattr(here, field.name) != getattr(there, field.name)]
    assert [field.name for field in moved if field.metadata["mutable"]] == [*splits, "cache_dir"]
    assert {field.name for field in fields(here) if field.metadata["mutable"]} == {
        "corpus",
        "binary",
        *splits,
        "vocabulary_of",
        "cache_dir",
        "cache_bytes",
        "remote_patience",
    }


def test_a_name_wins_over_a_file_of_that_name_unless_it_is_written_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("python").write_text("spam" * 100)
    named_so = open_corpus(resolve(CorpusSettings(corpus="python", cache_dir="cache")))
    path = open_corpus(resolve(CorpusSettings(corpus="./python", cache_dir="cache")))
    assert named_so.sources.files > 100 and [source.name for source in path.read_sources()] == ["python"]


def test_a_near_name_is_named():
    with pytest.raises(
        ValueError, match=r"tinyshakespear does not exist.*did you mean the corpus named tinyshakespeare"
    ):
        resolve(CorpusSettings(corpus="tinyshakespear", cache_dir=os.devnull))


def test_every_download_says_what_it_must_be():
    for name, item in DOWNLOADS.items():
        assert name == item.name and name in datasets.NAMES
        assert len(item.digest) == 2 * hashlib.new(item.algorithm).digest_size
        assert item.file == ("tinyshakespeare" if name == "tinyshakespeare" else f"{name}.zip")
