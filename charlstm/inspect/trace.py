"""Reads a text with all that the model computes, a window at a time: memory does not grow with the text."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.config.model import ModelConfig
from charlstm.inference.evaluate import Split
from charlstm.inspect.units import arrays_of, main_array
from charlstm.model import language_model
from charlstm.model.ops import compiler
from charlstm.training.loss import NATS_PER_BIT, cross_entropy
from charlstm.types import ModelParams, RecurrentState
from data_pipeline.batch import Separator, ends_separator, looks_back
from data_pipeline.direction import Reversed
from data_pipeline.shards import ArraySplit, Corpus

if TYPE_CHECKING:
    from charlstm.api import Model

WINDOW = 256  # symbols that one call of the device reads


def windows(split: Split, separator: Separator, following: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields windows of one length: symbols, those that follow, and where the state is reset, `[1, WINDOW]`.

    Args:
      following: symbols at the end that are only read as those that follow.  What is beyond the end is padding.
    """
    back = looks_back(separator)
    for first in range(0, len(split) - following, WINDOW):
        start = max(0, first - back)
        ids = split.read(start, min(len(split), first + WINDOW + 1)).astype(np.int32)
        ids = np.pad(ids, (back - (first - start), 0), constant_values=-1)
        ids = np.pad(ids, (0, back + WINDOW + 1 - len(ids)))
        reset = ends_separator(ids, separator)[:WINDOW]
        yield ids[None, back:-1], ids[None, back + 1 :], reset[None]


def require_vocabulary(model: "Model", text: Split | Corpus) -> None:
    """Raises ValueError where a text was prepared with other symbols than those of the model."""
    if text.vocabulary != model.vocabulary:
        raise ValueError(
            f"this model has {model.vocabulary.in_short}, and the text given has {text.vocabulary.in_short}: give one "
            "that was prepared with the model's own symbols"
        )


def split_of(model: "Model", text: Split | str | bytes) -> Split:
    """Returns a text as a split of the model's symbols, and such a split as it is.

    Raises:
      TypeError: it is neither, such as a corpus or a path.
      ValueError: the split has another vocabulary than the model.
    """
    if isinstance(text, str | bytes):
        return ArraySplit(text, model.vocabulary)
    if not (hasattr(text, "read") and hasattr(text, "vocabulary")):
        raise TypeError(f"text is a {type(text).__name__}: give the text itself, or a split such as corpus.valid")
    require_vocabulary(model, text)
    return text


def as_read(model: "Model", text: Split | str | bytes) -> Split:
    """Returns a text, or a split in the order of the text, as a split in the order in which the model reads it.

    Raises:
      ValueError: the split has another vocabulary than the model.
    """
    split = split_of(model, text)
    return Reversed(split) if model.config.streams.reverse else split


def in_text_order(model: "Model", array: np.ndarray) -> np.ndarray:
    """Returns what the model found at each symbol that it read, in the order of the text."""
    return array[::-1] if model.config.streams.reverse else array


def require_forward(model: "Model") -> None:
    """Raises ValueError where a model reads backward."""
    if model.config.streams.reverse:
        raise ValueError(
            "this model reads backward, and what is shown here goes with reading forward: Model.bits and Model.trace "
            "give what it computes at each symbol, in the order of the text"
        )


def first_state(config: ModelConfig, params: ModelParams, rows: int) -> RecurrentState:
    """The state before anything was read."""
    return language_model.reset_state(params, language_model.zero_state(config, rows, params.b_out.dtype))


def require_state(config: ModelConfig, state: Any, rows: int) -> None:
    """Raises ValueError where a state is not one that such a model has of `rows` texts side by side."""
    arrays = 2 if main_array(config) == "c" else 1  # of a layer: h, and c if any
    if [np.shape(leaf) for leaf in jax.tree.leaves(state)] != [(rows, H) for H in config.widths for _ in range(arrays)]:
        raise ValueError(
            f"state is none that this model has after {rows} text{'s' * (rows != 1)}: hand on that of the call before, "
            "or None where a text begins"
        )


def names_of(config: ModelConfig) -> tuple[str, ...]:
    """Names of all arrays: "logits", and of each layer its states and gates, such as "1.c"."""
    return ("logits", *(f"{n + 1}.{array}" for n in range(len(config.widths)) for array in arrays_of(config)))


def named(config: ModelConfig, names: str | Sequence[str]) -> tuple[str, ...]:
    """The names of arrays that are asked for, one or several; all where none is.

    Raises:
      ValueError: there is no array of a name.
    """
    known = names_of(config)
    wanted = (names,) if isinstance(names, str) else tuple(names)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"there is no array {unknown[0]!r}: use {', '.join(known)}")
    return wanted or known


def chunks(
    model: "Model", text: Split | str | bytes, names: str | Sequence[str] = ()
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the named arrays of each window of a text, `[symbols, .]`, after each symbol; by default all.

    Args:
      text: a text, or a split in the order of the text; windows and symbols come in the order in which the model reads.

    Raises:
      ValueError: there is no array of a name, or the split has another vocabulary than the model.
    """
    config, split = model.config.model, as_read(model, text)
    state, wanted, left = first_state(config, model.params, 1), named(config, names), len(split)
    for read, _, reset in windows(split, model.separator, 0):
        state, found = _trace(model.params, state, read, reset, config, wanted)
        yield {name: np.asarray(found[name])[:left, 0] for name in wanted}
        left -= WINDOW


def whole(model: "Model", split: Split, names: str | Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The chunks of a text, joined, in the order of the text."""
    config = model.config.model
    found: dict[str, list[np.ndarray]] = {name: [] for name in named(config, names)}
    for chunk in chunks(model, split, names):
        for name, array in chunk.items():
            found[name].append(array)
    if len(split) == 0:
        return {name: np.zeros((0, _width(config, name, model.vocabulary.size)), np.float32) for name in found}
    return {name: in_text_order(model, np.concatenate(parts)) for name, parts in found.items()}


def bits(model: "Model", text: Split | str | bytes) -> np.ndarray:
    """Returns the bits of each symbol given all that were read before, float32 `[symbols]`, in the order of the text.

    The one that is read first costs log2(V).
    """
    split, state = as_read(model, text), first_state(model.config.model, model.params, 1)
    found = [np.full(min(1, len(split)), np.log2(model.vocabulary.size), np.float32)]
    for read, following, reset in windows(split, model.separator, 1):
        state, nats = _nats(model.params, state, read, following, reset, model.config.model)
        found.append(np.asarray(nats, np.float32) / NATS_PER_BIT)
    return in_text_order(model, np.concatenate(found)[: len(split)].astype(np.float32))


def _width(config: ModelConfig, name: str, vocabulary_size: int) -> int:
    return vocabulary_size if name == "logits" else config.widths[int(name.partition(".")[0]) - 1]


@partial(compiler.jit, static_argnames=("config", "names"))
def _trace(params, state, ids_BT, reset_BT, config, names) -> tuple[RecurrentState, dict[str, Any]]:
    state, logits_TBV, found = language_model.trace(config, params, state, jnp.asarray(ids_BT), reset_BT)
    found["logits"] = logits_TBV
    return state, {name: found[name] for name in names}


@partial(compiler.jit, static_argnames="config")
def _nats(params, state, ids_BT, following_BT, reset_BT, config):
    state, logits_TBV = language_model.apply(config, params, state, ids_BT, reset_BT)
    return state, cross_entropy(logits_TBV, following_BT.T)[:, 0]
