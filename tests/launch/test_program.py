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
