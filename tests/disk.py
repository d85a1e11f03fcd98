"""The order in which files are written, put on disk and named, and what of it a loss of power would undo."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


class Disk:
    """Looks at every fsync and every rename below `root`.

    A file or a directory is on disk as it was at its last fsync.  What gets another name has to be on disk, with all
    that is in it; and the name itself is there for good once the directory that has it was synced afterwards.

    Attributes:
      faults: sentences about what got its name too early.
      named: the names that files and directories got, in order.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._synced, self._unsynced_names = root, dict[int, tuple[int, int]](), set[Path]()
        self.faults: list[str] = []
        self.named: list[str] = []

    def fsync(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        self._synced[found.st_ino] = (found.st_size, found.st_mtime_ns)
        directory = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self._unsynced_names -= {name for name in self._unsynced_names if name.parent == directory}

    def has(self, path: Path) -> bool:
        """True if the content of `path` is on disk as it is now."""
        found = path.stat()
        return self._synced.get(found.st_ino) == (found.st_size, found.st_mtime_ns)

    def rename(self, source: Path, target: Path) -> None:
        if self._root not in target.parents or ".removed-" in target.name:
            return
        for path in (source, *source.rglob("*")):
            if path.is_symlink() or path.name.endswith(".lock"):
                continue
            if not self.has(path):
                self.faults.append(f"{target.name} was named before {path.name} in it was on disk")
        self.named.append(target.name)

    def was_named(self, target: Path) -> None:
        if self._root in target.parents:
            self._unsynced_names.add(target)

    @property
    def lost(self) -> list[str]:
        """The names that are there now, and would not be after a loss of power."""
        return sorted(name.name for name in self._unsynced_names if name.exists())


@contextlib.contextmanager
def watched(root: Path) -> Iterator[Disk]:
    """The disk below `root` while the block writes to it."""
    disk = Disk(root.resolve())
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def fsynced(file) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        fsync(descriptor)
        disk.fsync(descriptor)

    def renamed(how):
        def act(source, target, **kwargs) -> None:
            disk.rename(Path(source), Path(target))
            how(source, target, **kwargs)
            disk.was_named(Path(target))

        return act

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsynced)
        patch.setattr(os, "replace", renamed(replace))
        patch.setattr(os, "rename", renamed(rename))
        yield disk
