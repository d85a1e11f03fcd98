"""Inspects the beginning and the end of each file: whether it is text, and how it is separated from the next."""

import concurrent.futures
import dataclasses
import os
import shlex
from pathlib import Path
from typing import NamedTuple

from data_pipeline.atomic_files import named_in_errors
from data_pipeline.build import magic
from data_pipeline.build.sources import Text, TextFile, remembered


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
            return list(pool.map(lambda file: _look(file, separator), files))

    found = remembered(memo, files, ["look", magic.VERSION, separator.hex()], look_at_all)
    return [Look(*look) for look in found]


def _look(file: TextFile, separator: bytes) -> Look:
    with named_in_errors(file.path), file.path.open("rb", buffering=0) as opened:
        head = opened.read(magic.HEAD)
        start = len(magic.BYTE_ORDER_MARK) if head.startswith(magic.BYTE_ORDER_MARK) else 0
        end = max(start, file.bytes - len(separator))
        tail = os.pread(opened.fileno(), len(separator), end) if file.bytes > len(head) else head[end:]
    separated = next(n for n in range(len(tail), -1, -1) if tail.endswith(separator[:n]))
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


def joined(text: Text, looks: list[Look], separator: bytes) -> Text:
    """Returns `text` without byte-order marks, and with the separator between its files.

    The missing part of the separator is added to each file that another one follows; an existing ending stays as it is.
    Empty files are ignored.
    """
    files = [dataclasses.replace(file, start=look.start) for file, look in zip(text.files, looks, strict=True)]
    filled = [number for number, file in enumerate(files) if file.bytes > file.start]
    for number in filled[:-1]:
        if not files[number].ending:
            files[number] = dataclasses.replace(files[number], ending=separator[looks[number].separated :])
    if not filled:
        raise ValueError(f"{text.name} is empty: there is no text to prepare")
    return dataclasses.replace(text, files=tuple(files))


def remarks(text: Text, looks: list[Look]) -> str:
    """Returns one line: the number of files and bytes, which look binary, and which were found twice."""
    count = len(text.files)
    words = [f"{count:,} file{'' if count == 1 else 's'}, {text.bytes:,} bytes"]
    odd = [file.name for file, look in zip(text.files, looks, strict=True) if look.kind or look.looks_binary]
    if odd:
        words.append(f"{odd[0]}{f' and {len(odd) - 1:,} more' if odd[1:] else ''} look{'' if odd[1:] else 's'} binary")
    if text.repeated:
        name, first = text.repeated[0]
        more = f", and {len(text.repeated) - 1:,} more such name{'s' if text.repeated[2:] else ''}"
        words.append(f"read once: {name}, which is {first} too{more if text.repeated[1:] else ''}")
    return "; ".join(words)
