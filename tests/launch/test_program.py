"""What every program does with a signal and with an error that nobody can catch."""

import subprocess
import sys

from tests.conftest import ROOT

# Ctrl-C that comes while a finalizer runs: Python reports the KeyboardInterrupt and goes on as if nothing had been.
INTERRUPTED_IN_A_FINALIZER = """
import os, signal, time
from launch import program
class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
def main(argv):
    Dying()
    for _ in range(2000):
        time.sleep(0.01)
    return program.DONE
program.run("launch.test", main)
"""


def test_a_ctrl_c_that_falls_into_a_finalizer_is_not_lost():
    command = [sys.executable, "-c", INTERRUPTED_IN_A_FINALIZER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "launch.test: interrupted\n")


def shell(command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command, sys.executable], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help_whose_reader_leaves_is_no_error():
    done = shell('"$0" -m launch.train --help | head -1; echo ${PIPESTATUS[@]}')
    assert (done.stdout.splitlines()[1], done.stderr) == ("0 0", "")


def test_an_output_that_is_closed_or_full_is_no_traceback():
    closed = shell('"$0" -m launch.train --help >&-')
    assert (closed.returncode, closed.stderr) == (0, "")
    full = shell('"$0" -m launch.train --help >/dev/full')
    assert (full.returncode, full.stderr) == (74, "launch.train: [Errno 28] No space left on device\n")


def test_sigterm_where_nothing_is_to_be_saved_is_one_line_and_its_own_status():
    told = INTERRUPTED_IN_A_FINALIZER.replace("SIGINT", "SIGTERM")
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (143, "launch.test: terminated\n")


def test_memory_that_runs_out_is_one_sentence():
    program = (
        "from launch import program\n"
        "def main(argv): raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.')\n"
        "program.run('launch.test', main)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("launch.test: out of memory (") and done.stderr.count("\n") == 1
