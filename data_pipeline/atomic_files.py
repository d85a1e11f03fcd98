"""Writes files atomically, and locks them between processes."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # the disk is full or fails


class InUse(ValueError):
    """A lock is held by another process, which is to be waited for."""

    errno = errno.EALREADY  # no file system gives it, as it gives EBUSY of a mount point


class Recoverable(ValueError):
    """Work is refused for a reason outside of the text: once that is mended the same command goes on, so what has been
    done is kept."""


class Unreachable(OSError):
    """An object store did not answer for as long as one was ready to wait."""

    errno = errno.EHOSTUNREACH


def expand_user(path: Path | str) -> Path:
    """Expands a leading ~ to the home directory.  Raises ValueError if there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path} begins with the home directory of a user who has none here: name another") from None


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Adds the name of `path` to an OSError of the block that names no file, as those of read and write do not."""
    try:
        yield
    except OSError as error:
        if error.strerror and error.filename is None:  # one without has a sentence of its own, which would be lost
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write to, which appears at `path`, synced to disk, when the block ends; not if it fails."""
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        with named_in_errors(path), beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def remove_torn(path: Path) -> None:
    """Removes what an `atomic_write` to `path` left beside it when it was killed."""
    for beside in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}.new"):
        beside.unlink(missing_ok=True)


def sealed(content: bytes) -> bytes:
    """Appends a line with the sha256 of `content`, for files that are made again if they are damaged."""
    return content + b"\n" + hashlib.sha256(content).hexdigest().encode() + b"\n"


def unsealed(path: Path) -> bytes | None:
    """Reads a file that was `sealed` and returns its content; None if it is absent or damaged."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    content = data[: -len(sealed(b""))]
    return content if data == sealed(content) else None


def sync(path: Path) -> None:
    """Puts a file's content, or the names in a directory, on disk: else they may not survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock file `path`, which is removed afterwards.

    A killed process holds no lock.  On a file system without locks, `owner_file(path)` takes their place; there, a
    process killed on another machine holds its lock until somebody deletes that file.  `waiting` is called once if
    another process has the lock.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = _flock(descriptor, waiting)
            with contextlib.suppress(FileNotFoundError):
                # The previous holder has removed the file; the lock is on the file that is there now.
                if not held or os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        with contextlib.nullcontext() if held else _owned(owner_file(path), waiting):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def owner_file(path: Path) -> Path:
    """Returns the file that replaces the lock `path` on a file system without locks; it names the holder."""
    return path.with_name(f"{path.name}.owner")


def _flock(descriptor: int, waiting: Callable[[], None]) -> bool:
    """Waits for the lock and returns True; False if the file system has no locks."""
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return False
    return True


@contextlib.contextmanager
def _owned(file: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds a file that only one process can create.  Removes one left by a dead process of this machine."""
    own, told = _process(os.getpid()), False
    assert own is not None
    while not _made(file, own):
        with contextlib.suppress(FileNotFoundError):
            if _is_of_the_dead(found := file.read_bytes()):
                _take_away(file, found)
                continue
        if not told:
            told = True
            waiting()
        time.sleep(0.1)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _made(file: Path, content: bytes) -> bool:
    """Creates the file; returns False if it exists."""
    try:
        with file.open("xb") as out:
            out.write(content)
    except FileExistsError:
        return False
    return True


def _process(number: int) -> bytes | None:
    """Returns the identity of a process of this machine: machine, number, start time.  None if it is dead."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's process, which is alive
    began = ""
    with contextlib.suppress(OSError):  # no /proc
        state, *_, began = Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2].split()[:20]
        if state == "Z":
            return None
    return json.dumps({"machine": platform.node(), "process": number, "began": began}).encode()


def _is_of_the_dead(owner: bytes) -> bool:
    try:
        found = json.loads(owner)
        return found["machine"] == platform.node() and _process(found["process"]) != owner
    except (ValueError, KeyError, TypeError):
        return False  # not ours to judge


def _take_away(file: Path, dead: bytes) -> None:
    """Removes `file` if it still contains `dead`.  Who does it holds a lock of that content: else it might be that of
    the next holder which is removed."""
    with _owned(file.with_name(f"{file.name}.{hashlib.sha256(dead).hexdigest()[:8]}"), lambda: None):
        if file.read_bytes() == dead:
            file.unlink()
