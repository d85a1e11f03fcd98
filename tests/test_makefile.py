"""The environments that `make` sets up: made once, made anew where they must be, or one line that says what to type.

The Makefile's own conditions run, in Pythons of any version with and without venv; these make environments of one file,
whose python notes what it is asked for and installs nothing.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import ROOT

# A Python of VERSION, which finds the modules MODULES; what contains the words FAILS in the environment fails.
PYTHON = """#!/bin/sh
case "$1" in
-c) exec {real} -I -c "import sys; sys.version_info = {version}; sys.modules.update({modules})
$2" ;;
-m) echo "$(basename "$0") $*" >> {notes}; mkdir -p "$3/bin"; cp {inside} "$3/bin/python" ;;
esac
case "$*" in *"$FAILS"*) exit 1 ;; esac
"""
INSIDE = """#!/bin/sh
echo "$*" >> {notes}
case "$*" in *"$FAILS"*) exit 1 ;; esac
"""
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
NOTHING_FAILS = "no command has these words"

LOCKED = "-m pip install --disable-pip-version-check -r requirements.lock"
ITSELF = "-m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e ."
INTEROP = ".venv-interop/with-3.12"


class Clone:
    """A folder with the Makefile, and Pythons that it may be told to use."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._notes, self._inside = folder / "clone", folder / "notes", folder / "inside"
        self.folder.mkdir()
        for name in ("Makefile", "requirements.lock", "pyproject.toml"):
            shutil.copy(ROOT / name, self.folder)
        self._write(self._inside, INSIDE.format(notes=self._notes))

    def python(self, name: str, has_venv: bool = True) -> str:
        """The path of an interpreter, made for it: `name` is python3.12 or the like."""
        version = (*map(int, name.removeprefix("python").split(".")), 1)
        modules = f"venv=sys, ensurepip={'sys' if has_venv else None}"  # as Debian has it without python3-venv
        own = {"real": sys.executable, "version": version, "modules": modules}
        path = self.folder.parent / name
        self._write(path, PYTHON.format(**own, notes=self._notes, inside=self._inside))
        return str(path)

    def make(self, target: str, python: str, *rest: str, fails: str = NOTHING_FAILS) -> subprocess.CompletedProcess:
        """Runs make, without its echo of commands, and without what a make that started this test has handed down."""
        environment = {"PATH": os.environ["PATH"], "FAILS": fails}
        command = ["make", "--silent", target, f"PYTHON={python}", *rest]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60)

    def asked(self) -> list[str]:
        """What the Pythons were asked for since the last call."""
        lines = self._notes.read_text().splitlines() if self._notes.exists() else []
        self._notes.unlink(missing_ok=True)
        return lines

    def environment(self) -> set[str]:
        """The files in .venv."""
        top = self.folder / ".venv"
        return {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}

    @staticmethod
    def _write(path: Path, script: str) -> None:
        path.write_text(script)
        path.chmod(0o755)


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


def installed(clone: Clone, python: str) -> None:
    done = clone.make(".venv/installed", python)
    assert done.returncode == 0, done.stderr


def test_the_environment_is_made_once_and_filled_again_when_the_lock_changes(clone):
    python = clone.python("python3.12")
    installed(clone, python)
    assert clone.asked() == ["python3.12 -m venv .venv", LOCKED, ITSELF]
    assert clone.environment() == {"bin/python", "python-3.12", "installed"}
    installed(clone, python)
    assert clone.asked() == []
    (clone.folder / "requirements.lock").touch()
    installed(clone, python)
    assert clone.asked() == [LOCKED, ITSELF]


@pytest.mark.parametrize("there_before", [False, True], ids=["a new clone", "an environment is there"])
@pytest.mark.parametrize(
    ("name", "has_venv", "sentence"),
    [
        ("python3.10", True, "Python 3.10 is too old: name 3.11 or later, make PYTHON=python3.12"),
        ("python3.9", False, "Python 3.9 is too old: name 3.11 or later, make PYTHON=python3.12"),
        ("python3.11", False, "this Python has no venv: on Debian and Ubuntu, sudo apt install python3-venv"),
        ("", True, "there is no pythn3.12: name a Python that is there, make PYTHON=python3.12"),
    ],
    ids=["too old", "too old and without venv", "without venv", "not there"],
)
def test_a_python_that_will_not_do_is_refused_in_one_line_and_changes_nothing(
    name, has_venv, sentence, there_before, clone
):
    if there_before:
        installed(clone, clone.python("python3.12"))
        assert clone.asked()
    before = clone.environment()
    done = clone.make("train", clone.python(name, has_venv) if name else "pythn3.12")
    assert (done.returncode, done.stdout) == (2, sentence + "\n")
    assert clone.environment() == before and clone.asked() == []


@pytest.mark.parametrize("python", ["python3.10", "pythn3.12"])
def test_a_python_that_will_not_do_leaves_the_environment_of_the_benchmarks_as_it_is(python, clone):
    assert clone.make(".venv-bench/with-3.12-bench", clone.python("python3.12"), "GPUS=").returncode == 0
    done = clone.make("gpu", clone.python(python) if python == "python3.10" else python, "GPUS=")
    assert done.returncode == 2 and done.stdout.endswith("make PYTHON=python3.12\n") and done.stdout.count("\n") == 1
    assert (clone.folder / ".venv-bench" / "with-3.12-bench").exists()


def half_made(clone: Clone) -> None:
    """As a venv leaves it that was killed."""
    (clone.folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(clone.folder.parent / "inside", clone.folder / ".venv" / "bin" / "python")


def of_another_python(clone: Clone) -> None:
    installed(clone, clone.python("python3.12"))


@pytest.mark.parametrize("there_before", [half_made, of_another_python])
def test_an_environment_that_is_half_made_or_of_another_python_is_made_anew(there_before, clone):
    there_before(clone)
    (clone.folder / ".venv" / "left").touch()
    clone.asked()
    installed(clone, clone.python("python3.13"))
    assert clone.asked() == ["python3.13 -m venv .venv", LOCKED, ITSELF]
    assert clone.environment() == {"bin/python", "python-3.13", "installed"}


def test_an_environment_of_the_benchmarks_that_was_left_without_packages_is_made_anew_by_another_python(clone):
    assert clone.make(".venv-bench/with-3.12-bench", clone.python("python3.12"), "GPUS=", fails="install").returncode
    clone.asked()
    assert clone.make("gpu", clone.python("python3.13"), "GPUS=").returncode == 0
    made, installed, _ = clone.asked()
    assert made == "python3.13 -m venv .venv-bench" and installed.endswith("-e .[bench]")
    assert clone.make("gpu", clone.python("python3.13"), "GPUS=").returncode == 0
    assert clone.asked() == ["-m benchmarks.gpu"]


@pytest.mark.parametrize(
    ("fails", "sentence", "left", "again"),
    [
        (
            "-r requirements.lock",
            "the packages could not be installed: see above.  With the network and some 2 GB of disk there, type make"
            " again.",
            {"bin/python", "python-3.12"},
            [LOCKED, ITSELF],
        ),
        (
            "-m venv",
            "the environment .venv could not be made: see above.  With some 2 GB of free disk there, type make again.",
            {"bin/python"},
            ["python3.12 -m venv .venv", LOCKED, ITSELF],
        ),
    ],
    ids=["no network", "a full disk"],
)
def test_what_fails_is_said_in_one_line_and_the_next_make_goes_on_from_there(fails, sentence, left, again, clone):
    python = clone.python("python3.12")
    done = clone.make("train", python, fails=fails)
    assert (done.returncode, done.stdout) == (2, sentence + "\n")
    assert clone.environment() == left
    clone.asked()
    installed(clone, python)
    assert clone.asked() == again


@pytest.mark.parametrize("environment", [".venv/installed", ".venv-bench/with-3.12-bench", INTEROP])
def test_pip_shows_its_progress_where_it_fetches_packages(environment, clone):
    done = clone.make(environment, clone.python("python3.12"), "GPUS=")
    assert done.returncode == 0, done.stderr
    fetching = [line for line in clone.asked() if line.startswith("-m pip") and "--no-deps" not in line]
    assert fetching and not [line for line in fetching if "quiet" in line or " -q" in line]


def test_a_package_of_others_that_cannot_be_installed_is_named_and_the_rest_is_installed(clone):
    done = clone.make(INTEROP, clone.python("python3.12"), fails=" flair")
    assert (done.returncode, done.stdout) == (0, "flair could not be installed: its tests are skipped\n")
    packages = {line.split()[-1] for line in clone.asked()}
    assert {"numpy", "onnx", "onnxruntime", "openai", "flair", "tensorboard"} <= packages


def test_the_environment_of_interop_is_filled_again_when_its_packages_change_and_made_anew_of_another_python(clone):
    def asked(version: str) -> list[str]:
        done = clone.make(f".venv-interop/with-{version}", clone.python(f"python{version}"))
        assert done.returncode == 0, done.stderr
        return clone.asked()

    made = asked("3.12")
    assert made[0] == "python3.12 -m venv .venv-interop" and asked("3.12") == []
    makefile = clone.folder / "Makefile"
    makefile.write_text(makefile.read_text().replace("OTHERS :=", "OTHERS := another"))
    added = [line for line in asked("3.12") if line not in made]
    assert len(added) == 1 and added[0].endswith(" another")
    assert asked("3.13")[0] == "python3.13 -m venv .venv-interop"


@pytest.mark.parametrize(
    ("given", "run_dir"),
    [
        ((), "runs/quickstart"),
        (("ARGS=--num_steps=50",), "runs/quickstart"),
        (("ARGS=--run_dir=runs/mine",), "runs/mine"),
        (("ARGS=--run_dir runs/mine",), "runs/mine"),
        (("ARGS=--num_steps 50  --run_dir   runs/mine --seed=3",), "runs/mine"),
        (("ARGS=--run_dir=runs/first --run_dir runs/mine",), "runs/mine"),
        (("ARGS=--num_steps=50", "RUN_DIR=runs/mine"), "runs/mine"),
        (("ARGS=--run_dir=runs/mine", "RUN_DIR=runs/other"), "runs/mine"),
    ],
    ids=str,
)
def test_the_run_that_is_trained_is_the_one_that_is_scored_and_sampled(given, run_dir, clone):
    python = clone.python("python3.12")
    installed(clone, python)
    clone.asked()
    assert clone.make("train", python, *given).returncode == 0
    trained, scored, sampled = clone.asked()
    arguments = " ".join(" ".join(word.removeprefix("ARGS=") for word in given if word.startswith("ARGS=")).split())
    assert trained == f"-m launch.train --flagfile=configs/quickstart.flags --run_dir={run_dir} {arguments}".rstrip()
    assert scored.startswith(f"-m launch.evaluate --run_dir={run_dir} ")
    assert sampled.startswith(f"-m launch.sample --run_dir={run_dir} ")
