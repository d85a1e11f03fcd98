"""A linear probe: what all units together know of a pattern, by logistic regression with an L1 penalty (scikit-learn).

Radford, Jozefowicz and Sutskever found the sentiment neuron so (arXiv:1704.01444).  The text is split by blocks, as
neighboring characters are nearly the same example: one third is learned from, one chooses the strength of the penalty,
one gives the figures.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from charlstm.inference.evaluate import Split
from charlstm.inspect import trace
from charlstm.inspect.patterns import Pattern, symbols_of
from charlstm.inspect.ranking import name_of, pattern_of
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


def probe(model: "Model", text: Split | str | bytes, pattern: str | Pattern) -> Probe:
    """Fits a probe on the main array of all layers; of a text, the first 30,000 symbols.

    Raises:
      ValueError: scikit-learn is not installed, or a third of the text is all inside the pattern or all outside.
    """
    check_installed()
    split, inside, third = examples(model, text, pattern)
    return _fitted(model, name_of(pattern), _inputs(model, split), inside, third)


def examples(
    model: "Model", text: Split | str | bytes, pattern: str | Pattern
) -> tuple[ArraySplit, np.ndarray, np.ndarray]:
    """Returns the symbols that a probe is fitted on, whether each is inside the pattern, and the third that it is in.

    Raises:
      ValueError: a third is all inside the pattern or all outside.
    """
    whole = trace.split_of(model, text)
    ids = whole.read(0, min(len(whole), MOST_SYMBOLS))
    decoded, lengths = symbols_of(model.vocabulary, ids)
    inside = np.repeat(pattern_of(pattern)(decoded), lengths)
    third = np.arange(len(inside)) // min(BLOCK, max(1, len(inside) // 12)) % 3
    for part in range(3):
        if not inside[third == part].any() or inside[third == part].all():
            raise ValueError(
                f"no probe of {name_of(pattern)!r} can be fitted: it matches all or nothing in a third of the text's "
                f"first {len(ids):,} symbols: use another pattern or text"
            )
    return ArraySplit.of_ids(ids, model.vocabulary), inside, third


def probe_texts(model: "Model", texts: Sequence[str | bytes], labels: Sequence[Any]) -> Probe:
    """Fits a probe on the states after reading each of many texts, such as reviews and whether they are content.

    A third of the texts of each label is learned from, one chooses the penalty, one gives the figures.

    Args:
      labels: of each text, one of two values.  What is looked for is the one that sorts last, such as True or 1.

    Raises:
      ValueError: scikit-learn is not installed, a text is empty, there is not one label a text, there are not two
        values, or one of them has fewer than three texts.
    """
    check_installed()
    if len(labels) != len(texts):
        raise ValueError(f"there are {len(texts)} texts and {len(labels)} labels: give a label for each text")
    if not all(texts):
        raise ValueError("a text is empty: leave it out")
    values, label, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    if len(values) != 2:
        raise ValueError(f"the labels have {len(values)} different values: give two, such as True and False")
    if counts.min() < 3:
        fewest = values.tolist()[counts.argmin()]
        raise ValueError(f"a probe needs three texts of each label, and {fewest!r} has {counts.min()}: give more texts")
    is_on, third = label == 1, np.zeros(len(label), int)
    for value in (False, True):
        third[is_on == value] = np.arange((is_on == value).sum()) % 3
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
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

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
