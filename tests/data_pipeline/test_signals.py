"""What a program says where nobody can read it."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from data_pipeline import signals
from tests.conftest import ROOT


def written(descriptor: int, times: int = 1) -> list[float]:
    """Seconds that each of some long writes took, none of which raises anything."""
    seconds = []
    with signals._Stderr(descriptor, "w") as stderr:
        for _ in range(times):
            began, left = time.monotonic(), b"x" * 100_000
            while left:
                left = left[stderr.write(left) :]
            seconds.append(time.monotonic() - began)
    return seconds


def test_what_is_said_to_a_pipe_without_a_reader_to_a_full_disk_or_to_a_closed_terminal_is_dropped():
    reader, writer = os.pipe()
    os.close(reader)
    written(writer)
    written(os.open("/dev/full", os.O_WRONLY))
    window, inside = pty.openpty()
    os.close(window)
    written(inside)


def test_who_does_not_read_is_waited_for_once_and_heard_again_when_he_does(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE", 0.2)
    reader, writer = os.pipe()
    first, *others = written(os.dup(writer), 50)
    assert first >= 0.2 and sum(others) < 50 * 0.2 / 2
    os.read(reader, 1 << 20)
    with signals._Stderr(writer, "w") as stderr:
        assert stderr.write(b"again") == 5
    assert os.read(reader, 1 << 20) == b"again"
    os.close(reader)


def test_a_pipe_has_lost_its_reader_when_that_is_closed():
    reader, writer = os.pipe()
    assert not signals.has_lost_its_reader(writer)
    os.close(reader)
    assert signals.has_lost_its_reader(writer)
    os.close(writer)


def test_signals_are_held_back_before_anything_is_imported():
    code = (
        "import signal, sys\n"
        "class Look:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'data_pipeline.signals':\n"
        "            print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))))\n"
        "sys.meta_path.insert(0, Look())\n"
        "from data_pipeline import startup\n"
        "startup.attach('test')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == (f"{[int(signal.SIGINT), int(signal.SIGTERM)]}\n", "")


def test_in_a_process_that_is_no_program_a_signal_is_answered_in_the_block_and_an_ignored_one_is_not():
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals.reacting(came.append):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGINT]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(KeyboardInterrupt):
        signals.leave(signal.SIGINT)


def test_a_block_in_a_thread_answers_nothing():
    def block() -> None:
        with signals.reacting(print):
            entered.append(signal.getsignal(signal.SIGINT))

    entered: list = []
    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert entered == [signal.default_int_handler]
