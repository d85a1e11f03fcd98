"""launch.sample --interactive: what the commands do, and Ctrl-C on a terminal."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from charlstm import api
from charlstm.inference.sampling import Sampling
from data_pipeline.vocabulary import Vocabulary
from launch import sample
from launch.support.interactive import Interactive
from tests.jobs import ROOT, xla_flags
from tests.serving.conftest import runs  # noqa: F401


@pytest.fixture
def typed(runs, monkeypatch, capsys):  # noqa: F811
    """Runs the program on lines of stdin: (stdout, stderr)."""

    def run(*lines, flags=(), name="characters"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert sample.main(["launch.sample", f"--run_dir={runs[name]}", "--interactive", *flags]) == 0
        shown = capsys.readouterr()
        return shown.out, shown.err.partition("\n")[2]

    return run


def test_a_line_is_continued_and_an_empty_line_goes_on(typed, runs):  # noqa: F811
    model = api.load(runs["characters"])
    text = model.sample("abc", 90, temperature=0.7, top_k=5, seed=3)[3:]
    shown, said = typed("/t 0.7", "/k 5", "/seed 3", "/n 45", "abc", "")
    assert shown == text[:45] + "\n" + text[45:] + "\n" and said == ""
    again, _ = typed("abc", "", flags=["--temperature=0.7", "--top_k=5", "--seed=3", "--length=45"])
    assert again == shown


def test_what_is_typed_later_is_read_after_what_was_written(typed, runs):  # noqa: F811
    model = api.load(runs["characters"])
    shown, _ = typed("/t 0", "/n 20", "abc", "de\\", "/reset", "abc")
    first, second, third = (shown[:20], shown[21:41], shown[42:62])
    assert first == third == model.sample("abc", 20, temperature=0)[3:]
    assert second == model.sample("abc" + first + "de\n", 20, temperature=0)[-20:]


def test_top_shows_what_may_come_and_a_number_adds_it(typed, runs):  # noqa: F811
    model = api.load(runs["characters"])
    shown, said = typed("/n 20", "/t 0", "/top", "2", "1", "", "7")
    rows = re.findall(r"^ +(\d+)  '(.+?)' +([\d.]+)%", said, flags=re.M)
    assert len(rows) == 30 and 50 < sum(float(row[2]) for row in rows[:10]) <= 100
    assert {row[1] for row in rows[:10]} == {r"\n", *"abcdefgé€"}  # the unknown symbol is not among them
    added = rows[1][1] + rows[10][1]
    expected = model.sample("\n" + added, 20, temperature=0)[1 + len(added) :]  # a text begins as after a newline
    assert shown == expected + "\n"
    assert "'7' (U+0037)" in said  # no number of a list any more, but a symbol that is unknown


def test_a_character_whose_first_byte_was_chosen_by_number_is_shown_whole(capsys):
    made = SimpleNamespace(ids=np.array([[*"é!".encode()[1:]]]))
    text = mock.Mock(next_log_probabilities=lambda: -np.abs(np.arange(256.0) - "é".encode()[0]), write=lambda *_: made)
    Interactive(text, Vocabulary("bytes"), (), Sampling(), 0, 2).run(iter(["/top", "1", ""]))
    assert capsys.readouterr().out == "é!\n"


def test_what_is_wrong_is_said_and_the_text_goes_on(typed):
    shown, said = typed("/x", "/t", "/t -1", "/k a", "/seed -1", "/n 0", "xyz", "/help", "/n 5", "ab", "/quit", "ab")
    lines = said.splitlines()
    assert "/help lists them" in lines[0] and "/help lists them" in lines[1] and "temperature=-1" in lines[2]
    assert "not in the vocabulary" in said and "/top" in said and "Traceback" not in said
    assert len(shown) == 6


@pytest.mark.parametrize("flag", ["--prompt=a", "--num_samples=2", "--format=json", "--stop=a"])
def test_flags_of_texts_in_one_go_are_refused(runs, flag):  # noqa: F811
    with pytest.raises(ValueError, match=flag.partition("=")[0]):
        sample.main(["launch.sample", f"--run_dir={runs['characters']}", "--interactive", flag])


def test_utf8_is_whole_across_turns(typed, runs):  # noqa: F811
    model = api.load(runs["bytes"])
    shown, _ = typed("/seed 2", "/n 7", "é", *[""] * 9, name="bytes")
    expected = model.sample("é", 70, seed=2)[1:]
    assert shown.replace("\n", "").rstrip("\ufffd") == expected.replace("\n", "").rstrip("\ufffd")


def test_what_is_not_utf8_is_read_and_what_stdout_lacks_is_shown_as_a_question_mark(runs, monkeypatch):  # noqa: F811
    made = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\ncaf\xe9\n"), "utf-8"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(made, "ascii"))
    assert sample.main(["launch.sample", f"--run_dir={runs['bytes']}", "--interactive", "--length=60"]) == 0
    assert made.getvalue().count(b"\n") >= 2 and b"?" in made.getvalue()


def test_on_a_terminal_ctrl_c_stops_the_text_and_ctrl_d_leaves(runs):  # noqa: F811
    master, slave = pty.openpty()
    environment = os.environ | {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    command = [sys.executable, "-m", "launch.sample", f"--run_dir={runs['characters']}", "--interactive"]
    running = subprocess.Popen(
        ["setsid", "--ctty", *command, "--length=100000000"],
        cwd=ROOT,
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    seen = ""

    def until(pattern, seconds=300, again=b""):
        nonlocal seen
        deadline = time.monotonic() + seconds
        while not re.search(pattern, seen):
            assert time.monotonic() < deadline and running.poll() is None, seen[-2000:]
            if not select.select([master], [], [], 5)[0]:
                os.write(master, again)
            else:
                seen += os.read(master, 65536).decode("utf-8", "replace")
        before, seen = seen, ""
        return before

    try:
        until("> ")
        os.write(master, b"abc\n")
        until(r"abc\r\n(.|\r|\n){300}")
        os.write(master, b"\x03")
        until("\n.{0,8}> ")
        os.write(master, b"/quit")
        until("/quit")
        # At a prompt it drops the line.  One that comes as readline goes to wait is seen with the next key only.
        os.write(master, b"\x03")
        until("\r\n.{0,8}> ", again=b"\x03")
        os.write(master, b"/n 30\n")
        until("> ")
        os.write(master, b"de\n")
        until(r"de\r\n(.|\r|\n){30,}> ")
        os.write(master, b"\x04")
        assert running.wait(300) == 0
    finally:
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
        running.wait()
        os.close(master)
