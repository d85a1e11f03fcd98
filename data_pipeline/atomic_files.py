"""Files that appear whole or not at all, and locks between the processes that make them."""

import contextlib
import errno
import fcntl
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


def expand_user(path: Path | str) -> Path:
    """`path`, where a ~ at its start stands for a home directory.  Raises ValueError where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path} begins with the home directory of a user who has none here: name another") from None


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """An OSError of the block that names no file, as those of reading and writing do not, gets the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write in, which is at `path` once the block has ended and on disk, and nowhere if it failed."""
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        with named_in_errors(path), beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_directory(path.parent)


def sealed(content: bytes) -> bytes:
    """`content`, and a line with its sha256: what we keep for ourselves, and make again where it is not whole."""
    return content + b"\n" + hashlib.sha256(content).hexdigest().encode() + b"\n"


def unsealed(path: Path) -> bytes | None:
    """The content that was `sealed` in the file `path`; None where there is none, or it is not as it was written."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    content = data[: -len(sealed(b""))]
    return content if data == sealed(content) else None


def sync_directory(directory: Path) -> None:
    """Puts the names in `directory` on disk: without it a file that was renamed may not survive a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock file `path`, which is there no longer than it is held.

    A killed process holds no lock.  On a file system without locks, `owner_file(path)` does what they would do; there a
    process that was killed on another machine holds its lock until somebody deletes that file.  `waiting` is called
    once, when another process has the lock.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = _flock(descriptor, waiting)
            with contextlib.suppress(FileNotFoundError):
                # Who had the lock removed the file when it was done; what counts is the file that is there now.
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
    """What stands for the lock `path` on a file system without locks: it says which process has it."""
    return path.with_name(f"{path.name}.owner")


def _flock(descriptor: int, waiting: Callable[[], None]) -> bool:
    """Whether the lock was got: yes, unless the file system has none."""
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
    """Holds a file that only one process can make.  One that a dead process of this machine has left is taken away."""
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
    """Whether this process has made the file, which was not there."""
    try:
        with file.open("xb") as out:
            out.write(content)
    except FileExistsError:
        return False
    return True


def _process(number: int) -> bytes | None:
    """A process of this machine as nobody else is: machine, number and when it was started.  None where it is dead."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's, which lives
    began = ""
    with contextlib.suppress(OSError):  # there is no /proc
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
    """Removes `file` if it still says `dead`.  Of several processes that try, none takes what another has just made."""
    aside = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(file, aside)
        if aside.read_bytes() != dead:
            _made(file, aside.read_bytes())
        aside.unlink()
