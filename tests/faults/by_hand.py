"""Jobs of launch.train whose processes are started one by one, each in surroundings of its own."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from charlstm.run.step_directory import StepDirectory
from tests.compiling import xla_flags
from tests.jobs import ROOT

_SLOW_READER = """
import time
from data_pipeline.loader import Windows
read = Windows.__next__
def slowly(windows):
    time.sleep({seconds})
    return read(windows)
Windows.__next__ = slowly
"""


def slow_reader(folder: Path, seconds: float) -> Path:
    """A directory for the path of a Python whose windows of text come as slowly as this."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SLOW_READER.format(seconds=seconds))
    return folder


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("localhost", 0))
        return asked.getsockname()[1]


@contextlib.contextmanager
def processes(
    flags: Sequence[str],
    said: Path,
    count: int = 2,
    *,
    inside: Mapping[int, Sequence[str]] | None = None,
    python_path: Mapping[int, Path] | None = None,
) -> Iterator[list[subprocess.Popen]]:
    """The processes of one job; those that have not ended at the end are killed.

    Args:
      said: the directory for what they say, process p in `p.txt`.
      inside: process -> the command inside of which it runs, such as `seeing`.
      python_path: process -> what its Python finds first.
    """
    joined = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"] if count > 1 else []
    with contextlib.ExitStack() as started:
        running = []
        for process in range(count):
            own = [f"--process_id={process}"] if count > 1 else []
            command = [*(inside or {}).get(process, []), sys.executable, "-m", "launch.train", *flags, *joined, *own]
            path = f"{(python_path or {}).get(process, ROOT)}:{ROOT}"
            out = started.enter_context(open(said / f"{process}.txt", "w"))
            environment = os.environ | {"PYTHONPATH": path, "XLA_FLAGS": xla_flags()}
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
            started.callback(running[-1].wait)
            started.callback(running[-1].kill)
        yield running


def statuses(running: list[subprocess.Popen], seconds: float = 300) -> list[int]:
    return [process.wait(timeout=seconds) for process in running]


def seeing(*mounts: str) -> list[str]:
    """A command inside of which a process sees other file systems than the rest: those that these commands mount."""
    return ["unshare", "--mount", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]


def held_to_permissions() -> list[str]:
    """A command inside of which a process may write where permissions say so, and nowhere else, even as root."""
    if os.geteuid():
        return []
    without = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={without}", f"--inh-caps={without}"]


def works(command: list[str]) -> bool:
    """Whether such a command is allowed here."""
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    return False


needs_mounts = pytest.mark.skipif(
    not works(seeing("mount -t tmpfs tmpfs /mnt")), reason="mounting is not allowed here: it takes root"
)


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


@contextlib.contextmanager
def own_disk(directory: Path, size: str) -> Iterator[None]:
    """What is in `directory` moves to a small disk of its own, which is there as long as the block."""
    aside = directory.with_name(f"{directory.name}.aside")
    directory.rename(aside)
    directory.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory)
    try:
        subprocess.run(["cp", "-a", f"{aside}/.", str(directory)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(disk: Path) -> Path:
    """A file that leaves not one byte of the disk."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    return ballast


def whole_steps(run_dir: Path) -> list[int]:
    """The checkpoints of a run, each of which is verified."""
    files = StepDirectory(run_dir / "checkpoints")
    for step in files.steps():
        files.read(step, ("params", "opt_state", "recurrent_state"))
    return files.steps()
