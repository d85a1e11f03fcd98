"""Inspects the beginning and the end of each file: whether it is text, and how it is separated from the next."""

import collections
import concurrent.futures
import dataclasses
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from data_pipeline.atomic_files import named_in_errors
from data_pipeline.build import magic
from data_pipeline.build.decompress import COMPRESSIONS
from data_pipeline.build.hashing import mapped, remembered
from data_pipeline.build.sources import Text, TextFile

KINDS = 5  # kinds of files that are named


class Look(NamedTuple):
    """Result of inspecting a file."""

    start: int  # bytes of a byte-order mark
    separated: int  # leading bytes of the separator with which the file ends
    kind: str  # kind of binary file; "" if it may be text
    remedy: str  # {} stands for the file
    looks_binary: bool


def look_at(files: list[TextFile], separator: bytes, memo: Path, workers: int) -> list[Look]:
    """Inspects files before they are read; caches the results in the directory `memo`."""

    def look_at_all() -> list[Look]:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            return list(mapped(pool, lambda file: _look(file, separator), files))

    found = remembered(memo, files, ["look", magic.VERSION, separator.hex()], look_at_all)
    return [Look(*look) for look in found]


def _look(file: TextFile, separator: bytes) -> Look:
    with named_in_errors(file.path), file.path.open("rb", buffering=0) as opened:
        head = opened.read(magic.HEAD)
        start = len(magic.BYTE_ORDER_MARK) if head.startswith(magic.BYTE_ORDER_MARK) else 0
        end = max(start, file.bytes - len(separator))
        tail = os.pread(opened.fileno(), len(separator), end) if file.bytes > len(head) else head[end:]
    separated = begun(tail, separator)
    kind = magic.kind_of(head)
    name, remedy = kind or ("", "")
    return Look(start, separated, name, remedy, magic.looks_binary(head))


def refuse_binary(files: list[TextFile], looks: list[Look]) -> None:
    """Raises ValueError if files are not text; names the first of them."""
    found = [(file, look) for file, look in zip(files, looks, strict=True) if look.kind]
    if found:
        file, look = found[0]
        more = f" (nor are {len(found) - 1} more of {len(files)} files)" if found[1:] else ""
        raise ValueError(
            f"{file.path} is no text but {look.kind}{more}: {look.remedy.format(shlex.quote(str(file.path)))}, or give "
            "--binary=allow to learn bytes as they are"
        )


def begun(tail: bytes, separator: bytes) -> int:
    """Returns how many leading bytes of the separator `tail` ends with."""
    return next(n for n in range(len(separator), -1, -1) if tail.endswith(separator[:n]))


def joined(text: Text, separator: bytes) -> Text:
    """Returns `text` with the separator between its files.

    The missing part of the separator is added to each file that another one follows; an existing ending stays as it is.
    Empty files are ignored.
    """
    files = list(text.files)
    filled = [number for number, file in enumerate(files) if file.bytes > file.start]
    for number in filled[:-1]:
        if not files[number].ending:
            files[number] = dataclasses.replace(files[number], ending=separator[files[number].separated :])
    if not filled:
        raise ValueError(f"{text.name} is empty: there is no text to prepare")
    return dataclasses.replace(text, files=tuple(files))


def remarks(text: Text, odd: list[str]) -> str:
    """Returns one line: the number of files by kind, bytes, which (`odd`) look binary, what was left out and why."""
    count, size = len(text.files), sum(file.bytes for file in text.files)
    kinds = collections.Counter(_ending(file.name) for file in text.files)
    by_kind = ", ".join(f"{times:,} {kind}" for kind, times in kinds.most_common(KINDS))
    more = f", {len(kinds) - KINDS} more kinds" if len(kinds) > KINDS else ""
    of_kinds = f" ({by_kind}{more})" if len(kinds) > 1 else ""
    words = [f"{count:,} file{'' if count == 1 else 's'}{of_kinds}, {size:,} bytes"]
    if odd:
        words.append(f"{odd[0]}{f' and {len(odd) - 1:,} more' if odd[1:] else ''} look{'' if odd[1:] else 's'} binary")
    if text.repeated:
        name, first = text.repeated[0]
        more = f", and {len(text.repeated) - 1:,} more such name{'s' if text.repeated[2:] else ''}"
        words.append(f"read once: {name}, which is {first} too{more if text.repeated[1:] else ''}")
    if text.left_out:
        more = f", and {len(text.left_out) - 1:,} more" if text.left_out[1:] else ""
        words.append(f"left out: {text.left_out[0]}{more}")
    return "; ".join(words)


def _ending(name: str) -> str:
    """Returns the ending of a file's name, with that of its compression."""
    found = re.search(r"(\.\w+)?\.\w+$", name.rpartition("/")[2].lower())
    ending = found.group() if found else ""
    return (ending if ending.endswith(COMPRESSIONS) else ending[ending.rfind(".") :]) or "without ending"
