"""Scores a held-out split with a checkpoint of a run: every symbol once, with carried state.

    python -m launch.evaluate --run_dir=runs/mine --split=test

With --dynamic the model goes on learning from the text that it is scored on, after each score (dynamic evaluation).
With --text a text of one's own is scored, as one stream; --format=jsonl prints an object a line for each symbol: symbol
(a character, or the value of a byte), bits, entropy (the bits expected there) and rank (1: none was more probable).
With --search_temperature there is a second score, at the softmax temperature that is best on the validation split.
Neither changes the run.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.evaluate")

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.config.training import EvaluationConfig
from charlstm.inference import dynamic_evaluation as dynamic
from charlstm.inference import evaluate as evaluate_lib
from charlstm.inference.score import Score, mixed
from charlstm.run import corpus as corpus_lib
from charlstm.run import run_directory
from charlstm.run.metrics import duration
from charlstm.types import ModelParams
from data_pipeline.atomic_files import expand_user
from data_pipeline.progress import say_on_stderr
from data_pipeline.settings import check_choices, setting
from data_pipeline.shards import Corpus
from launch.support import cli, flags, jax_setup, progress, score_text

FORMATS = ("text", "json", "jsonl")
OF_A_TEXT = {"run_dir", "checkpoint", "text", "format"}  # the flags that have a part in its score


@dataclasses.dataclass(frozen=True)
class EvaluateFlags:
    """The split to score, and the checkpoint."""

    run_dir: str = setting("", "The run to evaluate.  Required.")
    split: str = setting("test", "The split to score.", choices=("train", "valid", "test"))
    checkpoint: str = setting("best", "best (on validation; the newest where none was validated), latest, or a step.")
    corpus: str = setting(
        "", "The run's own text, where it has moved, or its mixture, as --mixture takes it; checked by its fingerprint."
    )
    text: str = setting("", "A file of text to score instead of a split, - for stdin.")
    dynamic: bool = setting(
        False,
        "Dynamic evaluation, on one device: the split is one stream, so that --eval_chunk, --burn_in and "
        "--evaluation_batch_size have no part in it.",
    )
    search_temperature: bool = setting(
        False, "Score at the best softmax temperature of the validation split as well, from 1/2 to 2, to 1 %."
    )
    format: str = setting("text", "How the result is printed; jsonl, of --text: each symbol.", choices=FORMATS)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.format == "jsonl" and not self.text:
            raise ValueError("format=jsonl prints each symbol of a text: give --text as well")


GROUPS = (EvaluateFlags(), dynamic.DynamicEvaluationConfig())
TEMPERATURES = tuple(2.0 ** (k / 64) for k in range(-64, 65))  # about 1 % from one to the next
Scorer = Callable[..., dict[str, list[Score]]]


def main(argv: Sequence[str]) -> int:
    (chosen, adaptation, _), _ = flags.parse(argv, __doc__ or "", *GROUPS, EvaluationConfig())
    if not chosen.run_dir:
        raise ValueError("--run_dir is required: name the run to evaluate")
    given = flags.given_in(argv, __doc__ or "", *GROUPS, EvaluationConfig())
    if chosen.text and (others := sorted(given.keys() - OF_A_TEXT)):
        raise ValueError(f"text={chosen.text} is scored as it is, as one stream: leave --{', --'.join(others)} out")
    run_directory.named("run_dir", chosen.run_dir)
    run_dir = expand_user(chosen.run_dir)
    config, identity = run_directory.read(run_dir)
    # Once more: what is not given is as the run has it.
    (_, _, evaluation), _ = flags.parse(argv, __doc__ or "", *GROUPS, config.evaluation)
    if chosen.dynamic and (changed := _differences(evaluation, config.evaluation)):
        raise ValueError(f"{changed} has no part in a dynamic score, of one stream: leave it out")
    if not chosen.dynamic and (changed := _differences(adaptation, dynamic.DynamicEvaluationConfig())):
        raise ValueError(f"{changed} has no part in a static score: give --dynamic as well")
    if chosen.text:
        jax_setup.keep_compiled()
        return score_text.main(run_dir, chosen.checkpoint, chosen.text, chosen.format)
    text = config
    if chosen.corpus:
        where = {"mixture" if config.streams.mixture else "corpus": chosen.corpus}
        text = config_lib.replace(config, **where, train="", valid="", test="")
    remedy = ": give --text, or with --corpus the text that it was trained on"
    corpus = corpus_lib.load_own(run_dir, text, remedy)
    for split in (chosen.split, *(["valid"] if chosen.search_temperature else [])):
        if split not in corpus.splits:
            raise ValueError(f"{corpus.name} has no {split} split, only {', '.join(corpus.splits)}")

    corpus = corpus_lib.as_read(config, corpus)
    jax_setup.keep_freed_memory()
    jax_setup.keep_compiled()
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
        fields = _fields(chosen, adaptation, step, temperature, scores[""], seconds)
        if members := {name: _figures(of) for name, of in scores.items() if name}:
            fields["mixture"] = members
        print(json.dumps(fields))
    else:
        for name in sorted(scores, key=bool, reverse=True):  # that of all last
            print("\n".join(_lines(chosen, name, corpus.vocabulary.kind, step, temperature, scores[name], seconds)))
    return cli.DONE


def _scorer(
    config: Config,
    corpus: Corpus,
    mesh: distributed.Mesh,
    params: ModelParams,
    adaptation: dynamic.DynamicEvaluationConfig | None,
) -> Scorer:
    """A function (split, temperatures) -> scores of all, by the name ""; of a mixture, also of each corpus."""
    separator = run_directory.separator(config, corpus.vocabulary)
    if adaptation is not None:
        doing = progress.shown("gradients of the training text")
        usual = dynamic.mean_square(config, adaptation, params, corpus.splits["train"], separator, doing)

    def score_one(name: str, text: evaluate_lib.Split, temperatures: Sequence[float]) -> list[Score]:
        if adaptation is None:
            V = corpus.vocabulary.size
            evaluate = evaluate_lib.at_temperatures(config, V, text, mesh, separator, temperatures)
            return evaluate(params, progress.shown(f"evaluating {name}"))
        doing = progress.shown(f"dynamic evaluation of {name}")
        return dynamic.score(config, adaptation, params, usual, text, separator, temperatures, doing)

    def score(split: str, temperatures: Sequence[float] = (1.0,)) -> dict[str, list[Score]]:
        texts = corpus.texts(split)
        found = {name: score_one(f"{split} {name}".strip(), text, temperatures) for name, text in texts.items()}
        by_temperature = [dict(zip(found, scores, strict=True)) for scores in zip(*found.values(), strict=True)]
        return found | {"": [mixed(scores, corpus.percent) for scores in by_temperature]}

    return score


def search(score: Scorer, split: str) -> tuple[float, dict[str, list[Score]]]:
    """The temperature that is best on the validation split, and the scores of `split` at 1 and at that."""
    # Bits are a convex function of 1 / temperature, so the best of all lies beside the best of those tried.
    found = score("valid", TEMPERATURES)
    best = min(range(len(TEMPERATURES)), key=lambda place: found[""][place].bits)
    if split != "valid":
        return TEMPERATURES[best], score(split, (1.0, TEMPERATURES[best]))
    usual = TEMPERATURES.index(1.0)
    return TEMPERATURES[best], {name: [scores[usual], scores[best]] for name, scores in found.items()}


def _lines(
    chosen: EvaluateFlags, text: str, kind: str, step: int, temperature: float, scores: list[Score], seconds: float
) -> Iterator[str]:
    name = chosen.split + (f"/{text}" if text else "") + (", dynamic" if chosen.dynamic else "")
    first = scores[0]
    plain = first.characters is None or (kind == "bytes" and first.characters == first.bytes)
    length = f"{first.bytes:,} bytes" if plain else f"{first.characters:,} characters of {first.bytes:,} bytes"
    if isinstance(first.bytes, float):
        length = "by the weights of the mixture"
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
    fields = {"split": chosen.split, "step": step, **_figures(scores), "seconds": round(seconds, 3)}
    if chosen.dynamic:
        fields |= dataclasses.asdict(adaptation)
    return fields | ({"temperature": temperature} if chosen.search_temperature else {})


def _figures(scores: list[Score]) -> dict[str, Any]:
    first, at_best = scores[0], scores[1].figures() if len(scores) > 1 else {}
    return {
        **first.figures(),
        "symbols": first.symbols,
        "characters": first.characters,
        "bytes": first.bytes,
        "unknown_share": first.unknown / first.symbols,
        **{f"{name}_at_temperature": value for name, value in at_best.items()},
    }


def _differences(settings: Any, usual: Any) -> str:
    """The settings that are not as usual, such as "eval_chunk=10, burn_in=5"."""
    values = dataclasses.asdict(settings)
    return ", ".join(
        f"{name}={values[name]}" for name, value in dataclasses.asdict(usual).items() if values[name] != value
    )


if __name__ == "__main__":
    cli.run("launch.evaluate", main)
