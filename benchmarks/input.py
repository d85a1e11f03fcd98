"""The data pipeline alone: how much faster than training it is, and what a corpus of any size costs to open.

    python -m benchmarks.input [--quick] [--rounds=5]

The corpora are sparse files, so what is measured is the pipeline and the system's page cache, not a disk.  A start is
timed from the corpus's name to the first window in hand, a resume to the last window of the epoch; imports are not.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

from benchmarks import rows as rows_lib
from benchmarks import sparse_corpus
from benchmarks.rows import Rows
from benchmarks.shapes import QUICK, SHAPES, Shape
from benchmarks.sparse_corpus import MEGABYTE
from benchmarks.workers import Worker, environments, fastest

# Name -> number of shards, and their bytes.
SIZES = {"1 MB": (1, MEGABYTE), "1 GB": (4, 256 * MEGABYTE), "1 TB": (4096, 256 * MEGABYTE)}


def run(rows: Rows, quick: bool, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpora = {}
        for name in list(SIZES)[: 2 if quick else 3]:
            corpora[name] = Path(folder) / name.replace(" ", "")
            corpora[name].mkdir()
            sparse_corpus.make(corpora[name], *SIZES[name])
        # Of all the shapes, the first one's step eats the most text.
        feed(rows, QUICK if quick else SHAPES[0], corpora["1 GB"], quick, 2 if quick else rounds)
        open_all(rows, corpora, 1 if quick else rounds)


def feed(rows: Rows, shape: Shape, corpus: Path, quick: bool, rounds: int) -> None:
    """Adds a row: windows read in a second, and updates made, taking turns."""
    own = {"shape": asdict(shape)}
    reader = Worker("benchmarks.peers.ours.reading", own | {"corpus": str(corpus)}, {})
    _, trainer = fastest("benchmarks.peers.ours.training", own, environments(quick))
    seconds = rows_lib.alternate({"read": reader.seconds, "train": trainer.seconds}, rounds)
    rate = rows_lib.spread([1 / s for s in seconds["read"]])
    ratio = rows_lib.ratios(seconds["read"], seconds["train"])
    rows.add(
        shape=str(shape),
        windows_per_second=rate.median,
        quartiles=rate.quartiles,
        megabytes_per_second=rate.median * shape.symbols / 1e6,
        updates_per_second=rows_lib.spread([1 / s for s in seconds["train"]]).median,
        faster_than_eaten_by=ratio.median,
        ratio_quartiles=ratio.quartiles,
    )
    reader.close()
    trainer.close()


def open_all(rows: Rows, corpora: dict[str, Path], rounds: int) -> None:
    """Adds a row for the start and the resume at each size."""
    for at in ("start", "resume"):
        found = rows_lib.alternate({name: partial(_opened, path, at) for name, path in corpora.items()}, rounds)
        seconds = {name: [report["seconds"] for report in reports] for name, reports in found.items()}
        resident = {name: max(report["resident"] for report in reports) for name, reports in found.items()}
        for name, path in corpora.items():
            spread = rows_lib.spread(seconds[name])
            beyond = [s - small for s, small in zip(seconds[name], seconds["1 MB"], strict=True)]
            rows.add(
                corpus=name,
                at=at,
                seconds=spread.median,
                quartiles=spread.quartiles,
                seconds_beyond_1_MB=rows_lib.spread(beyond).median,
                resident_megabytes=resident[name] / 1e6,
                megabytes_beyond_1_MB=(resident[name] - resident["1 MB"]) / 1e6,
                megabytes_on_disk=sum(file.stat().st_blocks for file in path.iterdir()) * 512 / 1e6,
            )


def _opened(corpus: Path, at: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.sparse_corpus", str(corpus), "64", "128", "0", at]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    rows_lib.main("input", run, rounds=5)
