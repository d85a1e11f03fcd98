"""Preparing by parts, beside a preparation at once: MB of text for a second of processor time, and the peak of memory.

    python -m benchmarks.parts [MB of text] [kind ...]

Both prepare the same generated file on one core, alternately, twice, each in a process of its own.  The kinds are
txt, jsonl.zst and characters (txt in a vocabulary of characters).  Processor time includes that of the system, and of
starting the process.  Parts and shards have 4 MiB, so that what is counted and written again where a split ends is a
small share of the text, as it is of a large corpus with parts of 256 MiB.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from backports import zstd

from data_pipeline.manifest import read_manifest

KINDS = ("txt", "jsonl.zst", "characters")
ROUNDS = 2
DOCUMENT = 6000  # characters
PROGRAM = """
import resource, sys
from pathlib import Path
from data_pipeline.build.by_parts import Sizes, prepare_by_parts
from data_pipeline.build.prepare import prepare
from data_pipeline.settings import CorpusSettings
text, out, vocabulary, way = sys.argv[1:]
how = CorpusSettings(corpus=text, cache_dir=out + ".cache", vocabulary=vocabulary)
if way == "at once":
    prepare(how, Path(out), workers=1, shard_bytes=4 << 20)
else:
    prepare_by_parts(how, Path(out), workers=1, sizes=Sizes(part=4 << 20, shard=4 << 20))
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def generate(path: Path, megabytes: int) -> None:
    """Writes a file of words drawn at random, some of them of several bytes."""
    draw = random.Random(1)
    words = ["".join(draw.choices("etaoinshrdlucmfwypé漢", k=draw.randint(1, 9))) for _ in range(20_000)]
    opened = zstd.open(path, "wt", encoding="utf-8") if path.suffix == ".zst" else path.open("w", encoding="utf-8")
    with opened as out:
        left = megabytes * 1_000_000
        while left > 0:
            text = " ".join(draw.choices(words, k=DOCUMENT // 6))
            left -= len(text.encode())
            out.write(json.dumps({"text": text}) + "\n" if path.suffix == ".zst" else text + "\n")


def main(megabytes: int, kinds: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="parts_") as directory:
        for kind in kinds:
            text = Path(directory) / ("text.jsonl.zst" if kind == "jsonl.zst" else "text.txt")
            generate(text, megabytes)
            best: dict[str, tuple[float, int]] = {}
            for number in range(ROUNDS):
                for way in ("at once", "by parts"):
                    out = Path(directory) / f"{kind}-{way[:2]}-{number}"
                    vocabulary = "characters" if kind == "characters" else "bytes"
                    command = [sys.executable, "-c", PROGRAM, str(text), str(out), vocabulary, way]
                    seconds, peak = subprocess.run(command, check=True, capture_output=True).stdout.split()
                    best[way] = min(best.get(way, (1e9, 0)), (float(seconds), int(peak)))
                    size = sum(split.bytes for split in read_manifest(out).splits.values())
                    subprocess.run(["rm", "-r", str(out), f"{out}.cache"], check=True)
            rows = {f"MB/s {way}": round(size / 1e6 / seconds, 1) for way, (seconds, _) in best.items()}
            peaks = {f"MiB {way}": peak // 1024 for way, (_, peak) in best.items()}
            ratio = round(best["at once"][0] / best["by parts"][0], 2)
            print(json.dumps({"kind": kind, "MB": megabytes} | rows | {"ratio": ratio} | peaks), flush=True)
            text.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megabytes", type=int, nargs="?", default=200)
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    given = parser.parse_args()
    main(given.megabytes, given.kinds)
