"""Flagfiles: a line --name=value each; empty lines and those that begin with # are skipped.

A value with spaces at its ends, or with what cannot be printed, is written in double quotes, as a JSON string.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from charlstm.config.arguments import in_words

SWITCH = {"true": True, "t": True, "1": True, "yes": True, "false": False, "f": False, "0": False, "no": False}


def read(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The values in a flagfile and in those that it names, by the names of their flags; of several, the last.

    Args:
      kinds: bool, int, float or str for every flag that there is.

    Raises:
      ValueError: a file cannot be read, or a line is not of a known flag and a value that it takes.
    """
    found = {}
    for where, name, value in lines(path):
        switched_off = name.startswith("no") and kinds.get(name[2:]) is bool and value is None
        name, value = (name[2:], "false") if switched_off else (name, value)
        kind = kinds.get(name)
        if kind is None:
            raise ValueError(f"{where}: unknown flag --{name}")
        if value is None and kind is not bool:
            raise ValueError(f"{where}: --{name} has no value: write --{name}=value")
        try:
            found[name] = SWITCH[(value or "true").lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise ValueError(f"{where}: --{name}={value} is not {in_words(kind)}") from None
    return found


def lines(path: Path, within: tuple[Path, ...] = ()) -> Iterator[tuple[str, str, str | None]]:
    """Yields (where it stands, flag, its value or None) for each line; those of flagfiles that it names come first.

    Raises:
      ValueError: a file cannot be read or reads itself, or a line is no flag.
    """
    if path in within:
        raise ValueError(f"flagfile={path} reads itself: take it out of {within[-1]}")
    try:
        text = path.expanduser().read_text("utf-8")
    except OSError as error:
        raise ValueError(f"flagfile={path} cannot be read: {error.strerror}") from None
    except RuntimeError:  # of expanduser
        raise ValueError(f"flagfile={path} is in the home directory of a user who has none here") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"flagfile={path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    own: list[tuple[str, str, str | None]] = []
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        flag, equals, value = line.partition("=")
        name = flag.removeprefix("-").removeprefix("-")
        if not name or name == flag:
            raise ValueError(f"{where}: {line!r} is not a flag: write --name=value")
        if name == "flagfile":
            yield from lines(Path(unquote(value, where)), (*within, path))
        else:
            own.append((where, name, unquote(value, where) if equals else None))
    yield from own


def quote(value: str) -> str:
    """`value` as it stands in a flagfile."""
    plain = value == value.strip() and value.isprintable() and not value.startswith('"')
    return value if plain else json.dumps(value)


def as_argument(line: str) -> str:
    """Returns a line of a flagfile, --name=value, as it is given on a command line."""
    name, equals, value = line.partition("=")
    return f"{name}{equals}{unquote(value, line)}"


def unquote(value: str, where: str) -> str:
    """The value that `quote` wrote.  Raises ValueError if it is not whole."""
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {value} is not a whole json string: {error.msg}") from None
