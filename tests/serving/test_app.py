"""The HTTP border, in this process: answers as OpenAI's, errors as documented, nothing else."""

import asyncio
import base64
import codecs
import json
import re
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient

from charlstm import api, distributed
from charlstm import config as config_lib
from charlstm.inference.text import Sample
from charlstm.run import run_directory
from charlstm.serving import completions, loading, opaque, protocol
from charlstm.serving.app import MOST_BODY, Server
from charlstm.serving.protocol import TokenNames
from data_pipeline.vocabulary import Vocabulary
from tests.fuzzing import ANY_JSON, fuzzed, spoiled
from tests.serving.conftest import RUNS, make_run

LIMITS = {"slots": 4, "queue": 20, "max_prompt": 300, "max_tokens": 200}


def server_of(run_dir, **limits):
    config, identity = run_directory.read(run_dir)
    mesh = distributed.make(jax.devices()[:1])
    model = loading.load(run_dir, config, identity, mesh, "best", print)
    return Server(model, run_dir.name, "<p>a page", **(LIMITS | limits))


@pytest.fixture(scope="module", params=["bytes", pytest.param("documents", marks=pytest.mark.long)])
def served(request, runs):
    """(client, model): the server of a run, and the run's model in the library."""
    server = server_of(runs[request.param])
    with TestClient(server.app, raise_server_exceptions=True) as client:
        yield client, api.load(runs[request.param])
    server.slots.close()


def ask(client, status=200, **fields):
    answer = client.post("/v1/completions", json=fields)
    assert answer.status_code == status, answer.text
    return answer.json()


def stream(client, **fields):
    """The objects of a streamed answer."""
    with client.stream("POST", "/v1/completions", json={"stream": True, **fields}) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        events = [line for line in answer.iter_lines() if line]
    assert all(event.startswith("data: ") for event in events) and events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


HOW = {"temperature": 0.8, "top_k": 9, "top_p": 0.95, "seed": 11}


def test_texts_are_those_of_the_library_with_the_same_seed(served):
    client, model = served
    for prompt in ("", "abcd", "é€a" * 50):
        texts = model.sample(prompt, 100, num_samples=3, **HOW)
        answer = ask(client, prompt=prompt, max_tokens=100, n=3, echo=True, **HOW)
        assert [choice["text"] for choice in answer["choices"]] == texts
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        (alone,) = ask(client, prompt=prompt, max_tokens=100, **HOW)["choices"]
        assert prompt + alone["text"] == texts[0]
    assert (answer["object"], answer["model"], answer["seed"]) == ("text_completion", model.run_dir.name, 11)
    assert answer["system_fingerprint"].startswith("step-3-")
    several = ask(client, prompt=["a", "b"], max_tokens=30, n=2, **HOW)["choices"]
    alone = [ask(client, prompt=prompt, max_tokens=30, n=2, **HOW)["choices"] for prompt in "ab"]
    assert [choice["text"] for choice in several] == [choice["text"] for choices in alone for choice in choices]


def test_symbols_by_number_are_the_symbols(served):
    client, model = served
    ids = model.vocabulary.encode("cab").tolist()
    assert ask(client, prompt=[ids], **HOW)["choices"] == ask(client, prompt="cab", **HOW)["choices"]
    assert ask(client, prompt=ids, **HOW)["choices"] == ask(client, prompt="cab", **HOW)["choices"]


def test_a_stream_is_the_text_in_pieces(served):
    client, _ = served
    fields = {"prompt": "é€a", "max_tokens": 120, "n": 2, "echo": True, "logprobs": 3, **HOW}
    whole = ask(client, **fields)
    parts = stream(client, **fields, stream_options={"include_usage": True})
    assert parts[-1]["choices"] == [] and parts.pop()["usage"] == whole["usage"]
    assert len(parts) > 4 and len({part["id"] for part in parts}) == 1
    for index, choice in enumerate(whole["choices"]):
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for part in own for value in part["logprobs"][name]] == values
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]


def test_what_is_streamed_is_never_half_a_character(served):
    client, _ = served
    parts = stream(client, prompt="", max_tokens=200, n=4, **HOW)
    for index in range(4):
        own = [part["choices"][0]["text"] for part in parts if part["choices"][0]["index"] == index]
        assert "".join(own) == ask(client, prompt="", max_tokens=200, n=4, **HOW)["choices"][index]["text"]


def test_a_text_ends_before_the_first_stop_string_that_is_met(served):
    client, model = served
    prompt, how = "cd", {**HOW, "max_tokens": 200}
    text = model.sample(prompt, 200, stop="", **HOW)[len(prompt) :]
    whole = re.findall("[^\ufffd]{2}", text[5:])  # pairs of characters that the vocabulary has
    for stops in ([whole[1], whole[0][-1]], [text[0]], [whole[2]], ["\n\n\n\na"], whole[0], []):
        listed = [stops] if isinstance(stops, str) else stops
        ends = [place for stop in listed if (place := text.find(stop)) >= 0]
        (choice,) = ask(client, prompt=prompt, stop=stops, **how)["choices"]
        assert choice["text"] == text[: min(ends, default=None)]
        assert choice["finish_reason"] == ("stop" if ends else "length")
        parts = stream(client, prompt=prompt, stop=stops, **how)
        assert "".join(part["choices"][0]["text"] for part in parts) == choice["text"]


def test_log_probabilities_are_the_models_own_and_name_the_symbols(served):
    client, model = served
    (choice,) = ask(client, prompt="ab", max_tokens=60, logprobs=5, stop=[], **HOW)["choices"]
    found, vocabulary = choice["logprobs"], model.vocabulary
    raw = b"".join(
        codecs.decode(t[6:].replace("\\x", ""), "hex") if t[:7] == "bytes:\\" else t.encode() for t in found["tokens"]
    )
    assert len(found["tokens"]) == 60 and raw.decode("utf-8", "replace") == choice["text"]
    ids = np.concatenate(
        [
            vocabulary.encode("ab"),
            np.frombuffer(raw, np.uint8) if vocabulary.kind == "bytes" else vocabulary.encode(choice["text"]),
        ]
    )
    if not model.separator:
        logits, _ = model(ids)
        log_probabilities = np.asarray(jax.nn.log_softmax(logits))[1:-1]
        np.testing.assert_allclose(
            found["token_logprobs"], log_probabilities[np.arange(60), ids[2:]], rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(
            [list(top.values()) for top in found["top_logprobs"]],
            -np.sort(-log_probabilities)[:, :5],
            rtol=1e-3,
            atol=1e-4,
        )
    for token, value, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert len(top) == 5 and top.get(token, value) == value
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"][offset] == token if not token.startswith("bytes:") else choice["text"][offset] > "\x7f"
    none = ask(client, prompt="ab", max_tokens=3, logprobs=0, **HOW)["choices"][0]["logprobs"]
    assert none["top_logprobs"] == [{}, {}, {}] and len(none["token_logprobs"]) == 3


def test_echo_scores_a_text_as_the_library_does(served):
    client, model = served
    text = "abcdé€\nfg" * 25
    (choice,) = ask(client, prompt=text, max_tokens=0, echo=True, logprobs=1)["choices"]
    values, ids = choice["logprobs"]["token_logprobs"], model.vocabulary.encode(text)
    assert (choice["text"], choice["finish_reason"], len(values)) == (text, "length", len(ids))
    if model.separator:
        assert values[0] is not None  # the separator was read before
        bits = model.bits("ab" + text)[2:]
    else:
        assert values.pop(0) is None
        bits = model.bits(text)[1:]
    np.testing.assert_allclose(values, -bits * np.log(2), rtol=1e-3, atol=1e-4)
    usage = ask(client, prompt=text, max_tokens=0)["usage"]
    assert usage == {"prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids)}


def test_a_state_in_the_clients_hands_goes_on_with_the_text(served):
    client, model = served
    how = {"stop": [], "logprobs": 0, "temperature": 0.8, "seed": 11}
    (whole,) = ask(client, prompt="abcd", max_tokens=90, **how)["choices"]
    tokens, offsets = whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"]
    within = [t for t in range(1, 90) if tokens[t].startswith("bytes:") and offsets[t] == offsets[t - 1]]
    assert bool(within) == (model.vocabulary.kind == "bytes"), "no character of several bytes"
    for cut in [0, 16, 37, 90, *within[:6]]:
        (first,) = ask(client, prompt="abcd", max_tokens=cut, return_state=True, **how)["choices"]
        (rest,) = ask(client, state=first["state"], max_tokens=90 - cut, **how)["choices"]
        assert first["text"] + rest["text"] == whole["text"] and (cut not in within or first["text"][-1:] != "\ufffd")
        assert first["logprobs"]["tokens"] + rest["logprobs"]["tokens"] == tokens
        placed = [len(first["text"]) + offset for offset in rest["logprobs"]["text_offset"]]
        assert first["logprobs"]["text_offset"] + placed == offsets
    stop = re.findall("[^\ufffd]{2}", whole["text"])[-1]
    answer = ask(client, prompt="abcd", max_tokens=90, return_state=True, **how | {"stop": stop})
    (first,), written = answer["choices"], answer["usage"]["completion_tokens"]
    (rest,) = ask(client, state=first["state"], max_tokens=90 - written, **how)["choices"]
    assert (first["finish_reason"], first["text"] + rest["text"]) == ("stop", whole["text"])
    (read,) = ask(client, prompt="efg", state=first["state"], max_tokens=9, echo=True, logprobs=1, **HOW)["choices"]
    assert read["text"].startswith("efg") and None not in read["logprobs"]["token_logprobs"]
    (read,) = ask(client, prompt="", state=first["state"], max_tokens=9, echo=True, logprobs=2, **HOW)["choices"]
    assert len(read["logprobs"]["top_logprobs"]) == len(read["logprobs"]["tokens"]) == 9


def test_each_of_several_texts_goes_on_with_its_own_noise(served):
    client, _ = served
    how = {"stop": [], **HOW}
    wholes = ask(client, prompt="abcd", max_tokens=60, n=3, **how)["choices"]
    begun = ask(client, prompt="abcd", max_tokens=25, n=3, return_state=True, **how)["choices"]
    for whole, first in zip(wholes, begun, strict=True):
        rest, other = ask(client, state=first["state"], max_tokens=35, n=2, **how)["choices"]
        assert first["text"] + rest["text"] == whole["text"] != first["text"] + other["text"]


def test_a_character_that_a_prompt_begins_is_ended_by_the_text(bytes_client):
    euro = "€".encode()
    (first,) = ask(bytes_client, prompt=[*b"ab", euro[0]], max_tokens=0, echo=True, return_state=True)["choices"]
    (rest,) = ask(bytes_client, prompt=list(euro[1:]), state=first["state"], max_tokens=0, echo=True)["choices"]
    assert (first["text"], rest["text"]) == ("ab", "€")


def test_the_prompts_of_a_client_that_has_left_are_not_scored_on(runs):
    server = server_of(runs["bytes"])

    async def score() -> None:
        left = asyncio.get_running_loop().create_future()
        left.set_result(None)
        await server._score(SimpleNamespace(logprobs=1), None, 3, server.slots.model, left)

    with pytest.raises(ClientDisconnect):
        asyncio.run(score())
    assert server._to_score == 0


def test_a_separator_that_begins_in_one_request_ends_the_text_in_the_next():
    end, last_K = np.array([3, 4], np.int32), np.array([3, 3], np.int32)
    for drawn, ended in ((1, True), (2, True), (0, False)):
        ask_on = SimpleNamespace(after=SimpleNamespace(last_K=last_K), joint=opaque.Joint(drawn))
        before = completions._before_stop(ask_on, np.zeros(0, np.int32))
        sample = Sample(Vocabulary("characters", "abcde"), np.zeros(0, np.int32), [end], before)
        sample.feed(np.array([4]), np.array([-1.0]))
        assert sample.stopped == ended


def test_without_stop_a_separator_that_is_drawn_has_its_log_probabilities(tmp_path):
    vocabulary, settings = RUNS["documents"]
    server = server_of(make_run(tmp_path / "run", vocabulary, config_lib.replace(settings, document_separator="d")))
    with TestClient(server.app) as client:
        how = {"prompt": "c", "max_tokens": 1, "logprobs": 10}
        seed = next(seed for seed in range(99) if ask(client, **how, seed=seed)["choices"][0]["text"] == "")
        (choice,) = ask(client, **how, seed=seed, stop="")["choices"]  # as the page peeks
        assert choice["text"] == "d" in choice["logprobs"]["top_logprobs"][0]
    server.slots.close()


REFUSED = {
    "body is not JSON": [b"", b"{", b"\xff", b'{"seed": ' + b"1" * 5000 + b"}", b"[" * 100_000],
    "not a JSON object": [b"[]", b"1", b'"a"'],
    "unknown field": [{"promt": "a"}],
    "not supported": [{"best_of": 2}, {"suffix": "a"}, {"presence_penalty": 1.0}, {"logit_bias": {"1": 2}}],
    "temperature": [{"temperature": value} for value in (-1, "1", True, 1e9, [], 10**400)],
    "top_p": [{"top_p": value} for value in (0, 2, "1")],
    "top_k": [{"top_k": value} for value in (-1, 1.5, 2**40, False)],
    "max_tokens": [{"max_tokens": value} for value in (-1, 201, 1.5, "3")],
    "n must be": [{"n": 0}, {"n": 10**9}, {"n": True}],
    "texts": [{"prompt": ["a"] * 5, "n": 6}],
    "seed": [{"seed": -1}, {"seed": 2**32}, {"seed": "a"}],
    "logprobs": [{"logprobs": 21}, {"logprobs": True}],
    "stop": [{"stop": 1}, {"stop": ["a"] * 5}, {"stop": [1]}, {"stop": "a" * 257}, {"stop": "\ud800"}],
    "prompt": [{"prompt": value} for value in (1, [], [[]], ["a", 1], [-1], [256], {}, "a" * 301, "\ud800")],
    "state": [{"state": value} for value in (1, "é", "AAAA", "A" * 100)],
    "stream": [{"stream": 1}, {"stream_options": 1}],
    "true or false": [{"echo": "yes"}, {"return_state": 0}],
}  # fmt: skip


def check_error(answer, words=""):
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}, error
    assert words in error["message"] and len(error["message"].splitlines()) == 1, error


@pytest.mark.parametrize("words", REFUSED)
def test_what_means_nothing_is_refused_in_a_sentence(served, words):
    client, _ = served
    for body in REFUSED[words]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = client.post("/v1/completions", content=content)
        assert answer.status_code == 400, (body, answer.text)
        check_error(answer, words)


def test_other_errors_have_their_status_and_are_objects_too(served):
    client, model = served
    answer = client.post("/v1/completions", json={"model": "gpt-2"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    for name in (model.run_dir.name, None):
        assert client.post("/v1/completions", json={"model": name, "max_tokens": 1}).status_code == 200
    for status, call in {
        404: lambda: client.get("/v2"),
        405: lambda: client.get("/v1/completions"),
        413: lambda: client.post("/v1/completions", content=b" " * (MOST_BODY + 1)),
    }.items():
        answer = call()
        assert answer.status_code == status
        check_error(answer)
    check_error(client.get("/v1/models/other"), "no model")


def test_a_full_queue_is_429_and_a_draining_server_503(runs):
    server = server_of(runs["bytes"], queue=0)
    with TestClient(server.app) as client:
        with client.stream("POST", "/v1/completions", json={"n": 4, "max_tokens": 200, "stream": True}):
            answers = [client.post("/v1/completions", json={"n": 4, "max_tokens": 200}) for _ in range(2)]
        server.slots.submit([])
        refused = [answer for answer in answers if answer.status_code == 429]
        for answer in refused:
            assert answer.headers["retry-after"]
            check_error(answer, "no room")
        server.is_draining = True
        answer = client.post("/v1/completions", json={})
        assert answer.status_code == client.get("/health").status_code == 503
        check_error(answer, "about to end")
    server.slots.close()


def test_the_unknown_symbol_is_not_among_the_most_probable_and_hides_no_character_of_its_name(tmp_path):
    vocabulary = Vocabulary("characters", "ab\ufffd")  # as in text that was once decoded wrongly
    server = server_of(make_run(tmp_path / "run", vocabulary))
    model = api.load(tmp_path / "run")
    with TestClient(server.app) as client:
        how = {"prompt": "ab\ufffdba", "echo": True, "logprobs": 20}
        (choice,) = ask(client, max_tokens=3, temperature=0, **how)["choices"]
    logits, _ = model(model.vocabulary.encode(choice["text"]))
    expected = np.asarray(jax.nn.log_softmax(logits))[:-1, 1:]
    for top, values in zip(choice["logprobs"]["top_logprobs"][1:], expected, strict=True):
        np.testing.assert_allclose([top[name] for name in vocabulary.characters], values, rtol=1e-3, atol=1e-4)
        assert len(top) == 3
    server.slots.close()
    assert protocol.most_probable(np.zeros((0, 4)), 3, 0) == []  # of a window of which no symbol is shown


def test_many_symbols_that_are_scored_are_named_where_nobody_waits(bytes_client, monkeypatch):
    """In a thread of their own: not that of the event loop, in which /health is answered, nor the one that writes."""
    where = {}

    def describe(self, ids, *rest):
        where.setdefault(threading.current_thread().name.partition("_")[0], []).append(len(ids))
        return described(self, ids, *rest)

    described, _ = TokenNames.describe, monkeypatch.setattr(TokenNames, "describe", describe)
    for written in (0, 3):
        ask(bytes_client, prompt=["a" * 300, "b" * 200], n=2, max_tokens=written, echo=True, logprobs=20)
    assert where.pop("asyncio") == [300, 300, 200, 200] * 2
    assert max(max(counts) for counts in where.values()) <= 3


def test_a_request_may_have_so_many_symbols_to_score(bytes_client, monkeypatch):
    monkeypatch.setattr(protocol, "MOST_SCORED", 100)  # but one prompt may always be scored
    how = {"max_tokens": 0, "echo": True, "logprobs": 0}
    for fields in ({"prompt": "a" * 300}, {"prompt": ["a" * 100, "b" * 50], "n": 2}):
        assert ask(bytes_client, **fields, **how)["choices"]
    ask(bytes_client, prompt=["a" * 300] * 2, max_tokens=0, logprobs=1)  # nothing is scored
    for fields in ({"prompt": ["a" * 300, "b"]}, {"prompt": "a" * 151, "n": 2}):
        answer = bytes_client.post("/v1/completions", json=fields | how)
        assert answer.status_code == 400
        check_error(answer, "symbols to score, and may have 300: ask for fewer at a time")


def test_a_device_that_fails_while_a_prompt_is_scored_is_an_error_object_and_is_counted(bytes_client, monkeypatch):
    def fail(*args):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr("charlstm.serving.completions.distributions", fail)
    answer = bytes_client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 1})
    assert answer.status_code == 500
    check_error(answer, "out of memory")
    assert 'requests_total{status="500"} 1' in bytes_client.get("/metrics").text


def test_a_server_whose_device_has_failed_for_good_is_not_healthy_and_says_so(runs):
    server = server_of(runs["bytes"])
    server.slots.is_broken = True
    with TestClient(server.app) as client:
        health, answer = client.get("/health"), client.post("/v1/completions", json={"prompt": "abc"})
    assert health.status_code == answer.status_code == 503 and health.json()["status"] == "broken"
    check_error(answer, "must be started again")
    server.slots.close()


def test_a_scored_answer_names_the_model_that_scored_whichever_comes_meanwhile(runs, monkeypatch):
    server = server_of(runs["bytes"])
    new = server.slots.model._replace(step=9)

    def score(*given):
        yield from scored(*given)
        server.slots.use(new)
        while server.slots.model is not new:
            threading.Event().wait(0.01)

    scored, _ = completions.score, monkeypatch.setattr(completions, "score", score)
    with TestClient(server.app) as client:
        answer = ask(client, prompt="abc", max_tokens=0, echo=True, logprobs=1)
    assert answer["system_fingerprint"].startswith("step-3-")
    server.slots.close()


def test_the_other_pages(served):
    client, model = served
    assert client.get("/").text == "<p>a page"
    (listed,) = client.get("/v1/models").json()["data"]
    assert listed == client.get(f"/v1/models/{model.run_dir.name}").json()
    assert (listed["id"], listed["object"], listed["step"]) == (model.run_dir.name, "model", 3)
    health = client.get("/health").json()
    assert (health["status"], health["busy"], health["slots"]) == ("ok", 0, 4)
    ask(client, prompt="abc", max_tokens=5)
    metrics = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(values["charlstm_serve_symbols_written_total"]) >= 5
    assert int(values['charlstm_serve_requests_total{status="200"}']) >= 1


ASKED = {
    "model": "bytes", "prompt": ["ab", "c"], "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "n": 2,
    "stop": ["a", "bc"], "seed": 3, "stream": False, "stream_options": {"include_usage": True}, "logprobs": 2,
    "echo": True, "return_state": True, "user": "me", "suffix": None, "best_of": 1, "presence_penalty": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def bytes_client(runs):
    server = server_of(runs["bytes"])
    with TestClient(server.app, raise_server_exceptions=True) as client:
        yield client
    assert server.slots.busy == server.slots.waiting == 0
    server.slots.close()


def check_answer(answer):
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code == 200:
        body = answer.json() if "json" in answer.headers["content-type"] else answer.text
        assert "choices" in body or body.endswith("[DONE]\n\n")
    else:
        check_error(answer)


def test_any_request_is_answered_or_refused_as_documented(bytes_client):
    asked = [ASKED, {"prompt": "ab", "stream": True, "max_tokens": 9}]

    @fuzzed(120)
    @given(st.sampled_from(asked).flatmap(lambda fields: spoiled(json.dumps(fields).encode())))
    def answered(body):
        check_answer(bytes_client.post("/v1/completions", content=body))

    @fuzzed(80)
    @given(st.sampled_from(sorted(ASKED)), ANY_JSON)
    def any_value(field, value):
        check_answer(bytes_client.post("/v1/completions", content=f'{{"max_tokens": 3, "{field}": {value}}}'.encode()))

    state = ask(bytes_client, prompt="a", max_tokens=1, return_state=True)["choices"][0]["state"]

    @fuzzed(40)
    @given(st.binary(max_size=6), st.integers(0, len(base64.b64decode(state))), st.integers(0, 6))
    def any_state(put, place, lost):
        raw = base64.b64decode(state)
        raw = raw[:place] + put + raw[place + lost :]
        fields = {"state": base64.b64encode(raw).decode(), "max_tokens": 2}
        check_answer(bytes_client.post("/v1/completions", json=fields))

    answered()
    any_value()
    any_state()


@pytest.mark.long
def test_the_vocabulary_of_every_run_can_be_served(runs):
    for name in RUNS.keys() - {"bytes", "documents"}:
        server, model = server_of(runs[name]), api.load(runs[name])
        with TestClient(server.app) as client:
            for prompt in ("", "ab"):
                text = ask(client, prompt=prompt, max_tokens=40, echo=True, **HOW)["choices"][0]["text"]
                assert text == model.sample(prompt, 40, **HOW)
            check_error(client.post("/v1/completions", json={"prompt": "xyz"}), "not in the vocabulary")
        server.slots.close()
