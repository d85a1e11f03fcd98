"""Makes command-line flags from the fields of settings dataclasses: one source for name, default, type and help.

A flagfile overrides the defaults, and the command line overrides the flagfile, wherever on the line it stands.  Each
line of a flagfile is a flag, --name=value; empty lines and lines that begin with # are skipped; a value with leading or
trailing spaces, or with unprintable characters, is written in double quotes, as a JSON string.
"""

import dataclasses
import difflib
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from absl import flags

from charlstm.config.flagfile import quote, unquote
from data_pipeline.atomic_files import expand_user

# Old name -> new name, of flags renamed since earlier versions.
FORMER = {"recurrence": "lstm_backend", "piece": "eval_chunk", "between_dropout": "layer_dropout"}
# What the flags of other programs are called here; of several, the first that the program has.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "lr": ("learning_rate",), "start": ("prompt", "sample_prompt"), "seed_text": ("prompt", "sample_prompt"),
    "config": ("flagfile",), "config_file": ("flagfile",), "preset": ("flagfile",),
    "corpus": ("input",), "input": ("corpus",),
    "data": ("corpus", "input"), "data_dir": ("corpus", "input"), "dataset": ("corpus", "input"),
    "out_dir": ("run_dir", "output"), "output_dir": ("run_dir", "output"), "out": ("run_dir", "output"),
    "model": ("run_dir",), "model_dir": ("run_dir",), "resume": ("run_dir",), "init_from": ("initial_checkpoint",),
    "steps": ("num_steps",), "iters": ("num_steps",), "max_iters": ("num_steps",), "max_steps": ("num_steps",),
    "rnn_size": ("hidden_size",), "units": ("hidden_size",), "layers": ("num_layers",), "n_layer": ("num_layers",),
    "dropout": ("layer_dropout",), "block_size": ("window",), "seq_length": ("window",), "seq_len": ("window",),
    "max_new_tokens": ("length",), "num_tokens": ("length",), "temp": ("temperature",), "patience": ("stop_after",),
}  # fmt: skip
HELP = {"--help", "-help", "-h", "--helpshort", "--helpfull", "-?"}


class Help(Exception):
    """Raised if the user asks for help; the message is the help."""


def parse(
    argv: Sequence[str], description: str, *groups: Any, renamed: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[Any], list[str]]:
    """Parses `argv` into settings.

    Args:
      argv: the program's name, then its arguments.
      description: the first lines of the help.
      *groups: dataclass instances whose fields are settings and whose values are the defaults.  A group whose fields
        are themselves such dataclasses is a tree of groups.
      renamed: field -> name of its flag, if that is another.

    Returns:
      The groups with the given values, and the given flags as lines of a flagfile, with flagfiles expanded.

    Raises:
      Help: the user asks for help.
      ValueError: a flag is unknown, or does not take its value; the message names the nearest known one.
    """
    values = _values(argv, description, groups, renamed)
    given = [f"--{name}={quote(_text(values[name].value))}" for name in values if values[name].present]
    return [_filled(group, values, renamed) for group in groups], given


def parse_around(argv: Sequence[str], description: str, *groups: Any) -> tuple[list[Any], list[str]]:
    """Returns the groups as `parse` does, and the arguments that are no flags, before, between and after these."""
    values, rest = _values_and_rest(argv, description, groups, {})
    return [_filled(group, values, {}) for group in groups], rest


def given_in(argv: Sequence[str], description: str, *groups: Any) -> dict[str, Any]:
    """Returns the values of the flags given in `argv`, which are not held against each other yet; else as `parse`."""
    values = _values(argv, description, groups, {})
    return {name: values[name].value for name in values if values[name].present}


def _values(
    argv: Sequence[str], description: str, groups: Sequence[Any], renamed: Mapping[str, str]
) -> flags.FlagValues:
    values, rest = _values_and_rest(argv, description, groups, renamed)
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}: every setting is a flag, --name=value")
    return values


def _values_and_rest(
    argv: Sequence[str], description: str, groups: Sequence[Any], renamed: Mapping[str, str]
) -> tuple[flags.FlagValues, list[str]]:
    leaves = leaves_of(groups)
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # flags may stand after other arguments
    for leaf in leaves:
        for field in dataclasses.fields(leaf):
            _define(values, leaf, field, renamed)
    arguments = list(argv[1:])
    if HELP & set(arguments):
        raise Help(_help(description, leaves, renamed))
    try:
        arguments = _flagfiles_first(arguments, values)
        if any(re.match("--?undefok(=|$)", argument) for argument in arguments):
            raise flags.UnrecognizedFlagError("undefok")  # absl's own: unknown flags would be dropped in silence
        rest = values([argv[0], *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown_flag(" ".join(error.flagname.split()), list(values))) from None
    except (flags.Error, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    return values, rest


def leaves_of(groups: Sequence[Any]) -> list[Any]:
    """Returns the dataclasses of `groups` whose fields are settings."""
    return [leaf for group in groups for leaf in _leaves(group)]


def _leaves(group: Any) -> list[Any]:
    fields = [getattr(group, field.name) for field in dataclasses.fields(group)]
    return fields if fields and all(map(dataclasses.is_dataclass, fields)) else [group]


def _define(values: flags.FlagValues, leaf: Any, field: dataclasses.Field, renamed: Mapping[str, str]) -> None:
    default, choices = getattr(leaf, field.name), field.metadata["choices"]
    name, text = renamed.get(field.name, field.name), field.metadata["help"]
    if isinstance(default, bool):
        flags.DEFINE_bool(name, default, text, flag_values=values)
        values[name].parser = _Switch()
    elif isinstance(default, int | float):
        flags.DEFINE(_Number(type(default)), name, default, text, flag_values=values)
    else:
        parser = _OneOf(choices) if choices else flags.ArgumentParser()
        flags.DEFINE(parser, name, default, text, flag_values=values)


class _OneOf(flags.ArgumentParser):
    """Parses a string that is one of `choices`."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices = choices

    def parse(self, argument: str) -> str:
        if argument not in self.choices:
            raise ValueError(f"use one of {', '.join(self.choices)}{_nearest(argument, self.choices)}")
        return argument

    def flag_type(self) -> str:
        return "string"


class _Number(flags.ArgumentParser):
    """Parses an int or a float."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def parse(self, argument: Any) -> Any:
        try:
            return self.kind(argument)
        except ValueError:
            raise ValueError(f"not a {'whole number' if self.kind is int else 'number'}") from None

    def flag_type(self) -> str:
        return self.kind.__name__


class _Switch(flags.BooleanParser):
    """Parses a boolean, in any of absl's spellings."""

    def parse(self, argument: Any) -> bool:
        try:
            return super().parse(argument)
        except (ValueError, TypeError):
            raise ValueError("use true or false") from None


def _flagfiles_first(arguments: list[str], values: flags.FlagValues, within: tuple[str, ...] = ()) -> list[str]:
    """Replaces flagfiles by their flags, and puts these before all others: the last one wins."""
    from_files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in ("--flagfile", "-flagfile"):
            from_files += _flags_of(value if equals else next(rest, ""), values, within)
        else:
            others.append(argument)
    return from_files + others


def _flags_of(path: str, values: flags.FlagValues, within: tuple[str, ...]) -> list[str]:
    """Reads the flags in the flagfile `path`; `within`: the flagfiles that led to it, outermost first."""
    if path in within:
        raise ValueError(f"flagfile={path} reads itself: take it out of {within[-1]}")
    try:
        lines = expand_user(path).read_text("utf-8").split("\n")
    except OSError as error:
        there = Path(__file__).parents[2] / path
        if not there.is_file():
            presets = {preset.stem: preset for preset in (Path(__file__).parents[2] / "configs").glob("*.flags")}
            near = difflib.get_close_matches(Path(path).stem, presets, 1)
            there = presets[near[0]] if near else there
        remedy = f"; --flagfile={there} is there" if there.is_file() else ""
        raise ValueError(f"flagfile={path} cannot be read: {error.strerror}{remedy}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"flagfile={path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    found = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        flag = name.removeprefix("-").removeprefix("-")
        # Without a value, a flag that is not a boolean would take the next line, or the next argument, as its value.
        if not flag or flag == name or not (equals or flag not in values or values[flag].boolean):
            raise ValueError(f"{path}, line {number}: {line!r} is not a flag: write --name=value")
        found.append(name + equals + unquote(value, f"{path}, line {number}"))
    return _flagfiles_first(found, values, (*within, path))


def _filled(group: Any, values: flags.FlagValues, renamed: Mapping[str, str]) -> Any:
    if _leaves(group) == [group]:
        names = [field.name for field in dataclasses.fields(group)]
        return dataclasses.replace(group, **{name: values[renamed.get(name, name)].value for name in names})
    filled = {f.name: _filled(getattr(group, f.name), values, renamed) for f in dataclasses.fields(group)}
    return dataclasses.replace(group, **filled)


def _unknown_flag(name: str, known: list[str]) -> str:
    if name in FORMER:
        return f"unknown flag --{name}: it is called --{FORMER[name]}"
    if name in ("epochs", "num_epochs") and "num_steps" in known:
        return f"unknown flag --{name}: a run's length is --num_steps; --dry_run says how many steps an epoch has"
    if here := next((here for here in ELSEWHERE.get(name, ()) if here in (*known, "flagfile")), ""):
        return f"unknown flag --{name}: it is called --{here} here"
    return f"unknown flag --{name}{_nearest(name, known)}"


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.removeprefix("no"), known, 1) or difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _choices(field: dataclasses.Field) -> str:
    """Returns a sentence that lists the choices, or "" if the help text names them all."""
    choices = field.metadata["choices"]
    return "" if all(choice in field.metadata["help"] for choice in choices) else f"  One of {', '.join(choices)}."


def described(
    leaves: Sequence[Any], renamed: Mapping[str, str] = MappingProxyType({})
) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Returns the title of each group of settings, with (flag, default, help) of each of its settings."""
    groups = []
    for leaf in leaves:
        rows = []
        for field in dataclasses.fields(leaf):
            help_text = field.metadata["help"] + _choices(field)
            for old, new in renamed.items():
                help_text = help_text.replace(f"--{old}", f"--{new}")
            rows.append((renamed.get(field.name, field.name), _text(getattr(leaf, field.name)), help_text))
        groups.append(((leaf.__doc__ or "").strip().splitlines()[0], rows))
    return groups


def _help(description: str, leaves: list[Any], renamed: Mapping[str, str]) -> str:
    lines = [
        description.rstrip(),
        "",
        "Every flag is --name=value; --flagfile=PATH reads flags from a file, a line each.",
    ]
    for title, rows in described(leaves, renamed):
        lines += ["", title, ""]
        for flag, default, help_text in rows:
            name = f"  --{flag}={default}"
            text = textwrap.wrap(help_text, 72)
            if len(name) < 34:
                lines.append(f"{name:<34}{text[0]}")
                text = text[1:]
            else:
                lines.append(name)
            lines += [" " * 34 + line for line in text]
    return "\n".join(lines)
