"""The loop does each thing at its step: no batch is left out, nothing that diverged is saved, a stop is saved once."""

import contextlib
import io
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from charlstm.config.training import TrainingConfig
from charlstm.inference.score import Score
from charlstm.run import digest
from charlstm.run.log import RunLog
from charlstm.run.loop import Training
from charlstm.run.metrics import Diverged, MetricAggregator
from charlstm.run.start import due
from charlstm.training import averaging, divergence, plateau
from charlstm.types import Metrics, ModelParams, TrainState

LAST = 11
KEYS = {
    "step", "epoch", "split", "bits_per_symbol", "bits_per_character", "bits_per_byte", "learning_rate", "grad_norm",
    "symbols_per_second", "input_wait", "scored_symbols", "time", "seconds",
}  # fmt: skip


def scored(bits) -> Score:
    return Score(bits, 1, 1, 1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Model(Training):
    """A run of a model that learns nothing but which batches it saw, in order; what the loop asked of it, in order.

    The parameters are the numbers of the batches seen, then -1.  Batch n is the number n, and update n its successor.
    """

    def __init__(
        self, tmp_path, start=0, stop_after=None, bad=None, what="loss", valid=True, terminal=None, **settings
    ):
        self.folder, settings = tmp_path, TrainingConfig(num_steps=LAST, **settings)
        self.run = SimpleNamespace(
            config=SimpleNamespace(training=settings), open_windows=lambda start: contextlib.nullcontext()
        )
        self.checkpoints = SimpleNamespace(failed_saves=0)
        self.log = RunLog(tmp_path, terminal or io.StringIO())
        self.metrics = MetricAggregator(4, settings, self.log.info)
        self.batches: list[int] = []
        self.evaluated: list[int] = []
        self.saved: dict[int, float | None] = {}
        self.saves: list[int] = []
        self.asked: list[int] = []
        self.checked: list[int] = []
        self.heard: dict[int, float] = {}
        self.sampled: list[int] = []
        self._source, self._stop_after = itertools.count(start), stop_after
        self._bad, self._what = bad, what
        self._valid = valid or None
        seen = np.where(np.arange(LAST) < start, np.arange(LAST), -1)
        self.first = TrainState(
            jnp.asarray(start, jnp.int32), jnp.asarray(seen, jnp.int32), (), (), divergence.start(np.float32),
            plateau.start(), (),
        )  # fmt: skip

    def next_batch(self, windows) -> int:
        self.batches.append(next(self._source))
        return self.batches[-1]

    def update(self, state, batch):
        step = int(state.step)
        seen = np.array(state.params)
        seen[step] = batch
        figures = {"loss": float(step + 1), "norm": 0.5}
        if step + 1 == self._bad:
            figures[self._what] = np.nan
        finite = np.arange(4) != (2 if step + 1 == self._bad else -1)
        bad, divergence_state = int(4 - finite.sum()), state.divergence
        metrics = Metrics(
            figures["loss"], np.ones(4), figures["norm"], 0.01, not bad, True, finite, bad, divergence_state, 4
        )
        return state._replace(step=jnp.asarray(step + 1, jnp.int32), params=jnp.asarray(seen)), metrics

    def score(self, step) -> Score:
        return scored(step / 100)

    def evaluate(self, step, state):
        # It is given the state after `step` updates, neither older nor newer ones.
        assert list(np.asarray(state.params)) == [*range(step), *[-1] * (LAST - step)]
        self.evaluated.append(step)
        return [self.metrics.evaluation_record(step, "valid", self.score(step), 1.0)]

    def update_plateau(self, state, score):
        self.heard[int(state.step)] = score
        return state._replace(plateau=state.plateau._replace(evaluations=state.plateau.evaluations + 1))

    def save(self, state, score):
        step = int(state.step)
        self.metrics.settle()
        assert state.plateau.evaluations == len(self.heard)  # a checkpoint has heard what was said at its step
        assert list(np.asarray(state.params)) == [*range(step), *[-1] * (LAST - step)]
        assert self.batches == [*range(int(self.first.step), step)]
        self.saves.append(step)
        self.saved[step] = score

    def sample(self, step, state):
        assert list(np.asarray(state.params)) == [*range(step), *[-1] * (LAST - step)]
        assert step not in self.saves  # a checkpoint of step n comes after the sample of step n
        self.sampled.append(step)

    def check_replicas(self, state):
        self.checked.append(int(state.step))

    def stopping(self, step) -> bool:
        self.asked.append(step)
        return step == self._stop_after

    def train(self) -> TrainState:
        try:
            return self.train_from(self.first)
        finally:
            self.log.close()

    @property
    def lines(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def recorded(self, split: str) -> list[int]:
        return [line["step"] for line in self.lines if line["split"] == split]


# When.


@pytest.mark.parametrize(
    ("every", "last", "steps"),
    [
        (3, 11, [3, 6, 9, 11]),
        (11, 11, [11]),
        (100, 11, [11]),
        (0, 11, [11]),
        (1, 3, [1, 2, 3]),
        (5, 10, [5, 10]),
    ],
)
def test_what_is_due_every_so_often_is_due_then_and_at_the_last_step_and_never_else(every, last, steps):
    assert [step for step in range(1, last + 1) if due(step, every, last)] == steps


@pytest.mark.parametrize(
    ("settings", "start", "logged", "evaluated", "saved"),
    [
        (
            {"log_every": 3, "evaluate_every": 4, "checkpoint_every": 5},
            0, [3, 6, 9, 11], [4, 8, 11], {4: 0.04, 5: None, 8: 0.08, 10: None, 11: 0.11},
        ),
        (
            {"log_every": 3, "evaluate_every": 4, "checkpoint_every": 5},
            5, [6, 9, 11], [8, 11], {8: 0.08, 10: None, 11: 0.11},
        ),
        ({"log_every": 100, "evaluate_every": 0, "checkpoint_every": 0}, 0, [11], [11], {11: 0.11}),
        (
            {"log_every": 1, "evaluate_every": 5, "checkpoint_every": 5},
            7, [8, 9, 10, 11], [10, 11], {10: 0.1, 11: 0.11},
        ),
        (
            {"log_every": 5, "evaluate_every": 2, "checkpoint_every": 4, "valid": False},
            0, [5, 10, 11], [], {4: None, 8: None, 11: None},
        ),
    ],
    ids=["all apart", "resumed", "only at the end", "together", "no validation split"],
)  # fmt: skip
def test_lines_evaluations_and_checkpoints_are_made_at_their_steps_and_a_checkpoint_has_the_score_of_its_step(
    settings, start, logged, evaluated, saved, tmp_path
):
    run = Model(tmp_path, start=start, **settings)
    state = run.train()
    assert int(state.step) == LAST
    assert (run.recorded("train"), run.recorded("valid")) == (logged, evaluated)
    assert run.evaluated == evaluated
    assert run.saved == saved
    assert run.saves == sorted(saved)
    # What a run that ends here is told at its end alone, a longer one is not told.
    every = settings["evaluate_every"]
    assert run.heard == {step: step / 100 for step in evaluated if every and step % every == 0}


@pytest.mark.parametrize(
    ("settings", "sampled"),
    [
        ({"evaluate_every": 4}, [4, 8, 11]),
        ({"evaluate_every": 4, "valid": False}, [4, 8, 11]),
        ({"evaluate_every": 0}, [11]),
        ({"evaluate_every": 4, "sample_every": 5}, [5, 10, 11]),
        ({"evaluate_every": 4, "sample_every": 0}, []),
    ],
)
def test_samples_are_drawn_at_evaluations_or_at_steps_of_their_own_or_never(settings, sampled, tmp_path):
    run = Model(tmp_path, checkpoint_every=1, **settings)
    run.train()
    assert run.sampled == sampled


def test_what_is_evaluated_is_the_average_where_one_is_kept():
    state = Model(Path(), evaluate_every=0).first
    assert averaging.to_evaluate(state) is state.params
    state = state._replace(average=ModelParams(None, (), None, jnp.zeros(())))
    assert averaging.to_evaluate(state) is state.average


def test_a_line_of_training_is_of_the_steps_since_the_line_before(tmp_path):
    run = Model(tmp_path, log_every=4, evaluate_every=3)
    run.train()
    nats = [line["bits_per_symbol"] * np.log(2) for line in run.lines if line["split"] == "train"]
    assert nats == pytest.approx([(1 + 2 + 3 + 4) / 4, (5 + 6 + 7 + 8) / 4, (9 + 10 + 11) / 3])


# Invariant 1.


@pytest.mark.parametrize("start", [0, 4, 10])
def test_checkpoint_n_has_seen_exactly_batches_0_to_n_minus_1(start, tmp_path):
    run = Model(tmp_path, start=start, checkpoint_every=1)  # `save` looks at what was seen, and at what was handed out
    state = run.train()
    assert run.saves == [*range(start + 1, LAST + 1)]
    assert np.asarray(state.params).tolist() == [*range(LAST)]
    assert run.batches == [*range(start, LAST)]


def test_a_run_that_has_all_its_steps_takes_no_batch_and_saves_nothing(tmp_path):
    run = Model(tmp_path, start=LAST)
    assert run.train() is run.first
    assert (run.batches, run.saves, run.lines) == ([], [], [])


# The digest.


@pytest.mark.parametrize("valid", [True, False], ids=["with validation", "without"])
@pytest.mark.parametrize("start", [0, 8])
def test_the_last_line_of_a_finished_run_alone_has_the_digest_of_its_state(start, valid, tmp_path):
    run = Model(tmp_path, start=start, log_every=2, evaluate_every=3, valid=valid)
    state = run.train()
    *before, last = run.lines
    assert before
    assert all(line.keys() == KEYS for line in before)
    assert last.keys() == KEYS | {"state_digest"}
    assert last["state_digest"] == digest.state_digest(state)
    assert (last["step"], last["split"]) == (LAST, "valid" if valid else "train")


def test_a_run_that_was_stopped_has_no_digest(tmp_path):
    run = Model(tmp_path, stop_after=9, log_every=1, evaluate_every=3)
    run.train()
    assert all(line.keys() == KEYS for line in run.lines) and run.lines[-1]["step"] == 9


# Stopping.


@pytest.mark.parametrize("stop_after", [0, 1, 3, 7, 10])
def test_a_run_that_is_stopped_between_two_checkpoints_saves_where_it_is(stop_after, tmp_path):
    run = Model(tmp_path, stop_after=stop_after, checkpoint_every=4, evaluate_every=0)
    state = run.train()
    assert int(state.step) == stop_after == len(run.batches)
    assert run.saved == {step: None for step in (4, 8) if step < stop_after} | {stop_after: None}
    assert run.saves == sorted(run.saved)


@pytest.mark.parametrize(
    ("start", "stop_after", "evaluate_every", "saved"),
    [(0, 8, 0, {4: None, 8: None}), (0, 6, 3, {3: 0.03, 4: None, 6: 0.06}), (4, 4, 4, {})],
    ids=["a checkpoint", "a validated checkpoint", "the checkpoint it went on from"],
)
def test_a_run_that_is_stopped_at_a_checkpoint_does_not_save_it_again(
    start, stop_after, evaluate_every, saved, tmp_path
):
    run = Model(tmp_path, start=start, stop_after=stop_after, checkpoint_every=4, evaluate_every=evaluate_every)
    assert int(run.train().step) == stop_after
    assert run.saved == saved
    assert run.saves == sorted(saved)


def test_a_stop_that_comes_in_the_last_step_comes_too_late(tmp_path):
    run = Model(tmp_path, stop_after=LAST, evaluate_every=0, checkpoint_every=0)
    run.train()
    assert run.saves == [LAST] and "state_digest" in run.lines[-1]


def test_whether_to_stop_is_asked_once_before_each_update(tmp_path):
    run = Model(tmp_path, start=3)  # the answer is agreed among processes, so that all must ask at the same steps
    run.train()
    assert run.asked == [*range(3, LAST)]


def test_the_devices_copies_are_compared_at_their_steps_and_no_others(tmp_path):
    run = Model(tmp_path, check_replicas_every=4)
    run.train()
    assert run.checked == [4, 8]


# What is not finite.


@pytest.mark.parametrize("what", ["loss", "norm"])
@pytest.mark.parametrize("every", [1, 2, 3, 0])
@pytest.mark.parametrize("bad", [1, 4, 6, 10, 11])
def test_nothing_is_saved_evaluated_or_recorded_from_a_step_on_that_is_not_finite(bad, every, what, tmp_path):
    run = Model(tmp_path, bad=bad, what=what, log_every=every or 5, evaluate_every=every, checkpoint_every=every)
    with pytest.raises(Diverged, match=re.escape(f"not finite at step {bad}, in stream 2;")):
        run.train()
    expected = [step for step in range(1, bad) if every and step % every == 0]
    assert (run.saves, run.evaluated, run.recorded("valid")) == (expected, expected, expected)
    assert all(step < bad for step in run.recorded("train"))
    assert not any("state_digest" in line for line in run.lines)


@pytest.mark.parametrize("due_then", ["log_every", "evaluate_every", "checkpoint_every"])
def test_each_of_the_things_that_are_done_once_in_a_while_looks_first(due_then, tmp_path):
    never = {"log_every": 100, "evaluate_every": 0, "checkpoint_every": 0}
    run = Model(tmp_path, bad=5, **never | {due_then: 5})
    with pytest.raises(Diverged):
        run.train()
    assert (len(run.batches), run.saves, run.evaluated, run.lines) == (5, [], [], [])


def test_a_run_that_is_stopped_in_a_step_that_is_not_finite_saves_nothing_of_it(tmp_path):
    run = Model(tmp_path, bad=5, stop_after=5, checkpoint_every=3, evaluate_every=0)
    with pytest.raises(Diverged):
        run.train()
    assert run.saves == [3]


def test_a_score_that_is_not_finite_stops_the_run_and_nothing_of_it_is_saved_or_recorded(tmp_path):
    run = Model(tmp_path, evaluate_every=4, checkpoint_every=3)
    run.score = lambda step: scored(np.nan)
    with pytest.raises(Diverged, match="not finite at step 4"):
        run.train()
    assert (run.saves, run.recorded("valid")) == ([3], [])


# What is shown.


def test_log_txt_has_a_line_for_each_line_of_training_in_the_metrics(tmp_path):
    Model(tmp_path, log_every=4).train()
    log = (tmp_path / "log.txt").read_text()
    assert [int(n) for n in re.findall(r"^\S+ \S+ step (\d+)/11  epoch \S+  \S+ bpb ", log, re.MULTILINE)] == [4, 8, 11]
    assert log.count("\n") == 3


def test_the_live_line_goes_with_the_steps(tmp_path):
    terminal = Terminal()
    Model(tmp_path, log_every=6, terminal=terminal).train()
    shown = re.findall(r"\rstep (\d+)/11 ", terminal.getvalue())
    steps = [int(step) for step in shown]
    assert steps == sorted(steps) and {1, 2, 3, 4, 5, 7, 8, 9, 10} <= set(steps)
    assert "\n" not in terminal.getvalue()


@pytest.mark.parametrize("log_every", [1, 2])
def test_the_live_line_is_never_blank_once_there_is_something_to_show(log_every, tmp_path):
    terminal = Terminal()
    Model(tmp_path, log_every=log_every, evaluate_every=0, terminal=terminal).train()
    shown = [bool(line.strip()) for line in terminal.getvalue().removesuffix("\r").split("\r")[1:-1]]
    assert True in shown and all(shown[shown.index(True) :])


@pytest.mark.parametrize("terminal", [Terminal(), io.StringIO()], ids=["terminal", "pipe"])
def test_that_nothing_can_be_saved_stands_in_every_line_of_the_steps_until_it_is_over(terminal, tmp_path):
    run = Model(tmp_path, log_every=1, evaluate_every=0, checkpoint_every=1, terminal=terminal)

    def save(state, score):
        run.metrics.settle()
        run.checkpoints.failed_saves = (run.checkpoints.failed_saves + 1) * (int(state.step) < 3)

    run.save = save
    run.train()
    said = [line[20:].partition("step")[0] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert said[:4] == ["", "NOT SAVED, 1 times  ", "NOT SAVED, 2 times  ", ""] and not any(said[4:])
    assert terminal.getvalue().count("NOT SAVED") == 2
