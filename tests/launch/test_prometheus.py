"""What Prometheus is told: read over HTTP, and parsed by the parser of Prometheus's own client."""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

import pytest
from prometheus_client.parser import text_string_to_metric_families

from charlstm import distributed
from charlstm.run.sealing import SEAL
from launch import train
from launch.support import cli, prometheus
from launch.support.prometheus import METRICS, Monitor, MonitorFlags
from tests.jobs import job, last_line, wait_for
from tests.launch.conftest import refusal, tree

EVERYTHING = {name: 0.5 + number for number, name in enumerate(METRICS)}


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    while True:
        with contextlib.ExitStack() as taken, contextlib.suppress(OSError, OverflowError):
            first = taken.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            for port in range(first + 1, first + count):
                taken.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


@contextlib.contextmanager
def listening(process: int = 0, **values: float | None) -> Iterator[int]:
    """The port of a monitor that tells `values`."""
    port = free_ports(process + 1)
    told = Monitor(MonitorFlags(metrics_port=port), process, lambda: values)
    try:
        yield port + process
    finally:
        told.stop()


def get(port: int, path: str = "/metrics") -> tuple[str, str]:
    """The text and its type."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        return answer.read().decode(), answer.headers["Content-Type"]


def scraped(text: str) -> dict[str, tuple[str, dict[str, str], float]]:
    """name -> (kind, labels, value), as Prometheus reads them."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family
        (sample,) = family.samples
        assert sample.name not in found
        found[sample.name] = (family.type, sample.labels, sample.value)
    return found


def values_of(port: int) -> dict[str, float]:
    return {name.removeprefix("charlstm_"): value for name, (_, _, value) in scraped(get(port)[0]).items()}


def test_every_metric_is_scraped_with_its_value_its_kind_and_the_number_of_its_process():
    with listening(process=3, **EVERYTHING) as port:
        text, kind = get(port)
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    found = scraped(text)
    assert {name: value for name, (_, _, value) in found.items()} == {f"charlstm_{n}": v for n, v in EVERYTHING.items()}
    assert all(labels == {"process": "3"} for _, labels, _ in found.values())
    counters = {name for name, (kind, _, _) in found.items() if kind == "counter"}
    assert counters == {f"charlstm_{n}_total" for n in ("rollbacks", "skipped_updates", "recurrent_state_rows_reset")}
    assert {kind for kind, _, _ in found.values()} == {"counter", "gauge"}


def test_what_is_not_known_yet_is_left_out_and_a_zero_is_not():
    with listening(step=None, rollbacks_total=0) as port:
        assert values_of(port) == {"rollbacks_total": 0}
    with listening() as port:
        assert get(port)[0] == ""


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e-300, 123456789012.5, True])
def test_every_number_arrives_as_it_is(value):
    with listening(step=value) as port:
        assert repr(values_of(port)["step"]) == repr(float(value))


def test_a_value_is_that_of_the_moment_it_is_asked_for():
    port = free_ports(1)
    figures = iter([{}, {"step": 7}, {"step": 8}, {"step": 9}])
    told = Monitor(MonitorFlags(metrics_port=port), 0, lambda: next(figures))
    assert get(port)[0] == ""
    assert [values_of(port)["step"] for _ in range(3)] == [7, 8, 9]
    told.stop()


@pytest.mark.parametrize("port_given", [0, 1])
def test_without_the_flag_there_is_no_port_and_no_thread(port_given):
    before = set(threading.enumerate())
    told = Monitor(MonitorFlags(metrics_port=port_given * free_ports(1)), 0, dict)
    assert bool(set(threading.enumerate()) - before) == bool(port_given)
    told.stop()
    wait_for(lambda: set(threading.enumerate()) <= before, 10)


def test_a_client_that_says_nothing_more_keeps_neither_others_nor_the_end_of_the_run_waiting():
    with contextlib.ExitStack() as client:
        with listening(step=1) as port:
            silent = client.enter_context(socket.create_connection(("127.0.0.1", port)))
            silent.sendall(b"GET /metr")
            began = time.monotonic()
            assert values_of(port) == {"step": 1}
        assert time.monotonic() - began < 5  # nobody waits for it
        with pytest.raises(urllib.error.URLError):
            get(port)
        Monitor(MonitorFlags(metrics_port=port), 0, dict).stop()


def test_a_client_that_goes_away_in_the_middle_is_nothing_to_say_and_a_bug_is(capfd):
    asked, gone = threading.Event(), threading.Event()

    def slow() -> dict[str, float]:
        asked.set()
        gone.wait(10)
        return EVERYTHING

    def answering() -> bool:
        return any("process_request" in thread.name for thread in threading.enumerate())

    port = free_ports(1)
    monitor = Monitor(MonitorFlags(metrics_port=port), 0)
    monitor.values = slow
    with socket.create_connection(("127.0.0.1", port)) as leaving:
        leaving.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert asked.wait(10)
        leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # gone, and not politely
    gone.set()
    wait_for(lambda: not answering(), 10)
    assert capfd.readouterr() == ("", "")
    monitor.values = lambda: {"no_such_metric": 1}
    with pytest.raises(urllib.error.URLError):
        get(port)
    wait_for(lambda: not answering(), 10)
    monitor.stop()
    assert "no_such_metric" in capfd.readouterr().err


def test_without_prometheus_client_one_line_says_how_to_have_it(arguments, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    flags = (*arguments, f"--run_dir={tmp_path / 'run'}")
    assert refusal(train.main, *flags, "--metrics_port=9400").endswith("pip install 'charlstm[monitor]'")
    assert not (tmp_path / "run").exists()
    MonitorFlags()  # without the flag it is not needed


@pytest.mark.parametrize(
    ("host", "reason"),
    [("no-such-host.invalid", ""), ("", ""), ("a..b", "not a name"), ("192.0.2.1", ""), ("127.0.0.1:80", "")],
)
def test_a_host_that_is_not_this_machine_is_refused_with_the_remedy(host, reason):
    with pytest.raises(ValueError, match=f"^metrics_host={host} is no address of this machine .*{reason}") as caught:
        Monitor(MonitorFlags(metrics_port=free_ports(1), metrics_host=host), 0, dict)
    assert type(caught.value) is ValueError
    assert str(caught.value).endswith("): use 127.0.0.1, or 0.0.0.0 for all of its networks")


def test_a_port_in_use_is_refused_with_the_remedy():
    with listening(process=1) as port, pytest.raises(ValueError) as caught:
        Monitor(MonitorFlags(metrics_port=port - 2), 2, dict)
    sentence = f"process 2 cannot listen on port {port} of 127.0.0.1 (Address already in use): choose another"
    assert str(caught.value) == f"{sentence} metrics_port, above 1023, or 0 for none"


def test_a_port_that_is_not_allowed_is_refused_with_the_remedy(monkeypatch):
    def bind(server: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(WSGIServer, "server_bind", bind)
    with pytest.raises(ValueError, match=r"port 80 of 127.0.0.1 \(Permission denied\): choose .*, above 1023"):
        Monitor(MonitorFlags(metrics_port=80), 0, dict)


def test_a_port_that_there_is_not_is_refused():
    for port in (-1, 65536):
        with pytest.raises(ValueError, match=f"^metrics_port={port} must be from 1 to 65535, or 0 for no port$"):
            MonitorFlags(metrics_port=port)
    with pytest.raises(ValueError, match=r"^metrics_port=65535 \+ process 1 is above 65535: choose a lower one$"):
        Monitor(MonitorFlags(metrics_port=65535), 1, dict)


@pytest.mark.parametrize("on_this_process", [False, True])
def test_where_one_process_cannot_listen_all_refuse_and_none_keeps_its_port(on_this_process, monkeypatch):
    port = free_ports(1)
    monkeypatch.setattr(
        distributed, "all_gather_str", lambda word: [word, "" if on_this_process else "process 1 cannot listen"]
    )
    with contextlib.ExitStack() as taken:
        if on_this_process:
            taken.enter_context(socket.create_server(("127.0.0.1", port)))
        refused = pytest.raises(ValueError, match=f"^process {int(not on_this_process)} cannot listen")
        with refused, prometheus.of_this_process(MonitorFlags(metrics_port=port)):
            pass
    Monitor(MonitorFlags(metrics_port=port), 0, dict).stop()


def test_the_latest_records_are_what_is_told_of_training_and_validation():
    train_record = {
        "bits_per_character": None,
        "bits_per_byte": 2.5,
        "symbols_per_second": 9e4,
        "input_wait": 0.25,
        "step": 7,
    }
    of_train = {
        "train_bits_per_character": None,
        "train_bits_per_byte": 2.5,
        "symbols_per_second": 9e4,
        "input_wait_ratio": 0.25,
    }
    valid = {"bits_per_character": 3.5, "bits_per_byte": 1.5, "symbols_per_second": 1.0, "input_wait": None}
    nothing = dict.fromkeys((*of_train, "validation_bits_per_character", "validation_bits_per_byte"))
    assert prometheus.of_records({}) == nothing
    assert prometheus.of_records({"train": train_record}) == nothing | of_train
    assert prometheus.of_records({"valid": valid}) == nothing | {
        "validation_bits_per_character": 3.5,
        "validation_bits_per_byte": 1.5,
    }
    assert nothing.keys() <= METRICS.keys()


def test_the_age_is_that_of_the_newest_checkpoint_by_its_step(tmp_path):
    assert prometheus.checkpoint_age(tmp_path / "absent") is None
    for step, age in ((9, 50), (10, 500), ("20.corrupt-0", 5), ("30.saving", 5)):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / SEAL).write_text("{}")
        os.utime(tmp_path / str(step) / SEAL, (time.time() - age,) * 2)
    assert prometheus.checkpoint_age(tmp_path) == pytest.approx(500, abs=20)
    (tmp_path / "10" / SEAL).unlink()  # as it is being removed
    assert prometheus.checkpoint_age(tmp_path) is None
    (tmp_path / "11").mkdir()
    (tmp_path / "11" / SEAL).write_text("{}")
    os.utime(tmp_path / "11" / SEAL, (time.time() + 90,) * 2)  # by another clock
    assert prometheus.checkpoint_age(tmp_path) == 0


# The whole.


@pytest.mark.long
def test_both_processes_of_a_job_are_scraped_while_it_trains(job_flags, tmp_path):
    port, run_dir = free_ports(2), tmp_path / "run"
    often = ("--num_steps=100000", "--log_every=5", "--evaluate_every=10", "--checkpoint_every=10")
    own = ("--processes=2", "--devices_per_process=2")

    def ready(of_process: int) -> bool:
        assert running.poll() is None, running.communicate()
        try:
            return set(METRICS) <= values_of(port + of_process).keys()
        except (urllib.error.URLError, ConnectionError):
            return False

    with job(own, *job_flags, *often, f"--run_dir={run_dir}", f"--metrics_port={port}") as running:
        for number in (0, 1):
            wait_for(lambda number=number: ready(number))
        first = values_of(port)
        wait_for(lambda: values_of(port)["step"] >= first["step"] + 20)
        texts = [get(port + number)[0] for number in (0, 1)]
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=300)
    assert running.returncode == cli.STOPPED, said
    for number, found in enumerate(map(scraped, texts)):
        assert {labels["process"] for _, labels, _ in found.values()} == {str(number)}
        told = {name.removeprefix("charlstm_"): value for name, (_, _, value) in found.items()}
        assert (told["devices"], told["processes"], told["checkpoint_failures_in_a_row"]) == (4, 2, 0)
        assert 0 <= told["checkpoint_age_seconds"] < 120 and 0 <= told["input_wait_ratio"] <= 1
        assert 0 < told["train_bits_per_byte"] < 9 and 0 < told["validation_bits_per_byte"] < 9
        assert told["symbols_per_second"] > 0
        assert first["step"] + 20 <= told["step"] <= last_line(run_dir)["step"] + 5
    with pytest.raises(urllib.error.URLError):
        get(port)


@pytest.mark.parametrize("is_there", [True, False], ids=["old", "new"])
def test_a_run_whose_port_is_in_use_is_refused_before_anything_is_trained_or_changed(
    is_there, copied, arguments, tmp_path
):
    run_dir = copied if is_there else tmp_path / "new"
    before = tree(run_dir)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence = refusal(train.main, *arguments, f"--run_dir={run_dir}", "--num_steps=41", f"--metrics_port={port}")
    assert sentence.startswith(f"process 0 cannot listen on port {port} of 127.0.0.1 ")
    assert tree(run_dir) == before


def test_the_port_of_a_run_is_closed_when_it_is_done(copied, arguments):
    port = free_ports(1)
    go_on = ("train", *arguments, f"--run_dir={copied}", "--num_steps=41", f"--metrics_port={port}")
    assert train.main(go_on) == cli.DONE
    socket.create_server(("127.0.0.1", port)).close()
