"""What a run says of itself: sums divided once, plain lines in the log, one live line on a terminal and no other."""

import fcntl
import io
import itertools
import json
import os
import re
import struct
import termios
import time
from types import SimpleNamespace

import numpy as np
import pytest

from charlstm import metrics as metrics_lib
from charlstm.metrics import Diverged, Meter, RunLog, duration
from charlstm.types import Metrics

KEYS = {
    "step", "epoch", "split", "bits_per_character", "learning_rate", "grad_norm", "characters_per_second",
    "input_wait", "seconds",
}  # fmt: skip
BIT = float(np.log(2))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_screen(written: str, columns: int) -> list[str]:
    """The lines that a terminal of `columns` shows.  A character beyond the last column would begin a line anew."""
    lines, column = [""], 0
    for character in written:
        if character == "\n":
            lines.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            assert character.isprintable() and column < columns, (character, column)
            lines[-1] = lines[-1].ljust(column)[:column] + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.fixture(autouse=True)
def sixty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")


@pytest.fixture
def terminal():
    return Terminal()


@pytest.fixture
def log(tmp_path, terminal):
    log = RunLog(tmp_path, terminal)
    yield log
    log.close()


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes only when it is told to: `clock.now += seconds`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(metrics_lib, "time", SimpleNamespace(monotonic=lambda: clock.now, strftime=time.strftime))
    return clock


class Looked:
    """A figure on a device that remembers whether it was fetched."""

    def __init__(self, value: float) -> None:
        self.value, self.fetched = value, False

    def __float__(self) -> float:
        self.fetched = True
        return self.value


def reported(loss=1.0, norm=0.5, rate=0.01, streams=4, bad=(), worst=0, finite_params=True) -> Metrics:
    """What a step reports, in which the streams `bad` are not finite and `worst` has the largest loss."""
    finite, losses = np.ones(streams, bool), np.ones(streams, np.float32)
    finite[list(bad)], losses[worst] = False, 2
    return Metrics(loss, losses, norm, rate, finite_params, finite)  # type: ignore[arg-type]


def meter(num_steps=100) -> Meter:
    """Of 4 streams of 5 symbols, 8 steps an epoch."""
    return Meter(4, 5, 8, num_steps)


# Lines of metrics.jsonl.


def test_a_line_has_the_documented_keys_whatever_it_is_about():
    m = meter()
    m.add(3, reported())
    assert m.train_record().keys() == KEYS
    assert m.evaluation_record(3, "valid", 2.5, 1000.0).keys() == KEYS


def test_a_line_of_training_is_the_mean_over_all_its_symbols_in_bits_and_the_latest_rate_and_norm(clock):
    m = meter()
    for step, nats in ((5, 1.0), (6, 2.0), (7, 6.0)):
        m.add(step, reported(nats * BIT, norm=step / 10, rate=step / 100))
    clock.now += 10
    line = m.train_record()
    assert line["bits_per_character"] == pytest.approx(3.0)
    assert (line["step"], line["epoch"], line["split"]) == (7, 7 / 8, "train")
    assert (line["learning_rate"], line["grad_norm"]) == (0.07, 0.7)
    assert (line["characters_per_second"], line["input_wait"], line["seconds"]) == (6.0, 0.0, 10.0)


def test_lines_of_unequal_lengths_weighted_by_their_steps_are_the_mean_of_the_run():
    m, rng = meter(), np.random.default_rng(0)
    bits, lines = rng.uniform(1, 5, 23), []
    for step in range(1, 24):
        m.add(step, reported(bits[step - 1] * BIT))
        if step in (1, 4, 20, 23):
            lines.append(m.train_record())
    assert [line["step"] for line in lines] == [1, 4, 20, 23]
    total = sum(n * line["bits_per_character"] for n, line in zip((1, 3, 16, 3), lines, strict=True))
    assert total / 23 == pytest.approx(bits.mean())
    assert lines[2]["bits_per_character"] == pytest.approx(bits[4:20].mean())


def test_a_line_of_an_evaluation_has_the_figure_and_speed_given_and_nothing_of_training(clock):
    m = meter()
    m.add(3, reported())
    clock.now += 7
    line = m.evaluation_record(4, "valid", 2.5, 1234.56)
    assert line == {
        "step": 4, "epoch": 0.5, "split": "valid", "bits_per_character": 2.5, "learning_rate": None, "grad_norm": None,
        "characters_per_second": 1234.6, "input_wait": None, "seconds": 7.0,
    }  # fmt: skip


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
    assert (line["input_wait"], line["characters_per_second"]) == (0.75, 5.0)
    clock.now += 4
    m.add(3, reported())
    line = m.train_record()
    assert (line["input_wait"], line["characters_per_second"]) == (0.0, 5.0)


def test_the_time_of_evaluating_and_saving_is_left_out_of_the_speed_but_not_of_the_seconds(clock):
    m = meter()
    m.add(1, reported())
    clock.now += 100
    m.pause(96)
    line = m.train_record()
    assert (line["characters_per_second"], line["seconds"]) == (5.0, 100.0)


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
    assert m.train_record()["bits_per_character"] == pytest.approx(2.0)
    m.settle()
    m.add(3, reported(7 * BIT))
    assert m.train_record()["bits_per_character"] == pytest.approx(7.0)


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


@pytest.mark.parametrize("look", [Meter.settle, Meter.train_record])
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


# metrics.jsonl on disk.


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rewinding_drops_the_lines_after_the_step_and_half_lines_and_no_other(log, tmp_path):
    for step in (10, 20, 20, 30, 40):
        log.record({"step": step, "split": "train"})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 20, "spl')
    log.rewind(20)
    assert path.read_text() == "".join(f'{{"step": {step}, "split": "train"}}\n' for step in (10, 20, 20))
    log.record({"step": 30})
    assert [line["step"] for line in lines_of(tmp_path)] == [10, 20, 20, 30]
    log.rewind(0)
    assert path.read_text() == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt", "metrics.jsonl"]


def test_a_whole_line_that_lacks_only_its_end_is_kept_apart_from_the_next(log, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    log.rewind(2)
    log.record({"step": 3})
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


def test_rewinding_where_there_are_no_lines_makes_no_file(log, tmp_path):
    log.rewind(5)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_line_is_on_disk_when_it_is_recorded(log, tmp_path):
    log.record({"step": 1, "split": "train"})
    assert lines_of(tmp_path) == [{"step": 1, "split": "train"}]


# log.txt and the terminal.


@pytest.mark.parametrize("stream", [Terminal, io.StringIO], ids=["terminal", "pipe"])
def test_log_txt_has_each_line_with_its_time_and_nothing_of_the_status_line(stream, tmp_path):
    log = RunLog(tmp_path, stream())
    log.say("training on 1 x cpu")
    log.status("step 9/100")
    log.note("step 10/100  1 € bpc")
    log.status("step 11/100")
    log.say("finished")
    text = (tmp_path / "log.txt").read_text("utf-8")  # flushed: whoever watches the file sees the line
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert re.fullmatch(f"{stamp}training on 1 x cpu\n{stamp}step 10/100  1 € bpc\n{stamp}finished\n", text)
    assert not re.search(r"[^\n -~€]", text)
    log.close()


def test_a_second_log_of_the_same_run_goes_on_at_the_end(tmp_path):
    for word in ("one", "two"):
        log = RunLog(tmp_path, io.StringIO())
        log.say(word)
        log.close()
    assert [line.split()[2] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]


def test_the_status_line_has_step_epoch_bits_speed_wait_and_the_time_left(clock):
    m = meter(num_steps=1000)
    for step in (1, 2, 3, 4):
        clock.now += 0.5
        m.next_of(iter(["batch"]))
        m.add(step, reported(2.5 * BIT))
    # Three steps of 20 symbols looked at, in 2 s: 30 a second; 997 steps are left.
    assert m.status() == "step 3/1000  epoch 0.38  2.500 bpc  30 chars/s  input wait 0%  ETA 11m04s"


def test_before_any_step_was_looked_at_there_is_no_status():
    m = meter()
    assert m.status() == ""
    m.add(1, reported())
    assert m.status() == ""


def test_the_live_line_is_one_line_that_is_overwritten(log, terminal):
    for text in ("step 99/100  a long text", "step 100/100"):
        log.status(text)
    assert "\n" not in terminal.getvalue()
    assert on_screen(terminal.getvalue(), 60) == ["step 100/100"]


def test_the_live_line_is_cut_to_the_width_of_the_terminal_so_that_it_never_wraps(log, terminal):
    log.status("x" * 500)
    log.status("y" * 500)
    # One column stays free: in the last one, some terminals begin a new line.
    assert on_screen(terminal.getvalue(), 60) == ["y" * 59]


def test_the_live_line_is_wiped_before_a_plain_line_and_at_the_end(log, terminal):
    log.say("begins")
    for text in ("x" * 25, "y" * 500, "z" * 59):
        log.status(text)
        log.say("saved")
    log.status("x" * 25)
    log.close()
    assert on_screen(terminal.getvalue(), 60) == ["begins", "saved", "saved", "saved", ""]


def test_a_plain_line_alone_has_no_control_characters_on_a_terminal_either(log, terminal):
    log.say("one")
    log.say("two")
    log.close()
    assert terminal.getvalue() == "one\ntwo\n"


def test_where_there_is_a_live_line_a_note_goes_to_log_txt_alone(log, terminal, tmp_path):
    log.status("step 10/100")
    log.note("step 10/100")
    assert on_screen(terminal.getvalue(), 60) == ["step 10/100"]
    assert (tmp_path / "log.txt").read_text().endswith(" step 10/100\n")


def test_what_is_no_terminal_gets_plain_lines_and_no_status(tmp_path):
    pipe = io.StringIO()
    log = RunLog(tmp_path, pipe)
    log.status("step 1/100")
    log.note("step 10/100")
    log.status("step 11/100")
    log.say("finished")
    log.close()
    assert pipe.getvalue() == "step 10/100\nfinished\n"


@pytest.mark.parametrize("stream", [Terminal, io.StringIO], ids=["terminal", "pipe"])
def test_a_silent_log_writes_nothing(stream, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    terminal = stream()
    log = RunLog(tmp_path, terminal, silent=True)
    log.say("a")
    log.note("b")
    log.status("c")
    log.record({"step": 1})
    log.rewind(0)
    log.close()
    assert terminal.getvalue() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 9}\n'


def test_the_width_is_that_of_the_terminal_that_shows_the_line(tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS")
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 33, 0, 0))
    with os.fdopen(writer, "w") as terminal, os.fdopen(reader, "rb", buffering=0) as other_end:
        log = RunLog(tmp_path, terminal)
        log.status("x" * 500)
        assert other_end.read(1000) == b"\r" + b"x" * 32
        log.close()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0s"), (59.9, "59s"), (60, "1m00s"), (725, "12m05s"), (3599, "59m59s"), (3600, "1h00m"), (12000, "3h20m"),
        (86399, "23h59m"), (86400, "1d00h"), (2 * 86400 + 4 * 3600 + 59, "2d04h"),
    ],
)  # fmt: skip
def test_a_duration_is_in_words(seconds, words):
    assert duration(seconds) == words
