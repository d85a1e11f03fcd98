"""Writes text with a checkpoint of a run.

    python -m launch.sample --run_dir=runs/mine --prompt="Once" --length=2000 --temperature=0.8 --num_samples=3

stdout has the prompt, its continuation as it is made, and a newline.  Of several samples the first is shown as it is
made and the others follow it, each after an empty line and a line "--- sample 2 of 3 ---".  Without a prompt the text
begins as after a newline (after a document separator, where the run resets state at those); where the vocabulary has no
newline, after a symbol drawn at random.  An unknown symbol is never written.  All else goes to stderr.

--format=json prints one object a line for each sample: sample (its number), prompt, text (the continuation alone),
symbols (each with symbol, a character or the value of a byte, and logprob), logprob (their sum), bits_per_character,
seed, and checkpoint (its step).  Log-probabilities are natural logarithms, and the model's own: at temperature 1, of
all symbols.
"""

import dataclasses
import io
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from charlstm import generate as generate_lib
from charlstm.config import Config
from charlstm.generate import Chunk, Sampling
from charlstm.loss import NATS_PER_BIT
from data_pipeline.files import at_home
from data_pipeline.settings import check_choices, setting
from data_pipeline.vocabulary import Vocabulary
from launch import compilation, cores, flags, program, run_directory


@dataclasses.dataclass(frozen=True)
class SampleFlags:
    """What to write, and with which checkpoint."""

    run_dir: str = setting("", "The run to sample from.  Required.")
    checkpoint: str = setting("best", "best (on validation; the newest where none was validated), latest, or a step.")
    prompt: str = setting("", "Text that is read first, and continued.")
    prompt_file: str = setting("", "A file of text instead of --prompt, read as it is, its last newline too.")
    length: int = setting(2000, "Symbols to write after the prompt.")
    num_samples: int = setting(1, "Continuations written, side by side in one batch on the device.")
    seed: int = setting(0, "Same seed, same text.")
    stop: str = setting("", "A sample ends before this string, which is not shown.")
    unknown: str = setting(
        "refuse",
        "A symbol of the prompt that is not in the vocabulary is refused, or mapped to the unknown symbol.",
        choices=("refuse", "map"),
    )
    format: str = setting("text", "How samples are printed: see above.", choices=("text", "json"))

    def __post_init__(self) -> None:
        check_choices(self)
        if self.length < 0:
            raise ValueError(f"length={self.length} must not be negative")
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples} must be at least 1")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed} must be from 0 to {(1 << 32) - 1}")
        if self.prompt and self.prompt_file:
            raise ValueError(f"--prompt and --prompt_file={self.prompt_file} are both given: leave one out")


class Sample:
    """One text as it grows: what may be shown of it, and where it stops.

    Attributes:
      ids, log_probabilities: of the symbols after the prompt, up to the stop string.
      stopped: the stop string was met.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: np.ndarray, stop: np.ndarray) -> None:
        self.ids: list[int] = []
        self.log_probabilities: list[float] = []
        self.stopped = False
        self._decoder, self._stop, self._taken = vocabulary.decoder(), stop.tolist(), 0
        self._prompt_text = self._decoder.feed(prompt)

    def feed(self, ids: np.ndarray, log_probabilities: np.ndarray) -> None:
        """Adds symbols; those from the stop string on are dropped."""
        if self.stopped:
            return
        first = max(0, len(self.ids) - len(self._stop) + 1)  # an earlier stop would have been met before
        self.ids += ids.tolist()
        self.log_probabilities += log_probabilities.tolist()
        if not self._stop:
            return
        for start in range(first, len(self.ids) - len(self._stop) + 1):
            if self.ids[start : start + len(self._stop)] == self._stop:
                self.stopped = True
                del self.ids[start:], self.log_probabilities[start:]
                return

    def take(self, last: bool = False) -> str:
        """The text, prompt first, that was not taken yet and can be shown.

        What may be the beginning of the stop string or of a UTF-8 sequence is held back, unless nothing more will come.
        """
        end = len(self.ids) - (0 if last or self.stopped else self._beginning_of_stop())
        text, self._prompt_text = self._prompt_text, ""
        text += self._decoder.feed(np.array(self.ids[self._taken : end], np.int32))
        self._taken = end
        return text + (self._decoder.flush() if last else "")

    def _beginning_of_stop(self) -> int:
        """How many symbols at the end may be the beginning of the stop string."""
        lengths = range(min(len(self._stop) - 1, len(self.ids)), 0, -1)
        return next((n for n in lengths if self.ids[-n:] == self._stop[:n]), 0)


def main(argv: Sequence[str]) -> int:
    (chosen, sampling), _ = flags.parse(argv, __doc__ or "", SampleFlags(), Sampling())
    if not chosen.run_dir:
        raise ValueError("--run_dir is required: name the run to sample from")
    run_dir = at_home(chosen.run_dir)
    config, identity = run_directory.read(run_dir)
    vocabulary = identity.vocabulary
    prompt, stop = _prompt(chosen, vocabulary), _stop(chosen.stop, vocabulary)

    compilation.keep()
    mesh = cores.mesh_of_samples(chosen.num_samples)
    params, step = run_directory.restore_params(run_dir, config, identity, mesh, chosen.checkpoint)
    print(f"{run_dir}: the checkpoint of step {step}", file=sys.stderr)
    chunks = generate_lib.generate(
        config.model,
        params,
        prompt if len(prompt) else _before_all_text(config, vocabulary),
        sampling,
        rows=chosen.num_samples,
        length=chosen.length,
        seed=chosen.seed,
        unknown_id=0 if vocabulary.kind == "characters" else None,
        separator=run_directory.separator(config, vocabulary),
    )
    samples = [Sample(vocabulary, prompt, stop) for _ in range(chosen.num_samples)]
    began = time.monotonic()
    if chosen.format == "json":
        for _ in _grow(samples, chunks):
            pass
        for number, sample in enumerate(samples, 1):
            print(json.dumps({"sample": number} | _fields(sample, vocabulary, prompt, chosen.seed, step)))
    else:
        _print_text(samples, chunks)
    made, seconds = sum(len(sample.ids) for sample in samples), time.monotonic() - began
    print(f"{made:,} symbols in {seconds:.1f} s, {made / seconds:,.0f} a second", file=sys.stderr)
    return program.DONE


def _prompt(chosen: SampleFlags, vocabulary: Vocabulary) -> np.ndarray:
    """The ids [symbols] of the prompt."""
    name, text = "prompt", chosen.prompt
    if chosen.prompt_file:
        name = "prompt_file"
        try:
            text = at_home(chosen.prompt_file).read_bytes().decode("utf-8", "surrogateescape")
        except OSError as error:
            raise ValueError(f"prompt_file={chosen.prompt_file} cannot be read: {error.strerror}") from None
    try:
        ids = vocabulary.encode(text, "map")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if chosen.unknown == "refuse" and (position := _first_unknown(ids, vocabulary)) is not None:
        raise ValueError(
            f"{name}: {_named(text[position])} at position {position} is not in the vocabulary: leave it out, or turn "
            f"such symbols into the unknown one with --unknown=map"
        )
    return ids


def _stop(text: str, vocabulary: Vocabulary) -> np.ndarray:
    """The ids [symbols] of the stop string."""
    ids = vocabulary.encode(text, "map")
    if (position := _first_unknown(ids, vocabulary)) is not None:
        raise ValueError(
            f"stop={text!r} can never be met: {_named(text[position])} at position {position} is not in the vocabulary"
        )
    return ids


def _first_unknown(ids: np.ndarray, vocabulary: Vocabulary) -> int | None:
    return None if vocabulary.kind == "bytes" or ids.all() else int(np.argmin(ids != 0))


def _named(symbol: str) -> str:
    return f"{symbol!r} (U+{ord(symbol):04X})"


def _before_all_text(config: Config, vocabulary: Vocabulary) -> np.ndarray:
    """What is read, and not shown, where there is no prompt: one symbol, or none."""
    separator = run_directory.separator(config, vocabulary)
    if separator is not None:
        return np.array([separator])
    return vocabulary.encode("\n") if vocabulary.kind == "bytes" or "\n" in vocabulary.characters else np.array([])


def _grow(samples: list[Sample], chunks: Iterable[Chunk]) -> Iterator[None]:
    """Feeds the samples, chunk by chunk, until there is no more or all have stopped."""
    for chunk in chunks:
        for row, sample in enumerate(samples):
            sample.feed(chunk.ids[row], chunk.log_probabilities[row])
        yield
        if all(sample.stopped for sample in samples):
            return


def _print_text(samples: list[Sample], chunks: Iterable[Chunk]) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what the terminal cannot show must not end the text
    live, *others = samples
    try:
        print(live.take(), end="", flush=True)
        for _ in _grow(samples, chunks):
            print(live.take(), end="", flush=True)
    finally:  # when interrupted too
        print(live.take(last=True), flush=True)
    for number, sample in enumerate(others, 2):
        print(f"\n--- sample {number} of {len(samples)} ---\n{sample.take(last=True)}", flush=True)


def _fields(sample: Sample, vocabulary: Vocabulary, prompt: np.ndarray, seed: int, step: int) -> dict[str, Any]:
    """The object of --format=json."""
    ids, total = np.array(sample.ids, np.int32), math.fsum(sample.log_probabilities)
    symbols = sample.ids if vocabulary.kind == "bytes" else vocabulary.decode(ids)
    return {
        "prompt": vocabulary.decode(prompt),
        "text": vocabulary.decode(ids),
        "symbols": [
            {"symbol": symbol, "logprob": value}
            for symbol, value in zip(symbols, sample.log_probabilities, strict=True)
        ],
        "logprob": total,
        "bits_per_character": -total / NATS_PER_BIT / len(ids) if len(ids) else None,
        "seed": seed,
        "checkpoint": step,
    }


if __name__ == "__main__":
    program.run("launch.sample", main)
