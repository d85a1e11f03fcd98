"""The texts of one answer: what a slot writes for a client, in pieces that may be shown."""

import asyncio
import collections
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from charlstm.inference.continuation import distributions
from charlstm.inference.generate import Beginning
from charlstm.inference.text import Sample, unseen_before
from charlstm.serving import opaque
from charlstm.serving.protocol import LONGEST_STOP, Ask, TokenNames, most_probable
from charlstm.serving.slots import CHUNK
from charlstm.serving.texts import Group, Loaded, Prompt, Symbols, Text


class Scored(NamedTuple):
    """Symbols with what the model thought of them."""

    ids: list[int]
    log_probabilities: list[float | None]  # None for a symbol that nothing precedes
    most_probable: list[list[tuple[int, float]] | None]

    def add(self, ids: Sequence[int], log_probabilities: Sequence[float | None], tops: Sequence[Any]) -> None:
        """Adds symbols."""
        self.ids.extend(ids)
        self.log_probabilities.extend(log_probabilities)
        self.most_probable.extend(tops)


class Choice(Text):
    """One text of an answer.

    Attributes:
      model: that read the request; its group may get another one before it is begun.
      pieces: what can be shown, each a choice of OpenAI's; of an answer that is not streamed one, with everything.
      error: why there will be no more of them; None if there is none.
      is_done: nothing comes after the pieces.
      written: symbols so far.
    """

    def __init__(
        self,
        ask: Ask,
        model: Loaded,
        prompt: Prompt,
        place: tuple[int, int],
        changed: asyncio.Event,
    ) -> None:
        """Takes what is wanted.

        Args:
          place: of the prompt in the request, and of the text among those of the prompt.
          changed: set, in the thread of the event loop, when there are new pieces.
        """
        which, number = place
        super().__init__(prompt, ask.sampling, ask.seed, ask.joint.number + number, ask.max_tokens)
        self._ask, self.model, self._index, self.changed = ask, model, which * ask.n + number, changed
        ids, end = ask.prompts[which], np.array(model.separator, np.int32)
        stops = [end] if ask.stops is None else ask.stops
        before_stop = _before_stop(ask, ids) if ask.stops is None and len(end) else None
        shown, unshown = (ids, ids[:0]) if ask.echo else (ids[:0], ids)
        before = np.concatenate([np.frombuffer(ask.joint.pending, np.uint8), unshown])
        self._sample = Sample(model.vocabulary, shown, stops, before_stop, before=before)
        self._names, self._tops = TokenNames(model.vocabulary, before), list[Any]()
        self._trail: list[Beginning] = []  # what the text goes on from after each of its last symbols
        self.pieces: collections.deque[dict[str, Any]] = collections.deque()
        self.error: Exception | None = None
        self.is_done, self.written = False, 0
        self._of_prompt: dict[str, list[Any]] = {}  # log-probabilities, of the first piece

    def name_prompt(self, scored: Scored) -> None:
        """Takes the symbols of the prompt as part of the text: a tenth of a second's work, before it is begun."""
        self._of_prompt = self._names.describe(*scored)

    def begin(self, beginning: Beginning | None) -> None:
        self._trail = [beginning] if beginning else []
        if not self.length:
            self._give(True)

    def feed(self, symbols: Symbols) -> bool:
        self.written += len(symbols.ids)
        self._sample.feed(symbols.ids, symbols.log_probabilities)
        if self._ask.logprobs is not None:
            self._tops += _tops(symbols, self._ask.logprobs, self.model.unknown_id)
            del self._tops[len(self._sample.ids) :]
        if self._ask.return_state:
            self._trail = (self._trail + symbols.beginnings())[-LONGEST_STOP - CHUNK :]
        is_last = self._sample.stopped or self.written >= self.length
        if self._ask.stream or is_last:
            self._give(is_last)
        return is_last

    def fail(self, error: Exception) -> None:
        self.error, self.is_done = error, True

    def _give(self, is_last: bool) -> None:
        sample, start = self._sample, self._sample.taken
        text = sample.take(is_last, goes_on=self._ask.return_state)
        piece: dict[str, Any] = {"index": self._index, "text": text, "logprobs": None, "finish_reason": None}
        part = slice(start, sample.taken)
        if self._ask.logprobs is not None:
            found = self._names.describe(sample.ids[part], sample.log_probabilities[part], self._tops[part])
            piece["logprobs"] = {name: self._of_prompt.get(name, []) + values for name, values in found.items()}
            self._of_prompt = {}
        if is_last:
            piece["finish_reason"] = "stop" if sample.stopped else "length"
            if self._ask.return_state:
                shown = len(sample.ids)
                beginning = self._trail[-1 - (self.written - shown)]
                joint = opaque.Joint(self._ask.joint.drawn + shown, self.number, sample.pending)
                piece["state"] = opaque.pack(self.prompt.group.model or self.model, beginning, joint)
            self.written = len(sample.ids)
        if text or is_last or piece["logprobs"]:
            self.pieces.append(piece)
        self.is_done = is_last


def _before_stop(ask: Ask, ids: np.ndarray) -> np.ndarray:
    """Returns what a separator may have begun in: the prompt, and of a text that goes on what was drawn of it."""
    if ask.after is None:
        return ids
    last_K = ask.after.last_K
    return np.concatenate([last_K[max(0, len(last_K) - ask.joint.drawn) :], ids]).astype(np.int32)


def _tops(symbols: Symbols, count: int, unknown_id: int | None) -> list[list[tuple[int, float]]]:
    """Returns the most probable symbols at each place; the one that was chosen with the slot's own number."""
    logits_TV = symbols.logits().astype(np.float64)
    logits_TV -= logits_TV.max(axis=1, keepdims=True)
    tops = most_probable(logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True)), count, unknown_id)
    own = zip(symbols.ids, symbols.log_probabilities, strict=True)
    return [[(i, value if i == chosen else v) for i, v in top] for top, (chosen, value) in zip(tops, own, strict=True)]


def prompts_of(ask: Ask, model: Loaded) -> list[Prompt]:
    """Returns what is read for each prompt of a request."""
    # What the request has of this model must be of the one that writes.
    has_numbers = ask.after is not None or ask.is_scored
    group = Group(model.digest if has_numbers else None)
    return [Prompt(group, _read_before(ask, ids, model), ask.after, ask.joint.drawn) for ids in ask.prompts]


def _read_before(ask: Ask, ids: np.ndarray, model: Loaded) -> np.ndarray:
    if ask.after is not None:
        return ids.astype(np.int32)
    return np.concatenate([unseen_before(ids, model.separator, model.vocabulary), ids]).astype(np.int32)


def score(prompt: Prompt, shown: int, count: int, model: Loaded) -> Iterator[Scored]:
    """Scores the last `shown` symbols of a prompt, a window a turn; yields all so far.

    Args:
      count: most probable symbols that are named at each place.
    """
    scored, unseen = Scored([], [], []), len(prompt.ids) - shown
    ids = prompt.ids.tolist()
    if not unseen and prompt.after is None and ids:
        scored.add(ids[:1], [None], [None])
    place = 1 if prompt.after is None else 0  # of the symbol that the first distribution is of
    for log_probabilities_TV in distributions(
        model.config, model.params, prompt.ids[:-1], model.separator, prompt.after
    ):
        following = ids[place : place + len(log_probabilities_TV)]
        first = max(0, unseen - place)
        values = log_probabilities_TV[np.arange(len(following)), following]
        tops = most_probable(log_probabilities_TV[first : len(following)], count, model.unknown_id)
        scored.add(following[first:], values[first:].tolist(), tops)
        place += len(following)
        yield scored
    yield scored
