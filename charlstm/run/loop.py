"""The training loop: update, count, then look."""

from collections.abc import Callable
from typing import Any

from charlstm.config.training import TrainingConfig
from charlstm.run import digest
from charlstm.run.log import RunLog
from charlstm.run.metrics import MetricAggregator, finite_score
from charlstm.training import averaging
from charlstm.training.step import TrainStep
from charlstm.types import ModelParams, TrainState


def due(step: int, every: int, last: int) -> bool:
    """Whether what happens every `every` steps (0: never), and at step `last`, happens after `step` updates."""
    return step == last or (every > 0 and step % every == 0)


def train(
    settings: TrainingConfig,
    state: TrainState,
    train_step: TrainStep,
    next_batch: Callable[[], Any],
    *,
    evaluate: Callable[[int, ModelParams], dict[str, Any]] | None,
    heard: Callable[[TrainState, float], TrainState],
    save: Callable[[TrainState, float | None], None],
    check: Callable[[int, TrainState], None],
    log: RunLog,
    meter: MetricAggregator,
    stopping: Callable[[int], bool],
) -> TrainState:
    """Trains from `state` to `settings.num_steps`, or until `stopping(step)`, which every process must answer alike.

    Args:
      next_batch: gives the batch of step `state.step`, then the next one, and so on.
      evaluate: (step, params or their average) -> a line of metrics.jsonl; None where there is no validation split.
      heard: (state, validation bits per symbol) -> the state that training goes on from.
      save: makes a checkpoint of (state, validation bits per symbol or None).
      check: (step, state) -> None where the devices' copies are equal.

    Raises:
      Diverged: an update, a score or a device's copy is not sound; nothing of it was saved.
    """
    step, last = int(state.step), settings.num_steps
    saved = step or None  # what is on disk already is not saved again: it would lose its score
    while step < last and not stopping(step):
        state, metrics = train_step(state, next_batch())
        step += 1
        meter.add(step, metrics)
        log.status(meter.status())
        if due(step, settings.check_replicas_every, last=0):
            check(step, state)
        records, score = [], None
        if due(step, settings.log_every, last):
            meter.settle()
            log.note(meter.status())
            records.append(meter.train_record())
        if evaluate and due(step, settings.evaluate_every, last):
            meter.settle()
            records.append(evaluate(step, averaging.to_evaluate(state)))
            score = finite_score(step, records[-1])
            if due(step, settings.evaluate_every, last=0):  # at any other last step, a longer run is told nothing
                state = heard(state, score)
        if records and step == last:
            records[-1]["state_digest"] = digest.state_digest(state)
        for record in records:
            log.record(record)
        if score is not None or due(step, settings.checkpoint_every, last):
            meter.settle()
            save(state, score)
            saved = step
    if step != saved:
        meter.settle()
        save(state, None)
    return state
