"""Symbols by the ids of a model that others trained, and its parameters in the order of ours.

Here a vocabulary of characters is in the order of their code points, and id 0 is the unknown character.  Where a model
has no unknown symbol, one is added: it is read as the mean of all symbols, and written with e^-30 of the probability of
the average one, so that nothing that the model computes changes in float32.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from charlstm.types import ModelParams
from data_pipeline.atomic_files import expand_user
from data_pipeline.vocabulary import Vocabulary

BYTES = "bytes"
UNKNOWN = ("<unk>", "<UNK>", "[UNK]", "unk", "UNK", "<unknown>")
PRIVATE = range(0xE000, 0xF900)  # code points without a meaning: what stands for tokens of several characters
UNSEEN = 30.0  # nats that an unknown character is less probable than the average symbol
NO_ID = -1


class Table(NamedTuple):
    """A vocabulary, and for each of its ids the one that the model of others has for it; NO_ID for what it lacks."""

    vocabulary: Vocabulary
    theirs: np.ndarray
    remarks: list[str]


def read(vocabulary_file: str, size: int) -> Table:
    """The symbols of a model of `size` ids.

    Args:
      vocabulary_file: "bytes"; a .json: the symbols in the order of their ids, as a list or a string, or an object of
        symbol to id or id to symbol; or any other file: a text, whose distinct characters have ids in sorted order.

    Raises:
      ValueError: it cannot be read, or has another number of symbols.
    """
    if vocabulary_file == BYTES:
        if size != 256:
            raise ValueError(
                f"vocabulary_file=bytes is of 256 symbols and the weights are of {size:,}: give a .json of all, or "
                "leave other rows out of the weights"
            )
        return Table(Vocabulary("bytes"), np.arange(256), [])
    if not vocabulary_file:
        also = ", or --vocabulary_file=bytes" if size == 256 else ""
        raise ValueError(
            f"the weights are of {size} symbols, and do not say of which: give --vocabulary_file, a .json of the "
            f"symbols or the text that the model was trained on{also}"
        )
    path = expand_user(vocabulary_file)
    try:
        tokens = _of_json(path) if path.suffix == ".json" else _of_text(path, size)
    except OSError as error:
        raise ValueError(f"vocabulary_file={path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"vocabulary_file={path} is not UTF-8: {error.reason} at byte {error.start}") from None
    if len(tokens) != size:
        raise ValueError(f"vocabulary_file={path} has {len(tokens):,} symbols and the weights are of {size:,}")
    return _table(tokens, path)


def _of_json(path: Path) -> list[str]:
    try:
        tree = json.loads(path.read_text("utf-8"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"vocabulary_file={path} is not json: {error}") from None
    tokens: Any = tree
    if isinstance(tree, dict):
        by_id = {value: key for key, value in tree.items() if type(value) is int}
        if len(by_id) < len(tree):  # id -> symbol
            by_id = {int(key): value for key, value in tree.items() if key.isdecimal() and len(key) < 10}
        tokens = [by_id.get(number) for number in range(len(tree))]
    tokens = list(tokens) if isinstance(tokens, list | str) else [None]
    if not tokens or not all(isinstance(token, str) and token for token in tokens):
        raise ValueError(
            f"vocabulary_file={path} is neither a list of symbols nor an object of symbols and ids from 0 on, each once"
        )
    return tokens


def _of_text(path: Path, size: int) -> list[str]:
    """The distinct characters of a text, sorted, its line ends read as \\n; as they are, where that gives `size`."""
    found: dict[str | None, set[str]] = {None: set(), "": set()}
    for newline, seen in found.items():
        with path.open(encoding="utf-8", newline=newline) as file:
            while part := file.read(1 << 20):
                seen.update(part)
    usual, as_it_is = map(sorted, found.values())
    return as_it_is if len(as_it_is) == size else usual


def _table(tokens: list[str], path: Path) -> Table:
    if len(set(tokens)) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if token in tokens[:number])
        raise ValueError(f"vocabulary_file={path} has the symbol {twice!r} twice")
    unknown = next((token for token in UNKNOWN if token in tokens), None)
    ids = {token: number for number, token in enumerate(tokens) if len(token) == 1}
    free = (chr(code) for code in PRIVATE if chr(code) not in ids)
    remarks = []
    for number, token in enumerate(tokens):
        if len(token) > 1 and token != unknown:
            stands_in = next(free, None)
            if stands_in is None:
                raise ValueError(f"vocabulary_file={path} has over {len(PRIVATE)} symbols of several characters")
            ids[stands_in] = number
            remarks.append(f"{token!r} is no character: U+{ord(stands_in):04X} stands for it")
    if not ids:
        raise ValueError(f"vocabulary_file={path} has no characters")
    if unknown is None:
        remarks.append("there was no symbol for unknown characters: one is added, which is never written")
    theirs = [NO_ID if unknown is None else tokens.index(unknown), *(ids[symbol] for symbol in sorted(ids))]
    return Table(Vocabulary("characters", "".join(sorted(ids))), np.array(theirs), remarks)


def rearranged(params: ModelParams, table: Table) -> ModelParams:
    """The parameters with the symbols in the order of `table`."""
    lacking = table.theirs == NO_ID

    def rows(array_VN: Any, beneath: float = 0.0) -> Any:
        found = array_VN[table.theirs]
        found[lacking] = array_VN.mean(0, dtype=np.float64) - beneath
        return found

    first, *others = params.cells
    embedding, w_out = params.embedding, params.w_out
    return ModelParams(
        embedding=None if embedding is None else rows(embedding),
        cells=(first._replace(w_x=rows(first.w_x)) if embedding is None else first, *others),
        w_out=None if w_out is None else rows(w_out.T).T,
        b_out=rows(params.b_out, UNSEEN),
    )
