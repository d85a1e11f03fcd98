"""Reading documents, beside the bare decoder: MB of text for a second of processor time, on one core.

    python -m benchmarks.readers [--quick] [--megabytes=32]

A row for each kind of file: what its reader takes, and what the library that it rests on takes alone.
"""

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import re
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pyarrow
from backports import zstd
from pyarrow import parquet

from benchmarks import rows as rows_lib
from benchmarks.rows import Rows
from data_pipeline.build.decompress import Decompressed
from data_pipeline.build.documents import BadDocuments
from data_pipeline.build.tables import READERS

CHUNK = 1 << 20
PAGE = 8000  # characters of a document


def speed(text_bytes: int, read: Callable[[], Iterable[Any]]) -> float:
    """Returns MB of text for a second of processor time; the best of three."""
    times = []
    for _ in range(3):
        began = time.process_time()
        for _one in read():
            pass
        times.append(time.process_time() - began)
    return round(text_bytes / min(times) / 1e6, 1)


def chunks(opened: Any) -> Iterable[bytes]:
    return iter(lambda: opened.read(CHUNK), b"")


def files(texts: list[str]) -> dict[str, bytes]:
    """Returns the files that are read, by their kind."""
    table, rows = pyarrow.table({"text": texts}), io.StringIO(newline="")
    csv.writer(rows).writerows([["text"], *([text] for text in texts)])
    packed, stream = io.BytesIO(), io.BytesIO()
    parquet.write_table(table, packed, compression="zstd", row_group_size=1024)
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=1024)
    pages = "".join(f"<page><revision><text>{escape(text)}</text></revision></page>" for text in texts)
    return {
        "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(),
        "csv": rows.getvalue().encode(),
        "parquet": packed.getvalue(),
        "arrow": stream.getvalue(),
        "xml": f"<mediawiki>{pages}</mediawiki>".encode(),
    }


def cleared(events: Iterable[Any]) -> Iterable[Any]:
    for _, element in events:
        element.clear()
        yield element


BARE: dict[str, Callable[[bytes], Iterable[Any]]] = {
    "jsonl": lambda data: (json.loads(line)["text"] for line in io.BytesIO(data)),
    "csv": lambda data: csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8", newline="")),
    "parquet": lambda data: (
        batch.column(0).to_pylist() for batch in parquet.ParquetFile(io.BytesIO(data)).iter_batches(1024)
    ),
    "arrow": lambda data: (batch.column(0).to_pylist() for batch in pyarrow.ipc.open_stream(data)),
    "xml": lambda data: cleared(ElementTree.iterparse(io.BytesIO(data))),
}
COMPRESSED: dict[str, tuple[Any, Any]] = {
    ".gz": (gzip.compress, gzip.GzipFile),
    ".bz2": (bz2.compress, bz2.BZ2File),
    ".xz": (lzma.compress, lzma.LZMAFile),
    ".zst": (zstd.compress, zstd.ZstdFile),
}


def documents(form: str, data: bytes) -> Iterable[Any]:
    return READERS[form].read(io.BytesIO(data), "a", "text", BadDocuments("a", "line", False))


def decompressed(ending: str, data: bytes) -> Iterable[bytes]:
    return chunks(io.BufferedReader(Decompressed(io.BytesIO(data), ending, "a"), 256 << 10))


def decompressed_bare(decoder: Callable[..., Any], data: bytes) -> Iterable[bytes]:
    return chunks(decoder(fileobj=io.BytesIO(data)) if decoder is gzip.GzipFile else decoder(io.BytesIO(data)))


def run(rows: Rows, quick: bool, megabytes: int) -> None:
    csv.field_size_limit(64 << 20)
    size = (1 if quick else megabytes) << 20
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    text = re.sub("[^\t\n -\U0010ffff]", "", "".join(path.read_text("utf-8", "ignore") for path in sources)[:size])
    texts = [text[start : start + PAGE] for start in range(0, len(text), PAGE)]
    count = len(text.encode())

    def add(kind: str, ours: Callable[[], Iterable[Any]], bare: Callable[[], Iterable[Any]]) -> None:
        speeds = speed(count, ours), speed(count, bare)
        rows.add(
            kind=kind,
            megabytes_per_second_of_a_core=speeds[0],
            bare_decoder=speeds[1],
            of_bare=round(speeds[0] / speeds[1], 2),
        )

    for form, data in files(texts).items():
        add(form, functools.partial(documents, form, data), functools.partial(BARE[form], data))
    for ending, (compress, decoder) in COMPRESSED.items():
        data = compress(text.encode())
        bare = functools.partial(decompressed_bare, decoder, data)
        add(ending, functools.partial(decompressed, ending, data), bare)


if __name__ == "__main__":
    rows_lib.main("readers", run, megabytes=32)
