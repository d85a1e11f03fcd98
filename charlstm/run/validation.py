"""The validation split of a run, scored as it trains."""

from charlstm.inference import evaluate as evaluate_lib
from charlstm.inference.score import Score
from charlstm.run.start import Run
from charlstm.training import averaging, placement
from charlstm.types import TrainState


class Interrupted(Exception):
    """Ends an evaluation during which the run was told to stop."""


class Validation:
    """Scores up to --evaluate_symbols of the validation split.

    The rows are divided into the logical shards, as gradients are: the same bits on any number of devices that divides
    them.
    """

    def __init__(self, run: Run) -> None:
        self._split, self._kind = run.corpus.splits["valid"], run.corpus.vocabulary.kind
        shards, most = placement.shards_per_device(run.config, run.mesh.size), run.config.training.evaluate_symbols
        V = run.corpus.vocabulary.size
        self._score = evaluate_lib.make_evaluator(run.config, V, self._split, run.mesh, run.separator, shards, most)

    def score(self, state: TrainState, doing: evaluate_lib.Doing) -> Score:
        """The score of the parameters that are evaluated; `doing` is told of each window, and may raise Interrupted."""
        return self._score(averaging.to_evaluate(state), doing)

    def in_words(self, score: Score) -> str:
        """A score in words, and of which part of the split it is."""
        part = f", of {score.symbols:,} symbols of {N:,}" if score.symbols < (N := len(self._split)) else ""
        return f"validation {score.in_words(self._kind)}{part}"
