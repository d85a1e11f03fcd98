"""Reads a whole text once and keeps sums: which units know a pattern, where they are largest, how their gates stand.

The text is read in segments, each as rows side by side that are warmed by the symbols before them, so that memory grows
neither with the text nor with what is asked.  Values of units are counted in 255 levels (`units.LEVELS`).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from charlstm.config.model import ModelConfig
from charlstm.inference.evaluate import Split
from charlstm.inspect.patterns import Pattern, symbols_of
from charlstm.inspect.trace import first_state, require_forward
from charlstm.inspect.units import LEVELS, SIGMOID, all_units, arrays_of, main_array, quantized, shown
from charlstm.model import language_model
from charlstm.model.ops import compiler
from data_pipeline.batch import ends_separator, looks_back

if TYPE_CHECKING:
    from charlstm.api import Model

SEGMENT = 1 << 19  # symbols whose text and labels are in memory
AROUND = 4096  # symbols on either side that a pattern sees, too; a longer match may be cut
WARM_UP = 256  # symbols that a row reads before those that count
LEAST_ROW = 4096  # symbols of a row at least
MOST_ROWS, WINDOW = 64, 64
MOST_PATTERNS = 60  # with the whole text and the half, bits of an int64
BLOCK = 1000  # symbols; blocks of even number choose units, those of odd number score the choice
TOP = 6  # places that are kept of each unit and end
APART = 40  # symbols between two of them at least


@dataclasses.dataclass
class Survey:
    """Statistics of a model's units over a text, in the order of `units.all_units`.

    Attributes:
      symbols: read.
      levels: int64 `[patterns + 1, 2, units, 255]`: how often a unit had a level inside a pattern, the last one being
        the whole text; by halves of the text, the one that chooses and the one that is held out.
      gates: gate -> `[3, units]`: symbols at which it was below .1, above .9, and its sum.
      highest, lowest: `[TOP, 2, units]`: where a unit was at its ends, the first the farthest: how many levels from the
        other end (-1: no such place), and the position in the text.
    """

    patterns: tuple[str, ...]
    symbols: int
    levels: np.ndarray
    gates: dict[str, np.ndarray]
    highest: np.ndarray
    lowest: np.ndarray


class Rows(NamedTuple):
    """One window of a segment's rows side by side, `[rows, WINDOW]`."""

    ids: np.ndarray
    reset: np.ndarray
    position: np.ndarray  # in the segment; negative while warming up
    counted: np.ndarray


def read(
    model: "Model",
    split: Split,
    patterns: Mapping[str, Pattern],
    *,
    patterns_only: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
    """Reads a text or a split once; `patterns_only` leaves gates and ends out, which takes less time.

    Args:
      progress: is told after each window how many symbols were read, of how many.

    Raises:
      ValueError: the model reads backward, or there are more than MOST_PATTERNS.
    """
    require_forward(model)
    config = model.config.model
    count, P = len(all_units(config)), len(patterns)
    if P > MOST_PATTERNS:
        raise ValueError(f"{P} patterns are more than can be looked for at once: give at most {MOST_PATTERNS}")
    gates = [gate for gate in arrays_of(config) if gate in SIGMOID]
    nowhere = np.array([[-1.0], [-1.0 - APART]])[None]
    survey = Survey(
        tuple(patterns),
        len(split),
        np.zeros((P + 1, 2, count, len(LEVELS)), np.int64),
        {gate: np.zeros((3, count)) for gate in gates},
        np.tile(nowhere, (TOP, 1, count)),
        np.tile(nowhere, (TOP, 1, count)),
    )
    done = 0
    for start in range(0, len(split), SEGMENT):
        stop = min(len(split), start + SEGMENT)
        labels = np.stack([*_labels(model, split, patterns, start, stop), np.ones(stop - start, bool)])
        half = (np.arange(start, stop) // min(BLOCK, max(1, len(split) // 8))) % 2
        for rows, levels, sums in _looked(model, _rows(model, split, start, stop), not patterns_only):
            levels_BTU, position = np.asarray(levels), rows.position[rows.counted]
            _count(survey.levels, levels_BTU[rows.counted], labels[:, position], half[position])
            done += len(position)
            progress(done, len(split))
            if patterns_only:
                continue
            _keep_ends(survey, levels_BTU, rows, start)
            for gate, sum_3U in sums.items():
                survey.gates[gate] += np.asarray(sum_3U)
    return survey


def _labels(
    model: "Model", split: Split, patterns: Mapping[str, Pattern], start: int, stop: int
) -> Iterator[np.ndarray]:
    """Yields whether each symbol of a segment is inside each pattern, bool `[symbols]`."""
    if not patterns:
        return
    first = max(0, start - AROUND)
    text, lengths = symbols_of(model.vocabulary, split.read(first, min(len(split), stop + AROUND)))
    for label in patterns.values():
        yield np.repeat(label(text), lengths)[start - first : stop - first]


def _rows(model: "Model", split: Split, start: int, stop: int) -> Iterator[Rows]:
    """Yields the windows of a segment, its rows side by side."""
    count, back = stop - start, looks_back(model.separator)
    rows = min(MOST_ROWS, max(1, count // LEAST_ROW))
    length = -(-count // rows)
    before = min(start, WARM_UP + back)
    ids = split.read(start - before, stop).astype(np.int32)
    ids = np.pad(ids, (WARM_UP + back - before, rows * length - count + WINDOW), constant_values=-1)
    reset = ends_separator(ids, model.separator)
    reset[WARM_UP] |= start == 0
    ids = np.maximum(ids[back:], 0)
    begins = np.arange(rows)[:, None] * length
    for first in range(-WARM_UP if start or rows > 1 else 0, length, WINDOW):
        offset = np.arange(first, first + WINDOW)[None]
        position = begins + offset
        counted = (offset >= 0) & (offset < length) & (position < count)
        place = np.minimum(position + WARM_UP, len(ids) - 1)
        yield Rows(ids[place], reset[place], position, counted)


def _looked(model: "Model", windows: Iterator[Rows], with_gates: bool) -> Iterator[tuple[Rows, Any, dict[str, Any]]]:
    """Yields windows with what `_look` finds; while one is counted, the device reads the next."""
    config = model.config.model
    state: Any = None
    before: Any = None
    for rows in windows:
        if state is None:
            state = first_state(config, model.params, len(rows.ids))
        state, levels, sums = _look(model.params, state, rows.ids, rows.reset, rows.counted, config, with_gates)
        if before is not None:
            yield before
        before = rows, levels, sums
    if before is not None:
        yield before


def _count(levels: np.ndarray, levels_NU: np.ndarray, labels_PN: np.ndarray, half_N: np.ndarray) -> None:
    """Adds the levels of N symbols to the counts of their patterns and halves: each kind of symbol is counted once."""
    U, L = levels.shape[2:]
    bits_N = (1 << np.arange(len(labels_PN))) @ labels_PN + (half_N << len(labels_PN))
    kinds, kind_N = np.unique(bits_N, return_inverse=True)
    counts_UKL = np.empty((U, len(kinds), L), np.int64)
    for unit, level_N in enumerate(np.ascontiguousarray(levels_NU.T)):  # one by one, in the fastest cache
        counts_UKL[unit] = np.bincount(level_N + kind_N * L, minlength=counts_UKL[unit].size).reshape(-1, L)
    for number, kind in enumerate(kinds):
        inside = (kind >> np.arange(len(labels_PN)) & 1).astype(bool)
        levels[inside, kind >> len(labels_PN)] += counts_UKL[:, number]


def _keep_ends(survey: Survey, levels_BTU: np.ndarray, rows: Rows, start: int) -> None:
    """Keeps the places where units are highest and lowest: of each row and window at most one."""
    for kept, sign in ((survey.highest, 1), (survey.lowest, -1)):
        end_BTU = levels_BTU if sign == 1 else len(LEVELS) - 1 - levels_BTU
        end_BTU = np.where(rows.counted[:, :, None], end_BTU.astype(np.int16), -1)
        most_BU = end_BTU.max(1)
        row, unit = np.nonzero(most_BU > kept[-1, 0][None])
        for r, u in zip(row.tolist(), unit.tolist(), strict=True):
            value = float(most_BU[r, u])
            if value <= kept[-1, 0, u]:  # others of this window were put before it
                continue
            place = int(end_BTU[r, :, u].argmax())
            position = start + int(rows.position[r, place])
            near = np.flatnonzero(np.abs(kept[:, 1, u] - position) < APART)
            if len(near) and kept[near[0], 0, u] >= value:
                continue
            lost = near[0] if len(near) else TOP - 1
            kept[lost, :, u] = value, position
            kept[:, :, u] = kept[np.argsort(-kept[:, 0, u], kind="stable"), :, u]


@partial(compiler.jit, static_argnames=("config", "with_gates"))
def _look(
    params, state, ids_BT, reset_BT, counted_BT, config: ModelConfig, with_gates
) -> tuple[Any, Any, dict[str, Any]]:
    """Reads a window: (state, levels of the units [B, T, U], of each gate the sums of `Survey.gates`)."""
    state, _, found = language_model.trace(config, params, state, ids_BT, reset_BT, with_gates=with_gates)
    layers, main = range(1, len(config.widths) + 1), main_array(config)

    def joined(name: str) -> Any:
        return jnp.concatenate([shown(config, name, found[f"{n}.{name}"]) for n in layers], axis=2).swapaxes(0, 1)

    sums = {}
    for gate in arrays_of(config) if with_gates else ():
        if gate in SIGMOID:
            value_BTU, counts = joined(gate), counted_BT[:, :, None]
            parts = (value_BTU < 0.1) & counts, (value_BTU > 0.9) & counts, jnp.where(counts, value_BTU, 0)
            sums[gate] = jnp.stack([part.sum((0, 1), jnp.float32) for part in parts])
    return state, quantized(joined(main)), sums
