"""A corpus of 64 GB costs no more memory and no more time to open than one of 1 MB."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sparse_corpus
from benchmarks.sparse_corpus import END, MEGABYTE
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured in /proc")


def measure(directory, *arguments):
    """Opens a corpus in a process of its own; returns the report."""
    command = [sys.executable, "-m", "benchmarks.sparse_corpus", directory, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return sparse_corpus.make(tmp_path_factory.mktemp("large"), 256)


def test_64_gigabytes_open_and_resume_at_their_end_within_100_megabytes_of_a_corpus_of_1_megabyte(large, tmp_path):
    small = measure(sparse_corpus.make(tmp_path, 1, MEGABYTE), 64, 16, 1)
    big = measure(large, 64, 16, 1)
    print(f"1 MB: {small}\n64 GB: {big}")
    assert (small["symbols"], big["symbols"]) == (MEGABYTE, 64 * 1024 * MEGABYTE)
    assert small["last_symbols"] == big["last_symbols"] == END.decode()
    assert big["resident"] - small["resident"] < 100 * MEGABYTE
    assert big["peak"] - small["peak"] < 100 * MEGABYTE


def test_resident_memory_does_not_grow_with_the_text_read(large):
    streams, window, count = 64, 2**14, 120  # 120 MB of text
    report = measure(large, streams, window, count)
    assert report["position"] == count
    assert report["resident_after"] - report["resident"] < 64 * MEGABYTE
