"""A linear probe: what all units together know of a pattern, by logistic regression with an L1 penalty (scikit-learn).

Radford, Jozefowicz and Sutskever found the sentiment neuron so (arXiv:1704.01444).  The text is split by blocks, as
neighboring characters are nearly the same example: one third is learned from, one chooses the strength of the penalty,
one gives the figures.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from charlstm.inspect import trace
from charlstm.inspect.patterns import Pattern, symbols_of
from charlstm.inspect.ranking import pattern_of
from charlstm.inspect.survey import BLOCK
from charlstm.inspect.units import Unit, all_units, shown
from data_pipeline.shards import ArraySplit

if TYPE_CHECKING:
    from charlstm.api import Model

STRENGTHS = tuple(2.0**k for k in range(-10, 1, 2))  # C of scikit-learn: the inverse of the penalty's strength
MOST_SYMBOLS = 30_000
MISSING = "a probe needs scikit-learn, which is not installed: pip install 'charlstm[inspect]'"


class Probe(NamedTuple):
    """A sparse linear detector of a pattern."""

    pattern: str
    auc: float  # on what neither the weights nor the penalty have seen, as is the accuracy
    accuracy: float  # share that is called right
    strength: float  # C, as chosen
    weights: tuple[tuple[Unit, float], ...]  # those that are not 0, by size, for values as they are shown
    offset: float


def check_installed() -> None:
    """Raises ValueError where scikit-learn, which a probe needs, is not installed."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError:
        raise ValueError(MISSING) from None


def probe(model: "Model", text: str | bytes, pattern: str | Pattern) -> Probe:
    """Fits a probe on the main array of all layers; of a text, the first 30,000 symbols.

    Raises:
      ValueError: scikit-learn is not installed, or a third of the text is all inside the pattern or all outside.
    """
    split = ArraySplit(text, model.vocabulary)
    split = ArraySplit(model.vocabulary.decode_bytes(split.read(0, min(len(split), MOST_SYMBOLS))), model.vocabulary)
    decoded, lengths = symbols_of(model.vocabulary, split.read(0, len(split)))
    inside = np.repeat(pattern_of(pattern)(decoded), lengths)
    third = np.arange(len(inside)) // min(BLOCK, max(1, len(inside) // 12)) % 3
    name = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", "pattern")
    return _fitted(model, name, _inputs(model, split), inside, third)


def probe_texts(model: "Model", texts: Sequence[str | bytes], labels: Sequence[bool]) -> Probe:
    """Fits a probe on the states after reading each of many texts, such as reviews and whether they are content.

    A third of the texts of each label is learned from, one chooses the penalty, one gives the figures.

    Args:
      labels: of each text, one of two classes.

    Raises:
      ValueError: scikit-learn is not installed, a text is empty, or a label has fewer than three texts.
    """
    is_on = np.asarray(labels, bool)
    third = np.zeros(len(is_on), int)
    for value in (False, True):
        third[is_on == value] = np.arange((is_on == value).sum()) % 3
    if not all(texts):
        raise ValueError("a text is empty: leave it out")
    last = 0 if model.config.streams.reverse else -1  # states come in the order of the text
    states = [_inputs(model, ArraySplit(text, model.vocabulary))[last] for text in texts]
    return _fitted(model, "labels", np.stack(states), is_on, third)


def _inputs(model: "Model", split: ArraySplit) -> np.ndarray:
    """The values that are shown of all units at each symbol of a text, `[symbols, units]`."""
    config, names = model.config.model, list(dict.fromkeys(unit.name for unit in all_units(model.config.model)))
    found = trace.whole(model, split, names)
    return np.concatenate([np.asarray(shown(config, n.partition(".")[2], a)) for n, a in found.items()], axis=1)


def _fitted(model: "Model", name: str, inputs: np.ndarray, inside: np.ndarray, third: np.ndarray) -> Probe:
    """Fits on third 0, chooses the penalty on third 1, and takes the figures on third 2."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
    except ImportError:
        raise ValueError(MISSING) from None
    if any(inside[third == part].all() or not inside[third == part].any() for part in range(3)):
        raise ValueError("a third of the examples is all inside or all outside: give a longer text, or more texts")
    best, best_auc = None, -1.0
    for strength in STRENGTHS:
        fitted = LogisticRegression(l1_ratio=1, C=strength, solver="liblinear", random_state=0)
        fitted.fit(inputs[third == 0], inside[third == 0])
        auc = roc_auc_score(inside[third == 1], fitted.decision_function(inputs[third == 1]))
        if auc > best_auc + 1e-4:  # of nearly equal ones that with fewer weights
            best, best_auc = fitted, auc
    assert best is not None
    decided, units = best.decision_function(inputs[third == 2]), all_units(model.config.model)
    auc, accuracy = roc_auc_score(inside[third == 2], decided), ((decided > 0) == inside[third == 2]).mean()
    (weights,) = best.coef_
    order = [place for place in np.argsort(-np.abs(weights), kind="stable").tolist() if weights[place]]
    chosen = tuple((units[place], float(weights[place])) for place in order)
    return Probe(name, float(auc), float(accuracy), best.C, chosen, float(best.intercept_[0]))
