"""What every program does with a signal and with an error that nobody can catch."""

import errno
import os
import re
import subprocess
import sys

import pytest

from data_pipeline.atomic_files import InUse
from launch.support import cli
from tests.conftest import ROOT

# Ctrl-C that comes while a finalizer runs: a KeyboardInterrupt would be reported, and nothing else.
INTERRUPTED_IN_A_FINALIZER = """
import os, signal, time
from launch.support import cli
class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
def main(argv):
    Dying()
    for _ in range(2000):
        time.sleep(0.01)
    return cli.DONE
cli.run("launch.test", main)
"""


def test_a_ctrl_c_that_falls_into_a_finalizer_is_not_lost():
    command = [sys.executable, "-c", INTERRUPTED_IN_A_FINALIZER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (130, "launch.test: interrupted\n")


# Ctrl-C that comes while the main thread is in a compiler, say, and sees no Python for long.
INTERRUPTED_OUTSIDE_OF_PYTHON = """
import ctypes, os, signal, threading, time
from launch.support import cli
def main(argv):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    ctypes.CDLL(None).sleep(30)
cli.run("launch.test", main)
"""
# Ctrl-C when all is done, and the interpreter takes itself down.
INTERRUPTED_AT_THE_END = """
import atexit, os, signal, sys, time
from launch.support import cli
def interrupt():
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(1000)
def main(argv):
    atexit.register(interrupt)
    return cli.STOPPED
cli.run("launch.test", main)
"""
# A signal that changes nothing: the status is that of the program.
SIGNALLED = """
import os, signal, sys, time
from launch.support import cli
def main(argv):
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(0.5)
    return cli.DIVERGED
cli.run("launch.test", main)
"""


# What starts the program of its further arguments, with a signal ignored or not.
STARTED_WITH = """
import os, signal, sys
signal.signal(getattr(signal, sys.argv[1]), getattr(signal, sys.argv[2]))
os.execv(sys.argv[3], sys.argv[3:])
"""


def python(code: str, *arguments: str, started_with: tuple[str, ...] = (), **options) -> tuple[int, str]:
    """Runs `code` in a process that begins as a program does; its exit status and what is on its stderr."""
    command = [sys.executable, "-c", "from data_pipeline import signals; signals.attach('launch.test')\n" + code]
    command += arguments
    if started_with:
        command = [sys.executable, "-c", STARTED_WITH, *started_with, *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)
    return done.returncode, done.stderr


def test_a_ctrl_c_is_answered_while_the_main_thread_is_not_in_python():
    assert python(INTERRUPTED_OUTSIDE_OF_PYTHON) == (130, "launch.test: interrupted\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_that_comes_when_all_is_done_does_not_change_the_status(name):
    assert python(INTERRUPTED_AT_THE_END, name) == (cli.STOPPED, "")


# A signal while a directory is being made that is to appear whole.
INTERRUPTED_BESIDE_AN_OUTPUT = """
import os, signal, sys, time
from pathlib import Path
from data_pipeline.new_directory import hidden_beside
from launch.support import cli
def main(argv):
    with hidden_beside("output", Path(sys.argv[2])) as hidden:
        (hidden / "weights").write_text("half of them")
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        time.sleep(1000)
cli.run("launch.test", main)
"""


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_leaves_nothing_of_a_directory_that_is_being_made(name, status, tmp_path):
    assert python(INTERRUPTED_BESIDE_AN_OUTPUT, name, str(tmp_path / "out"))[0] == status
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_that_was_ignored_when_the_program_was_started_stays_ignored(name):
    assert python(SIGNALLED, name, started_with=(name, "SIG_IGN")) == (cli.DIVERGED, "")


def test_a_window_that_is_closed_ends_no_program():
    not_under_nohup = ("SIGHUP", "SIG_DFL")
    assert python(SIGNALLED, "SIGHUP", started_with=not_under_nohup) == (cli.DIVERGED, "")


@pytest.mark.parametrize("first", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.long)])
def test_the_first_signal_in_training_is_acknowledged_at_once_and_a_second_ctrl_c_is_one_line_and_130(first, tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from launch.support import cli\n"
        "from launch.support.prometheus import MonitorFlags\n"
        "from launch.support.services import ProgramServices\n"
        "from launch.support.watchdog import WatchdogFlags\n"
        "def main(argv):\n"
        "    services = ProgramServices(WatchdogFlags(), MonitorFlags())\n"
        "    with services.opened(Path(sys.argv[2])), services.watching(None), services.pause('evaluating'):\n"
        "        for number in (getattr(signal, sys.argv[1]), signal.SIGINT):\n"
        "            os.kill(os.getpid(), number)\n"
        "            while not services.stop_requested():\n"
        "                time.sleep(0.01)\n"
        "        time.sleep(1000)\n"
        "cli.run('launch.test', main)\n"
    )
    told = "told to stop: evaluates no further, saves and ends; a second Ctrl-C ends it at once and loses all steps"
    lost = "not saved: all steps are lost"
    assert python(code, first, str(tmp_path)) == (130, f"{told}\n{lost}\nlaunch.test: interrupted\n")


def shell(line: str) -> subprocess.CompletedProcess:
    command = ["bash", "-c", line, sys.executable]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_help_whose_reader_leaves_is_no_error():
    done = shell('"$0" -m launch.train --help | head -1; echo ${PIPESTATUS[@]}')
    assert (done.stdout.splitlines()[1], done.stderr) == ("0 0", "")


def test_an_output_that_is_closed_or_full_is_no_traceback():
    prints = "from launch.support import cli; cli.run('launch.test', lambda argv: print('result') or cli.DONE)"
    closed = shell(f'"$0" -c "{prints}" >&-')
    assert (closed.returncode, closed.stderr) == (0, "")
    full = shell(f'"$0" -c "{prints}" >/dev/full')
    assert (full.returncode, full.stderr) == (74, "launch.test: No space left on device\n")


TELLS = """
import sys
from launch.support import cli
def main(argv):
    for n in range(1000):
        print("so far", n, file=sys.stderr, flush=True)
    print("result")
    return cli.DONE
cli.run("launch.test", main)
"""


@pytest.mark.parametrize("gone", ["2> >(exec true)", "2>/dev/full", "2>&-"])
def test_a_result_is_written_to_its_end_where_nothing_more_can_be_said_on_stderr(gone):
    command = [*("bash", "-c", f'"$0" -c "$1" {gone}'), sys.executable, TELLS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (cli.DONE, "result\n", "")


def test_a_pipe_that_breaks_is_the_end_of_the_text_only_where_it_is_that_of_stdout():
    code = "from launch.support import cli\ndef main(argv): raise BrokenPipeError(32, 'Broken pipe')\n"
    ended, said = python(code + "cli.run('launch.test', main)")
    assert (ended, said) == (cli.MISTAKE, "launch.test: Broken pipe\n")


def test_sigterm_where_nothing_is_to_be_saved_is_one_line_and_its_own_status():
    told = INTERRUPTED_IN_A_FINALIZER.replace("SIGINT", "SIGTERM")
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (143, "launch.test: terminated\n")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_name_that_stdout_cannot_encode_loses_no_result(encoding):
    code = "from launch.support import cli\ncli.run('launch.test', lambda argv: print('caf\\udce9 実験') or cli.DONE)\n"
    assert python(code, env=os.environ | {"PYTHONIOENCODING": f"{encoding}:strict"}) == (cli.DONE, "")


def test_memory_that_runs_out_is_one_sentence():
    code = (
        "from launch.support import cli\n"
        "def main(argv): raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.')\n"
        "cli.run('launch.test', main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("launch.test: out of memory (") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("program", ["train", "evaluate", "sample", "local"])
def test_a_python_that_the_project_was_not_installed_into_says_which_environment_to_use(program):
    command = [sys.executable, "-S", "-m", f"launch.{program}"]  # without site-packages
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == cli.MISTAKE and ended.stdout == ""
    assert re.fullmatch(rf"launch\.{program}: .* has no jax: use the environment .*\n", ended.stderr)


def test_what_passes_by_itself_has_a_status_that_is_tried_again(capsys):
    assert cli.explain("launch.prepare", ChildProcessError("a process was killed")) == cli.LOST
    assert cli.explain("launch.prepare", ConnectionError("no scheduler answers")) == cli.UNREACHABLE
    assert cli.explain("launch.prepare", FileNotFoundError(2, "is not there")) == cli.MISTAKE
    assert cli.explain("launch.train", InUse("another machine has it")) == cli.IN_USE
    assert cli.explain("launch.export", OSError(errno.EBUSY, "Device or resource busy")) == cli.MISTAKE
    assert capsys.readouterr().err.startswith("launch.prepare: a process was killed\n")
