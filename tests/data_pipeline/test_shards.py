"""Reading a prepared corpus, whole and damaged."""

import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.manifest import (
    Manifest,
    Shard,
    Source,
    SplitRecord,
    read_manifest,
    summary,
    write_manifest,
    write_sources,
)
from data_pipeline.shard_writer import write_shard
from data_pipeline.shards import Split, open_corpus, verify_corpus
from data_pipeline.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [Source("a.txt", 3, "0" * 64, documents=1), Source("b.txt", 5, None, "an etag", documents=7)]
WIDE = Vocabulary("characters", "".join(map(chr, range(0x4E00, 0x4E00 + 1000))))  # uint16


def make(directory: Path, ids: np.ndarray, shard_symbols: int, vocabulary: Vocabulary, block_bytes: int) -> Path:
    """A corpus whose training split is `ids`."""
    shards = []
    for number, start in enumerate(range(0, len(ids), shard_symbols)):
        part = ids[start : start + shard_symbols].astype(vocabulary.dtype)
        # In pieces that are no multiple of a block.
        shards.append(write_shard(directory, f"train-{number:05d}.ids", np.array_split(part, 3), block_bytes))
    record = SplitRecord(len(ids), 3 * len(ids), None, 0, tuple(shards))
    manifest = Manifest(vocabulary, {"train": record}, summary(SOURCES), "key", block_bytes)
    write_sources(directory, SOURCES)
    write_manifest(directory, manifest)
    return directory


IDS = np.random.default_rng(0).integers(0, WIDE.size, 1000)


@pytest.fixture
def corpus(tmp_path) -> Path:
    return make(tmp_path, IDS, 300, WIDE, 64)  # shards of 600 bytes: blocks of 64, the last of 24


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    return open_corpus(make(tmp_path_factory.mktemp("corpus"), IDS, 300, WIDE, 64)).splits["train"]


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 3))
def test_any_range_is_read_across_blocks_and_shards(split, one, other, keep):
    split.keep_blocks(keep)
    start, stop = min(one, other), max(one, other)
    ids = split.read(start, stop)
    assert ids.dtype == np.dtype("<u2") and ids.tolist() == IDS[start:stop].tolist()


def test_what_is_known_of_a_corpus_is_known_without_reading_it(corpus):
    opened = open_corpus(corpus)
    assert opened.vocabulary == WIDE and list(opened.splits) == ["train"]
    assert opened.read_sources() == SOURCES
    assert (opened.sources.files, opened.sources.bytes, opened.sources.documents) == (2, 8, 8)
    train = opened.splits["train"]
    assert (len(train), train.bytes, train.dtype) == (1000, 3000, np.dtype("<u2"))
    assert len(opened.fingerprint) == 64


def test_what_was_read_is_the_readers_own(split):
    first = split.read(0, 10)
    first[:] = 0
    assert split.read(0, 10).tolist() == IDS[:10].tolist()


def test_many_threads_read_what_one_reads(split):
    split.keep_blocks(2)
    starts = np.random.default_rng(1).integers(0, 900, 400).tolist()
    together = threading.Barrier(8)

    def read(start: int) -> list[int]:
        return split.read(start, start + 100).tolist()

    with ThreadPoolExecutor(8, initializer=together.wait) as pool:
        for start, ids in zip(starts, pool.map(read, starts), strict=True):
            assert ids == IDS[start : start + 100].tolist()


def test_a_split_can_be_pickled(split):
    again = pickle.loads(pickle.dumps(split))
    assert again.read(250, 650).tolist() == IDS[250:650].tolist()


def test_a_flipped_bit_in_a_shard_is_refused(corpus):
    opened = open_corpus(corpus)
    path = corpus / "train-00001.ids"
    data = bytearray(path.read_bytes())
    data[130] ^= 4
    path.write_bytes(data)
    train = open_corpus(corpus).splits["train"]
    assert train.read(300, 364).tolist() == IDS[300:364].tolist()  # the blocks before are whole
    for reader in (train, opened.splits["train"]):
        with pytest.raises(ValueError, match=r"train-00001\.ids is damaged: the block at byte 128 does not match"):
            reader.read(0, 1000)
    with pytest.raises(ValueError, match=r"train-00001\.ids is damaged"):
        verify_corpus(corpus)


def test_a_block_is_checked_again_once_it_was_forgotten(corpus):
    train = open_corpus(corpus).splits["train"]
    train.keep_blocks(1)
    train.read(0, 1)
    train.read(999, 1000)
    with (corpus / "train-00000.ids").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(ValueError, match=r"train-00000\.ids is damaged: the block at byte 0 "):
        train.read(0, 1)


def test_a_shard_of_another_corpus_with_its_own_checksums_is_never_read(corpus):
    other = IDS[:300].copy()
    other[7] += 1
    write_shard(corpus, "train-00000.ids", [other.astype("<u2")], 64)
    for read in (lambda: open_corpus(corpus).splits["train"].read(200, 300), lambda: verify_corpus(corpus)):
        with pytest.raises(ValueError, match=r"train-00000\.ids may be of another text: train-00000\.crc is not the "):
            read()


def test_a_shard_of_another_corpus_written_over_the_one_in_use_is_never_read(corpus, tmp_path_factory):
    other, train = tmp_path_factory.mktemp("other"), open_corpus(corpus).splits["train"]
    train.read(0, 1)
    shard = write_shard(other, "train-00000.ids", [(IDS[:300] + 1).astype("<u2")], 64)
    for name in (shard.file, shard.checksums):  # into the same files, which are mapped
        (corpus / name).write_bytes((other / name).read_bytes())
    with pytest.raises(ValueError, match=r"train-00000\.ids is damaged: the block at byte 384 does not match its"):
        train.read(200, 201)


def test_a_shard_that_is_not_the_one_of_the_manifest_is_found_by_verifying(corpus):
    manifest = read_manifest(corpus)
    first, *rest = manifest.splits["train"].shards
    shards = dataclasses.replace(first, sha256="0" * 64), *rest
    split = dataclasses.replace(manifest.splits["train"], shards=shards)
    write_manifest(corpus, dataclasses.replace(manifest, splits={**manifest.splits, "train": split}))
    with pytest.raises(ValueError, match=r"train-00000\.ids has sha256 [0-9a-f]{64} instead of 0{64}"):
        verify_corpus(corpus)


def test_a_whole_corpus_is_verified_in_full(corpus):
    told = []
    verify_corpus(corpus, lambda *what: told.append(what))
    assert told[-1] == ("verifying", 1000, 1000)


@pytest.mark.parametrize("name", ["train-00002.ids", "train-00002.crc"])
def test_a_missing_or_shortened_file_is_refused_when_the_corpus_is_opened(corpus, name):
    path = corpus / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(
        ValueError, match=f"{name} has {size - 1} bytes instead of {size}: delete the corpus and prepare"
    ):
        open_corpus(corpus)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing: delete the corpus and prepare"):
        open_corpus(corpus)


def test_a_file_cut_off_while_it_is_mapped_is_refused_and_kills_nobody(corpus):
    name = "train-00000.ids"
    code = (
        "import os, sys\n"
        "from data_pipeline.shards import open_corpus\n"
        f"train = open_corpus({str(corpus)!r}).splits['train']\n"
        "train.keep_blocks(1)\n"
        "train.read(0, 1)\n"
        f"os.truncate({str(corpus / name)!r}, 0)\n"
        "try: train.read(200, 201)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"  # a SIGBUS would be -7
    assert f"{name} has 0 bytes" in done.stdout


def test_shards_beyond_the_limit_of_open_files_can_be_read(tmp_path):
    ids = np.arange(560) % 256
    make(tmp_path, ids, 4, Vocabulary("bytes"), 4)  # 140 shards of 2 files
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "from data_pipeline.shards import open_corpus\n"
        f"print(int(open_corpus({str(tmp_path)!r}).splits['train'].read(0, 560).sum()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{ids.sum()}\n", done.stderr


def test_reading_all_of_a_large_split_does_not_make_the_process_larger(tmp_path):
    size = 192 << 20  # of zeros, sparse on disk
    with (tmp_path / "train-00000.ids").open("wb") as file:
        file.truncate(size)
    block = 1 << 20
    crc = np.full(size // block, zlib.crc32(bytes(block)), "<u4")
    (tmp_path / "train-00000.crc").write_bytes(crc.tobytes())
    digests = "0" * 64, hashlib.sha256(crc.tobytes()).hexdigest()
    record = SplitRecord(size, size, None, 0, (Shard("train-00000.ids", size, *digests),))
    write_manifest(tmp_path, Manifest(Vocabulary("bytes"), {"train": record}, block_bytes=block))
    code = (
        "import re\n"
        "from data_pipeline.shards import open_corpus\n"
        f"train = open_corpus({str(tmp_path)!r}).splits['train']\n"
        "train.keep_blocks(2)\n"
        "rss = lambda: int(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "train.read(0, 100); before = rss()\n"
        f"for i in range(0, {size}, {block}): train.read(i, i + {block})\n"
        "print(rss() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 << 10  # KiB


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"format": "other"}, "not the manifest of a prepared corpus"),
        ({"format_version": 2}, "format version 2, and this program reads 4"),
        ({"dtype": "uint8"}, "dtype 'uint8', where 1001 symbols need uint16"),
        ({"block_bytes": 63}, "block_bytes=63 is not a positive multiple of 2"),
        ({"block_bytes": "64"}, "field 'block_bytes' is missing or not a json int"),
        ({"fingerprint": "0" * 64}, "is not that of the contents"),
        ({"vocabulary": {"kind": "bytes"}}, "dtype 'uint16', where 256 symbols need uint8"),
        ({"splits": {"other": {}}}, "split 'other' is not one of train, valid, test"),
        (
            {"splits": {"train": {"symbols": 1, "bytes": 1, "characters": 1, "unknown": 0, "shards": []}}},
            "do not add up to its 1 symbols",
        ),
        (
            {"splits": {"train": {"shards": [{"file": "../secret.ids", "symbols": 1, "sha256": "0" * 64}]}}},
            "'../secret.ids' is not the name of a shard",
        ),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(corpus, change, complaint):
    path = corpus / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError) as caught:
        open_corpus(corpus)
    assert str(path) in str(caught.value) and complaint in str(caught.value)


def test_a_directory_without_a_manifest_or_with_a_torn_one_is_no_corpus(corpus, tmp_path):
    path = corpus / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*delete the corpus and prepare it again"):
        open_corpus(corpus)
    path.unlink()
    with pytest.raises(ValueError, match=r"is not a prepared corpus: it has no manifest\.json"):
        open_corpus(corpus)


def test_the_fingerprint_is_that_of_the_ids(tmp_path):
    def fingerprint(name: str, ids: np.ndarray, vocabulary: Vocabulary = WIDE, block: int = 64) -> str:
        (tmp_path / name).mkdir()
        return open_corpus(make(tmp_path / name, ids, 300, vocabulary, block)).fingerprint

    changed = IDS.copy()
    changed[-1] ^= 1
    other = Vocabulary("characters", WIDE.characters[:-1] + "\uffff")
    same, blocks = fingerprint("a", IDS), fingerprint("b", IDS, block=128)
    assert same == blocks
    assert len({same, fingerprint("c", changed), fingerprint("d", IDS, other)}) == 3
