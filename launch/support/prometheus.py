"""Serves what a run measures to Prometheus: GET /metrics on one port per process (extra `monitor`)."""

import contextlib
import dataclasses
import errno
import importlib.util
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from charlstm import distributed
from charlstm.run.sealing import SEAL
from charlstm.run.step_directory import StepDirectory
from data_pipeline.settings import setting

with contextlib.suppress(ImportError):  # an extra, which MonitorFlags asks for
    import prometheus_client
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

# name without the prefix charlstm_ -> description.  A name in _total is a counter, any other a gauge.
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
    """The port for Prometheus, which is closed by default."""

    metrics_port: int = setting(0, "Process N answers GET /metrics on this port + N; 0 opens no port.")
    metrics_host: str = setting(
        "127.0.0.1", "The address it listens on; 0.0.0.0: whoever reaches this machine may read the metrics."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.metrics_port <= 65535:
            raise ValueError(f"metrics_port={self.metrics_port} must be from 1 to 65535, or 0 for no port")
        if self.metrics_port and importlib.util.find_spec("prometheus_client") is None:
            raise ValueError("metrics_port needs prometheus_client, not installed: pip install 'charlstm[monitor]'")


class Monitor:
    """Serves the metrics of one process from its start until `stop`; without --metrics_port, does nothing."""

    def __init__(self, chosen: MonitorFlags, process: int, values: Callable[[], Values] = dict) -> None:
        """Listens, and answers in threads.

        Args:
          values: returns the values by the names in METRICS, None if not yet known; called by other threads.

        Raises:
          ValueError: the port or the host is not available.
        """
        self.values, self._process, self._server = values, process, None
        if chosen.metrics_port:
            registry = prometheus_client.CollectorRegistry()  # without the library's metrics of the Python process
            registry.register(self)
            self._server, self._thread = _listen(chosen, process, registry)

    def collect(self) -> Iterator[Any]:
        """Yields a metric family for each known value: what prometheus_client asks for at every scrape."""
        values = self.values()
        assert values.keys() <= METRICS.keys(), values.keys() - METRICS.keys()
        for name, description in METRICS.items():
            if (value := values.get(name)) is not None:
                kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                family = kind(f"charlstm_{name}", description, labels=["process"])
                family.add_metric([str(self._process)], float(value))
                yield family

    def stop(self) -> None:
        """Closes the port."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


@contextlib.contextmanager
def of_this_process(chosen: MonitorFlags, values: Callable[[], Values] = dict) -> Iterator[Monitor]:
    """Yields the monitor of this process.  Raises ValueError on every process of the job if any cannot listen."""
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


def _listen(chosen: MonitorFlags, process: int, registry: Any) -> Any:
    """Starts the server; returns it and its thread."""
    host, port = chosen.metrics_host, chosen.metrics_port + process
    if port > 65535:
        raise ValueError(f"metrics_port={chosen.metrics_port} + process {process} is above 65535: choose a lower one")
    try:
        return prometheus_client.start_http_server(port, host, registry)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a name"
        if isinstance(error, socket.gaierror | UnicodeError) or error.errno == errno.EADDRNOTAVAIL:
            remedy = "use 127.0.0.1, or 0.0.0.0 for all of its networks"
            raise ValueError(f"metrics_host={host} is no address of this machine ({reason}): {remedy}") from None
        remedy = "choose another metrics_port, above 1023, or 0 for none"
        raise ValueError(f"process {process} cannot listen on port {port} of {host} ({reason}): {remedy}") from None


def of_records(latest: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Returns the metrics that the latest lines of metrics.jsonl have, by split; None if absent."""
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
    """Returns the seconds since the newest checkpoint in `directory` was committed; None if absent or not readable."""
    files = StepDirectory(directory)
    with contextlib.suppress(OSError):  # a checkpoint may be removed at this moment
        if steps := files.steps():
            return max(time.time() - (files.step(max(steps)) / SEAL).stat().st_mtime, 0.0)
    return None
