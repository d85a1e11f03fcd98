"""The seal of a directory of files: written when all of them are on disk, and compared with them when they are read.

A directory is whole if, and only if, its seal is there, the bytes of the seal are exactly those that its content
encodes to, and every other file has the size and sha256 that the seal gives.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.atomic_files import sync

SEAL = "checkpoint.json"
WRITES = 16  # files put on disk at a time: of many processes there are thousands, and a disk takes its time for each
PIECE = 4 << 20  # bytes hashed between two beats
ALONE = (0, 1)  # the share of a process that is alone: number 0 of 1
# What reading a lost or rotten file raises.  Anything else (no permission, out of handles) proves nothing of the file.
_PROOF_OF_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)


class Damaged(Exception):
    """A checkpoint is not what was saved; the sentence says where."""


def seal(directory: Path, meta: dict[str, Any], beat: Callable[[], None] = lambda: None) -> None:
    """Makes all files of `directory` durable and lists them in its seal, beside `meta` (plain JSON, finite numbers).

    Args:
      beat: called as by `verify`, but from threads.

    Raises:
      OSError: the disk is full, or fails; there is no seal then.
    """
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(WRITES, "seal") as pool:
        written = pool.map(partial(_durable, beat=beat), found)
        files = {path.relative_to(directory).as_posix(): record for path, record in zip(found, written, strict=True)}
    beside = directory / f"{SEAL}.unfinished"
    with open(beside, "wb") as file:
        file.write(_encode(meta, files))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, directory / SEAL)
    with ThreadPoolExecutor(WRITES, "seal") as pool:
        list(pool.map(sync, [directory, *(path for path in directory.rglob("*") if path.is_dir())]))


def _durable(path: Path, beat: Callable[[], None]) -> dict[str, Any]:
    """Puts a file on disk; returns its size and sha256."""
    with open(path, "rb") as file:
        digest = _sha256(file, beat)
        os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": digest}


def forget_cached(directory: Path) -> None:
    """Drops the files of `directory` from the page cache, so that they are next read from disk."""
    for path in directory.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_meta(directory: Path) -> dict[str, Any]:
    """The `meta` of the seal; of the other files nothing is read.

    Raises:
      Damaged: there is no seal, or it is not as it was written.
    """
    return _read(directory)[0]


def verify(
    directory: Path,
    items: Collection[str] | None = None,
    share: tuple[int, int] = ALONE,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The `meta` of the seal, after every file was read again and compared with it.

    Args:
      items: subdirectories to read, besides the files at the top; None for all.
      share: (k, n): only the files that process k of n verifies, see `shared`.
      beat: called after every file, and every `PIECE` bytes of a large one.

    Raises:
      Damaged: the seal or a file is missing, shortened or changed.
    """
    meta, files = _read(directory)
    chosen = [name for name in files if items is None or "/" not in name or name.partition("/")[0] in items]
    for name in shared({name: files[name]["size"] for name in chosen}, *share):
        try:
            with open(directory / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != files[name]["size"]:
                    raise Damaged(f"{name} has {size} bytes, {files[name]['size']} were written")
                if _sha256(file, beat) != files[name]["sha256"]:
                    raise Damaged(f"{name} was changed after it was written")
        except OSError as error:
            raise _as_damage(error, name) from error
    return meta


def shared(sizes: dict[str, int], number: int, count: int) -> list[str]:
    """The files, given with their sizes, that process `number` of `count` verifies, so that all are verified by one.

    What describes an item, at its top, is small, and every process verifies it.  The rest, which holds the arrays, is
    dealt out, the largest first; what a process reads of another's share, its arrays' digests verify.
    """
    descriptions = [name for name in sizes if name.count("/") < 2]
    rest = sorted((name for name in sizes if name.count("/") >= 2), key=lambda name: (-sizes[name], name))
    return descriptions + rest[number::count]


def _sha256(file: BinaryIO, beat: Callable[[], None] = lambda: None) -> str:
    """The sha256 of a file, in hex."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(PIECE, os.fstat(file.fileno()).st_size + 1)))
    while count := file.readinto(piece):  # type: ignore[attr-defined]
        digest.update(piece[:count])
        beat()
    return digest.hexdigest()


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        content = (directory / SEAL).read_bytes()
    except OSError as error:
        raise _as_damage(error, SEAL) from error
    try:
        document = json.loads(content)
        meta, files = document["meta"], document["files"]
        if content == _encode(meta, files):
            return meta, files
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{SEAL} cannot be read ({type(error).__name__})") from error
    raise Damaged(f"{SEAL} was changed after it was written")


def _encode(meta: dict[str, Any], files: dict[str, Any]) -> bytes:
    """The canonical encoding of the content, with its sha256: a change of any byte is detected."""
    content = {"meta": meta, "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
    text = json.dumps({**content, "sha256": digest}, sort_keys=True, allow_nan=False, indent=1)
    return text.encode() + b"\n"


def _as_damage(error: OSError, name: str) -> Exception:
    if error.errno in _PROOF_OF_DAMAGE:
        return Damaged(f"{name} cannot be read ({error.strerror})")
    return error
