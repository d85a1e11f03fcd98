"""What a run says: plain lines in its log, one live line on a terminal and no other, whatever the disk does."""

import fcntl
import io
import json
import logging
import os
import re
import resource
import struct
import termios

import pytest

from charlstm.run.log import Lines, RunLog


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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


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
    log.info("training on 1 x cpu")
    log.status("step 9/100")
    log.progress("step 10/100  1 € bpc")
    log.progress("")  # what the status is before the first step
    log.status("step 11/100")
    log.info("finished")
    text = (tmp_path / "log.txt").read_text("utf-8")  # flushed: whoever watches the file sees the line
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert re.fullmatch(f"{stamp}training on 1 x cpu\n{stamp}step 10/100  1 € bpc\n{stamp}finished\n", text)
    assert not re.search(r"[^\n -~€]", text)
    log.close()


def test_the_warnings_of_a_run_are_in_its_own_log_and_another_run_in_a_thread_takes_none_of_them(tmp_path, caplog):
    logger, logs = logging.getLogger("data_pipeline"), {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        logs[name] = RunLog(tmp_path / name, io.StringIO())
    collecting = [logs[name].collecting("data_pipeline", (f"s3://{name}",)) for name in logs]
    collecting[0].__enter__()
    collecting[1].__enter__()
    logger.warning("%s does not answer", "s3://b/text")
    logger.warning("of neither")
    collecting[0].__exit__(None, None, None)  # the first ends first
    collecting[1].__exit__(None, None, None)
    logger.warning("%s does not answer", "s3://a/text")
    assert not (tmp_path / "a" / "log.txt").exists()
    assert (tmp_path / "b" / "log.txt").read_text().endswith(" s3://b/text does not answer\n")
    assert logger.propagate and caplog.messages == ["of neither", "s3://a/text does not answer"]


def test_a_second_log_of_the_same_run_goes_on_at_the_end(tmp_path):
    for word in ("one", "two"):
        log = RunLog(tmp_path, io.StringIO())
        log.info(word)
        log.close()
    assert [line.split()[2] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]


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
    log.info("begins")
    for text in ("x" * 25, "y" * 500, "z" * 59):
        log.status(text)
        log.info("saved")
    log.status("x" * 25)
    log.close()
    assert on_screen(terminal.getvalue(), 60) == ["begins", "saved", "saved", "saved", ""]


def test_a_plain_line_alone_has_no_control_characters_on_a_terminal_either(log, terminal):
    log.info("one")
    log.info("two")
    log.close()
    assert terminal.getvalue() == "one\ntwo\n"


def test_where_there_is_a_live_line_a_note_goes_to_log_txt_alone(log, terminal, tmp_path):
    log.status("step 10/100")
    log.progress("step 10/100")
    assert on_screen(terminal.getvalue(), 60) == ["step 10/100"]
    assert (tmp_path / "log.txt").read_text().endswith(" step 10/100\n")


def test_what_is_no_terminal_gets_plain_lines_and_no_status(tmp_path):
    pipe = io.StringIO()
    log = RunLog(tmp_path, pipe)
    log.status("step 1/100")
    log.progress("step 10/100")
    log.status("step 11/100")
    log.info("finished")
    log.close()
    assert pipe.getvalue() == "step 10/100\nfinished\n"


@pytest.mark.parametrize("stream", [Terminal, io.StringIO], ids=["terminal", "pipe"])
def test_a_silent_log_writes_nothing(stream, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    terminal = stream()
    log = RunLog(tmp_path, terminal, silent=True)
    log.info("a")
    log.progress("b")
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


# A disk that is full.


@pytest.fixture
def full():
    """No file may be larger than some bytes: os.write raises, as on a full disk, or writes the half that fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_that_a_full_disk_does_not_take_are_there_once_it_takes_them(tmp_path, full):
    pipe = io.StringIO()
    log = RunLog(tmp_path, pipe)
    log.record({"step": 1})
    full(17)  # the second line fits by half
    for step in (2, 3):
        log.record({"step": step})
        log.progress(f"step {step}")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"ste'
    assert pipe.getvalue() == "step 2\nstep 3\n"
    full(resource.RLIM_INFINITY)
    log.record({"step": 4})
    log.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4]
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["2", "3"]


def test_rewinding_drops_the_lines_that_wait_as_well(tmp_path, full):
    log = RunLog(tmp_path, io.StringIO())
    log.record({"step": 1})
    full(17)
    for step in (2, 3, 4):
        log.record({"step": step})
    full(resource.RLIM_INFINITY)
    log.rewind(3)
    log.record({"step": 5})
    log.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 5]


def test_lines_that_the_disk_never_took_are_told_of_at_the_end(tmp_path, full):
    log = RunLog(tmp_path, io.StringIO())
    full(10)
    log.progress("step 2")
    with pytest.raises(OSError, match=r"log\.txt"):
        log.close()


def test_what_waits_for_a_full_disk_is_bounded_and_whole_lines(tmp_path, full, monkeypatch):
    monkeypatch.setattr(Lines, "MOST", 20)
    lines = Lines(tmp_path / "lines.txt")
    full(0)
    lines.add("the first")
    with pytest.raises(OSError):
        lines.add("the second, that is long")
    full(resource.RLIM_INFINITY)
    lines.add("the third")
    assert (tmp_path / "lines.txt").read_text() == "the first\nthe third\n"
