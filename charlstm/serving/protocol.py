"""Requests and answers of POST /v1/completions, as OpenAI's clients speak them.  A token is a symbol."""

import dataclasses
import functools
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from charlstm.inference.generate import Beginning
from charlstm.inference.sampling import Sampling
from charlstm.inference.text import encode_prompt
from charlstm.serving import opaque
from charlstm.serving.texts import Loaded
from data_pipeline.vocabulary import Vocabulary

MOST_STOPS, MOST_LOGPROBS, LONGEST_STOP = 4, 20, 256
MOST_SCORED = 1 << 16  # symbols of all texts of a request, or one prompt: with 20 log-probabilities each, 42 MB
# OpenAI's fields that mean something else to this model, with the values at which they ask for nothing.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""), "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "logit_bias": (None, {}),
    "best_of": (None, 1),
}  # fmt: skip
KNOWN = {
    *("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream"),
    *("stream_options", "logprobs", "echo", "state", "return_state", "user", *WITHOUT_EFFECT),
}


class Refused(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {"Retry-After": "1"} if status in (429, 503) else {}

    def body(self) -> bytes:
        """Returns OpenAI's error object."""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": fields}).encode()


class Limits(NamedTuple):
    """Limits of a request."""

    max_prompt: int  # symbols
    max_tokens: int
    max_texts: int  # of one request


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request that can be answered."""

    prompts: list[np.ndarray]  # ids
    sampling: Sampling
    max_tokens: int
    n: int
    stops: list[np.ndarray] | None  # ids; None where the request has none
    seed: int
    stream: bool
    include_usage: bool
    logprobs: int | None
    echo: bool
    return_state: bool
    after: Beginning | None
    joint: opaque.Joint

    @property
    def is_scored(self) -> bool:
        """True if the symbols of the prompts have log-probabilities, too."""
        return self.echo and self.logprobs is not None


def parse(body: bytes, model: Loaded, name: str, limits: Limits) -> Ask:
    """Reads a request.  Raises Refused, which says what is wrong with it, and where."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {_in_short(error)}") from None
    if not isinstance(fields, dict):
        raise Refused(400, "the body is not a JSON object")
    _refuse_unknown(fields, name)
    take = _Taker(fields)
    try:
        sampling = Sampling(
            take.number("temperature", 1.0), take.whole("top_k", 0, 0, 2**31 - 1), take.number("top_p", 1.0)
        )
    except ValueError as error:
        raise Refused(400, str(error), str(error).partition("=")[0]) from None
    vocabulary, n = model.vocabulary, take.whole("n", 1, 1, limits.max_texts)
    after, joint = _state(take.text("state"), model)
    prompts = _prompts(fields.get("prompt"), vocabulary, limits)
    if n * len(prompts) > limits.max_texts:
        texts = f"{len(prompts)} prompts with n={n} are {n * len(prompts)} texts"
        raise Refused(400, f"{texts}, and at most {limits.max_texts} can be asked for at a time", "n")
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refused(400, "stream_options must be an object", "stream_options")
    ask = Ask(
        prompts=prompts,
        sampling=sampling,
        max_tokens=take.whole("max_tokens", min(256, limits.max_tokens), 0, limits.max_tokens),
        n=n,
        stops=_stops(fields.get("stop"), vocabulary),
        seed=take.whole("seed", secrets.randbits(32), 0, 2**32 - 1),
        stream=take.switch("stream"),
        include_usage=options.get("include_usage") is True,
        logprobs=take.whole("logprobs", -1, 0, MOST_LOGPROBS) if fields.get("logprobs") is not None else None,
        echo=take.switch("echo"),
        return_state=take.switch("return_state"),
        after=after,
        joint=joint,
    )
    to_score = n * sum(map(len, prompts)) if ask.is_scored else 0
    if to_score > (most := max(MOST_SCORED, limits.max_prompt)):
        texts = f"the texts have {to_score} symbols to score, and may have {most}"
        raise Refused(400, f"{texts}: ask for fewer at a time", "prompt")
    return ask


def _refuse_unknown(fields: Mapping[str, Any], name: str) -> None:
    if unknown := [field for field in fields if field not in KNOWN]:
        raise Refused(400, f"unknown field {_in_short(repr(unknown[0]))}", _in_short(unknown[0]))
    for field, values in WITHOUT_EFFECT.items():
        if field in fields and not any(fields[field] == value for value in values):
            raise Refused(400, f"{field} is not supported: leave it out", field)
    model = fields.get("model")
    if model is not None and model != name:
        raise Refused(404, f"there is no model {_in_short(repr(model))}: this is {name!r}", "model", "model_not_found")


class _Taker:
    """Takes fields of a type, within limits; null is a field's default."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def _of(self, name: str, default: Any, kinds: type | tuple[type, ...], kind: str) -> Any:
        value = self._fields.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise Refused(400, f"{name} must be {kind}", name)
        return value

    def number(self, name: str, default: float) -> float:
        value = self._of(name, default, (int, float), "a number")
        try:
            return float(value)
        except OverflowError:
            raise Refused(400, f"{name} is out of range", name) from None

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        value = self._of(name, default, int, "a whole number")
        if not low <= value <= high:
            raise Refused(400, f"{name} must be from {low} to {high}", name)
        return value

    def switch(self, name: str) -> bool:
        return self._of(name, False, bool, "true or false")

    def text(self, name: str) -> str | None:
        return self._of(name, None, str, "a string")


def _prompts(given: Any, vocabulary: Vocabulary, limits: Limits) -> list[np.ndarray]:
    """Returns the ids of a string, of symbols given by number, or of a list of these."""
    is_one = given is None or isinstance(given, str) or (isinstance(given, list) and _are_ids(given))
    several = ["" if given is None else given] if is_one else given
    if not isinstance(several, list) or not several:
        raise Refused(400, "prompt must be a string, a list of strings, or of symbols by number", "prompt")
    if len(several) > limits.max_texts:
        raise Refused(400, f"prompt must be at most {limits.max_texts} texts", "prompt")
    return [_prompt(one, vocabulary, limits) for one in several]


def _are_ids(given: Any) -> bool:
    return bool(given) and all(isinstance(value, int) and not isinstance(value, bool) for value in given)


def _prompt(given: Any, vocabulary: Vocabulary, limits: Limits) -> np.ndarray:
    if isinstance(given, str):
        try:
            ids = encode_prompt(given, vocabulary)
        except ValueError as error:
            raise Refused(400, f"prompt: {_in_short(error, 300)}", "prompt") from None
    elif isinstance(given, list) and _are_ids(given):
        if not all(0 <= value < vocabulary.size for value in given):
            raise Refused(400, f"prompt: symbols by number are from 0 to {vocabulary.size - 1}", "prompt")
        ids = np.array(given, vocabulary.dtype)
    else:
        raise Refused(400, "prompt must be a string, a list of strings, or of symbols by number", "prompt")
    if len(ids) > limits.max_prompt:
        raise Refused(400, f"prompt has {len(ids)} symbols, and may have {limits.max_prompt}", "prompt")
    return ids


def _stops(given: Any, vocabulary: Vocabulary) -> list[np.ndarray] | None:
    if given is None:
        return None
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise Refused(400, f"stop must be a string or a list of at most {MOST_STOPS}", "stop")
    try:
        encoded = [encode_prompt(stop, vocabulary) for stop in stops]
    except ValueError as error:
        raise Refused(400, f"stop can never be met: {_in_short(error, 300)}", "stop") from None
    if any(len(ids) > LONGEST_STOP for ids in encoded):
        raise Refused(400, f"stop must be at most {LONGEST_STOP} symbols", "stop")
    return encoded


def _state(given: str | None, model: Loaded) -> tuple[Beginning | None, opaque.Joint]:
    try:
        return (None, opaque.Joint()) if given is None else opaque.unpack(model, given)
    except ValueError as error:
        raise Refused(400, str(error), "state") from None


def _in_short(words: Any, most: int = 100) -> str:
    return " ".join(str(words).split())[:most]


class Answer(NamedTuple):
    """Fields that all parts of an answer have in common."""

    id: str
    created: int
    model: str
    fingerprint: str
    seed: int

    @classmethod
    def begun(cls, model: Loaded, name: str, seed: int) -> "Answer":
        """Returns an answer with a name of its own."""
        fingerprint = f"step-{model.step}-{model.digest.hex()[:12]}"
        return cls(f"cmpl-{secrets.token_hex(12)}", int(time.time()), name, fingerprint, seed)

    def part(self, choices: Sequence[str], usage: dict[str, int] | None = None) -> bytes:
        """Returns the JSON of an answer or of a part of one; `choices` are `packed`."""
        fields = {
            **{"id": self.id, "object": "text_completion", "created": self.created, "model": self.model},
            **{"system_fingerprint": self.fingerprint, "seed": self.seed},
            **({} if usage is None else {"usage": usage}),
        }
        return f'{json.dumps(fields)[:-1]}, "choices": [{", ".join(choices)}]}}'.encode()


def packed(choice: Mapping[str, Any]) -> str:
    """Returns the JSON of a choice, of which many log-probabilities take a tenth of a second."""
    return json.dumps(choice, allow_nan=False)


def usage_of(ask: Ask, written: int) -> dict[str, int]:
    """Returns the symbols read and written."""
    read = sum(map(len, ask.prompts))
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


@functools.lru_cache(maxsize=2)  # an older model's, too
def names_of(vocabulary: Vocabulary) -> list[str]:
    """Returns the name of each symbol: the character, or bytes:\\xHH for a byte that is part of one."""
    if vocabulary.kind == "bytes":
        return [chr(value) if value < 0x80 else rf"bytes:\x{value:02x}" for value in range(256)]
    return list(vocabulary.decode(np.arange(vocabulary.size)))


class TokenNames:
    """Names of symbols as strings, and where they begin in the text."""

    def __init__(self, vocabulary: Vocabulary, before: np.ndarray) -> None:
        """Takes the ids [symbols] before the text, of which the last may have begun its first character."""
        self._names, self._decoder, self._length = names_of(vocabulary), vocabulary.decoder(), 0
        self._decoder.feed(before)

    def offset(self, symbol: int) -> int:
        """Returns the place of the character in the text to which the next symbol belongs."""
        self._length += len(self._decoder.feed(np.array([symbol])))
        return self._length - (not self._decoder.pending)

    def describe(self, ids: Sequence[int], values: Sequence[float | None], tops: Sequence[Any]) -> dict[str, Any]:
        """Returns the object `logprobs` of symbols; `tops` has for each of them its most probable ones by id."""
        names = self._names
        named: Callable[[Any], Any] = lambda top: None if top is None else {names[i]: finite(v) for i, v in top}  # noqa: E731
        return {
            "tokens": [names[symbol] for symbol in ids],
            "token_logprobs": [finite(value) for value in values],
            "top_logprobs": [named(top) for top in tops],
            "text_offset": [self.offset(symbol) for symbol in ids],
        }


def finite(value: float | None) -> float | None:
    """Returns a number that JSON has; None for another one."""
    return float(value) if value is not None and np.isfinite(value) else None


def most_probable(
    log_probabilities_TV: np.ndarray, count: int, unknown_id: int | None
) -> list[list[tuple[int, float]]]:
    """Returns (id, log-probability) of the `count` most probable symbols of each row, in order.

    Args:
      unknown_id: of the symbol that is not named, as it is never drawn: it may share its name with a character.
    """
    order = np.argsort(-log_probabilities_TV, axis=1, kind="stable")
    if unknown_id is not None:
        order = order[order != unknown_id].reshape(len(order), order.shape[1] - 1)
    order = order[:, :count]
    return [[(int(i), float(row[i])) for i in ids] for row, ids in zip(log_probabilities_TV, order, strict=True)]
