"""Files that appear whole or not at all, and locks."""

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline.atomic_files import Unreachable, atomic_write, locked, named_in_errors, owner_file
from data_pipeline.build.sources import Extent
from tests.conftest import ROOT


@pytest.fixture(params=["locks", "no locks"])
def file_system(request, monkeypatch) -> str:
    """One that knows locks, and one that does not, as some network file systems."""
    if request.param == "no locks":

        def flock(*args):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


def test_a_lock_has_one_holder_at_a_time_and_leaves_no_file(file_system, tmp_path):
    inside, most = [], []
    times = 300 if file_system == "locks" else 12  # who waits looks again after a tenth of a second

    def hold(_) -> None:
        with locked(tmp_path / "lock", lambda: None):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.001)
            inside.pop()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(hold, range(times)))
    assert len(most) == times and max(most) == 1
    assert not list(tmp_path.iterdir())


HOLDER = """
import errno, fcntl, sys, time
from pathlib import Path
from data_pipeline.atomic_files import locked
def flock(*args):
    raise OSError(errno.ENOLCK, "no locks available")
if sys.argv[2] == "no locks":
    fcntl.flock = flock
with locked(Path(sys.argv[1]), lambda: None):
    print("held", flush=True)
    time.sleep(1000)
"""


class Waits(Exception):
    """Somebody else has the lock."""


def refuse() -> None:
    raise Waits


def test_a_lock_is_another_processs_while_that_lives_and_no_longer(file_system, tmp_path):
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(lock), file_system]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            with pytest.raises(Waits), locked(lock, refuse):
                pass
        finally:
            holder.kill()
    with locked(lock, refuse):
        assert lock.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file_system", ["no locks"], indirect=True)
def test_without_locks_what_another_machine_holds_is_held_until_its_file_is_deleted(file_system, tmp_path):
    lock = tmp_path / "lock"
    elsewhere = json.dumps({"machine": "elsewhere", "process": 1, "began": "1"})
    for owner in (elsewhere, "", "something else"):
        owner_file(lock).write_text(owner)
        with pytest.raises(Waits), locked(lock, refuse):
            pass
        assert owner_file(lock).read_text() == owner
    owner_file(lock).unlink()
    with locked(lock, refuse):
        pass


@pytest.mark.parametrize("file_system", ["no locks"], indirect=True)
def test_without_locks_a_number_that_another_process_got_since_is_no_holder(file_system, tmp_path):
    lock = tmp_path / "lock"
    before = {"machine": platform.node(), "process": os.getpid(), "began": "1"}  # shortly after the machine was started
    owner_file(lock).write_text(json.dumps(before))
    with locked(lock, refuse):
        pass


@pytest.mark.parametrize("file_system", ["no locks"], indirect=True)
def test_without_locks_one_of_many_takes_over_from_the_dead(file_system, tmp_path):
    lock, dead = tmp_path / "lock", json.dumps({"machine": platform.node(), "process": os.getpid(), "began": "1"})
    owner_file(lock).write_text(dead)
    inside, most = [], []

    def hold() -> None:
        with locked(lock, lambda: None):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.002)
            inside.pop()

    holders = [threading.Thread(target=hold, daemon=True) for _ in range(8)]
    for holder in holders:
        holder.start()
    for holder in holders:
        holder.join(timeout=300)
    assert len(most) == 8 and max(most) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1000, 1 << 20], ids=["flushed at the end", "written at once"])
def test_a_full_disk_is_told_of_with_the_name_of_the_file_and_leaves_nothing(tmp_path, size):
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from data_pipeline.atomic_files import atomic_write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n"
        "    with atomic_write(Path(sys.argv[1])) as out: out.write(bytes(int(sys.argv[2])))\n"
        "except OSError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file"), str(size)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == f"[Errno {errno.EFBIG}] File too large: '{tmp_path}/file'\n"
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_read_is_not_taken_for_the_one_that_is_written(tmp_path):
    source = Path("/proc/self/mem")  # its first bytes cannot be read
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "file") as out:
        for chunk in Extent(source, 0, 10).read():
            out.write(chunk)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(source))


def test_an_error_of_the_system_gets_the_name_of_its_file_and_one_with_a_sentence_keeps_it():
    for raised, said in (
        (OSError(errno.EIO, "Input/output error"), "[Errno 5] Input/output error: 'web/a.jsonl'"),
        (OSError(errno.ENOENT, "No such file", "b"), "[Errno 2] No such file: 'b'"),
        (Unreachable("s3://web has not answered for 10 min"), "s3://web has not answered for 10 min"),
    ):
        with pytest.raises(OSError) as caught, named_in_errors(Path("web/a.jsonl")):
            raise raised
        assert str(caught.value) == said
