"""The lock of a run directory: one job at a time trains in it."""

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.atomic_files import InUse, locked, owner_file
from data_pipeline.progress import say_on_stderr

LOCK = ".lock"
PATIENCE = 120.0  # seconds: a file server takes a dead machine's locks away after 90, usually


@contextlib.contextmanager
def lock_run_directory(
    run_dir: Path, say: Callable[[str], None] = say_on_stderr, patience: float = PATIENCE
) -> Iterator[None]:
    """Locks the run directory for this job, and makes it if absent.  A killed process of this machine holds no lock.

    Args:
      say: takes a line where another machine has the lock, which may be dead.
      patience: seconds to wait for it then.

    Raises:
      ValueError: another job of this machine has it, or it cannot be written.
      InUse: one of another machine has it, and has kept it.
    """
    lock, deadline, told = run_dir / LOCK, time.monotonic() + patience, False

    def refuse() -> None:
        owner = lock.read_text("utf-8", "replace").strip() if lock.exists() else ""
        remedy = "wait for it to end, or name another"
        if (marker := owner_file(lock)).exists():  # a file system without locks
            remedy += f"; if it is dead, on another machine, delete {marker}"
        elsewhere = " on " in owner and not owner.endswith(f" on {platform.node()}")
        kind = InUse if elsewhere else ValueError
        raise kind(f"run_dir={run_dir} is in use by {owner or 'another process'}: {remedy}")

    with contextlib.ExitStack() as lock_held:
        while True:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                lock_held.enter_context(locked(lock, refuse))
                lock.write_text(f"process {os.getpid()} on {platform.node()}\n")
                break
            except InUse as refused:
                if time.monotonic() > deadline:
                    raise
                if not told:
                    say(f"{refused}; waits {patience:.0f} s, as that machine may be dead")
                told = True
                time.sleep(min(1.0, patience))
            except OSError as error:
                why = error.strerror or error
                raise ValueError(f"run_dir={run_dir} cannot be written ({why}): name another") from None
        yield
