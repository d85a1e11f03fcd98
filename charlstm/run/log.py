"""Output of a run: log.txt, metrics.jsonl, samples.jsonl, and on a terminal one live line."""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from data_pipeline.atomic_files import sync


class Copy(Protocol):
    """A copy of metrics.jsonl and samples.jsonl in another form."""

    def rebuild(self, records: list[dict[str, Any]], samples: list[dict[str, Any]]) -> None: ...

    def record(self, fields: dict[str, Any]) -> None: ...

    def sample(self, fields: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Writes `log.txt`, `metrics.jsonl` and `samples.jsonl` of a run directory, and the terminal.

    A `silent` log (of a process that is not the first, or of a dry run) writes nothing to the run directory.  What a
    full disk does not take is kept, and written when there is room again.

    Args:
      copy: kept beside both files, and made anew when lines are dropped.
    """

    def __init__(self, run_dir: Path, terminal: TextIO, silent: bool = False, copy: Copy | None = None) -> None:
        self._copy = None if silent else copy
        self._terminal: TextIO | None = terminal
        self._live = terminal.isatty() or type(terminal).__module__.startswith("ipykernel")
        self._lock = threading.Lock()  # a checkpoint's thread has something to say, too
        self._log = None if silent else Lines(run_dir / "log.txt")
        self._metrics = None if silent else Lines(run_dir / "metrics.jsonl")
        self._samples = None if silent else Lines(run_dir / "samples.jsonl")
        self._status_shown = False

    def info(self, text: str) -> None:
        """One plain line, in log.txt and on the terminal."""
        if self._log is None:
            return
        with self._lock:
            self._write(text)
            self._show(self._wiped() + text + "\n")

    @contextlib.contextmanager
    def collecting(self, name: str, beginnings: tuple[str, ...]) -> Iterator[None]:
        """Takes the warnings of a logger of the standard library; a silent log leaves them to stderr.

        Args:
          beginnings: of the messages that are this run's, as several may train in threads of one process.
        """

        def leave(record: logging.LogRecord) -> bool:
            if record.levelno < logging.WARNING or not record.getMessage().startswith(beginnings):
                return True
            self.info(record.getMessage())
            return False  # no handler says it once more

        logger = logging.getLogger(name)
        if self._log is not None:
            logger.addFilter(leave)
        try:
            yield
        finally:
            logger.removeFilter(leave)

    def progress(self, text: str) -> None:
        """One plain line in log.txt, unless `text` is empty; on a terminal it is the live line."""
        if self._log is None or not text:
            return
        with self._lock:
            self._write(text)
            if not self._live:
                self._show(text + "\n")
        self.status(text)

    def status(self, text: str) -> None:
        """The one live line at the foot of a terminal; nothing where the output is not a terminal."""
        if self._log is None or not self._live or not text:
            return
        with self._lock:
            width = self._width()
            self._show("\r" + text[:width].ljust(width))
            self._status_shown = True

    def record(self, fields: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.add(json.dumps(fields))
        if self._copy is not None:
            self._copy.record(fields)

    def sample(self, fields: dict[str, Any], in_short: list[str]) -> None:
        """One line of samples.jsonl, and a few plain lines of it."""
        if self._samples is not None:
            self._samples.add(json.dumps(fields))
        if self._copy is not None:
            self._copy.sample(fields)
        for line in in_short:
            self.info(f"step {fields['step']} | {line}")

    def rewind(self, step: int, evaluated: bool = True) -> None:
        """Drops the lines of both files after `step`: a run that goes on from a checkpoint makes them again.

        Args:
          evaluated: False: the evaluation of `step` and its sample are made again, too.
        """
        for lines in (self._metrics, self._samples):
            if lines is not None:
                lines.rewind(step, evaluated)
        if self._copy is not None and self._metrics is not None and self._samples is not None:
            records, samples = (
                [json.loads(line) for line in lines.text().splitlines()] for lines in (self._metrics, self._samples)
            )
            self._copy.rebuild(records, samples)

    def sync(self) -> None:
        """Puts the lines of both files on disk: a checkpoint is not to outlive those that led to it."""
        for lines in (self._metrics, self._samples):
            if lines is not None:
                lines.sync()

    def close(self) -> None:
        """Raises OSError where there are lines that the disk does not take."""
        with self._lock:
            self._show(self._wiped())
            if self._copy is not None:
                self._copy.close()
            for lines in (self._log, self._metrics, self._samples):
                if lines is not None:
                    lines.close()

    def _write(self, text: str) -> None:
        assert self._log is not None
        self._log.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def _width(self) -> int:
        """Columns of the live line: one less than the terminal has, so that it does not wrap."""
        try:
            assert self._terminal is not None
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size(self._terminal.fileno()).columns)
        except (OSError, ValueError):
            columns = 0
        return (columns or 80) - 1

    def _wiped(self) -> str:
        """Characters that erase the live line."""
        shown, self._status_shown = self._status_shown, False
        return "\r" + " " * self._width() + "\r" if shown else ""

    def _show(self, text: str) -> None:
        """Puts `text` on the terminal, while there is one: a run does not end with the window it was started in."""
        if self._terminal is None:
            return
        try:
            print(text, end="", file=self._terminal, flush=True)
        except (OSError, ValueError):
            self._terminal, self._live, self._status_shown = None, False, False


class Lines:
    """A file that lines are added to.  Those that the disk does not take wait for the next one that it does."""

    MOST = 2**24  # bytes that wait

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file is there and cannot be written."""
        self.path, self._waiting = path, bytearray()
        if path.exists():
            self._write()

    def add(self, line: str) -> None:
        """Raises OSError where too much is waiting: the line is lost."""
        self._waiting += (encoded := line.encode("utf-8") + b"\n")
        try:
            self._write()
        except OSError:
            if len(self._waiting) > self.MOST:
                del self._waiting[-len(encoded) :]
                raise

    def text(self) -> str:
        """All lines, those that wait as well."""
        there = self.path.read_bytes() if self.path.exists() else b""
        return (there + self._waiting).decode("utf-8", "replace")

    def rewind(self, step: int, evaluated: bool = True) -> None:
        """Drops the JSON objects after `step`, and unless `evaluated` those of `step` that are not of training."""
        kept = []
        for line in (written := self.text()).splitlines():
            try:
                record = json.loads(line)
                again = not evaluated and record["step"] == step and record.get("split") != "train"
                if record["step"] <= step and not again:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):
                continue  # the half line of a run that was killed while writing it, or what a failing disk left
        if written:
            self.replace("".join(kept))

    def replace(self, text: str) -> None:
        """Replaces the content of the file by `text`, in one stroke; no line waits after that."""
        beside = self.path.with_suffix(f"{self.path.suffix}.tmp")
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        self._waiting.clear()

    def sync(self) -> None:
        """Puts on disk what is written; a disk that fails is found by the checkpoint that follows."""
        with contextlib.suppress(OSError):
            sync(self.path)
            sync(self.path.parent)

    def close(self) -> None:
        """Raises OSError where there are lines left."""
        if self._waiting:
            self._write()

    def _write(self) -> None:
        """Writes what waits; of a line that only half fits, the other half goes on waiting."""
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            while self._waiting:
                del self._waiting[: os.write(file, self._waiting)]
        except OSError as error:
            error.filename = os.fspath(self.path)
            raise
        finally:
            os.close(file)
