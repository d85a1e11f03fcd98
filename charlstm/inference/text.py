"""A text as it is sampled: what is read before it, what may be shown of it already, and where it stops."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from charlstm.config import Config
from charlstm.inference.generate import Chunk, generate
from charlstm.inference.sampling import Sampling
from charlstm.model.layer import Held
from charlstm.types import ModelParams
from data_pipeline.batch import Separator
from data_pipeline.vocabulary import Vocabulary


class Sample:
    """One text as it grows: what may be shown of it, and where it stops.

    Args:
      vocabulary: of the ids.
      prompt: ids [symbols] that are shown first.  These and `stop` are in the order in which the model reads.
      stop: ids [symbols] before which the text ends; none where it does not.  Or several of these.
      before_stop: ids [symbols] before the continuation in which the stop string may begin already.
      before: ids [symbols] before the prompt, of which the last may have begun a UTF-8 sequence.
      errors: what becomes of bytes that are not UTF-8, as for `bytes.decode`.
      backward: the model writes from right to left, so that the text can be shown only when it is whole.

    Attributes:
      ids, log_probabilities: of the symbols after the prompt, up to the stop string.
      taken: how many of these were taken.
      stopped: the stop string was met.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt: np.ndarray,
        stop: np.ndarray | Sequence[np.ndarray],
        before_stop: np.ndarray | None = None,
        errors: str = "replace",
        backward: bool = False,
        before: np.ndarray | None = None,
    ) -> None:
        self.ids: list[int] = []
        self.log_probabilities: list[float] = []
        self.stopped = False
        self._decoder, self.taken = vocabulary.decoder(errors), 0
        stops = [stop] if isinstance(stop, np.ndarray) else stop
        self._stops = [one.tolist() for one in stops if len(one)]
        # The last symbols, too few for the longest stop string.
        self._end: list[int] = [] if before_stop is None else self._too_few(before_stop.tolist())
        self._backward, self._prompt = backward, prompt
        if before is not None:
            self._decoder.feed(before)
        self._prompt_text = "" if backward else self._decoder.feed(prompt)

    def feed(self, ids: np.ndarray, log_probabilities: np.ndarray) -> None:
        """Adds symbols; those from the stop string on are dropped."""
        if self.stopped:
            return
        before, end = len(self.ids), self._end + ids.tolist()
        self.ids += ids.tolist()
        self.log_probabilities += log_probabilities.tolist()
        for met in range(len(self._end) + 1, len(end) + 1) if self._stops else ():
            lengths = [len(stop) for stop in self._stops if end[max(0, met - len(stop)) : met] == stop]
            if lengths:
                self.stopped = True
                kept = max(0, before - len(self._end) + met - max(lengths))
                del self.ids[kept:], self.log_probabilities[kept:]
                return
        self._end = self._too_few(end)

    def _too_few(self, ids: list[int]) -> list[int]:
        return ids[max(0, len(ids) - max(map(len, self._stops), default=1) + 1) :]

    def take(self, last: bool = False, goes_on: bool = False) -> str:
        """The text, prompt first, that was not taken yet and can be shown.

        What may be the beginning of the stop string or of a UTF-8 sequence is held back, unless nothing more will come.
        Of a backward model everything is: its text ends with the prompt.

        Args:
          last: no more symbols will come.
          goes_on: another text begins where this one ends: a UTF-8 sequence that is begun stays `pending` for it.
        """
        if self._backward:
            if not last:
                return ""
            whole, self._prompt = np.concatenate([self._prompt, self.ids[self.taken :]]), np.zeros(0, np.int32)
            self.taken = len(self.ids)
            return self._decoder.feed(whole[::-1].astype(np.int32)) + self._decoder.flush()
        end = len(self.ids) - (0 if last or self.stopped else self._beginning_of_stop())
        text, self._prompt_text = self._prompt_text, ""
        text += self._decoder.feed(np.array(self.ids[self.taken : end], np.int32))
        self.taken = end
        return text + (self._decoder.flush() if last and not goes_on else "")

    @property
    def pending(self) -> bytes:
        """The unfinished UTF-8 sequence at the end of what was taken."""
        return self._decoder.pending

    def _beginning_of_stop(self) -> int:
        """Number of symbols at the end that may begin a stop string."""
        begun = (n for stop in self._stops for n in range(1, len(stop)) if self._end[-n:] == stop[:n])
        return min(len(self.ids), max(begun, default=0))


def as_read(ids: np.ndarray, backward: bool) -> np.ndarray:
    """Turns ids [symbols] from the order of the text to that in which a model reads it, or back."""
    return ids[::-1] if backward else ids


def unseen_before(prompt: np.ndarray, separator: Separator, vocabulary: Vocabulary) -> np.ndarray:
    """The ids [symbols] that are read before the prompt and not shown.

    The separator, as before every document in training; where documents are not told apart and there is no prompt, a
    newline, if the vocabulary has one.
    """
    has_newline = vocabulary.kind == "bytes" or "\n" in vocabulary.characters
    newline = vocabulary.encode("\n" if has_newline and not len(prompt) else "")
    return np.array(separator, np.int32) if separator else newline


def unknown_id(vocabulary: Vocabulary) -> int | None:
    """The id of the symbol that is never drawn; None if there is none."""
    return 0 if vocabulary.kind == "characters" else None


def remark_on_escapes(name: str, text: str) -> str:
    """A remark where a text has a backslash and an n, by which a line break may be meant; "" elsewhere."""
    if r"\n" not in text:
        return ""
    meant = text.replace(r"\n", "\n")
    return f"{name} has a backslash and an n, as given; for a line break write --{name}=$'{text}', which is {meant!r}"


def encode_prompt(
    text: str, vocabulary: Vocabulary, unknown: str = "refuse", remedy: str = "leave it out"
) -> np.ndarray:
    """The ids [symbols] of a prompt, or of a stop string.

    Args:
      unknown: "refuse" symbols that are not in the vocabulary, or "map" them to the unknown symbol.
      remedy: what can be done about an unknown symbol where the text was given.

    Raises:
      TypeError: it is no string.
      ValueError: a symbol is unknown; says which, where, and the remedy.
    """
    if not isinstance(text, str):
        raise TypeError(f"the prompt or stop string is of type {type(text).__name__}: give a str")
    ids = vocabulary.encode(text, "map")
    if unknown == "refuse" and vocabulary.kind == "characters" and not ids.all():
        position = int(np.argmin(ids != 0))
        symbol = text[position]
        raise ValueError(f"{symbol!r} (U+{ord(symbol):04X}) at position {position} is not in the vocabulary: {remedy}")
    return ids


def begin(
    config: Config,
    params: ModelParams,
    vocabulary: Vocabulary,
    separator: Separator,
    prompt: str,
    stop: str | None,
    sampling: Sampling,
    *,
    rows: int,
    length: int,
    seed: int,
    held: tuple[Held, ...] = (),
) -> tuple[list[Sample], Iterator[None]]:
    """Returns texts that have only their prompt yet, one a row, and an iterator whose every turn makes them grow.

    Args:
      separator: of documents, which is read before the prompt, and ends a text where `stop` is None.

    Raises:
      TypeError: the prompt or `stop` is no string.
      ValueError: one of their symbols is unknown.
    """
    backward = config.streams.reverse
    ids = as_read(encode_prompt(prompt, vocabulary), backward)
    ends = np.array(separator, np.int32) if stop is None else as_read(encode_prompt(stop, vocabulary), backward)
    chunks = generate(
        config.model,
        params,
        np.concatenate([unseen_before(ids, separator, vocabulary), ids]),
        sampling,
        rows=rows,
        length=length,
        seed=seed,
        unknown_id=unknown_id(vocabulary),
        separator=separator,
        held=held,
    )
    # A document ends with its separator, wherever that begins; another stop string begins in the continuation.
    before_stop = ids if tuple(ends.tolist()) == separator else None
    samples = [Sample(vocabulary, ids, ends, before_stop, backward=backward) for _ in range(rows)]
    return samples, grow(samples, chunks)


def grow(samples: list[Sample], chunks: Iterable[Chunk]) -> Iterator[None]:
    """Feeds the samples, chunk by chunk, until there is no more or all have stopped."""
    for chunk in chunks:
        for row, sample in enumerate(samples):
            sample.feed(chunk.ids[row], chunk.log_probabilities[row])
        yield
        if all(sample.stopped for sample in samples):
            return
