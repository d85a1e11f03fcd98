"""What `pip install` brings is the library, its programs and its flagfiles, whole, and works in any directory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import ROOT

PACKAGES = ("charlstm", "data_pipeline", "launch", "configs")
LEFT_OUT = ("tests", "benchmarks", "notebooks", "docs")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input")


def files_of(folder: Path) -> set[str]:
    """The names of the files of all packages below `folder`, relative to it."""
    names = (path.relative_to(folder) for package in PACKAGES for path in (folder / package).rglob("*"))
    return {str(name) for name in names if (folder / name).is_file() and "__pycache__" not in name.parts}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tree: a build leaves files in it, and would take up those of a build before."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in (*PACKAGES, *LEFT_OUT):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory) -> Path:
    """The folder in which the wheel is installed, alone; what it depends on is that of this interpreter."""
    folder = tmp_path_factory.mktemp("installed")
    offline = ("--no-deps", "--no-index")
    subprocess.run([*PIP, "wheel", *offline, "--no-build-isolation", f"--wheel-dir={folder}", source], check=True)
    (wheel,) = folder.glob("charlstm-*.whl")
    subprocess.run([*PIP, "install", *offline, f"--target={folder / 'packages'}", wheel], check=True)
    return folder / "packages"


def run(installed: Path, directory: Path, *arguments: str) -> str:
    """What Python prints with these arguments in `directory`, where it finds the project as it is installed alone."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, *arguments], cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_every_file_of_its_packages_and_nothing_else(source, installed):
    assert files_of(installed) == files_of(source)
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top == set(PACKAGES)
    (information,) = installed.glob("charlstm-*.dist-info")
    assert (information / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_every_module_is_imported_from_where_it_is_installed(installed, tmp_path):
    names = [name.removesuffix(".py").replace("/", ".") for name in files_of(installed) if name.endswith(".py")]
    names = sorted(name.removesuffix(".__init__") for name in names)
    assert {"charlstm", "data_pipeline.build.prepare", "launch.train"} <= set(names)
    names.remove("charlstm.interop.folder.load_torch")  # PyTorch may not be installed
    program = f"import importlib\nfor name in {names!r}: print(importlib.import_module(name).__file__)"
    places = run(installed, tmp_path, "-P", "-c", program).splitlines()
    assert len(places) == len(names)
    assert all(Path(place).is_relative_to(installed) for place in places)


def test_the_flagfiles_are_found_as_resources(installed, tmp_path):
    program = "from importlib import resources\nprint(resources.files('configs') / 'quickstart.flags')"
    place = Path(run(installed, tmp_path, "-P", "-c", program).strip())
    assert place.is_relative_to(installed)
    assert place.read_bytes() == (ROOT / "configs" / "quickstart.flags").read_bytes()


def test_a_program_runs_in_any_directory(installed, tmp_path):
    shown = run(installed, tmp_path, "-m", "launch.train", "--help")
    assert "--run_dir" in shown and "--hidden_size" in shown
    assert list(tmp_path.iterdir()) == []


# The ten lines of the library (load_corpus, Config, train, load, ...) are to be run here from the wheel, too, by
# `run(installed, tmp_path, "-P", "-c", TEN_LINES)`.
