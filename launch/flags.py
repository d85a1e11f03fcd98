"""Command-line flags made from the fields of settings dataclasses: one source for name, default, type and help.

A flagfile overrides the defaults and the command line overrides the flagfile, wherever on the line it stands.
"""

import dataclasses
import difflib
import textwrap
from collections.abc import Sequence
from typing import Any

from absl import flags


class Help(Exception):
    """The user asked for help; the message is the help."""


def parse(argv: Sequence[str], description: str, *groups: Any) -> tuple[list[Any], list[str]]:
    """Parses `argv` into settings.

    Args:
      argv: the program's name, then its arguments.
      description: the first lines of the help.
      *groups: dataclass instances whose fields are settings, and whose values are the defaults.  A group whose fields
        are themselves such dataclasses is a tree of groups.

    Returns:
      The groups with the values given, and the flags given as lines of a flagfile, flagfiles resolved.

    Raises:
      Help: help was asked for.
      ValueError: an unknown flag, or a value that its flag does not take; the message names the nearest known one.
    """
    leaves = [leaf for group in groups for leaf in _leaves(group)]
    values = flags.FlagValues()
    for leaf in leaves:
        for field in dataclasses.fields(leaf):
            _define(values, leaf, field)
    arguments = list(argv[1:])
    if {"--help", "-help", "-h", "--helpshort", "--helpfull", "-?"} & set(arguments):
        raise Help(_help(description, leaves))
    try:
        rest = values([argv[0], *_flagfiles_first(arguments)])[1:]
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown_flag(error.flagname, list(values))) from None
    except flags.Error as error:
        raise ValueError(" ".join(str(error).split())) from None
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}: every setting is a flag, --name=value")
    given = [f"--{name}={_text(values[name].value)}" for name in values if values[name].present and name != "flagfile"]
    return [_filled(group, values) for group in groups], given


def _leaves(group: Any) -> list[Any]:
    fields = [getattr(group, field.name) for field in dataclasses.fields(group)]
    return fields if fields and all(map(dataclasses.is_dataclass, fields)) else [group]


def _define(values: flags.FlagValues, leaf: Any, field: dataclasses.Field) -> None:
    default, choices = getattr(leaf, field.name), field.metadata["choices"]
    text = field.metadata["help"]
    if isinstance(default, bool):
        flags.DEFINE_bool(field.name, default, text, flag_values=values)
    elif isinstance(default, int):
        flags.DEFINE_integer(field.name, default, text, flag_values=values)
    elif isinstance(default, float):
        flags.DEFINE_float(field.name, default, text, flag_values=values)
    else:
        parser = _OneOf(choices) if choices else flags.ArgumentParser()
        flags.DEFINE(parser, field.name, default, text, flag_values=values)


class _OneOf(flags.ArgumentParser):
    """A string that is one of a few."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices = choices

    def parse(self, argument: str) -> str:
        if argument not in self.choices:
            raise ValueError(f"use one of {', '.join(self.choices)}{_nearest(argument, self.choices)}")
        return argument

    def flag_type(self) -> str:
        return "string"


def _flagfiles_first(arguments: list[str]) -> list[str]:
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--flagfile", "-flagfile"):
            files += [argument, *([value] if (value := next(rest, None)) is not None else [])]
        elif argument.startswith(("--flagfile=", "-flagfile=")):
            files.append(argument)
        else:
            others.append(argument)
    return files + others


def _filled(group: Any, values: flags.FlagValues) -> Any:
    if _leaves(group) == [group]:
        return dataclasses.replace(group, **{f.name: values[f.name].value for f in dataclasses.fields(group)})
    filled = {f.name: _filled(getattr(group, f.name), values) for f in dataclasses.fields(group)}
    return dataclasses.replace(group, **filled)


def _unknown_flag(name: str, known: list[str]) -> str:
    return f"unknown flag --{name}{_nearest(name, known)}"


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.removeprefix("no"), known, 1) or difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _help(description: str, leaves: list[Any]) -> str:
    lines = [
        description.rstrip(),
        "",
        "Every flag is --name=value; --flagfile=PATH reads flags from a file, a line each.",
    ]
    for leaf in leaves:
        lines += ["", (leaf.__doc__ or "").strip().splitlines()[0], ""]
        for field in dataclasses.fields(leaf):
            default = getattr(leaf, field.name)
            name = f"  --{field.name}={_text(default)}" if default != "" else f"  --{field.name}="
            text = textwrap.wrap(field.metadata["help"], 72)
            if len(name) < 34:
                lines.append(f"{name:<34}{text[0]}")
                text = text[1:]
            else:
                lines.append(name)
            lines += [" " * 34 + line for line in text]
    return "\n".join(lines)
