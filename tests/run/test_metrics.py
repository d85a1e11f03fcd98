"""What a run says of itself: sums divided once, plain lines in the log, one live line on a terminal and no other."""

import itertools
import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest

from charlstm.config.training import TrainingConfig
from charlstm.inference.score import Score
from charlstm.run import metrics as metrics_lib
from charlstm.run.metrics import Diverged, MetricAggregator, duration
from charlstm.training import divergence
from charlstm.types import Metrics

KEYS = {
    "step", "epoch", "split", "bits_per_symbol", "bits_per_character", "bits_per_byte", "learning_rate", "grad_norm",
    "symbols_per_second", "input_wait", "scored_symbols", "time", "seconds",
}  # fmt: skip
BIT = float(np.log(2))
SCORE = Score(50.0, 20, 10, 20)


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes only when it is told to: `clock.now += seconds`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(
        metrics_lib,
        "time",
        SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 5e8 + clock.now, strftime=time.strftime),
    )
    return clock


class Looked:
    """A figure on a device that remembers whether it was fetched."""

    def __init__(self, value: float) -> None:
        self.value, self.fetched = value, False

    def __float__(self) -> float:
        self.fetched = True
        return self.value


def reported(loss=1.0, norm=0.5, rate=0.01, streams=4, bad=(), worst=0, finite_params=True, symbols=20) -> Metrics:
    """What a step reports, in which the streams `bad` are not finite and `worst` has the largest loss."""
    finite, losses = np.ones(streams, bool), np.ones(streams, np.float32)
    finite[list(bad)], losses[worst] = False, 2
    accepted = finite_params and np.isfinite(getattr(loss, "value", loss)) and np.isfinite(getattr(norm, "value", norm))
    divergence_state = divergence.start(np.float32)
    return Metrics(loss, losses, norm, rate, accepted, finite_params, finite, len(bad), divergence_state, symbols)


def meter(num_steps=100, say=print, **settings) -> MetricAggregator:
    """Of 4 streams of 5 symbols, 8 steps an epoch."""
    return MetricAggregator(8, TrainingConfig(num_steps=num_steps, **settings), say)


# Lines of metrics.jsonl.


def test_a_line_has_the_documented_keys_whatever_it_is_about():
    m = meter()
    m.add(3, reported())
    assert m.train_record().keys() == KEYS
    assert m.evaluation_record(3, "valid", SCORE, 1000.0).keys() == KEYS


def test_a_line_of_training_is_the_mean_over_all_its_symbols_in_bits_and_the_latest_rate_and_norm(clock):
    m = meter()
    for step, nats in ((5, 1.0), (6, 2.0), (7, 6.0)):
        m.add(step, reported(nats * BIT, norm=step / 10, rate=step / 100))
    clock.now += 10
    line = m.train_record()
    assert line["bits_per_symbol"] == pytest.approx(3.0)
    assert (line["step"], line["epoch"], line["split"]) == (7, 7 / 8, "train")
    assert (line["learning_rate"], line["grad_norm"]) == (0.07, 0.7)
    assert (line["symbols_per_second"], line["input_wait"], line["seconds"]) == (6.0, 0.0, 10.0)


def test_lines_of_unequal_lengths_weighted_by_their_steps_are_the_mean_of_the_run():
    m, rng = meter(), np.random.default_rng(0)
    bits, lines = rng.uniform(1, 5, 23), []
    for step in range(1, 24):
        m.add(step, reported(bits[step - 1] * BIT))
        if step in (1, 4, 20, 23):
            lines.append(m.train_record())
    assert [line["step"] for line in lines] == [1, 4, 20, 23]
    total = sum(n * line["bits_per_symbol"] for n, line in zip((1, 3, 16, 3), lines, strict=True))
    assert total / 23 == pytest.approx(bits.mean())
    assert lines[2]["bits_per_symbol"] == pytest.approx(bits[4:20].mean())


def test_a_window_counts_by_its_symbols(clock):
    m = meter()
    m.add(1, reported(1.0 * BIT, symbols=30))
    m.add(2, reported(5.0 * BIT, symbols=10))
    clock.now += 4
    line = m.train_record()
    assert line["bits_per_symbol"] == pytest.approx((30 * 1 + 10 * 5) / 40)
    assert line["symbols_per_second"] == 10.0


def test_a_line_of_an_evaluation_has_the_figure_and_speed_given_and_nothing_of_training(clock):
    m = meter()
    m.add(3, reported())
    clock.now += 7
    line = m.evaluation_record(4, "valid", SCORE, 1234.56)
    assert line == {
        "step": 4, "epoch": 0.5, "split": "valid", "bits_per_symbol": 2.5, "bits_per_character": 5.0,
        "bits_per_byte": 2.5, "learning_rate": None, "grad_norm": None, "symbols_per_second": 1234.6,
        "input_wait": None, "scored_symbols": SCORE.symbols, "time": 5e8 + 1007.0, "seconds": 7.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "of_ascii", "per_character", "per_byte", "units"),
    [
        ("bytes", False, None, 2.0, ("bpb", "bytes/s")),
        ("characters", False, 2.0, None, ("bpc", "chars/s")),
        ("bytes", True, 2.0, 2.0, ("bpb", "bytes/s")),
        ("characters", True, 2.0, 2.0, ("bpc", "chars/s")),
    ],
)
def test_a_line_of_training_has_the_figure_of_what_its_symbols_are(
    kind, of_ascii, per_character, per_byte, units, clock
):
    m = MetricAggregator(8, TrainingConfig(num_steps=9), print, kind, of_ascii)
    m.add(1, reported(2 * BIT))
    m.settle()
    clock.now += 1
    assert re.search(r"2\.000 (\w+)  20 (\S+)  ", m.status()).groups() == units
    line = m.train_record()
    assert (line["bits_per_symbol"], line["bits_per_character"], line["bits_per_byte"]) == (2, per_character, per_byte)


def test_of_utf8_the_bits_are_those_per_byte_times_bytes_and_per_character_times_characters():
    text = "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643"  # Arabic: 8 characters in 15 bytes
    of_bytes, of_characters = (Score(21.0, len(symbols), 8, 15) for symbols in (text.encode(), text))
    for score in (of_bytes, of_characters):
        assert score.bits_per_byte * len(text.encode()) == score.bits_per_character * len(text) == 21.0
    assert (of_bytes.bits_per_symbol, of_characters.bits_per_symbol) == (21 / 15, 21 / 8)
    assert of_bytes.in_words("bytes") == "1.4000 bits per byte (2.6250 per character)"
    assert of_characters.in_words("characters") == "2.6250 bits per character (1.4000 per byte)"


def test_where_symbols_are_unknown_there_is_no_figure_per_byte_and_their_share_stands_beside():
    score = Score(21.0, 800, 800, 1500, unknown=3)
    assert score.figures() == {"bits_per_symbol": 21 / 800, "bits_per_character": 21 / 800, "bits_per_byte": None}
    assert score.in_words("characters") == "0.0262 bits per character, 0.38% of the symbols unknown"


def test_of_what_is_not_utf8_there_is_no_figure_per_character():
    score = Score(30.0, 15, None, 15)
    assert score.figures() == {"bits_per_symbol": 2.0, "bits_per_character": None, "bits_per_byte": 2.0}
    assert score.in_words("bytes") == "2.0000 bits per byte"


def test_the_input_wait_is_the_share_of_the_time_spent_on_the_next_batch(clock):
    def slow():
        for number in itertools.count():
            clock.now += 3
            yield number

    m, windows = meter(), slow()
    for step in (1, 2):
        assert m.next_of(windows) == step - 1
        clock.now += 1
        m.add(step, reported())
    line = m.train_record()
    assert (line["input_wait"], line["symbols_per_second"]) == (0.75, 5.0)
    clock.now += 4
    m.add(3, reported())
    line = m.train_record()
    assert (line["input_wait"], line["symbols_per_second"]) == (0.0, 5.0)


def test_of_many_processes_a_line_says_the_least_the_mean_and_the_longest_input_wait_and_meets_nobody(monkeypatch):
    waits = dict.fromkeys(range(1024), 0.25) | {700: 0.75, 3: 0.0}
    monkeypatch.setattr(metrics_lib.distributed, "is_one_of_several", lambda: True)
    monkeypatch.setattr(metrics_lib.distributed, "latest_of_all", lambda name, value: waits)
    monkeypatch.delattr(metrics_lib.distributed, "all_gather_str")
    m = meter()
    m.add(1, reported())
    found = m.train_record()["input_wait_of_processes"]
    assert found == {"min": 0.0, "mean": 0.2502, "max": 0.75, "process": 700}


def test_the_time_of_evaluating_and_saving_is_left_out_of_the_speed_but_not_of_the_seconds(clock):
    m = meter()
    m.add(1, reported())
    clock.now += 100
    m.pause(96)
    line = m.train_record()
    assert (line["symbols_per_second"], line["seconds"]) == (5.0, 100.0)


# One step late.


def test_metrics_are_looked_at_one_step_late():
    m, losses = meter(), [Looked(1.0) for _ in range(4)]
    for step, loss in enumerate(losses, start=1):
        m.add(step, reported(loss))
        m.status()
        assert [each.fetched for each in losses] == [n < step for n in range(1, 5)]
    m.settle()
    assert losses[3].fetched


def test_a_line_waits_for_the_last_step_of_its_interval():
    m = meter()
    m.add(1, reported(1 * BIT))
    m.add(2, reported(3 * BIT))
    assert m.train_record()["bits_per_symbol"] == pytest.approx(2.0)
    m.settle()
    m.add(3, reported(7 * BIT))
    assert m.train_record()["bits_per_symbol"] == pytest.approx(7.0)


# What diverged.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["loss", "gradient norm"])
def test_a_loss_or_a_gradient_that_is_not_finite_is_told_at_its_own_step_when_the_next_is_added(which, value):
    m = meter()
    m.add(6, reported())
    m.add(7, reported(**{"loss" if which == "loss" else "norm": value}, bad=[3]))
    with pytest.raises(Diverged) as caught:
        m.add(8, reported())
    what = f"loss={value}" if which == "loss" else f"gradient norm={value}"
    assert str(caught.value) == f"{what} is not finite at step 7, in stream 3; nothing of it was saved"


@pytest.mark.parametrize(
    ("bad", "where"),
    [
        ([2], "in stream 2;"),
        ([0, 2], "in streams 0, 2;"),
        (range(1, 9), "in streams 1, 2, 3, 4, 5, 6, 7, 8;"),
        (range(1, 10), "in streams 1, 2, 3, 4, 5, 6, 7, 8, ...;"),
        ([], "in no stream's own loss or state; the largest loss is stream 5's;"),
    ],
    ids=["one", "two", "eight", "nine", "none"],
)
def test_the_streams_that_are_not_finite_are_named(bad, where):
    m = meter()
    m.add(1, reported(norm=np.inf, streams=12, bad=bad, worst=5))
    with pytest.raises(Diverged, match=re.escape(where)):
        m.settle()


@pytest.mark.parametrize("look", [MetricAggregator.settle, MetricAggregator.train_record])
def test_a_step_that_diverged_gets_no_line(look):
    m = meter()
    m.add(1, reported(np.nan))
    with pytest.raises(Diverged):
        look(m)


def test_parameters_that_are_not_finite_after_a_sound_step_are_noticed():
    run = meter()
    run.add(7, reported(finite_params=False))
    with pytest.raises(Diverged, match=r"^a parameter is not finite after step 7; nothing of it was saved$"):
        run.settle()


# Updates that are skipped.


def unsound(in_a_row=1, **figures) -> Metrics:
    found = reported(**figures)
    return found._replace(accepted=False, divergence=found.divergence._replace(consecutive_skips=in_a_row))


def test_what_was_skipped_is_told_counted_and_left_out_of_the_mean():
    said: list[str] = []
    m = meter(on_divergence="skip", say=said.append)
    m.add(1, reported(2 * BIT))
    m.add(2, unsound(loss=np.nan, bad=(2,)))
    m.add(3, reported(4 * BIT, bad=(0, 3)))  # an update may be sound although rows of the state are not
    line = m.train_record()
    assert (line["bits_per_symbol"], m.skipped, m.state_resets) == (3.0, 1, 3)
    assert said == [
        "loss=nan is not finite at step 2, in stream 2: update skipped, 1 row of the recurrent state zeroed",
        "the recurrent state is not finite at step 3, in streams 0, 3: 2 rows of the recurrent state zeroed",
    ]


# Going on, and going back.


def test_after_a_restart_a_line_covers_what_was_saved_and_what_came_since_and_speed_the_latter_alone(clock):
    whole, first = meter(), meter()
    for m in (whole, first):
        m.add(1, reported(1.1 * BIT))
        m.add(2, reported(2.3 * BIT, symbols=30))
        m.settle()
    saved = json.loads(json.dumps(first.sums()))
    first.add(3, reported(np.nan))  # of a step that is gone back from; it is not looked at again
    for m in (first, meter()):
        clock.now += 100
        m.restart(saved, 0)
        assert m.status() == ""
        m.add(3, reported(0.7 * BIT))
        clock.now += 2
        line = m.train_record()
        assert (line["symbols_per_second"], line["step"]) == (10.0, 3)
        whole.restart(saved, 0)
        whole.add(3, reported(0.7 * BIT))
        assert line["bits_per_symbol"] == whole.train_record()["bits_per_symbol"]
        assert line["bits_per_symbol"] == pytest.approx((1.1 * 20 + 2.3 * 30 + 0.7 * 20) / 70)
        assert m.sums().items() >= {"nats": 0.0, "symbols": 0, "steps": 0}.items()


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_starts_until_the_checkpoint_and_of_a_rollback_too(clock):
    first = meter()
    first.add(1, reported())
    clock.now += 30
    first.settle()
    saved = first.sums()
    clock.now += 500  # after the checkpoint, and before the next start
    second = meter()
    clock.now += 5
    second.restart(saved, 0)
    second.add(2, reported())
    clock.now += 7
    assert second.train_record()["seconds"] == 30 + 12
    second.restart(saved, 0)
    second.add(2, reported())
    assert second.train_record()["seconds"] == 30 + 12


def test_evaluations_without_gain_are_counted_and_the_count_is_kept(clock):
    m = meter(stop_after=2)
    counts = []
    for score in (2.0, 1.5, 1.5, 1.4, 1.6, 1.5):
        m.add_score(score)
        counts.append((m.without_gain, m.exhausted))
        kept = json.loads(json.dumps(m.sums()))
        m = meter(stop_after=2)
        m.restart(kept, 0)
    assert counts == [(0, False), (0, False), (1, False), (0, False), (1, False), (2, True)]
    assert not meter().exhausted


def test_windows_left_out_count_as_read(clock):
    m = meter()
    m.restart(None, 5)
    m.add(3, reported())
    clock.now += 1
    m.settle()
    assert "epoch 1.00 " in m.status()
    assert m.train_record()["epoch"] == m.evaluation_record(3, "valid", SCORE, 1.0)["epoch"] == 1.0


def test_where_all_was_skipped_there_is_no_mean():
    m = meter(on_divergence="skip", say=lambda line: None)
    m.add(1, unsound(loss=np.inf))
    line = m.train_record()
    assert (line["step"], line["bits_per_symbol"], line["grad_norm"]) == (1, None, None)
    assert json.loads(json.dumps(line, allow_nan=False)) == line and m.status() == ""


def test_only_so_many_are_skipped_one_after_the_other():
    m = meter(on_divergence="skip", max_skips=3, say=lambda line: None)
    for step in (1, 2, 3, 4):
        m.add(step, unsound(in_a_row=step, norm=np.inf))
    with pytest.raises(Diverged, match=r"after 3 updates skipped one after the other \(max_skips\)") as caught:
        m.settle()
    assert caught.value.step == 4 and m.skipped == 3


def test_poisoned_parameters_are_not_skipped():
    m = meter(on_divergence="skip")
    m.add(1, unsound(loss=np.nan, finite_params=False))
    with pytest.raises(Diverged, match="loss=nan is not finite at step 1"):
        m.settle()


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_a_poisoned_row_alone_is_not_passed_over(policy):
    m = meter(on_divergence=policy)
    m.add(7, reported(bad=(1,)))
    with pytest.raises(Diverged, match="the recurrent state is not finite at step 7, in stream 1; nothing of it"):
        m.settle()


def test_the_status_line_has_step_epoch_bits_speed_wait_and_the_time_left(clock):
    m = meter(num_steps=1000)
    for step in (1, 2, 3, 4):
        clock.now += 0.5
        m.next_of(iter(["batch"]))
        m.add(step, reported(2.5 * BIT))
    # Three steps of 20 symbols looked at, in 2 s: 30 a second; 997 steps are left.
    assert m.status() == "step 3/1000  epoch 0.38  2.500 bpb  30 bytes/s  ETA 11m04s  input wait 0%"
    clock.now += 9
    m.pause(9)  # an evaluation every three steps
    assert "  ETA 1h00m  " in m.status()


def test_before_any_step_was_looked_at_there_is_no_status():
    m = meter()
    assert m.status() == ""
    m.add(1, reported())
    assert m.status() == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0s"), (59.9, "59s"), (60, "1m00s"), (725, "12m05s"), (3599, "59m59s"), (3600, "1h00m"), (12000, "3h20m"),
        (86399, "23h59m"), (86400, "1d00h"), (2 * 86400 + 4 * 3600 + 59, "2d04h"),
    ],
)  # fmt: skip
def test_a_duration_is_in_words(seconds, words):
    assert duration(seconds) == words


# How long it takes.


def test_how_long_the_steps_take_is_said_once_by_those_after_the_first_which_compiles(clock):
    said: list[str] = []
    m = meter(num_steps=1003, say=said.append)
    for step in range(1, 9):
        m.add(step, reported())
        clock.now += 60 if step == 1 else 2
    m.settle()
    assert said == ["the 999 steps left take about 33m18s, by the first 4"]


def test_it_is_not_said_where_a_line_of_the_log_came_before(clock):
    said: list[str] = []
    m = meter(say=said.append)
    for step in range(1, 5):
        m.add(step, reported())
        m.settle()
        m.train_record()
        clock.now += 60
    assert said == []


def test_the_time_left_counts_from_the_second_call_when_all_is_compiled(clock):
    left, told = metrics_lib.time_left(), []
    for clock.now, done in ((0.0, 0), (100.0, 10), (110.0, 10), (115.0, 20), (155.0, 100)):
        told.append(left(done, 100))
    assert told == ["", "", "", ", 2m00s left", ", 0s left"]
