"""Reads and writes one text in turns: launch.sample --interactive."""

import contextlib
import dataclasses
import math
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from charlstm.inference.continuation import SYMBOLS, Continuation
from charlstm.inference.sampling import Sampling
from charlstm.inference.text import encode_prompt, unknown_id, unseen_before
from data_pipeline import signals
from data_pipeline.batch import Separator
from data_pipeline.vocabulary import Vocabulary
from launch.support import cli

TURN = 500  # symbols, where --length does not say it
SHOWN = 10  # symbols of /top
HELP = r"""What you type is read, and the model goes on from there; after an empty line it just goes on.
A backslash at the end of a line stands for a line break.
  /t 0.7    temperature                /top      the most probable next symbols: then a number adds one
  /k 40     the K most probable        /seed 3   draw what follows with another seed
  /p 0.9    the nucleus                /n 500    symbols of a turn
  /reset    a new text                 /help     this list
  Ctrl-C    stops text, drops a line   /quit     leave, as Ctrl-D"""


def lines() -> Iterator[str]:
    """Yields what is typed, or the lines of stdin where that is no terminal; Ctrl-C drops a line that is begun.

    Bytes that are not UTF-8 are lone surrogates, which `encode_prompt` takes.
    """
    cli.set_errors(sys.stdin, "surrogateescape")
    if not sys.stdin.isatty():
        yield from (line.removesuffix("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # history and editing
    signals.say("what you type is continued; /help lists commands, Ctrl-D leaves")
    with contextlib.suppress(EOFError):
        while True:
            try:
                with signals.interruptible():
                    line = input("> ")
            except KeyboardInterrupt:
                print()
                continue
            yield line
    print()


class Interactive:
    """One text, the settings of what follows, and the commands."""

    def __init__(
        self, text: Continuation, vocabulary: Vocabulary, separator: Separator, sampling: Sampling, seed: int, turn: int
    ) -> None:
        self._text, self._vocabulary, self._separator = text, vocabulary, separator
        self._sampling, self._seed, self._turn, self._is_stopped = sampling, seed, turn, False
        self._has_begun, self._decoder = False, vocabulary.decoder()
        self._top: list[int] = []  # ids that a number chooses among
        self._reset()

    def run(self, lines: Iterator[str]) -> None:
        """Answers line by line, to the end of the lines or /quit."""
        cli.set_errors(sys.stdout, "replace")  # what the terminal cannot show must not end the text
        with signals.reacting(self._signalled):
            for line in lines:
                self._is_stopped, chosen = False, line.strip()
                if chosen in ("/quit", "/q"):
                    return
                if self._top and chosen.isdecimal() and 1 <= int(chosen) <= len(self._top):
                    self._read(np.array([self._top[int(chosen) - 1]], np.int32))
                    self._show_top()
                    continue
                self._top = []
                try:
                    if line.startswith("/"):
                        self._command(*line.split())
                    else:
                        self._go_on(line)
                except ValueError as error:
                    self._say(str(error))

    def _signalled(self, number: int) -> None:
        if number != signal.SIGINT:
            signals.leave(number)
        self._is_stopped = True

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def _go_on(self, line: str) -> None:
        line = line[:-1] + "\n" if line.endswith("\\") else line
        self._read(encode_prompt(line, self._vocabulary).astype(np.int32))
        left = self._turn
        while left > 0 and not self._is_stopped:
            made = self._text.write(self._sampling, min(left, SYMBOLS)).ids[0]
            print(self._decoder.feed(made), end="", flush=True)
            left -= len(made)
        print(flush=True)

    def _read(self, ids: np.ndarray) -> None:
        if len(ids) or not self._has_begun:
            if not self._has_begun:
                self._decoder = self._vocabulary.decoder()
            unseen = [] if self._has_begun else [unseen_before(ids, self._separator, self._vocabulary)]
            self._text.read(np.concatenate([*unseen, ids]))
            self._decoder.feed(ids)  # shown already; the last may begin a character that the model ends
            self._has_begun = True

    def _show_top(self) -> None:
        self._read(np.zeros(0, np.int32))
        log_probabilities, never = self._text.next_log_probabilities(), unknown_id(self._vocabulary)
        order = np.argsort(-log_probabilities, kind="stable").tolist()
        self._top = [symbol for symbol in order if symbol != never][:SHOWN]
        for place, symbol in enumerate(self._top, 1):
            probability, name = math.exp(log_probabilities[symbol]), repr(self._vocabulary.decode(np.array([symbol])))
            if self._vocabulary.kind == "bytes" and symbol >= 0x80:
                name = f"0x{symbol:02x}"
            self._say(f"  {place:2d}  {name:6} {probability:6.1%}  {'#' * round(40 * probability)}")

    def _reset(self) -> None:
        self._text.reset(self._seed)
        self._has_begun = False

    def _command(self, name: str, *values: str) -> None:
        commands: dict[str, tuple[Callable[..., None], int]] = {
            "/t": (lambda value: self._set(temperature=float(value)), 1),
            "/k": (lambda value: self._set(top_k=int(value)), 1),
            "/p": (lambda value: self._set(top_p=float(value)), 1),
            "/n": (self._set_turn, 1),
            "/seed": (self._set_seed, 1),
            "/reset": (self._reset, 0),
            "/top": (self._show_top, 0),
            "/help": (lambda: self._say(HELP), 0),
        }
        if name not in commands or len(values) != commands[name][1]:
            raise ValueError(f"{' '.join((name, *values))} is no command: /help lists them")
        commands[name][0](*values)

    def _set(self, **changed: Any) -> None:
        self._sampling = dataclasses.replace(self._sampling, **changed)

    def _set_turn(self, value: str) -> None:
        if int(value) < 1:
            raise ValueError("a turn has 1 symbol or more")
        self._turn = int(value)

    def _set_seed(self, value: str) -> None:
        if not 0 <= int(value) < 1 << 32:
            raise ValueError(f"seed={value} must be from 0 to {(1 << 32) - 1}")
        self._seed = int(value)
        self._text.reseed(self._seed)
