"""Real servers in processes of their own: the official client, many clients at once, clients that go, signals."""

import contextlib
import http.client
import json
import random
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from charlstm import api
from launch import serve
from tests.serving.conftest import RUNS, save, started

HOW = {"temperature": 0.8, "top_k": 9, "top_p": 0.95}


@pytest.fixture(scope="module")
def served(runs):
    """(process, address, model) of a server that several tests share."""
    with started(runs["characters"], "--slots=8", "--queue=500", "--max_tokens=100000") as (running, address):
        yield running, address, api.load(runs["characters"])
        assert running.poll() is None, running.said


def post(address, timeout=300, **fields):
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(fields).encode())
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


def get(address, path):
    with urllib.request.urlopen(address + path, timeout=300) as answer:
        return answer.read().decode()


def busy(address):
    health = json.loads(get(address, "/health"))
    return health["busy"], health["waiting"]


def wait_until_idle(address, seconds=60):
    deadline = time.monotonic() + seconds
    while busy(address) != (0, 0):
        assert time.monotonic() < deadline, "a slot is lost"
        time.sleep(0.05)


def leave_in_the_middle(address, chance, **fields):
    """Sends a request, and goes before, while or after it is answered."""
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        connection.sendall((head + body)[: len(head + body) - chance.choice([0, 0, 0, 3])])
        if chance.random() < 0.7:
            connection.settimeout(chance.uniform(0.001, 0.1))
            with contextlib.suppress(TimeoutError):
                connection.recv(chance.choice([1, 100, 10_000]))
        if chance.random() < 0.5:  # reset, not closed
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def memory(pid):
    """Resident bytes of a process."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def test_the_official_client_completes_streams_scores_and_stops(served):
    openai = pytest.importorskip("openai", reason="the official client is not installed")
    _, address, model = served
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    name = model.run_dir.name
    assert [served.id for served in client.models.list()] == [name]
    how = {"model": name, "prompt": "abcd", "max_tokens": 80, "temperature": 0.8, "top_p": 0.95, "seed": 5}
    text = model.sample("abcd", 80, temperature=0.8, top_p=0.95, seed=5)[4:]
    whole = client.completions.create(**how)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text, "length")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4, 80)
    pieces = [part.choices[0].text for part in client.completions.create(**how, stream=True)]
    assert len(pieces) > 2 and "".join(pieces) == text
    scored = client.completions.create(**(how | {"max_tokens": 0}), echo=True, logprobs=2).choices[0]
    assert scored.text == "abcd" and scored.logprobs.tokens == list("abcd")
    assert scored.logprobs.token_logprobs[0] is None and len(scored.logprobs.top_logprobs[1]) == 2
    stopped = client.completions.create(**how, stop=[text[9:12]]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.find(text[9:12])], "stop")
    narrow = client.completions.create(**how, extra_body={"top_k": 1, "return_state": True}).choices[0]
    assert narrow.text == model.sample("abcd", 80, temperature=0)[4:] and narrow.state
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(**(how | {"temperature": -1}))
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="other", prompt="a")


def texts_at_once(address, model, clients):
    """Has each of many clients, who all begin at once, ask for a text of its own; compares with texts one by one."""
    settings = [{"temperature": 0.5 + i % 3 / 2, "top_k": i % 4 * 3, "seed": i} for i in range(clients)]
    barrier = threading.Barrier(clients)

    def one(i):
        barrier.wait()
        fields = {"prompt": "abcdefg"[: i % 7] + "é", "max_tokens": 40 + 5 * (i % 9), **settings[i]}
        return fields, post(address, **fields, logprobs=0)["choices"][0]

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(one, range(clients)))
    for fields, choice in answers:
        alone = post(address, **fields, logprobs=0)["choices"][0]
        assert alone == choice
    for (fields, choice), how in list(zip(answers, settings, strict=True))[:3]:
        text = model.sample(fields["prompt"], fields["max_tokens"], **how)
        assert fields["prompt"] + choice["text"] == text


def test_twelve_clients_at_once_get_the_texts_they_get_one_by_one(served):
    texts_at_once(*served[1:], 12)


@pytest.mark.long
def test_sixty_four_clients_at_once_get_the_texts_they_get_one_by_one(served):
    texts_at_once(*served[1:], 64)


def requests_with_kills(served, count, at_a_time=8):
    running, address, model = served
    expected = model.sample("abc", 30, seed=3, **HOW)
    chance = random.Random(0)
    chances = [random.Random(chance.random()) for _ in range(count)]

    def one(number):
        own = chances[number]
        if own.random() < 0.6:
            fields = {"prompt": "abc", "max_tokens": own.choice([30, 3000, 100_000]), "n": own.choice([1, 2])}
            leave_in_the_middle(address, own, **fields, stream=own.random() < 0.5, logprobs=own.choice([None, 2]))
        else:
            answer = post(address, prompt="abc", max_tokens=30, seed=3, **HOW)
            assert "abc" + answer["choices"][0]["text"] == expected

    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(one, range(count)))
    wait_until_idle(address)
    assert "abc" + post(address, prompt="abc", max_tokens=30, seed=3, **HOW)["choices"][0]["text"] == expected
    return memory(running.pid)


def test_no_slot_is_lost_by_clients_that_go(served):
    requests_with_kills(served, 80)


@pytest.mark.long
def test_ten_thousand_requests_with_kills_lose_no_slot_and_memory_is_flat(served):
    before = requests_with_kills(served, 1000)
    after = requests_with_kills(served, 9000)
    assert after < before + (64 << 20)


def test_a_client_that_goes_frees_its_slot_at_once(served):
    _, address, _ = served
    wait_until_idle(address)
    host, port = address.removeprefix("http://").split(":")
    for is_stream in (True, False):
        body = json.dumps({"max_tokens": 100_000, "n": 8, "stream": is_stream}).encode()
        with socket.create_connection((host, int(port)), timeout=300) as connection:
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            )
            connection.sendall(body)
            while busy(address)[0] < 8:
                time.sleep(0.01)
        wait_until_idle(address, 20)


def test_sigterm_drains_and_the_port_is_given_up(runs):
    with started(runs["bytes"], "--slots=2", "--max_tokens=20000") as (running, address):
        with ThreadPoolExecutor(5) as pool:
            asked = [pool.submit(post, address, prompt="a", max_tokens=1500, seed=i) for i in range(4)]
            while busy(address) != (2, 2):
                time.sleep(0.01)
            running.send_signal(signal.SIGTERM)
            assert all(len(answer.result()["choices"]) == 1 for answer in asked)
        assert running.wait(300) == 0
        assert any("told to stop" in line for line in running.said)
        with pytest.raises(OSError):
            get(address, "/health")


@pytest.mark.long
def test_clients_that_neither_write_nor_read_do_not_hold_a_server_that_is_told_to_stop(runs):
    code = "import sys; from launch import serve; from launch.support import cli; serve.LAST_ANSWERS = 2; "
    with started(runs["bytes"], "--slots=2", program=("-c", code + "cli.run('launch.serve', serve.main)")) as opened:
        running, address = opened
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "a", "max_tokens": 4096, "stream": True, "logprobs": 20}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with contextlib.ExitStack() as connections:
            for sent in (head + body, head + body[:5]):
                connection = connections.enter_context(socket.socket())
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                connection.connect((host, int(port)))
                connection.sendall(sent)
            while busy(address) != (1, 0):
                time.sleep(0.01)
            running.send_signal(signal.SIGTERM)
            assert running.wait(60) == 0
    assert len(running.said) == 2 and "told to stop" in running.said[1]


@pytest.mark.parametrize(
    ("numbers", "status"), [([signal.SIGINT], 130), ([signal.SIGTERM] * 2, 143)], ids=["^C", "TERM"]
)
def test_ctrl_c_and_a_second_sigterm_end_it_at_once(runs, numbers, status):
    with started(runs["bytes"], "--slots=2", "--max_tokens=1000000") as (running, address):
        thread = threading.Thread(target=leave_quietly, args=(address,))
        thread.start()
        while busy(address) == (0, 0):
            time.sleep(0.01)
        for number in numbers:
            running.send_signal(number)
            time.sleep(0.3)
        assert running.wait(40) == status
        thread.join()
        assert not any("Traceback" in line for line in running.said)


def leave_quietly(address):
    with contextlib.suppress(OSError, http.client.HTTPException):
        post(address, max_tokens=1_000_000)


def test_a_better_checkpoint_is_followed(runs, tmp_path, monkeypatch):
    run_dir = tmp_path / "bytes"
    shutil.copytree(runs["bytes"], run_dir)
    with started(run_dir, "--slots=2", "--follow") as (_, address):
        first = post(address, prompt="ab", max_tokens=30, seed=1, return_state=True)
        save(run_dir, *RUNS["bytes"][:1], 7, 2.25)
        save(run_dir, *RUNS["bytes"][:1], 9, 2.75)  # worse: is not the best
        deadline = time.monotonic() + 300
        while json.loads(get(address, "/health"))["step"] != 7:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            post(address, prompt="a", max_tokens=1)
        text = post(address, prompt="ab", max_tokens=30, seed=1, echo=True)["choices"][0]["text"]
        assert text == api.load(run_dir, "7").sample("ab", 30, seed=1)
        assert text[2:] != first["choices"][0]["text"]
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(address, state=first["choices"][0]["state"])
        assert refused.value.code == 400 and b"another model or checkpoint" in refused.value.read()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--run_dir is required"),
        (["--run_dir=RUN", "--port=70000"], "port=70000"),
        (["--run_dir=RUN", "--slots=0"], "slots=0"),
        (["--run_dir=RUN", "--host=256.0.0.1"], "256.0.0.1"),
        (["--run_dir=RUN", "--follow", "--checkpoint=3"], "checkpoint=best"),
        (["--run_dir=nowhere"], "not a run"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_one_sentence(runs, flags, words):
    flags = [flag.replace("RUN", str(runs["bytes"])) for flag in flags]
    with pytest.raises(ValueError, match=words):
        serve.main(["launch.serve", *flags])


def test_a_taken_port_is_named_in_a_sentence(runs):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port}.*choose another"):
            serve.main(["launch.serve", f"--run_dir={runs['bytes']}", f"--port={port}"])
