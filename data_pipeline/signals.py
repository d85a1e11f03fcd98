"""Signals and output of a program: answers Ctrl-C from its first line on, and survives the loss of its terminal.

From `attach` on,

    SIGINT, SIGTERM  end the program at once, with one line and exit status 130 or 143, unless it is `reacting`
    SIGHUP           is ignored: closing the window does not end the program
    stderr           never fails: output that it does not take is dropped

Signals are handled in a thread of their own.  The main thread may be in a compiler for minutes, where Python cannot
handle them, or in a finalizer or a callback of a library, where an exception is swallowed.  A signal that was ignored
when the program was started, as Ctrl-C is in a background job of a script, stays ignored.
"""

import contextlib
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

PATIENCE = 5.0  # seconds to wait for a terminal that takes no output: stopped by Ctrl-S, or a pager
NUMBERS = (signal.SIGINT, signal.SIGTERM)

Reaction = Callable[[int], None]  # called with the number of the signal

_name, _hint = "", ""  # of the program, once it is attached
_settled: int | None = None  # its exit status, once that is known
_ceded = set[int]()  # signals handled by a library
_leaving = threading.Lock()  # one thread prints the last line


def attach(name: str, hint: str = "") -> None:
    """Attaches this process to its terminal as the program `name`; before slow imports.

    Args:
      hint: end of the line that reports an interruption.
    """
    global _name, _hint
    if _name:
        return
    _name, _hint = name, hint
    for descriptor in (0, 1, 2):  # the next file opened would get the number of a closed one, and be written to
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # has the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)
    buffer = io.BufferedWriter(_Stderr(2, "w", closefd=False))
    encoding = sys.stderr.encoding if sys.stderr else "utf-8"
    sys.stderr = io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)
    # Processes of multiprocessing that outlive us clean up by themselves: no warning is needed.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    numbers = {number for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, set(NUMBERS) - numbers)
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # inherited by later threads
    answering = threading.Thread(target=_answer, args=(numbers,), name="signals", daemon=True)
    answering.start()
    for number in numbers:  # a library may unblock them: multiprocessing does
        signal.signal(number, lambda number, frame: signal.pthread_kill(answering.ident or 0, number))


def unblock() -> None:
    """Unblocks signals, in a child process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)


def cede(number: int) -> None:
    """Leaves signal `number` to the handler that a library has installed."""
    _ceded.add(number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})


def settle(status: int) -> None:
    """Makes signals end the program with `status` from here on: its work is done."""
    global _settled
    _settled = status


def say(line: str) -> None:
    """Writes a line on stderr; on a terminal, over the status line or progress bar."""
    print(("\r\033[K" if sys.stderr.isatty() else "") + line, file=sys.stderr, flush=True)


def show(line: str) -> None:
    """Shows a line on the terminal that the next one is written over; nothing if it is empty."""
    if line:
        with contextlib.suppress(OSError):
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            print("\r\033[K" + line[: width - 1], end="", file=sys.stderr, flush=True)


def leave(number: int) -> NoReturn:
    """Ends the program after signal `number`.  Raises KeyboardInterrupt in a process that is not attached."""
    if not _name:
        raise KeyboardInterrupt(number)
    _leaving.acquire()
    say(f"{_name}: {'terminated' if number == signal.SIGTERM else 'interrupted'}{_hint}")
    # Not a normal exit: it would tear down libraries that may be compiling, and crash.
    os._exit(128 + number)


_reaction: Reaction = leave


@contextlib.contextmanager
def reacting(reaction: Reaction) -> Iterator[None]:
    """Handles Ctrl-C and SIGTERM by `reaction` in this block, in a thread beside the main one.

    In a process that is not attached, such as a notebook's, the main thread calls it.
    """
    global _reaction
    if not _name:
        with _handled(reaction):
            yield
        return
    before, _reaction = _reaction, reaction
    try:
        yield
    finally:
        _reaction = before


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Lets Ctrl-C raise KeyboardInterrupt in this block of the main thread, so that a wait for a line ends."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _ceded.add(signal.SIGINT)  # the thread that answers may get it all the same
    try:
        yield
    finally:
        _ceded.discard(signal.SIGINT)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)


def has_lost_its_reader(descriptor: int) -> bool:
    """Returns whether the reader of a pipe is gone."""
    asked = select.poll()
    asked.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))


class _Stderr(io.FileIO):
    """A stderr that never fails: output is dropped if its terminal, reader or disk is gone or full."""

    _stalled = False

    def write(self, data: Any, /) -> int:
        taken: int | None = None
        with contextlib.suppress(OSError):
            asked = select.poll()
            asked.register(self.fileno(), select.POLLOUT)
            self._stalled = not asked.poll(0 if self._stalled else 1000 * PATIENCE)
            if not self._stalled:
                taken = super().write(memoryview(data)[: select.PIPE_BUF])  # more might block
        return len(data) if taken is None else taken


def _answer(numbers: set[signal.Signals]) -> None:
    while True:
        number = signal.sigwait(numbers)
        if _settled is not None:
            os._exit(_settled)
        if number in _ceded:
            signal.pthread_kill(threading.main_thread().ident or 0, number)
        else:
            _reaction(number)


@contextlib.contextmanager
def _handled(reaction: Reaction) -> Iterator[None]:
    """Does the same as `reacting` by Python's own handlers; other threads than the main one cannot have any."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in NUMBERS} if main else {}
    ours = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in ours:
        signal.signal(number, lambda number, frame: reaction(number))
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
