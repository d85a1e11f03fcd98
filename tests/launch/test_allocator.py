"""What is freed is kept for the next time, unless the user has told the C library otherwise."""

import os
import platform
import subprocess
import sys

import jax
import numpy as np
import pytest

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.run import estimate
from charlstm.training import step as step_lib
from data_pipeline.batch import Batch
from launch import allocator
from tests.conftest import ROOT

PROGRAM = """
import resource, sys, threading
import numpy as np
from launch import allocator
allocator.keep(int(sys.argv[1]))

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=lambda: np.ones(100 << 20, np.uint8))
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
@pytest.mark.parametrize(
    ("variable", "block", "kept"),
    [
        ("", allocator.LARGE, True),
        ("", allocator.LARGE - 1, False),
        ("MALLOC_ARENA_MAX", allocator.LARGE, False),
        ("GLIBC_TUNABLES", allocator.LARGE, False),
    ],
)
def test_memory_that_a_thread_has_freed_is_not_mapped_again_if_blocks_are_large_and_the_user_says_nothing_else(
    variable, block, kept
):
    environment = {n: v for n, v in os.environ.items() if n != "GLIBC_TUNABLES" and not n.startswith("MALLOC_")}
    environment |= (
        {variable: "4" if variable.startswith("MALLOC") else "glibc.malloc.tcache_count=7"} if variable else {}
    )
    command = [sys.executable, "-c", PROGRAM, str(block)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    first, second = (int(count) for count in done.stdout.split())
    assert (second < first / 10) == kept, (first, second)


@pytest.mark.parametrize(
    "changes",
    [{}, {"hidden_size": 512, "num_layers": 3}, {"cell": "gru", "batch_size": 64}, {"window": 16, "hidden_size": 256}],
)
def test_the_temporaries_of_an_update_are_known_about_before_it_is_compiled(changes):
    config = config_lib.fill_automatic(config_lib.replace(Config(), **{"batch_size": 32, "window": 64} | changes), 1)
    mesh, shape = distributed.make(jax.devices()[:1]), (config.streams.batch_size, config.streams.window)
    ids = jax.ShapeDtypeStruct(shape, np.uint8)
    batch = distributed.abstract(mesh, distributed.BY_STREAM, Batch(ids, ids, jax.ShapeDtypeStruct(shape, np.bool_)))
    program = step_lib.make(config, 96, mesh, 1000).lower(step_lib.abstract(config, 96, mesh), batch).compile()
    told = program.memory_analysis().temp_size_in_bytes
    assert 0.6 * told < estimate.estimate_temp_bytes(config, 1) < 1.4 * told, told
