"""Downloads texts: resumes interrupted downloads, and refuses texts with an unknown digest."""

import dataclasses
import http.client
import os
import urllib.request
import zipfile
import zlib
from pathlib import Path

from data_pipeline.atomic_files import atomic_write, locked, sync
from data_pipeline.build.hashing import hash_file
from data_pipeline.build.sources import CHUNK
from data_pipeline.progress import Progress

ATTEMPTS = 3  # consecutive ones without a new byte
TIMEOUT = 30  # seconds without a byte


@dataclasses.dataclass(frozen=True)
class Download:
    """A text on the network, with its known sizes and digest."""

    name: str  # of the text's file; in a zip archive, of its member
    url: str
    url_bytes: int  # size of the file at `url`
    bytes: int  # size of the text
    algorithm: str  # of `digest`, by hashlib's name
    digest: str  # of the text, in hex

    @property
    def file(self) -> str:
        """Returns the name of the file at `url`: that of the text, or with .zip."""
        return self.name + (".zip" if self.url.endswith(".zip") else "")


def fetch(item: Download, folder: Path, progress: Progress | None = None) -> Path:
    """Returns the file `folder/item.name`; if absent, downloads it, or unpacks an archive put there by hand.

    Raises:
      ValueError: there is no network, or the download is not the known text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text, fetched = folder / item.name, folder / item.file
    report = progress or (lambda doing, done, total: None)
    with locked(folder / f"{item.name}.lock", lambda: report(f"waiting for another download of {item.name}", 0, 0)):
        if not text.exists():
            if not fetched.exists():
                _download(item, fetched, report)
            if fetched != text:
                _unpack(item, fetched, text)
        _check(text, item)
    return text


def _check(text: Path, item: Download) -> None:
    there = [name for name in dict.fromkeys((item.name, item.file)) if (text.parent / name).exists()]
    remedy = f"delete {' and '.join(there)} and start again"
    size = text.stat().st_size
    if size != item.bytes:
        raise ValueError(f"{text} has {size} bytes instead of {item.bytes}, it is not {item.name}: {remedy}")
    digest = hash_file(text, item.algorithm)
    if digest != item.digest:
        raise ValueError(
            f"{text} is not {item.name}, its {item.algorithm} is {digest} instead of {item.digest}: {remedy}"
        )


def _download(item: Download, target: Path, report: Progress) -> None:
    """Downloads the url to `target`, and resumes from `target.part` if there is one."""
    part = target.with_name(target.name + ".part")
    failures, reason = 0, "the connection was cut"
    while (have := part.stat().st_size if part.exists() else 0) != item.url_bytes:
        if failures == ATTEMPTS:
            raise ValueError(
                f"{item.name} could not be downloaded from {item.url} ({reason}): put the file by hand at {target} "
                f"({item.url_bytes} bytes)"
            )
        try:
            _continue(item, part, have if have < item.url_bytes else 0, report)
        except (OSError, http.client.HTTPException) as error:  # which include those of urllib
            reason = str(error) or type(error).__name__
        failures = 0 if part.exists() and part.stat().st_size > have else failures + 1
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)
    sync(target.parent)


def _continue(item: Download, part: Path, have: int, report: Progress) -> None:
    """Appends to `part`, which has `have` bytes, the bytes of one connection."""
    request = urllib.request.Request(item.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if resumed else 0
        announced = response.headers.get("Content-Length")
        if announced is not None and have + int(announced) != item.url_bytes:
            raise ValueError(
                f"{item.url} has {have + int(announced)} bytes instead of the {item.url_bytes} of {item.file}: it is "
                "not the known text"
            )
        with part.open("ab" if resumed else "wb") as out:
            while chunk := response.read1(CHUNK):
                have += len(chunk)
                if have > item.url_bytes:
                    raise ValueError(f"{item.url} has more than the {item.url_bytes} bytes of {item.file}")
                out.write(chunk)
                report(f"downloading {item.name}", have, item.url_bytes)


def _unpack(item: Download, archive: Path, text: Path) -> None:
    if archive.stat().st_size != item.url_bytes:
        raise ValueError(
            f"{archive} has {archive.stat().st_size} bytes instead of {item.url_bytes}: delete it and start again"
        )
    try:
        with zipfile.ZipFile(archive) as packed, packed.open(item.name) as member, atomic_write(text) as out:
            left = item.bytes
            while chunk := member.read(min(CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    raise ValueError(f"{archive} holds more than the {item.bytes} bytes of {item.name}: it is not it")
                out.write(chunk)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{archive} is not the archive of {item.name} ({error}): delete it and start again") from None
