"""All that the page shows of one model and one text."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from charlstm.inference.evaluate import Split
from charlstm.inspect import ranking, saliency, surprise, survey, trace
from charlstm.inspect.patterns import NAMED, Pattern, symbols_of
from charlstm.inspect.probe import Probe
from charlstm.inspect.ranking import Ranking
from charlstm.inspect.surprise import Expected
from charlstm.inspect.survey import Survey
from charlstm.inspect.units import Unit, main_array, quantized, shown
from data_pipeline.shards import ArraySplit

if TYPE_CHECKING:
    from charlstm.api import Model

AROUND = 40  # characters on either side of where a unit is at its end
BEST = 10  # units that are kept of a ranking


@dataclasses.dataclass(frozen=True)
class Inspection:
    """One model reads one text of C characters, the first ones of a text that is surveyed as a whole.

    Attributes:
      text: the characters; the arrays below have one entry for each, that of its last symbol.
      arrays: name -> levels uint8 `[C, units]` of all layers side by side; the first one is the main one.
      saliency: float32 `[C, lookback]` of each character's log-probability by the characters before it.
      snippets: of each unit the text around where it is highest, then lowest: (before, the character, after).
    """

    name: str
    model: "Model"
    text: str
    arrays: dict[str, np.ndarray]
    expected: Expected
    saliency: np.ndarray
    survey: Survey
    rankings: Mapping[str, Ranking]
    snippets: tuple[tuple[list[tuple[str, str, str]], ...], ...]
    probes: Sequence[Probe] = ()
    unknown: int = 0  # symbols of the text that are not in the vocabulary
    left_out: int = 0  # characters of the text that are surveyed and not shown


def inspect(
    model: "Model",
    text: Split | str | bytes,
    name: str,
    *,
    length: int = 4000,
    arrays: Sequence[str] = (),
    lookback: int = 24,
    patterns: Mapping[str, Pattern] = NAMED,
    progress: Callable[[str], Callable[[int, int], None]] = lambda doing: lambda done, total: None,
) -> Inspection:
    """Reads a text with a model.

    Args:
      length: characters that are shown.
      arrays: c, h or gates whose values are kept, such as "h"; those of the main one, c or h, always are.
      lookback: characters before each one of which the saliency is computed; 0: none.
      patterns: which units are ranked by.
      progress: what is being done -> a function that is told how much of it is done, of how much.

    Raises:
      ValueError: the text is empty.
    """
    config, whole = model.config.model, trace.split_of(model, text)
    if not len(whole):
        raise ValueError("the text is empty: give one that has characters")
    everything, lengths = symbols_of(model.vocabulary, whole.read(0, len(whole)))
    ends = np.cumsum(lengths)
    shown_text, last = everything[:length], ends[:length] - 1
    part = ArraySplit.of_ids(whole.read(0, last[-1] + 1), model.vocabulary)
    wanted = tuple(dict.fromkeys((main_array(config), *arrays)))
    found = survey.read(model, whole, patterns, progress=progress(f"{name}: reading"))
    expected = surprise.joined(surprise.expected(model, part))
    return Inspection(
        name,
        model,
        shown_text,
        {array: _levels(model, part, array)[last] for array in wanted},
        _by_character(expected, last),
        _saliency(model, part, last, lengths[:length], lookback, progress(f"{name}: saliency")),
        found,
        ranking.rank_all(model, found, BEST),
        _snippets(found, everything, ends),
        unknown=whole.unknown,
        left_out=max(0, len(everything) - length),
    )


def first_characters(model: "Model", text: Split | str | bytes, length: int) -> tuple[str, ArraySplit]:
    """Returns the first characters of a text, as they are read, and their symbols."""
    whole = trace.split_of(model, text)
    characters, lengths = symbols_of(model.vocabulary, whole.read(0, len(whole)))
    return characters[:length], ArraySplit.of_ids(whole.read(0, int(lengths[:length].sum())), model.vocabulary)


def values(model: "Model", text: Split | str | bytes, unit: Unit) -> np.ndarray:
    """The values that are shown of a unit, within -1 and 1, at each character of a text."""
    split = trace.split_of(model, text)
    _, lengths = symbols_of(model.vocabulary, split.read(0, len(split)))
    array = trace.whole(model, split, (unit.name,))[unit.name][:, unit.number]
    return np.asarray(shown(model.config.model, unit.array, array))[np.cumsum(lengths) - 1]


def _levels(model: "Model", split: ArraySplit, array: str) -> np.ndarray:
    """The levels of an array of all layers, uint8 `[symbols, units]`."""
    config = model.config.model
    names = [f"{n + 1}.{array}" for n in range(len(config.widths))]
    parts = []
    for chunk in trace.chunks(model, split, names):
        of_layers = [quantized(shown(config, array, chunk[name])) for name in names]
        parts.append(np.concatenate(of_layers, axis=1))
    return np.concatenate(parts)


def _by_character(expected: Expected, last: np.ndarray) -> Expected:
    """Sums bits and entropy over the symbols of each character; rank and guesses are of its last symbol."""
    first = np.concatenate([[0], last[:-1] + 1])
    bits, entropy = np.add.reduceat(expected.bits, first), np.add.reduceat(expected.entropy, first)
    return Expected(bits, entropy, expected.rank[last], expected.guesses[last], expected.probabilities[last])


def _saliency(
    model: "Model",
    split: ArraySplit,
    last: np.ndarray,
    lengths: np.ndarray,
    lookback: int,
    progress: Callable[[int, int], None],
) -> np.ndarray:
    """The saliency of each character's last symbol, summed over the symbols of each of `lookback` characters before."""
    if not lookback:
        return np.zeros((len(last), 0), np.float32)
    characters = np.arange(len(last))
    first = last - lengths + 1
    symbols = int((last - first[np.maximum(characters - lookback, 0)]).max())  # that reach so many characters back
    of_symbols = saliency.saliency(model, split, max(1, symbols), progress)
    total = np.concatenate([np.zeros((len(split), 1), np.float32), np.cumsum(of_symbols, axis=1)], axis=1)[last]
    found = np.zeros((len(last), lookback), np.float32)
    for back in range(1, min(lookback, len(last) - 1) + 1):
        end = last[back:] - last[:-back]  # symbols from that character's last one to this one's
        rows, begin = characters[back:], end + lengths[:-back] - 1
        found[back:, back - 1] = total[rows, begin] - total[rows, end - 1]
    return found


def _snippets(found: Survey, text: str, ends: np.ndarray) -> tuple[tuple[list[tuple[str, str, str]], ...], ...]:
    def around(position: float) -> tuple[str, str, str]:
        at = int(np.searchsorted(ends, position, side="right"))
        return text[max(0, at - AROUND) : at], text[at], text[at + 1 : at + 1 + AROUND // 2]

    def of_end(kept: np.ndarray, unit: int) -> list[tuple[str, str, str]]:
        return [around(position) for value, position in kept[:, :, unit].tolist() if value >= 0]

    units = range(found.highest.shape[2])
    return tuple((of_end(found.highest, unit), of_end(found.lowest, unit)) for unit in units)
