"""Samples of a run as it trains: the same prompt and noise each time, so that only the model changes."""

from typing import Any

import numpy as np

from charlstm import distributed
from charlstm.config import Config
from charlstm.inference.generate import generate
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
from charlstm.training.loss import NATS_PER_BIT
from charlstm.types import ModelParams
from data_pipeline.batch import Separator
from data_pipeline.vocabulary import Vocabulary

SEED = 0  # that of launch.sample, where no other is given
LINES, COLUMNS = 3, 100  # of the text that the log shows


def check(config: Config, vocabulary: Vocabulary) -> None:
    """Raises ValueError where --sample_prompt has symbols that the vocabulary lacks."""
    if config.training.sampled_every is not None:
        _prompt(config, vocabulary)


def remarks(config: Config) -> list[str]:
    """A remark where --sample_prompt may not be what is meant."""
    remark = remark_on_escapes("sample_prompt", config.training.sample_prompt)
    return [remark] if remark else []


def draw(config: Config, vocabulary: Vocabulary, separator: Separator, params: ModelParams) -> dict[str, Any]:
    """Draws a text from `params`, on one device of this process: prompt, text, bits_per_symbol.

    It is the text of `launch.sample` with the same prompt, length and temperature.  bits_per_symbol is the model's own
    surprise at it; None where nothing was drawn.  The text of a backward run ends with the prompt, and its prompt, what
    stands before the text, is "".
    """
    settings, backward = config.training, config.streams.reverse
    prompt, stop = as_read(_prompt(config, vocabulary), backward), np.array(separator, np.int32)
    sample = Sample(vocabulary, prompt, stop, prompt, backward=backward)
    chunks = generate(
        config.model,
        distributed.own_copy(params),
        np.concatenate([unseen_before(prompt, separator, vocabulary), prompt]),
        Sampling(settings.sample_temperature),
        rows=1,
        length=settings.sample_length,
        seed=SEED,
        unknown_id=unknown_id(vocabulary),
        separator=separator,
    )
    for _ in grow([sample], chunks):
        pass
    bits = -sum(sample.log_probabilities) / NATS_PER_BIT / len(sample.ids) if sample.ids else None
    if backward:
        return {"prompt": "", "text": sample.take(last=True), "bits_per_symbol": bits}
    text = vocabulary.decode(np.array(sample.ids, np.int32))
    return {"prompt": vocabulary.decode(prompt), "text": text, "bits_per_symbol": bits}


def in_short(sample: dict[str, Any]) -> list[str]:
    """The first lines of a sample that are not empty, cut to a width; what cannot be printed is a question mark."""
    lines = [line for line in (sample["prompt"] + sample["text"]).expandtabs(4).splitlines() if line.strip()]
    return ["".join(c if c.isprintable() else "?" for c in line[:COLUMNS]) for line in lines[:LINES]]


def _prompt(config: Config, vocabulary: Vocabulary) -> np.ndarray:
    """The ids [symbols] of --sample_prompt."""
    try:
        return encode_prompt(config.training.sample_prompt, vocabulary)
    except ValueError as error:
        raise ValueError(f"sample_prompt: {error}") from None
