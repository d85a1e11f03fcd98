"""Writes text with a checkpoint of a run.

    python -m launch.sample --run_dir=runs/mine --prompt="Once" --length=2000 --temperature=0.8 --num_samples=3
    python -m launch.sample --run_dir=runs/mine --interactive

stdout has the prompt, its continuation as it is made, and a newline.  Of several samples the first is shown as it is
made and the others follow it, each after an empty line and a line "--- sample 2 of 3 ---".  Of a vocabulary of bytes a
file or a pipe gets the very bytes; a terminal gets valid text, with U+FFFD for bytes that are not UTF-8.  An unknown
symbol is never written.  All else goes to stderr.

The same command with --clamp and without it draws with the same noise: what differs in the texts is what the unit does.

Where the run resets state at documents, each sample is one document: the separator is read before the prompt, as before
every document in training, and the sample ends before the next one; neither is shown.  Elsewhere the text begins with
the prompt; without one, as after a newline; where the vocabulary has no newline, after a symbol drawn at random.

A backward model (trained with --reverse) writes from right to left.  --prompt is the end of the text, --stop stands
before it, and the text is printed from left to right: first what was written, then the prompt.  It is shown when it is
whole, also after Ctrl-C; without a prompt, it stands before a newline.

--format=json prints one object a line for each sample: sample (its number), prompt, text (the continuation alone),
lossy (whether text has U+FFFD for bytes that are not UTF-8), symbols (each with symbol, a character or the value of a
byte, and logprob), logprob (their sum), bits_per_character or for a vocabulary of bytes bits_per_byte, seed, and
checkpoint (its step).  Log-probabilities are natural logarithms, and the model's own: at temperature 1, of all symbols.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.sample")

import dataclasses
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from charlstm.config.model import ModelConfig
from charlstm.inference import generate as generate_lib
from charlstm.inference.continuation import Continuation
from charlstm.inference.generate import Chunk
from charlstm.inference.sampling import Sampling
from charlstm.inference.text import (
    Sample,
    as_read,
    encode_prompt,
    grow,
    remark_on_escapes,
    unknown_id,
    unseen_before,
)
from charlstm.model.layer import Held
from charlstm.run import run_directory
from charlstm.training.loss import NATS_PER_BIT
from data_pipeline import signals
from data_pipeline.atomic_files import expand_user
from data_pipeline.progress import announced
from data_pipeline.settings import LARGEST_INT, check_choices, setting
from data_pipeline.vocabulary import Vocabulary
from launch.support import cli, flags, interactive, jax_setup

MOST_SAMPLES = 1 << 16  # side by side, each with a state and with noise of its own
ENDING = 2.0  # seconds in which a text that is interrupted may come to its end: it is whole UTF-8, and a line


@dataclasses.dataclass(frozen=True)
class SampleFlags:
    """The text to write, and the checkpoint."""

    run_dir: str = setting("", "The run to sample from.  Required.")
    checkpoint: str = setting("best", "best (on validation; the newest where none was validated), latest, or a step.")
    prompt: str = setting("", "Text that is read first, and continued.")
    prompt_file: str = setting(
        "", "A file of text instead of --prompt, - for stdin, read as it is, its last newline too."
    )
    length: int = setting(2000, "Symbols to write after the prompt.")
    num_samples: int = setting(1, "Continuations written, side by side in one batch on the device.")
    seed: int = setting(0, "Same seed, same text.")
    clamp: str = setting(
        "",
        "Hold states of units while the text is written, LAYER:UNIT:VALUE, several with commas: 1:85:+1 holds c, or h "
        "where the cell has no c; 1.h:85:-1 holds h.",
    )
    stop: str = setting(
        "",
        "A sample ends before this string, which is not shown; escapes as for --document_separator.  Where the run "
        "resets state at documents it is by default their separator; --stop= writes on.",
    )
    unknown: str = setting(
        "refuse",
        "A symbol of the prompt that is not in the vocabulary is refused, or mapped to the unknown symbol.",
        choices=("refuse", "map"),
    )
    interactive: bool = setting(
        False, "Read and write one text in turns: what you type is continued, /help lists the commands."
    )
    format: str = setting("text", "How samples are printed: see above.", choices=("text", "json"))

    def __post_init__(self) -> None:
        check_choices(self)
        if self.length < 0:
            raise ValueError(f"length={self.length} must not be negative")
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples} must be at least 1")
        if self.num_samples > MOST_SAMPLES:
            raise ValueError(
                f"num_samples={self.num_samples} must be at most {MOST_SAMPLES}: make the others with another --seed"
            )
        if (symbols := self.num_samples * self.length) > LARGEST_INT:
            raise ValueError(
                f"num_samples={self.num_samples} of length={self.length} are {symbols} symbols, and at most "
                f"{LARGEST_INT} can be made at a time: lower one of them"
            )
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed} must be from 0 to {(1 << 32) - 1}")
        if self.prompt and self.prompt_file:
            raise ValueError(f"--prompt and --prompt_file={self.prompt_file} are both given: leave one out")
        others = ("prompt", "prompt_file", "num_samples", "clamp", "stop", "format", "unknown")
        if self.interactive and (given := [name for name in others if getattr(self, name) != _default(name)]):
            raise ValueError(f"--interactive writes one text from what is typed: leave out --{given[0]}")


def _default(name: str) -> Any:
    return SampleFlags.__dataclass_fields__[name].default


def main(argv: Sequence[str]) -> int:
    (chosen, sampling), given = flags.parse(argv, __doc__ or "", SampleFlags(), Sampling())
    if not chosen.run_dir:
        raise ValueError("--run_dir is required: name the run to sample from")
    run_directory.named("run_dir", chosen.run_dir)
    run_dir = expand_user(chosen.run_dir)
    config, identity = run_directory.read(run_dir)
    vocabulary = identity.vocabulary
    separator = run_directory.separator(config, vocabulary)
    if remark := remark_on_escapes("prompt", chosen.prompt):
        signals.say(remark)
    held = _held(chosen.clamp, config.model)
    backward = config.streams.reverse
    if backward and chosen.interactive:
        raise ValueError(f"--interactive writes from left to right, and {run_dir} reads backward: leave it out")
    prompt, stop = (as_read(ids, backward) for ids in (_prompt(chosen, vocabulary), _stop(chosen.stop, vocabulary)))
    if not any(flag.startswith("--stop=") for flag in given):
        stop = np.array(separator, np.int32)

    jax_setup.keep_compiled()
    mesh = jax_setup.sampling_mesh(chosen.num_samples)
    params, step = run_directory.restore_params(run_dir, config, identity, mesh, chosen.checkpoint, signals.say)
    print(f"{run_dir}: the checkpoint of step {step}", file=sys.stderr)
    if chosen.interactive:
        text = Continuation(config.model, params, unknown_id(vocabulary), separator)
        turn = chosen.length if any(flag.startswith("--length=") for flag in given) else interactive.TURN
        program = interactive.Interactive(text, vocabulary, separator, sampling, chosen.seed, turn)
        program.run(interactive.lines())
        return cli.DONE
    chunks = generate_lib.generate(
        config.model,
        params,
        np.concatenate([unseen_before(prompt, separator, vocabulary), prompt]),
        sampling,
        rows=chosen.num_samples,
        length=chosen.length,
        seed=chosen.seed,
        unknown_id=unknown_id(vocabulary),
        separator=separator,
        held=held,
    )
    errors = "surrogateescape" if chosen.format == "text" and _gets_bytes(sys.stdout, vocabulary) else "replace"
    # A document ends with its separator, wherever that begins; another stop string begins in the continuation.
    before_stop = prompt if tuple(stop.tolist()) == separator else None
    samples = [Sample(vocabulary, prompt, stop, before_stop, errors, backward) for _ in range(chosen.num_samples)]
    began = time.monotonic()
    with announced("compiling (once)"):
        first = list(itertools.islice(chunks, 1))
    compiled, of_first = time.monotonic(), sum(chunk.ids.size for chunk in first)
    chunks = itertools.chain(first, chunks)
    if chosen.format == "json":
        fields = partial(_fields, vocabulary=vocabulary, prompt=as_read(prompt, backward), backward=backward)
        _print_json(samples, chunks, fields, {"seed": chosen.seed, "checkpoint": step})
    else:
        _print_text(samples, chunks, errors)
    made, ended = sum(len(sample.ids) for sample in samples), time.monotonic()
    later = max(0, made - of_first)  # the first ones are compiled for
    rate = f", {later / (ended - compiled):,.0f} a second once compiled" if later else ""
    print(f"{made:,} symbols in {ended - began:.1f} s{rate}", file=sys.stderr)
    return cli.DONE


def _held(clamp: str, config: ModelConfig) -> tuple[Held, ...]:
    """Returns the states to hold."""
    if not clamp:
        return ()
    from charlstm.inspect import units  # which takes a quarter of a second to import

    return units.held(units.parse_clamp(clamp), config)


def _prompt(chosen: SampleFlags, vocabulary: Vocabulary) -> np.ndarray:
    """The ids [symbols] of the prompt."""
    name, text = "prompt", chosen.prompt
    if chosen.prompt_file:
        name = "prompt_file"
        path = 0 if chosen.prompt_file == "-" else expand_user(chosen.prompt_file)
        try:
            with open(path, "rb", closefd=path != 0) as file:
                text = file.read().decode("utf-8", "surrogateescape")
        except OSError as error:
            raise ValueError(f"prompt_file={chosen.prompt_file} cannot be read: {error.strerror}") from None
    try:
        remedy = "leave it out, or turn such symbols into the unknown one with --unknown=map"
        return encode_prompt(text, vocabulary, chosen.unknown, remedy)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _stop(text: str, vocabulary: Vocabulary) -> np.ndarray:
    """The ids [symbols] of the stop string."""
    try:
        return vocabulary.encode_escaped(text)
    except ValueError as error:
        raise ValueError(f"stop={text!r} can never be met: {error}") from None


def _gets_bytes(stdout: Any, vocabulary: Vocabulary) -> bool:
    """True if a text is written as its very bytes: to a file or a pipe, not to a terminal."""
    return vocabulary.kind == "bytes" and isinstance(stdout, io.TextIOWrapper) and not stdout.isatty()


def _print_text(samples: list[Sample], chunks: Iterable[Chunk], errors: str = "replace") -> None:
    if errors == "surrogateescape" and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors=errors)  # with the decoder's, each byte is written as it is
    else:
        cli.set_errors(sys.stdout, "replace")  # what the terminal cannot show must not end the text
    live, *others = samples
    came: list[int] = []

    def interrupted(number: int) -> None:
        came.append(number)
        time.sleep(ENDING)
        signals.leave(number)

    with signals.reacting(interrupted):
        print(live.take(), end="", flush=True)
        for _ in grow(samples, chunks):
            print(live.take(), end="", flush=True)
            if came:
                break
        print(live.take(last=True), flush=True)
        if came:
            signals.leave(came[0])
    for number, sample in enumerate(others, 2):
        print(f"\n--- sample {number} of {len(samples)} ---\n{sample.take(last=True)}", flush=True)


def _print_json(
    samples: list[Sample], chunks: Iterable[Chunk], fields: Callable[[Sample], dict[str, Any]], common: dict[str, Any]
) -> None:
    for _ in grow(samples, chunks):
        pass
    for number, sample in enumerate(samples, 1):
        print(json.dumps({"sample": number, **fields(sample), **common}), flush=True)


def _fields(sample: Sample, vocabulary: Vocabulary, prompt: np.ndarray, backward: bool) -> dict[str, Any]:
    """The object of --format=json, without what all samples have in common."""
    ids, total = as_read(np.array(sample.ids, np.int32), backward), math.fsum(sample.log_probabilities)
    text, is_bytes = vocabulary.decode(ids), vocabulary.kind == "bytes"
    symbols = ids.tolist() if is_bytes else text
    log_probabilities = sample.log_probabilities[:: -1 if backward else 1]
    return {
        "prompt": vocabulary.decode(prompt),
        "text": text,
        "lossy": text.encode("utf-8") != vocabulary.decode_bytes(ids),
        "symbols": [
            {"symbol": symbol, "logprob": value} for symbol, value in zip(symbols, log_probabilities, strict=True)
        ],
        "logprob": total,
        "bits_per_byte" if is_bytes else "bits_per_character": -total / NATS_PER_BIT / len(ids) if len(ids) else None,
    }


if __name__ == "__main__":
    cli.run("launch.sample", main)
