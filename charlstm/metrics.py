"""What a run measures: sums over its steps, the lines of metrics.jsonl and the status line made of them."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from charlstm import mesh as mesh_lib
from charlstm.loss import NATS_PER_BIT
from charlstm.types import Metrics


class Diverged(Exception):
    """A loss, a gradient, a parameter or a score is not finite; the message says at which step and in which streams."""


class Meter:
    """Adds up what the steps report.  Looks at a step's metrics one step late, so that the device never waits."""

    def __init__(self, batch_size: int, window: int, steps_per_epoch: int, num_steps: int) -> None:
        self._symbols, self._epoch, self._num_steps = batch_size * window, steps_per_epoch, num_steps
        self._pending: tuple[int, Metrics] | None = None
        self._started = time.monotonic()
        self._latest: dict[str, Any] = {}
        self._reset()

    def _reset(self) -> None:
        self._nats, self._steps, self._waited, self._since = 0.0, 0, 0.0, time.monotonic()

    def next_of(self, windows: Iterator[Any]) -> Any:
        """The next batch, the time waited for it counted as input wait."""
        before = time.monotonic()
        batch = next(windows)
        self._waited += time.monotonic() - before
        return batch

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of `step`; looks at those of the step before.  Raises Diverged (see `settle`)."""
        self.settle()
        self._pending = (step, metrics)

    def settle(self) -> None:
        """Looks at the metrics not yet looked at.

        Raises:
          Diverged: the loss or the gradient of that step is not finite, or a parameter after it.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        loss, norm = float(metrics.loss), float(metrics.grad_norm)
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise Diverged(_what_diverged(step, loss, norm, metrics))
        if not metrics.finite_params:
            raise Diverged(f"a parameter is not finite after step {step}; nothing of it was saved")
        self._nats += loss
        self._steps += 1
        self._latest = {"step": step, "learning_rate": float(metrics.learning_rate), "grad_norm": norm}

    def pause(self, seconds: float) -> None:
        """Leaves `seconds`, spent on evaluating or saving, out of the training speed."""
        self._since += seconds

    def train_record(self) -> dict[str, Any]:
        """A line of metrics.jsonl for the steps since the last one."""
        self.settle()
        step = self._latest["step"]
        record = self._record(step, "train", self._nats / max(self._steps, 1) / NATS_PER_BIT) | self._speed()
        record |= {k: self._latest[k] for k in ("learning_rate", "grad_norm")}
        self._reset()
        return record

    def evaluation_record(self, step: int, split: str, bits_per_character: float, speed: float) -> dict[str, Any]:
        """A line of metrics.jsonl for an evaluation that read `speed` characters a second."""
        return self._record(step, split, bits_per_character) | {"characters_per_second": round(speed, 1)}

    def status(self) -> str:
        """The live line, of the steps since the last record."""
        if not self._steps:
            return ""
        speed = self._speed()
        step = self._latest["step"]
        left = (self._num_steps - step) * self._symbols / max(speed["characters_per_second"], 1e-9)
        bits = self._nats / self._steps / NATS_PER_BIT
        return (
            f"step {step}/{self._num_steps}  epoch {step / self._epoch:.2f}  {bits:.3f} bpc  "
            f"{speed['characters_per_second']:,.0f} chars/s  input wait {speed['input_wait']:.0%}  ETA {duration(left)}"
        )

    def _record(self, step: int, split: str, bits: float) -> dict[str, Any]:
        return {
            "step": step,
            "epoch": round(step / self._epoch, 4),
            "split": split,
            "bits_per_character": bits,
            "learning_rate": None,
            "grad_norm": None,
            "characters_per_second": None,
            "input_wait": None,
            "seconds": round(time.monotonic() - self._started, 3),
        }

    def _speed(self) -> dict[str, float]:
        elapsed = max(time.monotonic() - self._since, 1e-9)
        return {
            "characters_per_second": round(self._steps * self._symbols / elapsed, 1),
            "input_wait": round(self._waited / elapsed, 4),
        }


def finite_score(step: int, record: dict[str, Any]) -> float:
    """The bits per character of an evaluation's record.  Raises Diverged where they are not finite."""
    score = record["bits_per_character"]
    if not np.isfinite(score):
        raise Diverged(f"{record['split']} score={score} is not finite at step {step}; nothing of it was saved")
    return score


def duration(seconds: float) -> str:
    """Seconds in words: 45s, 12m05s, 3h20m, 2d04h."""
    s = int(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def _what_diverged(step: int, loss: float, norm: float, metrics: Metrics) -> str:
    what = f"loss={loss}" if not np.isfinite(loss) else f"gradient norm={norm}"
    bad = np.flatnonzero(~mesh_lib.fetch(metrics.finite_B))
    if len(bad):
        where = f"stream{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad[:8]))}{', ...' if len(bad) > 8 else ''}"
    else:
        largest = int(np.argmax(mesh_lib.fetch(metrics.loss_B)))
        where = f"no stream's own loss or state; the largest loss is stream {largest}'s"
    return f"{what} is not finite at step {step}, in {where}; nothing of it was saved"
