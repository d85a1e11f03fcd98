"""Scores a held-out split with a checkpoint of a run: every symbol once, with carried state.

    python -m launch.evaluate --run_dir=runs/mine --split=test

With --dynamic the model goes on learning from the text that it is scored on, after each score (dynamic evaluation).
With --search_temperature there is a second score, at the soft-max temperature that is best on the validation split.
Neither changes the run.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.evaluate")

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from charlstm import distributed
from charlstm.config import Config
from charlstm.config.training import EvaluationConfig
from charlstm.inference import dynamic_evaluation as dynamic
from charlstm.inference import evaluate as evaluate_lib
from charlstm.inference.score import Score
from charlstm.run import run_directory
from charlstm.run.metrics import duration
from charlstm.types import ModelParams
from data_pipeline.atomic_files import expand_user
from data_pipeline.build import corpora
from data_pipeline.progress import bar, say_on_stderr
from data_pipeline.settings import check_choices, setting
from data_pipeline.shards import Corpus, open_corpus
from launch import cli, flags, runtime


@dataclasses.dataclass(frozen=True)
class EvaluateFlags:
    """The split to score, and the checkpoint."""

    run_dir: str = setting("", "The run to evaluate.  Required.")
    split: str = setting("test", "The split to score.", choices=("train", "valid", "test"))
    checkpoint: str = setting("best", "best (on validation; the newest where none was validated), latest, or a step.")
    corpus: str = setting("", "The run's own text, where it has moved; checked by its fingerprint.")
    dynamic: bool = setting(
        False,
        "Dynamic evaluation, on one device: the split is one stream, so that --eval_chunk, --burn_in and "
        "--evaluation_batch_size have no part in it.",
    )
    search_temperature: bool = setting(
        False, "Score at the best soft-max temperature of the validation split as well, from 1/2 to 2, to 1 %."
    )
    format: str = setting("text", "How the result is printed.", choices=("text", "json"))

    def __post_init__(self) -> None:
        check_choices(self)


GROUPS = (EvaluateFlags(), dynamic.DynamicEvaluationConfig())
TEMPERATURES = tuple(2.0 ** (k / 64) for k in range(-64, 65))  # about 1 % from one to the next
Scorer = Callable[..., list[Score]]


def main(argv: Sequence[str]) -> int:
    (chosen, adaptation, _), _ = flags.parse(argv, __doc__ or "", *GROUPS, EvaluationConfig())
    if not chosen.run_dir:
        raise ValueError("--run_dir is required: name the run to evaluate")
    run_directory.named("run_dir", chosen.run_dir)
    run_dir = expand_user(chosen.run_dir)
    config, identity = run_directory.read(run_dir)
    # Once more: what is not given is as the run has it.
    (_, _, evaluation), _ = flags.parse(argv, __doc__ or "", *GROUPS, config.evaluation)
    if chosen.dynamic and (given := _differences(evaluation, config.evaluation)):
        raise ValueError(f"{given} has no part in a dynamic score, of one stream: leave it out")
    if not chosen.dynamic and (given := _differences(adaptation, dynamic.DynamicEvaluationConfig())):
        raise ValueError(f"{given} has no part in a static score: give --dynamic as well")
    text = config.corpus
    if chosen.corpus:
        text = dataclasses.replace(text, corpus=chosen.corpus, train="", valid="", test="")
    corpus = open_corpus(corpora.resolve(text, bar(), say_on_stderr))
    run_directory.check_identity(run_dir, identity, run_directory.Identity(corpus.vocabulary, corpus.fingerprint))
    for split in (chosen.split, *(["valid"] if chosen.search_temperature else [])):
        if split not in corpus.splits:
            raise ValueError(f"{corpus.directory} has no {split} split, only {', '.join(corpus.splits)}")

    runtime.keep_freed_memory()
    runtime.keep_compiled()
    mesh = distributed.make()
    if chosen.dynamic:
        mesh = distributed.make(list(mesh.devices.flat[:1]))
    params, step = run_directory.restore_params(run_dir, config, identity, mesh, chosen.checkpoint, say_on_stderr)
    config = dataclasses.replace(config, evaluation=evaluation)
    began = time.monotonic()
    score = _scorer(config, corpus, mesh, params, adaptation if chosen.dynamic else None)
    temperature, scores = search(score, chosen.split) if chosen.search_temperature else (1.0, score(chosen.split))
    seconds = time.monotonic() - began
    if not distributed.is_first_process():
        return cli.DONE
    if chosen.format == "json":
        print(json.dumps(_fields(chosen, adaptation, step, temperature, scores, seconds)))
    else:
        print("\n".join(_lines(chosen, corpus.vocabulary.kind, step, temperature, scores, seconds)))
    return cli.DONE


def _scorer(
    config: Config,
    corpus: Corpus,
    mesh: distributed.Mesh,
    params: ModelParams,
    adaptation: dynamic.DynamicEvaluationConfig | None,
) -> Scorer:
    """A function (split, temperatures) -> scores."""
    separator = run_directory.separator(config, corpus.vocabulary)
    if adaptation is not None:
        doing = _progress("gradients of the training text")
        usual = dynamic.mean_square(config, adaptation, params, corpus.splits["train"], separator, doing)

    def score(name: str, temperatures: Sequence[float] = (1.0,)) -> list[Score]:
        split = corpus.splits[name]
        if adaptation is None:
            V = corpus.vocabulary.size
            evaluate = evaluate_lib.at_temperatures(config, V, split, mesh, separator, temperatures)
            return evaluate(params, _progress(f"evaluating {name}"))
        doing = _progress(f"dynamic evaluation of {name}")
        return dynamic.score(config, adaptation, params, usual, split, separator, temperatures, doing)

    return score


def search(score: Scorer, split: str) -> tuple[float, list[Score]]:
    """The temperature that is best on the validation split, and the scores of `split` at 1 and at that."""
    # Bits are a convex function of 1 / temperature, so the best of all lies beside the best of those tried.
    tried = dict(zip(TEMPERATURES, score("valid", TEMPERATURES), strict=True))
    best = min(tried, key=lambda temperature: tried[temperature].bits)
    return best, [tried[1.0], tried[best]] if split == "valid" else score(split, (1.0, best))


def _progress(doing: str) -> Callable[[int, int], None]:
    """Shows how far something is, and the time left: a bar on a terminal, otherwise a line a minute on stderr."""
    show, calls, told = bar(), 0, time.monotonic()
    first, since = 0, told  # how much was done when all was compiled, and when that was

    def progress(done: int, total: int) -> None:
        nonlocal calls, told, first, since
        now, calls, text = time.monotonic(), calls + 1, doing
        if calls == 2:
            first, since = done, now
        elif calls > 2:
            text += f", {duration((now - since) * (total - done) / (done - first))} left"
        show(text, done, total)
        if now - told >= 60 and not sys.stderr.isatty():
            told = now
            print(f"{text}: {done:,} of {total:,}", file=sys.stderr)

    return progress


def _lines(
    chosen: EvaluateFlags, kind: str, step: int, temperature: float, scores: list[Score], seconds: float
) -> Iterator[str]:
    name = f"{chosen.split}, dynamic" if chosen.dynamic else chosen.split
    first = scores[0]
    plain = first.characters is None or (kind == "bytes" and first.characters == first.bytes)
    length = f"{first.bytes:,} bytes" if plain else f"{first.characters:,} characters of {first.bytes:,} bytes"
    yield f"{name}: {first.in_words(kind)} at step {step}, {length} in {duration(seconds)}"
    if chosen.search_temperature:
        where = "this very split" if chosen.split == "valid" else "the validation split"
        end = " and the last one tried" if temperature in (TEMPERATURES[0], TEMPERATURES[-1]) else ""
        yield f"{name}: {scores[1].in_words(kind)} at temperature {temperature:.3f}, the best on {where}{end}"


def _fields(
    chosen: EvaluateFlags,
    adaptation: dynamic.DynamicEvaluationConfig,
    step: int,
    temperature: float,
    scores: list[Score],
    seconds: float,
) -> dict[str, Any]:
    fields = {
        "split": chosen.split,
        "step": step,
        **scores[0].figures(),
        "symbols": scores[0].symbols,
        "characters": scores[0].characters,
        "bytes": scores[0].bytes,
        "unknown_share": scores[0].unknown / scores[0].symbols,
        "seconds": round(seconds, 3),
    }
    if chosen.dynamic:
        fields |= dataclasses.asdict(adaptation)
    if chosen.search_temperature:
        at_temperature = {f"{name}_at_temperature": value for name, value in scores[1].figures().items()}
        fields |= {"temperature": temperature, **at_temperature}
    return fields


def _differences(settings: Any, usual: Any) -> str:
    """The settings that are not as usual, such as "eval_chunk=10, burn_in=5"."""
    values = dataclasses.asdict(settings)
    return ", ".join(
        f"{name}={values[name]}" for name, value in dataclasses.asdict(usual).items() if values[name] != value
    )


if __name__ == "__main__":
    cli.run("launch.evaluate", main)
