"""What a run measures, for Prometheus: GET /metrics on a port of every process, in the text format 0.0.4."""

import contextlib
import dataclasses
import errno
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from charlstm import distributed
from charlstm.run.step_directory import SEAL, StepDirectory
from data_pipeline.settings import setting

# What there is to tell, without the prefix charlstm_.  What ends in _total is a counter.
METRICS = {
    "step": "Updates made since the beginning of the run.",
    "train_bits_per_character": "Training loss over the steps of the last record, bits per Unicode character.",
    "train_bits_per_byte": "The same, bits per byte.",
    "validation_bits_per_character": "Last score of the validation split, bits per Unicode character.",
    "validation_bits_per_byte": "The same, bits per byte.",
    "symbols_per_second": "Training speed of all processes together over the steps of the last record.",
    "input_wait_ratio": "Part of that time in which this process waited for input, 0 to 1.",
    "checkpoint_age_seconds": "Seconds since the newest checkpoint was whole on disk.",
    "checkpoint_failures_in_a_row": "Saves that failed since the last one that succeeded.",
    "rollbacks_total": "Returns to an earlier checkpoint.",
    "skipped_updates_total": "Updates that were left out.",
    "recurrent_state_rows_reset_total": "Rows of recurrent state that were not finite and were set to zero.",
    "devices": "Devices of the job.",
    "processes": "Processes of the job.",
}
Values = Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class MonitorFlags:
    """The port for Prometheus, which is closed unless asked for."""

    metrics_port: int = setting(0, "Process N answers GET /metrics on this port + N; 0: no port is opened.")
    metrics_host: str = setting(
        "127.0.0.1", "The address it listens on; 0.0.0.0: whoever reaches this machine may read the metrics."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.metrics_port <= 65535:
            raise ValueError(f"metrics_port={self.metrics_port} must be from 1 to 65535, or 0 for no port")


class Monitor:
    """The port of one process, from its start until `stop`; without --metrics_port, nothing."""

    def __init__(self, chosen: MonitorFlags, process: int, values: Callable[[], Values]) -> None:
        """Listens, and answers in a thread.

        Args:
          values: gives what there is to tell, by the names in METRICS, None where it is not yet known; called by other
            threads.

        Raises:
          ValueError: the port or the host cannot be had.
        """
        self._server = _listening(chosen, process) if chosen.metrics_port else None
        if self._server:
            self._server.text = lambda: exposition(values(), process)
            threading.Thread(target=self._server.serve_forever, args=(0.1,), name="monitor", daemon=True).start()

    def stop(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()


@contextlib.contextmanager
def of_this_process(chosen: MonitorFlags, values: Callable[[], Values]) -> Iterator[Monitor]:
    """The monitor of this process.  Raises ValueError on all processes of the job where one of them cannot listen."""
    with contextlib.ExitStack() as held:
        refusal = ""
        try:
            monitor = Monitor(chosen, distributed.process_number(), values)
            held.callback(monitor.stop)
        except ValueError as error:
            refusal = str(error)
        refusals = [words for words in distributed.all_gather_str(refusal) if words]
        if refusals:  # all end alike: none waits for one that has ended
            raise ValueError(refusals[0])
        yield monitor


def exposition(values: Values, process: int) -> str:
    """`values` as Prometheus reads them."""
    assert values.keys() <= METRICS.keys(), values.keys() - METRICS.keys()
    lines = []
    for name, words in METRICS.items():
        if (value := values.get(name)) is not None:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP charlstm_{name} {words}", f"# TYPE charlstm_{name} {kind}"]
            lines += [f'charlstm_{name}{{process="{process}"}} {float(value)!r}']
    return "".join(line + "\n" for line in lines)


def of_records(latest: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """What the latest lines of metrics.jsonl say, by split; None where there is none yet."""
    train, valid = latest.get("train", {}), latest.get("valid", {})
    return {
        "train_bits_per_character": train.get("bits_per_character"),
        "train_bits_per_byte": train.get("bits_per_byte"),
        "validation_bits_per_character": valid.get("bits_per_character"),
        "validation_bits_per_byte": valid.get("bits_per_byte"),
        "symbols_per_second": train.get("symbols_per_second"),
        "input_wait_ratio": train.get("input_wait"),
    }


def checkpoint_age(directory: Path) -> float | None:
    """Seconds since the newest checkpoint in `directory` was sealed; None where there is none, or no disk to ask."""
    files = StepDirectory(directory)
    with contextlib.suppress(OSError):  # a checkpoint may be removed at this moment
        if steps := files.steps():
            return max(time.time() - (files.step(max(steps)) / SEAL).stat().st_mtime, 0.0)
    return None


def _listening(chosen: MonitorFlags, process: int) -> "_Server":
    host, port = chosen.metrics_host, chosen.metrics_port + process
    if port > 65535:
        raise ValueError(f"metrics_port={chosen.metrics_port} + process {process} is above 65535: choose a lower one")
    try:
        return _Server(host, port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a name"
        if isinstance(error, socket.gaierror | UnicodeError) or error.errno == errno.EADDRNOTAVAIL:
            remedy = "use 127.0.0.1, or 0.0.0.0 for all of its networks"
            raise ValueError(f"metrics_host={host} is no address of this machine ({reason}): {remedy}") from None
        remedy = "choose another metrics_port, above 1023, or 0 for none"
        raise ValueError(f"process {process} cannot listen on port {port} of {host} ({reason}): {remedy}") from None


class _Server(ThreadingHTTPServer):
    text: Callable[[], str]

    def __init__(self, host: str, port: int) -> None:
        found: list[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self.address_family, *_, address = min(found)  # IPv4 where the host has both
        super().__init__(address, _Answer)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer would ask the DNS for the host's name, and wait for it

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # of a client that has gone
            super().handle_error(request, client_address)


class _Answer(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10.0  # seconds for a client that connects and says nothing

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, explain="The metrics are at /metrics.")
            return
        body = self.server.text().encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is nothing to say."""
