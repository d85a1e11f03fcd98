"""Ranks units by how well one of them alone tells whether a symbol is inside a pattern."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from charlstm.inference.evaluate import Split
from charlstm.inspect import survey as survey_lib
from charlstm.inspect import trace
from charlstm.inspect.patterns import NAMED, Pattern, expression
from charlstm.inspect.survey import Survey
from charlstm.inspect.units import LEVELS, Unit, all_units

if TYPE_CHECKING:
    from charlstm.api import Model

CHOOSES, HELD_OUT = 0, 1


class Ranked(NamedTuple):
    """A unit as a detector of a pattern.  All figures are of the half of the text that did not choose it."""

    unit: Unit
    auc: float  # area under the ROC curve: that the unit is farther on inside than outside, ties counted half
    f1: float  # of the threshold
    is_low: bool  # it is low inside the pattern
    threshold: float  # inside is above it, or below it where `is_low`; the best F1 of the half that chose
    auc_chosen: float  # of the half that chose, and so of the best of many


class Ranking(NamedTuple):
    """The units of a model by how well they know a pattern, best first by the half of the text that chooses."""

    pattern: str
    inside: int  # symbols inside
    symbols: int  # of the text
    units: tuple[Ranked, ...]


def units_for(
    model: "Model",
    text: str | bytes | Split,
    pattern: str | Pattern,
    most: int = 20,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Ranking:
    """Ranks the units of all layers by the area under the ROC curve (AUC), 0.5 being chance.

    Blocks of 1,000 symbols of even number choose order, direction and threshold; those of odd number give the figures,
    so that the best of hundreds of units is not better by chance.

    Args:
      text: a text, or a split of a corpus.
      pattern: a regular expression, the name of one of `NAMED`, or a function text -> bool `[characters]`.
      most: units that are returned.
      progress: is told how many symbols were read, of how many.

    Raises:
      ValueError: the pattern is no regular expression, or matches nothing or everything in one half of the text, or
        the split has another vocabulary than the model.
    """
    split = trace.split_of(model, text)
    name = name_of(pattern)
    survey = survey_lib.read(model, split, {name: pattern_of(pattern)}, patterns_only=True, progress=progress)
    if problem := unusable(survey, 0):
        raise ValueError(f"{name!r} {problem}")
    return ranking(model, survey, 0, most)


def name_of(pattern: str | Pattern) -> str:
    """Returns what a pattern is called."""
    return pattern if isinstance(pattern, str) else getattr(pattern, "__name__", "pattern")


def pattern_of(pattern: str | Pattern) -> Pattern:
    """Returns the function of a pattern.  Raises ValueError if it is no regular expression."""
    return (NAMED.get(pattern) or expression(pattern)) if isinstance(pattern, str) else pattern


def unusable(survey: Survey, number: int) -> str:
    """Says why a pattern can rank no units; "" where it can."""
    inside, whole = survey.levels[number, :, 0].sum(1), survey.levels[-1, :, 0].sum(1)
    if not inside.sum() or inside.sum() == whole.sum():
        what = "everything" if inside.sum() else "nothing"
        return f"matches {what} in the {whole.sum():,} symbols of the text: use another pattern or text"
    if not inside.all() or (inside == whole).any():
        return "matches in one half of the text only: give a longer text"
    return ""


def ranking(model: "Model", survey: Survey, number: int, most: int) -> Ranking:
    """Ranks units by pattern `number` of a survey."""
    inside = survey.levels[number].astype(float)
    outside = survey.levels[-1] - inside
    auc = np.stack([_auc(inside[half], outside[half]) for half in (CHOOSES, HELD_OUT)])
    is_low = auc[CHOOSES] < 0.5
    auc = np.where(is_low[None], 1 - auc, auc)
    best = np.argsort(-auc[CHOOSES], kind="stable")[:most]
    units = all_units(model.config.model)
    found = []
    for place in best.tolist():
        level = _f1(inside[CHOOSES, place], outside[CHOOSES, place], bool(is_low[place])).argmax()
        f1 = _f1(inside[HELD_OUT, place], outside[HELD_OUT, place], bool(is_low[place]))[level]
        figures = float(auc[HELD_OUT, place]), float(f1), bool(is_low[place])
        found.append(Ranked(units[place], *figures, float(LEVELS[level]), float(auc[CHOOSES, place])))
    return Ranking(survey.patterns[number], int(inside[:, 0].sum()), int(survey.levels[-1, :, 0].sum()), tuple(found))


def _auc(inside_UL: np.ndarray, outside_UL: np.ndarray) -> np.ndarray:
    """The probability that a symbol inside has a higher level than one outside, `[units]`."""
    below_UL = np.cumsum(outside_UL, axis=1) - outside_UL / 2
    return (inside_UL * below_UL).sum(1) / (inside_UL.sum(1) * outside_UL.sum(1))


def _f1(inside_L: np.ndarray, outside_L: np.ndarray, is_low: bool) -> np.ndarray:
    """F1 of calling inside what is at each level or above, or where `is_low` at it or below, `[levels]`."""
    order = slice(None) if is_low else slice(None, None, -1)
    hits, alarms = np.cumsum(inside_L[order])[order], np.cumsum(outside_L[order])[order]
    return 2 * hits / (hits + alarms + inside_L.sum())


def rank_all(model: "Model", survey: Survey, most: int) -> Mapping[str, Ranking]:
    """Ranks units by each pattern of a survey that matches something and not everything."""
    usable = [number for number in range(len(survey.patterns)) if not unusable(survey, number)]
    return {survey.patterns[number]: ranking(model, survey, number, most) for number in usable}
