"""Checks that what is given to the library is of its kind: a refusal names the argument, its value and the remedy."""

import difflib
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from data_pipeline.settings import LARGEST_INT


def scalar(value: Any) -> Any:
    """A number or string of NumPy or JAX as Python's own, and anything else as it is."""
    return value.item() if hasattr(value, "item") and not np.ndim(value) else value


def in_words(kind: type) -> str:
    """The name of a type, with its article."""
    return f"{'an' if kind is int else 'a'} {kind.__name__}"


def of_kind(name: str, value: Any, kind: type) -> Any:
    """The value of a setting of type `kind`: a scalar of NumPy or JAX as Python's, and a path as a string.

    Raises:
      ValueError: it is of another type.
    """
    value = scalar(value)
    value = os.fspath(value) if kind is str and isinstance(value, os.PathLike) else value
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{name}={value!r} is not {in_words(kind)}")
    return value


def whole(name: str, value: Any, least: int, most: int = LARGEST_INT) -> int:
    """The whole number that is given, of Python, NumPy or JAX.

    Raises:
      ValueError: it is none, or out of its range.
    """
    number = scalar(value)
    if type(number) is not int or not least <= number <= most:
        raise ValueError(f"{name}={number!r} must be a whole number from {least} to {most}")
    return number


def path(name: str, value: Any, what: str) -> str:
    """The path that is given, as a string.

    Args:
      what: what it should lead to, for the remedy.

    Raises:
      TypeError: it is of another type.
      ValueError: it is empty, and would be the current directory.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} is of type {type(value).__name__}: give {what}, as a str or pathlib.Path")
    if not os.fspath(value):
        raise ValueError(f"{name} is empty: give {what}")
    return os.fspath(value)


def unknown_setting(name: str, known: Iterable[str]) -> str:
    """The sentence that refuses a setting that there is not, with the one that may be meant."""
    near = difflib.get_close_matches(name, known, 1)
    return f"unknown setting {name}{f'; did you mean {near[0]}?' if near else ''}"
