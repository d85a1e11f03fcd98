"""What is freed is kept for the next time, unless the user has told the C library otherwise."""

import os
import platform
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import resource, threading
import numpy as np
from launch import allocator
allocator.keep()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=lambda: np.ones(100 << 20, np.uint8))
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
@pytest.mark.parametrize("variable", ["", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_memory_that_a_thread_has_freed_is_not_mapped_again_unless_the_user_has_said_otherwise(variable):
    environment = {n: v for n, v in os.environ.items() if n != "GLIBC_TUNABLES" and not n.startswith("MALLOC_")}
    environment |= (
        {variable: "4" if variable.startswith("MALLOC") else "glibc.malloc.tcache_count=7"} if variable else {}
    )
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, check=True, capture_output=True)
    first, second = (int(count) for count in done.stdout.split())
    assert (second < first / 10) == (not variable), (first, second)
