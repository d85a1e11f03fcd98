"""The seal of a checkpoint directory: `checkpoint.json`, written last, which holds the size and sha256 of every other file.

A directory is whole if, and only if, its seal is there, its bytes are exactly those that its content encodes to, and every file
is as it says.  Nothing here needs JAX or Orbax, so files are judged before either touches them.
"""

import errno
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

SEAL = "checkpoint.json"
# What reading a lost or rotten file raises.  Anything else (no permission, out of handles) proves nothing of the file.
_PROOF_OF_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)


class Damaged(Exception):
    """A checkpoint is not what was saved; the sentence says where."""


def seal(directory: Path, meta: dict[str, Any]) -> None:
    """Makes all files of `directory` durable and lists them in its seal, beside `meta` (plain JSON, finite numbers).

    Raises:
      OSError: the disk is full, or fails; there is no seal then.
    """
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    beside = directory / f"{SEAL}.unfinished"
    with open(beside, "wb") as file:
        file.write(_encode(meta, files))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, directory / SEAL)
    for folder in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        fsync_directory(folder)


def read_meta(directory: Path) -> dict[str, Any]:
    """The `meta` of the seal; of the other files nothing is read.

    Raises:
      Damaged: there is no seal, or it is not as it was written.
    """
    return _read(directory)[0]


def verify(directory: Path, items: Collection[str] | None = None) -> dict[str, Any]:
    """The `meta` of the seal, after every file was read again and compared with it.

    Args:
      items: subdirectories to read, besides the files at the top; None for all.

    Raises:
      Damaged: the seal or a file is missing, shortened or changed.
    """
    meta, files = _read(directory)
    for name, written in files.items():
        if items is not None and "/" in name and name.partition("/")[0] not in items:
            continue
        try:
            with open(directory / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != written["size"]:
                    raise Damaged(f"{name} has {size} bytes, {written['size']} were written")
                if hashlib.file_digest(file, "sha256").hexdigest() != written["sha256"]:
                    raise Damaged(f"{name} was changed after it was written")
        except OSError as error:
            raise _as_damage(error, name) from error
    return meta


def fsync_directory(directory: Path) -> None:
    """Makes the entries of `directory` (a rename, a new file) survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{SEAL} is not what was written") from error
    raise Damaged(f"{SEAL} was changed after it was written")


def _encode(meta: dict[str, Any], files: dict[str, Any]) -> bytes:
    """The one encoding of this content, its own sha256 in it: no byte can change and still be this."""
    content = {"meta": meta, "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
    text = json.dumps({**content, "sha256": digest}, sort_keys=True, allow_nan=False, indent=1)
    return text.encode() + b"\n"


def _as_damage(error: OSError, name: str) -> Exception:
    if error.errno in _PROOF_OF_DAMAGE:
        return Damaged(f"{name} cannot be read ({error.strerror})")
    return error
