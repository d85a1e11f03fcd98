"""Preparing by parts, beside a preparation at once: MB of text for a second of processor time, and the peak of memory.

    python -m benchmarks.parts [--quick] [--rounds=2] [--megabytes=200] [--kinds=txt,jsonl.zst,characters]

Both prepare the same generated files, of up to 250 MB of text, on one core, alternately, each in a process of its own.
The kinds are txt, jsonl.zst, characters (txt in a vocabulary of characters) and xml.bz2 (a multistream dump).
Processor time includes that of the system, and of starting the process; the best round counts.  Parts and shards have
4 MiB (parts of xml.bz2 1 MiB), so that what is counted and written again where a split ends is a small share of the
text, as it is of a large corpus with parts of 256 MiB.
"""

import bz2
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from backports import zstd

from benchmarks import rows as rows_lib
from benchmarks.rows import Rows
from data_pipeline.manifest import read_manifest

FILE = 250  # MB of text, at most
DOCUMENT, STREAM = 6000, 100  # characters; documents in a stream
PAGE = "<page><revision><text>{}</text></revision></page>\n"
PROGRAM = """
import resource, sys
from pathlib import Path
from data_pipeline.build.by_parts import Sizes, prepare_by_parts
from data_pipeline.build.prepare import prepare
from data_pipeline.settings import CorpusSettings
text, out, vocabulary, way, part = sys.argv[1:]
how = CorpusSettings(corpus=text, cache_dir=out + ".cache", vocabulary=vocabulary)
if way == "at once":
    prepare(how, Path(out), workers=1, shard_bytes=4 << 20)
else:
    prepare_by_parts(how, Path(out), workers=1, sizes=Sizes(part=int(part), shard=4 << 20))
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


HEAD = bz2.compress(b"<mediawiki>")
WRITTEN: dict[str, Callable[[list[str]], bytes]] = {  # by ending
    "txt": lambda texts: "".join(text + "\n" for text in texts).encode(),
    "jsonl.zst": lambda texts: "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(),
    "xml.bz2": lambda texts: bz2.compress("".join(map(PAGE.format, texts)).encode()),
}


def generate(folder: Path, ending: str, megabytes: int) -> None:
    """Fills a folder with files of words drawn at random, some of them of several bytes."""
    draw = random.Random(1)
    words = ["".join(draw.choices("etaoinshrdlucmfwypé漢", k=draw.randint(1, 9))) for _ in range(20_000)]
    count = -(-megabytes // FILE)
    for number in range(count):
        path, left = folder / f"{number:03}.{ending}", megabytes * 1_000_000 // count
        with zstd.open(path, "wb") if ending.endswith(".zst") else path.open("wb") as out:
            out.write(HEAD if ending == "xml.bz2" else b"")
            while left > 0:
                texts = [" ".join(draw.choices(words, k=DOCUMENT // 6)) for _ in range(STREAM)]
                left -= sum(len(text.encode()) for text in texts)
                out.write(WRITTEN[ending](texts))
            out.write(bz2.compress(b"</mediawiki>") if ending == "xml.bz2" else b"")


def run(rows: Rows, quick: bool, rounds: int, megabytes: int, kinds: str) -> None:
    megabytes, rounds = (2, 1) if quick else (megabytes, rounds)
    for kind in kinds.split(","):
        with tempfile.TemporaryDirectory(prefix="parts_") as folder:
            (Path(folder) / "text").mkdir()
            generate(Path(folder) / "text", "txt" if kind == "characters" else kind, megabytes)
            timed = {way: partial(prepared, Path(folder), kind, way) for way in ("at once", "by parts")}
            reports = rows_lib.alternate(timed, rounds)
            speeds = {way: max(speed for speed, _ in each) for way, each in reports.items()}
            for way, each in reports.items():
                rows.add(
                    kind=kind,
                    megabytes=megabytes,
                    prepared=way,
                    megabytes_per_second_of_a_core=speeds[way],
                    of_at_once=round(speeds[way] / speeds["at once"], 2),
                    peak_mebibytes=min(peak for _, peak in each),
                )


def prepared(folder: Path, kind: str, way: str) -> tuple[float, int]:
    """Prepares the text; returns MB of text for a second of processor time, and the peak of memory in MiB."""
    out, vocabulary = folder / "out", "characters" if kind == "characters" else "bytes"
    part = (1 if kind == "xml.bz2" else 4) << 20
    command = [sys.executable, "-c", PROGRAM, str(folder / "text"), str(out), vocabulary, way, str(part)]
    seconds, peak = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()
    size = sum(split.bytes for split in read_manifest(out).splits.values())
    shutil.rmtree(out)
    shutil.rmtree(f"{out}.cache", ignore_errors=True)
    return round(size / 1e6 / float(seconds), 1), int(peak) // 1024


if __name__ == "__main__":
    rows_lib.main("parts", run, rounds=2, megabytes=200, kinds="txt,jsonl.zst,characters")
