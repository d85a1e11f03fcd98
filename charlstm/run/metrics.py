"""Metrics of a run: sums over its steps, the lines of metrics.jsonl and the status line."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from charlstm import distributed
from charlstm.config.training import TrainingConfig
from charlstm.inference.score import FIGURES, Score
from charlstm.training.loss import NATS_PER_BIT
from charlstm.types import Metrics

TOLD_AFTER = 5.0  # seconds of steps, by which the log says how long they all take


class Diverged(Exception):
    """An update or score is not finite, or a device's copy differs; the message has the step and the streams.

    Attributes:
      step: after so many updates.
      windows_at_fault: whether the text may be the cause; if False, only a device can be.
    """

    def __init__(self, step: int, message: str, windows_at_fault: bool = True) -> None:
        super().__init__(f"{message}; nothing of it was saved")
        self.step, self.windows_at_fault = step, windows_at_fault


class MetricAggregator:
    """Adds up what the steps report.  Looks at a step's metrics one step late, so that the device never waits.

    Attributes:
      records: the latest record of each split.
      skipped: updates skipped since this process started.
      state_resets: non-finite rows of recurrent state that were reset since then.
      without_gain: evaluations since the one with the lowest score.
      evaluation_due: the evaluation of this step was interrupted, and is made up for when the run goes on.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        settings: TrainingConfig,
        say: Callable[[str], None],
        kind: str = "bytes",
        of_ascii: bool = False,
    ) -> None:
        """Makes an aggregator for a run with `settings`.

        Args:
          say: takes a line for the log: what was skipped, and how long the steps take.
          kind: what the symbols are: bytes or characters.
          of_ascii: every symbol of the training text is a character of one byte, and known.
        """
        self._of_bytes, self._of_ascii = kind == "bytes", of_ascii
        self._epoch, self._num_steps = steps_per_epoch, settings.num_steps
        self._skips, self._max_skips, self._say = settings.on_divergence == "skip", settings.max_skips, say
        self._spike_factor, self._stop_after = settings.spike_factor, settings.stop_after
        self._pending: tuple[int, Metrics] | None
        self._first: tuple[int, float] | None = None  # the first step looked at, and when
        self._told = False  # how long the steps take
        self._started, self._begun, self._earlier = time.monotonic(), False, 0.0
        self._paused, self._made = 0.0, 0  # seconds of pauses and steps, of this process
        self.records: dict[str, dict[str, Any]] = {}
        self.skipped, self.state_resets = 0, 0
        self.restart(None, 0)

    def restart(self, sums: dict[str, Any] | None, left_out: int) -> None:
        """Resumes from a checkpoint: the next record, and its speed, leave out what was added since then.

        Args:
          sums: those of the steps between the last record and the checkpoint; None where there are none.
          left_out: windows that rollbacks have skipped so far; the epoch counts them as read.
        """
        self._pending, self._left_out = None, left_out
        self._latest: dict[str, Any] = {}  # what the last step looked at has reported
        self._reset()
        sums = sums or {"nats": 0.0, "symbols": 0, "steps": 0}
        self._nats, self._symbols, self._steps = sums["nats"], sums["symbols"], sums["steps"]
        self._best, self.without_gain = sums.get("best"), sums.get("without_gain", 0)
        self.evaluation_due = sums.get("evaluation_due", False)
        if not self._begun:  # else the seconds until that checkpoint are counted already
            self._earlier = sums.get("seconds", 0.0)

    def sums(self) -> dict[str, Any]:
        """Returns the metrics' part of a checkpoint: sums since the last record, validation so far, seconds so far.

        Plain JSON that keeps every bit of a float.
        """
        assert self._pending is None, "settle() first"
        return {
            **{"nats": self._nats, "symbols": self._symbols, "steps": self._steps},
            **{"best": self._best, "without_gain": self.without_gain, "evaluation_due": self.evaluation_due},
            "seconds": self._seconds(),
        }

    def _reset(self) -> None:
        self._nats, self._symbols, self._steps = 0.0, 0, 0
        self._timed, self._waited, self._since = 0, 0.0, time.monotonic()  # of this process alone

    def next_of(self, windows: Iterator[Any]) -> Any:
        """The next batch, the time waited for it counted as input wait."""
        before = time.monotonic()
        batch = next(windows)
        self._waited += time.monotonic() - before
        return batch

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of `step`; looks at those of the step before.  Raises Diverged (see `settle`)."""
        self.settle()
        self._pending, self._begun = (step, metrics), True

    def settle(self) -> None:
        """Looks at the metrics not yet looked at.

        Raises:
          Diverged: that step was rejected, or left a non-finite row of recurrent state, and cannot be skipped:
            on_divergence is not skip, a parameter is not finite, or max_skips is used up.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        if not metrics.accepted or metrics.nonfinite_rows:
            self._look_at_divergence(step, metrics)
        self._made += 1
        self._latest = {"step": step, "learning_rate": float(metrics.learning_rate), "grad_norm": None}
        if metrics.accepted:
            self._nats += float(metrics.loss) * int(metrics.symbols)
            self._symbols += int(metrics.symbols)
            self._timed += int(metrics.symbols)
            self._steps += 1
            self._latest["grad_norm"] = float(metrics.grad_norm)
        if not self._told:
            self._tell_time_left(step)

    def _tell_time_left(self, step: int) -> None:
        """Says once how long the steps left take, unless a line of the log has come before."""
        self._first = self._first or (step, time.monotonic())
        steps, seconds = step - self._first[0], time.monotonic() - self._first[1]
        if not self.records and (not steps or seconds < TOLD_AFTER):
            return
        self._told = True
        if not self.records and (left := self._num_steps - step):
            self._say(
                f"the {left:,} steps left take about {duration(left * seconds / steps)}, by the first {steps + 1}"
            )

    def _look_at_divergence(self, step: int, metrics: Metrics) -> None:
        what = _what_diverged(step, metrics, self._spike_factor)
        if not (self._skips and metrics.finite_params):
            raise Diverged(step, what)
        in_a_row = int(metrics.divergence.consecutive_skips)
        if in_a_row > self._max_skips:
            raise Diverged(step, f"{what}, after {in_a_row - 1} updates skipped one after the other (max_skips)")
        rows = int(metrics.nonfinite_rows)
        self.skipped += not metrics.accepted
        self.state_resets += rows
        done = [] if metrics.accepted else ["update skipped"]
        done += [f"{rows} row{'s' if rows > 1 else ''} of the recurrent state zeroed"] if rows else []
        self._say(f"{what}: {', '.join(done)}")

    def pause(self, seconds: float) -> None:
        """Leaves `seconds`, spent on evaluating or saving, out of the training speed; the time left has them."""
        self._since += seconds
        self._paused += seconds

    def train_record(self) -> dict[str, Any]:
        """A line of metrics.jsonl for the steps since the last one."""
        self.settle()
        step = self._latest["step"]
        score = None  # all were skipped
        if self._steps:
            characters = self._symbols if self._of_ascii or not self._of_bytes else None
            byte_count = self._symbols if self._of_ascii or self._of_bytes else None
            score = Score(self._nats / NATS_PER_BIT, self._symbols, characters, byte_count)
        record = self._record(step, "train", score) | self._speed()
        record |= {k: self._latest[k] for k in ("learning_rate", "grad_norm")}
        if distributed.is_one_of_several():
            waits = distributed.latest_of_all("input_wait", record["input_wait"])
            longest = max(waits, key=lambda process: waits[process])
            record["input_wait_of_processes"] = {
                **{"min": min(waits.values()), "mean": round(sum(waits.values()) / len(waits), 4)},
                **{"max": waits[longest], "process": longest},
            }
        self.records["train"] = record
        self._reset()
        return record

    def evaluation_record(self, step: int, split: str, score: Score, speed: float) -> dict[str, Any]:
        """A line of metrics.jsonl for an evaluation that read `speed` symbols a second."""
        figures = {"symbols_per_second": round(speed, 1), "scored_symbols": score.symbols}
        self.records[split] = self._record(step, split, score) | figures
        return self.records[split]

    def add_score(self, score: float) -> None:
        """Takes a validation score into account, bits per symbol: whether it is a gain."""
        if self._best is None or score < self._best:
            self._best, self.without_gain = score, 0
        else:
            self.without_gain += 1

    @property
    def exhausted(self) -> bool:
        """True if validation has not improved for --stop_after evaluations."""
        return 0 < self._stop_after <= self.without_gain

    def status(self) -> str:
        """The live line, of the steps since the last record."""
        # Read once: the watchdog's thread calls this, too.
        steps, nats, symbols, latest = self._steps, self._nats, self._symbols, self._latest
        if not (steps and symbols and latest):
            return ""
        speed = self._speed()
        step = latest["step"]
        a_step = symbols / steps / max(speed["symbols_per_second"], 1e-9) + self._paused / self._made
        per_symbol, unit = ("bpb", "bytes") if self._of_bytes else ("bpc", "chars")
        left = duration((self._num_steps - step) * a_step)
        speeds = f"{speed['symbols_per_second']:,.0f} {unit}/s  ETA {left}  input wait {speed['input_wait']:.0%}"
        where = f"step {step}/{self._num_steps}  epoch {self._epochs(step):.2f}"
        return f"{where}  {nats / symbols / NATS_PER_BIT:.3f} {per_symbol}  {speeds}"  # a terminal may cut the end off

    def _record(self, step: int, split: str, score: Score | None) -> dict[str, Any]:
        return {
            "step": step,
            "epoch": round(self._epochs(step), 4),
            "split": split,
            **(score.figures() if score else dict.fromkeys(FIGURES)),
            "learning_rate": None,
            "grad_norm": None,
            "symbols_per_second": None,
            "input_wait": None,
            "scored_symbols": None,
            "time": round(time.time(), 3),
            "seconds": round(self._seconds(), 3),
        }

    def _seconds(self) -> float:
        """Seconds of the run: of this process, and of those before it until the checkpoint that it began with."""
        return self._earlier + time.monotonic() - self._started

    def _epochs(self, step: int) -> float:
        """Epochs read after `step` updates."""
        return (step + self._left_out) / self._epoch

    def _speed(self) -> dict[str, float]:
        elapsed = max(time.monotonic() - self._since, 1e-9)
        return {
            "symbols_per_second": round(self._timed / elapsed, 1),
            "input_wait": round(self._waited / elapsed, 4),
        }


def finite_score(step: int, record: dict[str, Any]) -> float:
    """The bits per symbol of an evaluation's record.  Raises Diverged where they are not finite."""
    score = record["bits_per_symbol"]
    if not np.isfinite(score):
        raise Diverged(step, f"{record['split']} score={score} is not finite at step {step}")
    return score


def time_left() -> Callable[[int, int], str]:
    """Returns a function (done, total) -> ", 12s left", by what was done since its second call; "" before.

    The first call comes before all is compiled.
    """
    calls, first, since = 0, 0, 0.0

    def told(done: int, total: int) -> str:
        nonlocal calls, first, since
        now, calls = time.monotonic(), calls + 1
        if calls == 2:
            first, since = done, now
        if calls < 3 or done <= first:
            return ""
        return f", {duration((now - since) * (total - done) / (done - first))} left"

    return told


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


def _what_diverged(step: int, metrics: Metrics, spike_factor: float) -> str:
    loss, norm = float(metrics.loss), float(metrics.grad_norm)
    bad = np.flatnonzero(~distributed.fetch(metrics.finite_B))
    where = f"stream{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad[:8]))}{', ...' if len(bad) > 8 else ''}"
    if np.isfinite(loss) and np.isfinite(norm):
        if len(bad):
            return f"the recurrent state is not finite at step {step}, in {where}"
        if not metrics.finite_params:
            return f"a parameter is not finite after step {step}"
        usual = float(metrics.divergence.loss_ema)
        if spike_factor and loss > spike_factor * usual > 0:
            bits, usual = loss / NATS_PER_BIT, usual / NATS_PER_BIT
            return f"loss={bits:.3f} bits is a spike at step {step}, where {usual:.3f} is usual"
        return f"a parameter would not be finite after step {step}"
    what = f"loss={loss}" if not np.isfinite(loss) else f"gradient norm={norm}"
    if not len(bad):
        largest = int(np.argmax(distributed.fetch(metrics.loss_B)))
        where = f"no stream's own loss or state; the largest loss is stream {largest}'s"
    return f"{what} is not finite at step {step}, in {where}"
