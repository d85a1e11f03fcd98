"""The validation split of a run, scored as it trains."""

from functools import partial

from charlstm.inference import evaluate as evaluate_lib
from charlstm.inference.score import Score, mixed
from charlstm.run.start import Run
from charlstm.training import averaging, placement
from charlstm.types import TrainState


class Interrupted(Exception):
    """Ends an evaluation during which the run was told to stop."""


class Validation:
    """Scores up to --evaluate_symbols of the validation split; of a mixture, an equal part of each corpus's.

    The rows are divided into the logical shards, as gradients are: the same bits on any number of devices that divides
    them.

    Attributes:
      names: of the texts that are scored each by itself; of a single corpus one, "".
    """

    def __init__(self, run: Run) -> None:
        texts, self._percent = run.corpus.texts("valid"), run.corpus.percent
        self._kind, self._symbols = run.corpus.vocabulary.kind, {name: len(text) for name, text in texts.items()}
        self.names = list(texts)
        shards, V = placement.shards_per_device(run.config, run.mesh.size), run.corpus.vocabulary.size
        most = -(-run.config.training.evaluate_symbols // len(texts))
        self._scorers = [
            evaluate_lib.make_evaluator(run.config, V, text, run.mesh, run.separator, shards, most)
            for text in texts.values()
        ]

    def score(self, state: TrainState, doing: evaluate_lib.Doing) -> dict[str, Score]:
        """Scores the parameters that are evaluated: each text, and last, as "", the mean by their shares.

        Args:
          doing: called with each window, and may raise Interrupted.
        """
        params, count = averaging.to_evaluate(state), len(self._scorers)

        def of_all(number: int, done: int, windows: int) -> None:
            doing(number * windows + done, count * windows)

        found = [score(params, partial(of_all, number)) for number, score in enumerate(self._scorers)]
        scores = dict(zip(self.names, found, strict=True))
        return scores | {"": mixed(scores, self._percent)}

    def in_words(self, name: str, score: Score) -> str:
        """A score in words, and of which part of the split it is."""
        N = self._symbols[name] if name in self._symbols else sum(self._symbols.values())
        part = f", of {score.symbols:,} symbols of {N:,}" if score.symbols < N else ""
        return f"validation{f' {name}' if name else ''} {score.in_words(self._kind)}{part}"
