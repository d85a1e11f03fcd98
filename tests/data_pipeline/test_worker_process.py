"""A worker process ends with its parent, and is light."""

import subprocess
import sys

from tests.conftest import ROOT
from tests.jobs import alive, wait_for

PARENT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from data_pipeline.worker_process import end_with_parent
with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent) as pool:
    print(pool.submit(os.getpid).result())
    print(pool.submit(eval, "list(__import__('sys').modules)").result(), flush=True)
    pool.submit(time.sleep, 1000)
    time.sleep(1000)
"""


def test_a_worker_process_ends_when_its_parent_is_killed_and_imports_no_more_than_that_takes():
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker, modules = int(parent.stdout.readline()), parent.stdout.readline()
        assert alive(worker)
        parent.kill()
        wait_for(lambda: not alive(worker), seconds=30)
    assert "data_pipeline.worker_process" in modules
    assert not any(f"'{name}'" in modules for name in ("jax", "numpy", "data_pipeline.build"))
