"""Event files for TensorBoard: a copy of metrics.jsonl and samples.jsonl, made anew at every start.

So a run that went on from a checkpoint, or rolled back, has each step once, as the files that are copied have.  What
tensorboardX would leave to a thread of its own is written at once: that thread, on a full disk, would block the run.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from charlstm.config import Config, flatten
from charlstm.inference.score import FIGURES
from data_pipeline.settings import setting

NOT_DRAWN = ("step", "split", "time", "state_digest")


@dataclasses.dataclass(frozen=True)
class TensorboardFlags:
    """TensorBoard."""

    tensorboard: bool = setting(
        False, "Keep a copy of metrics and samples for TensorBoard, in the run directory's tensorboard/."
    )

    def __post_init__(self) -> None:
        if self.tensorboard and importlib.util.find_spec("tensorboardX") is None:
            raise ValueError(
                "--tensorboard needs tensorboardX, which is not installed: pip install 'charlstm[tensorboard]'"
            )


class EventFiles:
    """The event files of one run.  What fails is said once, and no more is written: it never stops the run."""

    def __init__(self, directory: Path, config: Config, say: Callable[[str], None]) -> None:
        self._directory, self._config, self._say = directory, config, say
        self._writer: Any = None
        self._failed = False

    def rebuild(self, records: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]]) -> None:
        """Makes the file anew: the settings, and these lines of metrics.jsonl and samples.jsonl."""
        with self._tried():
            from tensorboardX import event_file_writer, proto, summary

            self.close()
            self._directory.mkdir(exist_ok=True)
            for old in self._directory.glob("events.out.tfevents.*"):
                old.unlink()
            self._writer = event_file_writer.EventsWriter(str(self._directory / "events"))
            # Has a TensorBoard that is open drop what it read from the file before.
            start = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
            self._writer.write_event(proto.event_pb2.Event(step=0, session_log=start))
            settings = {
                name: getattr(getattr(self._config, at), name) for name, (at, _) in flatten(self._config).items()
            }
            for part in summary.hparams(settings, {f"valid/{name}": 0.0 for name in FIGURES}):
                self._write(part, 0, None)
        for record in records:
            self._add_record(record)
        for sample in samples:
            self._add_sample(sample)
        self._flush()

    def record(self, fields: dict[str, Any]) -> None:
        """Adds a line of metrics.jsonl."""
        self._add_record(fields)
        self._flush()

    def sample(self, fields: dict[str, Any]) -> None:
        """Adds a line of samples.jsonl."""
        self._add_sample(fields)
        self._flush()

    def close(self) -> None:
        """Closes the file."""
        with self._tried():
            if self._writer is not None:
                self._writer.close()
            self._writer = None

    def _add_record(self, fields: dict[str, Any]) -> None:
        with self._tried():
            from tensorboardX import summary

            for name, value in fields.items():
                if name not in NOT_DRAWN and isinstance(value, int | float):
                    self._write(summary.scalar(f"{fields['split']}/{name}", value), fields["step"], fields.get("time"))

    def _add_sample(self, fields: dict[str, Any]) -> None:
        with self._tried():
            from tensorboardX import summary

            lines = (fields["prompt"] + fields["text"]).split("\n")
            as_code = "\n".join(f"    {line}" for line in lines)  # TensorBoard reads Markdown
            self._write(summary.text("sample", as_code), fields["step"], fields.get("time"))

    def _write(self, what: Any, step: int, when: float | None) -> None:
        from tensorboardX import proto

        if self._writer is not None:
            event = proto.event_pb2.Event(step=step, summary=what, wall_time=when or 0.0)
            self._writer.write_event(event)

    def _flush(self) -> None:
        with self._tried():
            if self._writer is not None:
                self._writer.flush()

    @contextlib.contextmanager
    def _tried(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: a copy is not worth a run
            self._writer = None
            if not self._failed:
                self._failed = True
                self._say(f"no event files for TensorBoard from here on: {type(error).__name__}: {error}")
