"""A worker process of `multiprocessing`, which ends with its parent.  Imports nothing heavy: light processes use it."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Runs in a worker process: ends it once its parent has ended, in whatever way."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
