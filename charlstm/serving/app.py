"""The server: OpenAI's completions, the models, health, metrics, and a page to play with (Starlette)."""

import asyncio
import collections
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, Response, StreamingResponse
    from starlette.routing import Route
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("a server needs Starlette and uvicorn: pip install 'charlstm[serve]'") from error

from charlstm.serving import completions
from charlstm.serving.completions import Choice, Scored
from charlstm.serving.protocol import Answer, Ask, Limits, Refused, packed, parse, usage_of
from charlstm.serving.slots import Broken, Full, OtherModel, Slots
from charlstm.serving.texts import Loaded, Prompt, Text

MOST_BODY = 16 << 20  # bytes of a request

_log = logging.getLogger(__name__)


class Server:
    """The model, slots and limits that answers are made with.

    Attributes:
      app: the ASGI application.
      is_draining: requests that come are refused, those that are there are answered.
    """

    def __init__(
        self, model: Loaded, name: str, page: str, *, slots: int, queue: int, max_prompt: int, max_tokens: int
    ) -> None:
        """Compiles, and is ready to answer.

        Args:
          name: of the model, for clients.
          page: HTML that is at /.
          slots, queue: texts written at a time, and texts that may wait.
          max_prompt, max_tokens: symbols of a prompt, and of a text.
        """
        self._name, self._page, self.is_draining = name, page, False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.slots = Slots(model, slots, queue, self._notify)
        self._limits = Limits(max_prompt, max_tokens, self.slots.capacity)
        self._scoring, self._to_score, self._answers = asyncio.Semaphore(1), 0, collections.Counter[int]()
        routes = [
            Route("/", self._show_page),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/health", self._show_health),
            Route("/metrics", self._show_metrics),
        ]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: _not_found})

    def _notify(self, texts: Sequence[Text]) -> None:
        """Wakes those who wait for texts; called by the slots' thread."""
        if self._loop and not self._loop.is_closed() and texts:
            self._loop.call_soon_threadsafe(_wake, texts)

    async def _complete(self, request: Request) -> Response:
        self._loop = asyncio.get_running_loop()
        try:
            response = await self._answer(request)
        except Refused as refused:
            headers = refused.headers
            response = Response(refused.body(), refused.status, headers, "application/json")
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it
        except Exception as error:  # of the device, as a prompt is scored: out of memory, say
            _log.exception("a request could not be answered")
            response = Response(_failed(error).body(), 500, media_type="application/json")
        self._answers[response.status_code] += 1
        return response

    async def _answer(self, request: Request) -> Response:
        if self.is_draining:
            raise Refused(503, "the server is about to end: ask another one, or later")
        body = await _body(request)
        model = self.slots.model
        ask = parse(body, model, self._name, self._limits)
        prompts = completions.prompts_of(ask, model)
        places, changed = [(which, n) for which in range(len(prompts)) for n in range(ask.n)], asyncio.Event()
        choices = [Choice(ask, model, prompts[which], (which, n), changed) for which, n in places]
        if ask.is_scored:
            gone, shown = asyncio.ensure_future(_gone(request)), map(len, ask.prompts)
            try:
                for which, (prompt, count) in enumerate(zip(prompts, shown, strict=True)):
                    scored = await self._score(ask, prompt, count, model, gone)
                    for choice in choices[which * ask.n : (which + 1) * ask.n]:
                        await asyncio.to_thread(choice.name_prompt, scored)
            finally:
                gone.cancel()
        if ask.max_tokens or ask.return_state:
            self._submit(choices)
        else:
            changed.set()
            for choice in choices:
                choice.begin(None)
        if ask.stream:
            return StreamingResponse(self._stream(ask, choices, changed), media_type="text/event-stream")
        return await self._whole(request, ask, choices, changed)

    def _submit(self, choices: list[Choice]) -> None:
        try:
            self.slots.submit(choices)
        except Full:
            raise self._full(len(choices)) from None
        except Broken:
            raise Refused(503, "the device has failed for good, and the server must be started again") from None

    def _full(self, count: int) -> Refused:
        waiting = f"{self.slots.busy} texts are written and {self.slots.waiting} wait"
        return Refused(429, f"{waiting}: there is no room for {count} more, ask again")

    async def _score(self, ask: Ask, prompt: Prompt, shown: int, model: Loaded, gone: "asyncio.Future[None]") -> Scored:
        """Scores a prompt, one at a time, in a thread that gives way between windows, until the client has `gone`."""
        if self._to_score >= self.slots.capacity:
            raise self._full(1)
        self._to_score += 1
        try:
            async with self._scoring:
                scored = Scored([], [], [])
                turns = completions.score(prompt, shown, ask.logprobs or 0, model)
                while not gone.done() and (turn := await asyncio.to_thread(next, turns, None)) is not None:
                    scored = turn
                if gone.done():
                    raise ClientDisconnect
                return scored
        finally:
            self._to_score -= 1

    async def _whole(self, request: Request, ask: Ask, choices: list[Choice], changed: asyncio.Event) -> Response:
        gone = asyncio.ensure_future(_gone(request))
        gone.add_done_callback(lambda task: changed.set())
        try:
            while not all(choice.is_done for choice in choices):
                await changed.wait()
                changed.clear()
                if gone.done():
                    raise ClientDisconnect
        finally:
            gone.cancel()
            self.slots.leave([choice for choice in choices if not choice.is_done])
        _raise_if_failed(choices)
        usage = usage_of(ask, sum(choice.written for choice in choices))
        pieces = []
        for choice in choices:
            pieces.append(packed(choice.pieces[0]))
            await asyncio.sleep(0)  # others have their turn
        content = self._begun(ask, choices).part(pieces, usage)
        return Response(content, media_type="application/json")

    async def _stream(self, ask: Ask, choices: list[Choice], changed: asyncio.Event) -> AsyncIterator[bytes]:
        answer, is_done = None, False
        try:
            while not is_done:
                await changed.wait()
                changed.clear()
                is_done = all(choice.is_done for choice in choices)  # before their pieces are taken
                answer = answer or self._begun(ask, choices)
                for choice in choices:
                    while choice.pieces:
                        yield b"data: " + answer.part([packed(choice.pieces.popleft())]) + b"\n\n"
                _raise_if_failed(choices)
            if ask.include_usage and answer:
                usage = usage_of(ask, sum(choice.written for choice in choices))
                yield b"data: " + answer.part([], usage) + b"\n\n"
        except Refused as refused:
            yield b"data: " + refused.body() + b"\n\n"
        finally:
            self.slots.leave([choice for choice in choices if not choice.is_done])
        yield b"data: [DONE]\n\n"

    def _begun(self, ask: Ask, choices: list[Choice]) -> Answer:
        return Answer.begun(choices[0].prompt.group.model or choices[0].model, self._name, ask.seed)

    async def _show_page(self, request: Request) -> Response:
        return HTMLResponse(self._page)

    def _model(self) -> dict[str, Any]:
        model, limits = self.slots.model, self._limits
        return {
            **{"id": self._name, "object": "model", "created": 0, "owned_by": "charlstm", "step": model.step},
            **{"vocabulary": model.vocabulary.kind, "vocabulary_size": model.vocabulary.size},
            **{"max_prompt": limits.max_prompt, "max_tokens": limits.max_tokens},
        }

    async def _list_models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def _show_model(self, request: Request) -> Response:
        if (name := request.path_params["name"]) != self._name:
            refused = Refused(404, f"there is no model {name[:100]!r}", "model", "model_not_found")
            return Response(refused.body(), 404, media_type="application/json")
        return _json(self._model())

    async def _show_health(self, request: Request) -> Response:
        slots = self.slots
        counts = {"busy": slots.busy, "slots": slots.slots, "waiting": slots.waiting, "step": slots.model.step}
        word = "broken" if slots.is_broken else "draining" if self.is_draining else "ok"
        return _json({"status": word, "model": self._name} | counts, 200 if word == "ok" else 503)

    async def _show_metrics(self, request: Request) -> Response:
        slots = self.slots
        lines = []
        for name, kind, description, value in (
            ("slots", "gauge", "Texts that can be written at a time.", slots.slots),
            ("slots_busy", "gauge", "Texts that are being written.", slots.busy),
            ("waiting", "gauge", "Texts that wait for a slot.", slots.waiting),
            ("checkpoint_step", "gauge", "Step of the checkpoint that writes.", slots.model.step),
            ("symbols_written_total", "counter", "Symbols written.", slots.written),
            ("symbols_read_total", "counter", "Symbols of prompts.", slots.read),
        ):
            full = f"charlstm_serve_{name}"
            lines += [f"# HELP {full} {description}", f"# TYPE {full} {kind}", f"{full} {value}"]
        full = "charlstm_serve_requests_total"
        lines += [f"# HELP {full} Requests for completions, by status.", f"# TYPE {full} counter"]
        lines += [f'{full}{{status="{status}"}} {count}' for status, count in sorted(self._answers.items())]
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


def _wake(texts: Sequence[Text]) -> None:
    for text in texts:
        assert isinstance(text, Choice)
        text.changed.set()


def _json(tree: Any, status: int = 200) -> Response:
    return Response(json.dumps(tree), status, media_type="application/json")


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = f"{request.method} {request.url.path[:100]}: {error.detail.lower()}"
    return Response(Refused(error.status_code, words).body(), error.status_code, error.headers, "application/json")


async def _body(request: Request) -> bytes:
    """Returns the body.  Raises Refused where it is too large."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BODY:
            raise Refused(413, f"the body has more than {MOST_BODY} bytes")
        parts.append(part)
    return b"".join(parts)


async def _gone(request: Request) -> None:
    """Returns when the client has left."""
    receive: Callable[[], Awaitable[Any]] = request.receive
    while (await receive())["type"] != "http.disconnect":
        pass


def _raise_if_failed(choices: list[Choice]) -> None:
    for error in (choice.error for choice in choices if choice.error):
        if isinstance(error, OtherModel):
            raise Refused(503, "the model has just been replaced by a better one: ask again")
        raise _failed(error)


def _failed(error: Exception) -> Refused:
    return Refused(500, f"the text could not be written: {' '.join(str(error).split())[:200]}")
