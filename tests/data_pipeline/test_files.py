"""Files that appear whole or not at all, and locks."""

import errno
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline.files import locked, written_whole
from data_pipeline.texts import Extent
from tests.conftest import ROOT


def test_a_lock_has_one_holder_at_a_time_and_leaves_no_file(tmp_path):
    inside, most = [], []

    def hold(_) -> None:
        with locked(tmp_path / "lock", lambda: None) as held:
            assert held
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.001)
            inside.pop()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(hold, range(300)))
    assert len(most) == 300 and max(most) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1000, 1 << 20], ids=["flushed at the end", "written at once"])
def test_a_full_disk_is_told_of_with_the_name_of_the_file_and_leaves_nothing(tmp_path, size):
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from data_pipeline.files import written_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n"
        "    with written_whole(Path(sys.argv[1])) as out: out.write(bytes(int(sys.argv[2])))\n"
        "except OSError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file"), str(size)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == f"[Errno {errno.EFBIG}] File too large: '{tmp_path}/file'\n"
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_read_is_not_taken_for_the_one_that_is_written(tmp_path):
    source = Path("/proc/self/mem")  # its first bytes cannot be read
    with pytest.raises(OSError) as caught, written_whole(tmp_path / "file") as out:
        for chunk in Extent(source, 0, 10).read():
            out.write(chunk)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(source))
