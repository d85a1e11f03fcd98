"""Lists and clears the cache of texts: what lies below `cache_dir`, which never shrinks by itself but for `blocks/`."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipeline.atomic_files import locked

CLEARED = ("memo", "blocks")  # and what has locks; `downloads` may have been put there by hand
LOCKED = ("corpora", "parts")


class Entry(NamedTuple):
    """A part of the cache."""

    path: Path
    bytes: int


class _Busy(Exception):
    """Raised if another process holds a lock."""


def entries(cache: Path) -> list[Entry]:
    """Returns the parts of the cache: each prepared or begun corpus, and what there is beside these."""
    corpora = sorted(path for path in _listed(cache / "corpora") if path.is_dir())
    others = [path for path in sorted(_listed(cache)) if path.name != "corpora"]
    return [Entry(path, _size(path)) for path in (*corpora, *others)]


def clear(cache: Path) -> tuple[int, list[Path]]:
    """Deletes what can be made or fetched again; returns the bytes freed, and what is being prepared, which stays."""
    freed, busy = 0, []
    for path in (path for name in LOCKED for path in _listed(cache / name)):
        if not path.is_dir():
            continue
        name = path.name.removeprefix(".").removesuffix(".partial") if path.name.startswith(".") else path.name
        size = _size(path)
        try:
            with locked(path.with_name(f".{name}.lock"), _refuse):
                aside = path.with_name(f".{name}.partial")  # a preparation begins anew if it finds the rest of this
                if path != aside:
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(path, aside)
                shutil.rmtree(aside)
        except FileNotFoundError:  # the other part of a corpus went with it
            continue
        except _Busy:
            busy.append(path)
            continue
        freed += size
    for name in CLEARED:
        freed += _size(cache / name)
        shutil.rmtree(cache / name, ignore_errors=True)
    return freed, busy


def _refuse() -> None:
    raise _Busy


def _listed(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _size(path: Path) -> int:
    """Returns the bytes of the files below `path`; of what vanishes meanwhile none."""
    return sum(_sizes(path)) if path.is_dir() else path.stat().st_size if path.exists() else 0


def _sizes(path: Path) -> Iterator[int]:
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                yield os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
