"""`launch.evaluate --text`: a text of one's own, scored as one stream, and each of its symbols."""

import json
import math
import sys
from pathlib import Path

import numpy as np

from charlstm import api
from charlstm.inference.score import Score
from charlstm.inspect import surprise, trace
from data_pipeline.shards import ArraySplit
from launch.support import cli


def main(run_dir: Path, checkpoint: str, file: str, how: str) -> int:
    """Scores a file; prints the score, and as jsonl each symbol, in the memory of the text's ids.

    A backward model takes the memory of all that is printed.
    """
    content = sys.stdin.buffer.read() if file == "-" else cli.read_file("text", file)
    model = api.load(run_dir, checkpoint)
    split = ArraySplit(content, model.vocabulary)
    if not len(split):
        raise ValueError(f"text={file} is empty: give one that has symbols")
    if split.unknown:
        print(f"{split.unknown:,} symbols of {file} are not in the vocabulary, and read as unknown", file=sys.stderr)
    bits, done, parts = [], 0, surprise.expected(model, trace.as_read(model, split))
    if model.config.streams.reverse:  # the first symbol of the text is read last
        whole = surprise.joined(parts)
        parts = iter([surprise.Expected(*(trace.in_text_order(model, array) for array in whole))])
    for part in parts:
        bits.append(part.bits.sum(dtype=np.float64))
        if how == "jsonl":
            _print(model, split.read(done, done + len(part.bits)), part)
        done += len(part.bits)
    score = Score(math.fsum(bits), len(split), split.characters, split.bytes, split.unknown)
    where = sys.stderr if how == "jsonl" else sys.stdout
    if how == "json":
        print(json.dumps({"text": file, "step": model.step, **score.figures(), "symbols": len(split)}))
    else:
        print(f"{file}: {score.in_words(model.vocabulary.kind)} at step {model.step}", file=where)
    return cli.DONE


def _print(model: api.Model, ids: np.ndarray, part: surprise.Expected) -> None:
    symbols = ids.tolist() if model.vocabulary.kind == "bytes" else model.vocabulary.decode(ids)
    lines = []
    for symbol, bits, entropy, rank in zip(symbols, part.bits, part.entropy, part.rank, strict=True):
        fields = {
            "symbol": symbol,
            "bits": round(float(bits), 6),
            "entropy": round(float(entropy), 6),
            "rank": int(rank),
        }
        lines.append(json.dumps(fields) + "\n")
    sys.stdout.write("".join(lines))
