"""A directory that is made at the end of some work: it is refused before, and appears whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from data_pipeline import signals

TRIES = 3  # at a directory in which a file is being made meanwhile


def is_taken(path: Path) -> bool:
    """Returns whether there is something already, other than an empty directory."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def fixed(path: Path) -> str:
    """Returns why no other directory can take the place of this one, if it is there; "" where one can."""
    if os.path.ismount(os.path.realpath(path)):
        return "is a mount point, which no new directory can replace: name one inside of it"
    if path.is_dir() and path.samefile(os.curdir):
        return "is the directory that you are in, and a new one would replace it: name one inside of it"
    return ""


def replaceable(flag: str, path: Path) -> Path:
    """Returns a path that a new directory can take; of a link, that of what it leads to.

    Raises:
      ValueError: there is something already, or it is empty and cannot be replaced.
    """
    if is_taken(path):
        raise ValueError(f"{flag}={path} is there already: name a new directory, or remove it")
    if why := fixed(path):
        raise ValueError(f"{flag}={path} {why}")
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextlib.contextmanager
def hidden_beside(flag: str, path: Path) -> Iterator[Path]:
    """Yields a hidden directory beside `path`, to be moved there when it is whole; what is left of it is removed.

    A signal that ends the program removes it, too.

    Raises:
      ValueError: no directory can be made there.
      OSError: of the block, with `path` in place of the hidden one: the disk is full, say.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ValueError(f"{flag}={path} cannot be written: {error.strerror}") from None

    def leave(number: int) -> NoReturn:
        for _ in range(TRIES):
            shutil.rmtree(hidden, ignore_errors=True)
        signals.leave(number)

    try:
        with signals.reacting(leave):
            hidden.chmod(0o755)
            yield hidden
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}: {flag}={path} was not written") from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
