"""Scores a held-out split with a checkpoint of a run: every symbol once, with carried state.

python -m launch.evaluate --run_dir=runs/mine --split=test
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

from charlstm import evaluate as evaluate_lib
from charlstm import mesh as mesh_lib
from charlstm.metrics import duration
from charlstm.training_config import EvaluationConfig
from data_pipeline import corpora
from data_pipeline.files import at_home
from data_pipeline.progress import bar
from data_pipeline.settings import check_choices, setting
from data_pipeline.shards import open_corpus
from launch import compilation, flags, program, run_directory


@dataclasses.dataclass(frozen=True)
class EvaluateFlags:
    """What to score, and with which checkpoint."""

    run_dir: str = setting("", "The run to evaluate.  Required.")
    split: str = setting("test", "The split to score.", choices=("train", "valid", "test"))
    checkpoint: str = setting("best", "best (on validation; the newest where none was validated), latest, or a step.")
    corpus: str = setting("", "The run's own text, where it has moved; checked by its fingerprint.")
    format: str = setting("text", "How the result is printed.", choices=("text", "json"))

    def __post_init__(self) -> None:
        check_choices(self)


def main(argv: Sequence[str]) -> int:
    (chosen, _), _ = flags.parse(argv, __doc__ or "", EvaluateFlags(), EvaluationConfig())
    if not chosen.run_dir:
        raise ValueError("--run_dir is required: name the run to evaluate")
    run_dir = at_home(chosen.run_dir)
    config, identity = run_directory.read(run_dir)
    # Once more: what is not given is as the run has it.
    (_, evaluation), _ = flags.parse(argv, __doc__ or "", EvaluateFlags(), config.evaluation)
    text = config.corpus
    if chosen.corpus:
        text = dataclasses.replace(text, corpus=chosen.corpus, train="", valid="", test="")
    corpus = open_corpus(corpora.resolve(text, bar()))
    run_directory.require_same(run_dir, identity, run_directory.Identity(corpus.vocabulary, corpus.fingerprint))
    if chosen.split not in corpus.splits:
        raise ValueError(f"{corpus.directory} has no {chosen.split} split, only {', '.join(corpus.splits)}")

    compilation.keep()
    mesh = mesh_lib.make()
    params, step = run_directory.restore_params(run_dir, config, identity, mesh, chosen.checkpoint)
    config = dataclasses.replace(config, evaluation=evaluation)
    began = time.monotonic()
    score_split = evaluate_lib.of_split(
        config,
        corpus.vocabulary.size,
        corpus.splits[chosen.split],
        mesh,
        run_directory.separator(config, corpus.vocabulary),
    )
    score = score_split(params)
    seconds = time.monotonic() - began
    if not mesh_lib.is_first_process():
        return program.DONE
    if chosen.format == "json":
        print(json.dumps(_fields(chosen.split, step, score, seconds)))
    else:
        per_byte = "" if score.bytes == score.characters else f" ({score.bits_per_byte:.4f} per byte)"
        print(
            f"{chosen.split}: {score.bits_per_character:.4f} bits per character{per_byte} at step {step}, "
            f"{score.characters:,} characters of {score.bytes:,} bytes in {duration(seconds)}"
        )
    return program.DONE


def _fields(split: str, step: int, score: evaluate_lib.Score, seconds: float) -> dict[str, Any]:
    return {
        "split": split,
        "step": step,
        "bits_per_character": score.bits_per_character,
        "bits_per_byte": score.bits_per_byte,
        "characters": score.characters,
        "bytes": score.bytes,
        "seconds": round(seconds, 3),
    }


if __name__ == "__main__":
    program.run("launch.evaluate", main)
